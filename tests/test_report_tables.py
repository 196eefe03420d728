"""The table as Markdown, JSON and terminal output, from hand-written scores."""

import io
import json

import pytest
from rich.console import Console

from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.comparison import NOT_SIGNIFICANT, Difference
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report.tables import (
    comparison_table,
    console_table,
    markdown_tables,
    results_markdown,
    rich_table,
    write_results,
)

COLUMNS = {
    "paper": ("B-2", "B-4", "R-L", "BS", "BR", "ACC"),
    "zh": ("B-2", "B-4", "R-L char", "R-L word", "BS", "BS rescaled", "ACC"),
}


def scores(first, unparsed=0, **missing):
    """A result of `metrics.score` whose columns count up from `first`; `missing` maps columns to reasons."""

    def cell(column, value):
        bounds = (None, None) if column in missing else (value - 0.5, value + 1)
        direction = "lower" if column == "NLL" else "none"
        shown = None if column in missing else value
        return MetricResult(shown, f"{column} unit", "made up", missing.get(column), *bounds, direction)

    profiles = {
        profile: {column: cell(column, first + index) for index, column in enumerate(columns)}
        for profile, columns in COLUMNS.items()
    }
    both = {"system": cell("length", first), "reference": cell("length", 10.0)}
    return {
        "profiles": profiles,
        "strategy": {"macro-F1": cell("macro-F1", first + 30)},
        "likelihood": {"NLL": cell("NLL", first + 40)},
        "by_strategy": {
            strategy.label: {"turns": 10, "precision": cell("P", first), "recall": cell("R", first), "F1": cell("F", 7)}
            for strategy in STRATEGIES
        },
        "confusion": None if unparsed is None else [[5, *range(12)] for _ in STRATEGIES],
        "by_position": [
            {"position": 1, "turns": 60, "ACC": cell("ACC", first), "R-L char": cell("R-L char", first + 1)}
        ],
        "process": {"greeting first": both},
        "reply": {"length": both},
        "counts": {
            "turns": 120,
            "failed": 0,
            "unparsed": unparsed,
            "empty_replies": 2,
            "cut_off": 3,
            "incomplete": False,
        },
    }


RESULTS = {
    "untrained": {
        "reference": scores(1.0, unparsed=7, BS="no model", BR="no model"),
        "generated": scores(10.5, unparsed=9, BS="no model", BR="no model"),
    },
    "a|b [bold]": {"reference": scores(88.126, unparsed=None, ACC="no strategies")},
}


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]


def test_markdown_has_the_paper_columns_reference_first():
    header, untrained, partial = rows(results_markdown(RESULTS, {}))[:3]
    names = ["B-2", "B-4", "R-L", "BS", "BR", "ACC"]
    assert header == ["system", *(f"ref {name}" for name in names), *(f"gen {name}" for name in names)]
    reference = ["1.00 [0.50, 2.00]", "2.00 [1.50, 3.00]", "3.00 [2.50, 4.00]", "n/a[^1]", "n/a[^1]"]
    reference += ["6.00 [5.50, 7.00]"]
    generated = ["10.50 [10.00, 11.50]", "11.50 [11.00, 12.50]", "12.50 [12.00, 13.50]", "n/a[^1]", "n/a[^1]"]
    generated += ["15.50 [15.00, 16.50]"]
    assert untrained == ["untrained", *reference, *generated]
    assert partial[:2] == ["a\\|b [bold]", "88.13 [87.63, 89.13]"]
    assert partial[6] == "n/a[^2]"
    assert partial[7:] == ["n/a[^3]"] * 6


def test_markdown_has_a_table_per_profile():
    zh = rows(results_markdown(RESULTS, {}))[3:]
    assert zh[0][1:7] == ["ref B-2", "ref B-4", "ref R-L char", "ref R-L word", "ref BS", "ref BS rescaled"]
    assert [cell.split()[0] for cell in zh[1][1:7]] == ["1.00", "2.00", "3.00", "4.00", "n/a[^1]", "6.00"]


def test_each_reason_is_a_footnote_once():
    footnotes = [line for line in results_markdown(RESULTS, {}).splitlines() if line.startswith("[^")]
    assert footnotes == ["[^1]: no model", "[^2]: no strategies", "[^3]: not evaluated in this context"]


def test_markdown_names_units_counts_and_reconstructions():
    text = results_markdown(RESULTS, {})
    assert "**B-2** B-2 unit (made up); **B-4** B-4 unit (made up)" in text
    assert "**R-L char** R-L char unit (made up)" in text
    assert "B-2, B-4, R-L, BS and BR are reconstructions" in text
    assert "untrained, reference context: 120 (7 unparsed, 2 empty, 3 cut off)" in text
    assert "untrained, generated context: 120 (9 unparsed, 2 empty, 3 cut off)" in text
    assert "a|b [bold], reference context: 120 (strategies not predicted, 2 empty, 3 cut off)" in text


def test_no_footnotes_where_everything_is_known():
    full = {"trained": {"reference": scores(1.0), "generated": scores(2.0)}}
    assert "n/a" not in results_markdown(full, {}) and "[^" not in results_markdown(full, {})


def test_results_are_written(tmp_path):
    write_results(tmp_path / "run", RESULTS, {}, {"commit": "abc"})
    written = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert written["provenance"] == {"commit": "abc"}
    assert list(written["results"]) == list(RESULTS)
    cell = written["results"]["untrained"]["generated"]["profiles"]["paper"]["B-4"]
    assert cell == {
        "value": 11.5, "unit": "B-4 unit", "signature": "made up", "reason": None, "low": 11, "high": 12.5,
        "direction": "none",
    }  # fmt: skip
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8") == results_markdown(RESULTS, {})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json", "table.md"]


def test_a_number_that_json_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, {"trained": {"reference": scores(float("inf"))}}, {}, {})
    assert not any(tmp_path.iterdir())


def rendered(results, width):
    console = Console(width=width, file=io.StringIO())
    console.print(console_table(results))
    return console.file.getvalue()


def test_console_table_shows_every_number_in_80_columns():
    text = rendered(RESULTS, 80)
    row = next(line for line in text.splitlines() if "untrained" in line)
    reference, generated = (
        ["1.00", "2.00", "3.00", "n/a", "n/a", "6.00"],
        ["10.50", "11.50", "12.50", "15.50"],  # nobody has the other two here
    )
    assert row.split() == ["untrained", *reference, *generated]
    assert "[bold]" in text  # a name is no markup
    assert text.count("±0.8") == 8 + 5  # half of each interval, under its number
    assert "n/a: no model" in text and "n/a: not evaluated in this context" in text
    assert "reconstructions" in text


def test_console_table_keeps_the_names_of_models_whole_in_80_columns():
    unknown = dict.fromkeys(("BS", "BR"), "no model")
    both = {context: scores(24.0, **unknown) for context in ("reference", "generated")}
    for contexts in both.values():
        contexts["profiles"]["paper"]["R-L"] = MetricResult(0.31, "digits", "made up", None, 0.0, 0.6)
    assert "untrained base" in rendered({"untrained base": both}, 80)


def test_console_table_wraps_names_before_it_cuts_numbers():
    row = rendered({"most frequent strategy": {"reference": scores(50.0), "generated": scores(60.0)}}, 76)
    for number in (*range(50, 56), *range(60, 66)):
        assert f"{number}.00" in row


def test_the_sides_of_a_dialogue_stand_beside_the_reference():
    text = results_markdown(RESULTS, {})
    assert "| untrained | generated | 10.50 [10.00, 11.50] |" in text
    assert text.count("| reference dialogues |  | 10.00 [9.50, 11.00] |") == 2  # in process and in replies
    assert text.count("reference dialogues |") == 2 and "per set of turns" not in text
    # Where turns failed, the reference has other figures.
    fewer = scores(10.5)
    for table in ("process", "reply"):
        fewer[table] = {
            name: sides | {"reference": MetricResult(8.0, "u", "s")} for name, sides in fewer[table].items()
        }
    text = results_markdown(RESULTS | {"fails": {"generated": fewer}}, {})
    rows = (
        "| reference dialogues |  | 10.00 [9.50, 11.00] |\n| reference dialogues | turns of fails, generated | 8.00 |"
    )
    assert text.count(rows) == 2 and "per set of turns" in text


def test_columns_in_which_lower_is_better_are_marked():
    text = results_markdown(RESULTS, {})
    assert "| system | context | NLL ↓ |" in text and "| system | context | macro-F1 |" in text
    assert "| system | context | greeting first |" in text
    assert text.count("↓: lower is better.") == 1


def test_drift_is_shown_of_the_last_system_turn_by_turn():
    full = {"trained": {"reference": scores(40.0), "generated": scores(30.0)}}
    lost = {"position": 1, "turns": 55} | {
        name: MetricResult(10.0, "u", "s", None, 8.0, 12.0) for name in ("ACC", "R-L char")
    }
    for context, value in (("reference", 42.0), ("generated", 32.0)):  # of the turns that both contexts have
        lost[context] = dict.fromkeys(("ACC", "R-L char"), MetricResult(value, "u", "s", None, value - 1, value + 1))
    text = results_markdown(full, {"trained": [lost]})
    pair = " 42.00 [41.00, 43.00] | 32.00 [31.00, 33.00] |"
    assert f"| 1 | 55 |{pair}{pair} 10.00 [8.00, 12.00] | 10.00 [8.00, 12.00] |" in text
    header = (
        "| supporter turn | turns | ref ACC | gen ACC | ref R-L char | gen R-L char |\n|---|---:|---:|---:|---:|---:|"
    )
    alone = f"{header}\n| 1 | 60 | 40.00 [39.50, 41.00] |"
    assert alone in results_markdown(full, {"trained": []})
    assert f"| {STRATEGIES[0].label} | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 5 |" in text  # unparsed last


def test_a_comparison_says_plainly_what_is_not_significant():
    facts = {"context": "reference", "unit": "turns", "signature": "made up", "turns": 97, "left_out": 3}
    rows = [
        Difference(metric="ACC", a=43.0, b=42.0, difference=1.0, low=-0.5, high=2.5, p_value=0.04, adjusted=0.08,
                   mcnemar=0.01, verdict=NOT_SIGNIFICANT, **facts),
        Difference(metric="BS", reason="no model", **facts),
    ]  # fmt: skip
    text = markdown_tables([comparison_table(rows)])
    assert (
        "| reference | ACC | 43.00 | 42.00 | +1.00 [-0.50, +2.50] | 0.0400 | 0.0800 | 0.0100 | not significant |"
    ) in text
    assert "| reference | BS | n/a | n/a | n/a | n/a | n/a | n/a | no model |" in text
    assert "with Holm's correction for the 1 tests" in text
    assert text.count("In reference context: Left out: 3 turns that only one of the two systems has.") == 1
    assert "McNemar's test ignores dialogues" in text
    console = Console(width=100, file=io.StringIO())
    console.print(rich_table(comparison_table(rows, brief=True)))
    assert "not significant" in console.file.getvalue()
