"""The table as Markdown, JSON and terminal output, from hand-written scores."""

import io
import json

from rich.console import Console

from csc_train.evaluation.metrics import PROFILES, Score
from csc_train.evaluation.report import console_table, markdown_table, write_results


def scores(first, unparsed=0, **missing):
    """A result of `metrics.score` whose columns count up from `first`; `missing` maps columns to reasons."""
    profiles = {
        profile: {
            column: Score(
                None if column in missing else first + index, f"{column} unit", "made up", missing.get(column)
            )
            for index, column in enumerate(columns)
        }
        for profile, columns in PROFILES.items()
    }
    return {"profiles": profiles, "counts": {"turns": 120, "unparsed": unparsed, "empty_replies": 2}}


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
    header, untrained, partial = rows(markdown_table(RESULTS))[:3]
    names = ["B-2", "B-4", "R-L", "BS", "BR", "ACC"]
    assert header == ["system", *(f"ref {name}" for name in names), *(f"gen {name}" for name in names)]
    reference = ["1.00", "2.00", "3.00", "n/a[^1]", "n/a[^1]", "6.00"]
    generated = ["10.50", "11.50", "12.50", "n/a[^1]", "n/a[^1]", "15.50"]
    assert untrained == ["untrained", *reference, *generated]
    assert partial[:7] == ["a\\|b [bold]", "88.13", "89.13", "90.13", "91.13", "92.13", "n/a[^2]"]
    assert partial[7:] == ["n/a[^3]"] * 6


def test_markdown_has_a_table_per_profile():
    zh = rows(markdown_table(RESULTS))[3:]
    assert zh[0][1:7] == ["ref B-2", "ref B-4", "ref R-L char", "ref R-L word", "ref BS", "ref ACC"]
    assert zh[1][1:7] == ["1.00", "2.00", "3.00", "4.00", "n/a[^1]", "6.00"]


def test_each_reason_is_a_footnote_once():
    footnotes = [line for line in markdown_table(RESULTS).splitlines() if line.startswith("[^")]
    assert footnotes == ["[^1]: no model", "[^2]: no strategies", "[^3]: not evaluated in this context"]


def test_markdown_names_units_counts_and_reconstructions():
    text = markdown_table(RESULTS)
    assert "**B-2** B-2 unit (made up); **B-4** B-4 unit (made up)" in text
    assert "**R-L char** R-L char unit (made up)" in text
    assert "B-2, B-4, R-L, BS and BR are reconstructions" in text
    assert "untrained, reference context: 120 (7 unparsed, 2 empty)" in text
    assert "untrained, generated context: 120 (9 unparsed, 2 empty)" in text
    assert "a|b [bold], reference context: 120 (strategies not predicted, 2 empty)" in text


def test_no_footnotes_where_everything_is_known():
    full = {"trained": {"reference": scores(1.0), "generated": scores(2.0)}}
    assert "n/a" not in markdown_table(full) and "[^" not in markdown_table(full)


def test_results_are_written(tmp_path):
    write_results(tmp_path / "run", RESULTS, {"commit": "abc"})
    written = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert written["provenance"] == {"commit": "abc"}
    assert list(written["results"]) == list(RESULTS)
    cell = written["results"]["untrained"]["generated"]["profiles"]["paper"]["B-4"]
    assert cell == {"value": 11.5, "unit": "B-4 unit", "signature": "made up", "reason": None}
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8") == markdown_table(RESULTS)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json", "table.md"]


def rendered(results, width):
    console = Console(width=width, file=io.StringIO())
    console.print(console_table(results))
    return console.file.getvalue()


def test_console_table_shows_every_number_in_80_columns():
    text = rendered(RESULTS, 80)
    row = next(line for line in text.splitlines() if "untrained" in line)
    reference, generated = (
        ["1.00", "2.00", "3.00", "n/a", "n/a", "6.00"],
        ["10.50", "11.50", "12.50", "n/a", "n/a", "15.50"],
    )
    assert row.split() == ["untrained", *reference, *generated]
    assert "[bold]" in text  # a name is no markup
    assert "n/a: no model" in text and "n/a: not evaluated in this context" in text
    assert "reconstructions" in text


def test_console_table_wraps_names_before_it_cuts_numbers():
    row = rendered({"most frequent strategy": {"reference": scores(50.0), "generated": scores(60.0)}}, 76)
    for number in (*range(50, 56), *range(60, 66)):
        assert f"{number}.00" in row
