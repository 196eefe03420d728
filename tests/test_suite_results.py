"""The results of a suite beside the published table: figures by hand, rows in every state, the page in a browser."""

import copy
import json
import math
import os
import random
import re
from dataclasses import asdict, replace
from urllib.parse import unquote, urlparse

import pytest
import yaml
from conftest import ROOT
from rich.console import Console

from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.comparison import compare
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics.registry import metrics_in_profiles
from csc_train.evaluation.report.tables import to_plain, write_results
from csc_train.evaluation.scoring import score_predictions
from csc_train.files import write_json
from csc_train.inference.config import CONTEXTS
from csc_train.inference.predictions import Prediction
from csc_train.runs.comparison import MAX_POINTS
from csc_train.suites.base import Cost, RowResult
from csc_train.suites.published import FIGURES, PUBLISHED_METRICS, read_published
from csc_train.suites.results import console_results, write_suite_results
from csc_train.tracking.history import History

METRICS = MetricsConfig(profiles=["paper"], bootstrap_resamples=100)
PAPER = read_published("paper")
MARKUP = "<b>Qwen</b> + RoleCS"


# --- the published table ---


def test_the_papers_table_is_whole_and_names_the_rows_of_the_experiments():
    assert [*FIGURES] == [f"{context} {name}" for context in ("ref", "gen") for name in PUBLISHED_METRICS]
    assert [spec.name for spec in metrics_in_profiles(["paper"])] == [*PUBLISHED_METRICS]
    assert len(PAPER.rows) == 11 and "AAAI 2026" in PAPER.source and "qwen-dianjin" in PAPER.source
    assert all(None not in row.values() and [*row] == [*FIGURES] for row in PAPER.rows.values())
    assert PAPER.rows["GPT-4o"]["ref ACC"] == 42.58
    assert PAPER.rows["Qwen2.5-Instruct 72B + RoleCS"]["gen BR"] == 53.65
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    named = [name for text in texts for name in re.findall(r"The paper's row (.+? \+ RoleCS)", text)]
    assert len(named) == 6 and {*named} < {*PAPER.rows}


HEADER = ",".join(["row", *FIGURES])
CELLS = ",".join(["1"] * 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv: holds no row: write a header"),
        (f"# a comment\n{HEADER}\n", r"t\.csv: holds no row"),
        (f"{HEADER}C\na,{CELLS}", r"line 1: unknown column 'gen ACCC'\. Did you mean 'gen ACC'"),
        (f"# a\n# b\n{HEADER.removesuffix(',gen ACC')}\n", r"line 3: no column 'gen ACC': add it"),
        (f"{HEADER},ref ACC\n", r"line 1: two columns 'ref ACC'"),
        (f"{HEADER}\na,{CELLS}\nb,1,zwei{',1' * 10}\n", r"line 3, column 'ref B-4': 'zwei' is no number"),
        (f"{HEADER}\na,1,nan{',1' * 10}\n", r"line 2, column 'ref B-4': 'nan' is no number"),
        (f"# c\n{HEADER}\na,{CELLS}\n\na,{CELLS}\n", r"line 5, column 'row': a second row 'a'"),
        (f"{HEADER}\na,{CELLS},2\n", "line 2: 14 cells for 13 columns"),
        (f'{HEADER}\n"a"b,{CELLS}\n', "line 2: not CSV"),
    ],
)  # fmt: skip
def test_a_bad_published_table_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_published(str(tmp_path / "t.csv"))
    assert "\n" not in str(error.value)


def test_a_users_table_may_leave_cells_empty(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(
        f"\ufeff# of mine\nrow,{','.join(reversed(FIGURES))}\r\n模型 A, 1.5{',' * 11}\r\n", encoding="utf-8"
    )
    table = read_published(str(file))
    assert table.source == "of mine"
    assert table.rows == {"模型 A": dict.fromkeys(FIGURES) | {"gen ACC": 1.5}}
    assert table.unknown("模型 B") == f"{file}: no row '模型 B'. Did you mean '模型 A'?"
    with pytest.raises(InputError, match=r"nowhere\.csv: cannot read"):
        read_published(str(tmp_path / "nowhere.csv"))


# --- rows ---


def predictions(dialogues, context, right):
    rng = random.Random(f"{context} {right}")
    made = []
    for dialogue in dialogues:
        for turn in dialogue.supporter_turns:
            gold = dialogue.turns[turn]
            strategy = gold.strategy.number if rng.random() < right else gold.strategy.number % 12 + 1
            made.append(
                Prediction(dialogue.id, turn, context, "", "", strategy, "好的。", gold.strategy.number, gold.text)
            )
    return made


@pytest.fixture(scope="module")
def scored():
    """Dialogues, the results of two systems on them, and their comparison."""
    dialogues = generate_sample(12, seed=3)
    by_id = {each.id: each for each in dialogues}
    sides = [{context: predictions(dialogues, context, right) for context in CONTEXTS} for right in (0.2, 0.8)]
    results = {
        name: {context: score_predictions(each, by_id, METRICS) for context, each in side.items()}
        for name, side in zip(("base model", "trained"), sides, strict=True)
    }
    return dialogues, results, [asdict(row) for row in compare(sides[1], sides[0], METRICS, 1000)]


def waiting(folder, name="row", **changes):
    """A row of which nothing has run."""
    empty = Cost()
    fields = ("waiting", None, folder / f"{name}-evaluate", None, None, None, None, None, empty, empty)
    return replace(RowResult(name, name, *fields), **changes)


def evaluated(folder, scored, name="row", **changes):
    """A row with its evaluation."""
    row = waiting(folder, name, state="done", **changes)
    write_dialogues(row.evaluation / "dialogues.jsonl", scored[0])
    write_results(row.evaluation, scored[1], {}, {})
    (row.evaluation / "report.html").write_text("report")
    return row


def train(directory, history, data="nowhere.jsonl"):
    """The run directory of a training."""
    directory.mkdir(parents=True)
    (directory / "resolved.yaml").write_text(yaml.safe_dump({"data": {"train": {"path": str(data)}}}))
    write_json(directory / "run.json", {"recipe": "sft", "status": "finished"})
    log = History(directory)
    for line in history:
        log.log(line["step"], {name: value for name, value in line.items() if name != "step"})
    return directory


def written(folder, rows, published=PAPER, facts=None):
    """The rows of results.json, and the texts of results.md and results.html."""
    write_suite_results(folder, "paper", rows, published, facts or {})
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return result, *((folder / f"results.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))


def printed(rows, published=PAPER):
    console = Console(width=100, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(console_results("paper", rows, published))
    return console.export_text()


@pytest.mark.slow
def test_differences_and_marks_are_those_computed_by_hand(tmp_path, scored):
    row = evaluated(
        tmp_path, scored, "GPT", published="GPT-4o", planned=Cost(2.5, None, 7), spent=Cost(None, 1200, 6.5)
    )
    file = row.evaluation / "results.json"
    everything = json.loads(file.read_text(encoding="utf-8"))
    by_hand = {  # the paper's: 42.58, 8.13, 4.12, 2.97; 36.29, 6.41
        ("reference", "ACC"): (44.0, 42.58, 46.0),
        ("reference", "B-2"): (7.0, 6.0, 8.125),
        ("reference", "R-L"): (5.0, 4.125, 6.0),
        ("reference", "B-4"): (2.5, 2.0, 2.97),
        ("generated", "ACC"): (36.0, None, None),
    }
    for (context, name), (value, low, high) in by_hand.items():
        cell = everything["results"]["trained"][context]["profiles"]["paper"][name]
        cell |= {"value": value, "low": low, "high": high}
    write_json(file, everything)
    result, text, page = written(tmp_path, [row], facts={"code": "c0ffee"})
    figures = result["rows"][0]["figures"]
    found = {column: (figures[column]["difference"], figures[column]["place"]) for column in FIGURES}
    assert found["ref ACC"] == (pytest.approx(1.42), "inside")  # on the border
    assert found["ref B-4"] == (pytest.approx(-0.47), "inside")  # on the other one
    assert found["ref B-2"] == (pytest.approx(-1.13), "below")
    assert found["ref R-L"] == (pytest.approx(0.88), "above")
    assert found["gen ACC"] == (pytest.approx(-0.29), None)
    assert found["ref BS"] == (None, None) and figures["ref BS"]["published"] == 64.26
    assert figures["ref BS"]["ours"]["reason"] == "no BERTScore model given"
    assert "| 42.58<br>44.00 [42.58, 46.00]<br>+1.42 ✓ |" in text
    for shown in ("-1.13 ▼", "+0.88 ▲", "64.26<br>n/a", "n/a: no BERTScore model given", "- code: c0ffee"):
        assert shown in text
    assert "| 36.29<br>36.00<br>-0.29 |" in text
    assert "| GPT | done | 2.5 | 1,200 | 7.00 | 6.50 |" in text and "GPU hours planned | tokens spent" in text
    assert "B-4, R-L, BS and BR are reconstructions" in text and "gives no intervals" in text
    inside = sum(place == "inside" for _, place in found.values())
    assert f"1 of 1 rows are done. {inside} of {sum(place is not None for _, place in found.values())} pub" in text
    for shown in ("44.00±1.7", "+1.42 ✓", "-1.13 ▼"):
        assert shown in printed([row])
    assert text.index("synthetic samples (source=synthetic-sample)") < text.index("| row |")
    assert page.index("synthetic samples (source=synthetic-sample)") < page.index("<table")


def test_a_row_that_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path, scored):
    good = evaluated(tmp_path, scored, "good", published="GPT-4o", system="base model")
    broken = [evaluated(tmp_path, scored, f"broken {number}", published="GPT-4o") for number in range(4)]
    contents = ("{", '{"results": {}}', json.dumps({"results": {"x": {"reference": {"profiles": 3}}}}))
    for row, content in zip(broken, contents, strict=False):
        (row.evaluation / "results.json").write_text(content)
    wrong = copy.deepcopy(scored[1])
    wrong["trained"]["reference"]["profiles"]["paper"]["ACC"] = {"value": "many"}
    write_json(broken[3].evaluation / "results.json", {"results": to_plain(wrong)})
    misnamed = evaluated(tmp_path, scored, "misnamed", published="GPT-4", system="base")
    failed = waiting(tmp_path, "failed", state="failed", reason="out of memory", published="GPT-4o")
    rows = [good, *broken, misnamed, failed, waiting(tmp_path, "late", published="DeepSeek-R1")]
    result, text, _ = written(tmp_path, rows)
    problems = [row["problems"] for row in result["rows"]]
    assert problems[0] == problems[6] == problems[7] == []
    assert [len(each) for each in problems[1:5]] == [1] * 4
    for (problem,), row in zip(problems[1:5], broken, strict=True):
        assert str(row.evaluation / "results.json") in problem and f"{row.label}: not read: {problem}" in text
    assert "broken JSON at line 1" in problems[1][0] and "value Input should be a valid number" in problems[4][0]
    assert "no system 'base'. Did you mean 'base model'?" in problems[5][0]
    assert problems[5][1] == "paper.csv: no row 'GPT-4'. Did you mean 'GPT-4o'?"
    accuracy = to_plain(scored[1])["base model"]["generated"]["profiles"]["paper"]["ACC"]
    assert result["rows"][0]["figures"]["gen ACC"]["ours"] == accuracy
    assert all(each["ours"] is None for row in result["rows"][1:] for each in row["figures"].values())
    assert "failed: failed: out of memory" in text and "6 of 8 rows are done." in text
    assert "| late | 11.67 |" in text and "late" in printed(rows)


def test_curves_count_trained_tokens_and_are_thinned(tmp_path, scored):
    history = [{"step": 5, "loss": 3.0, "trained_tokens_per_second": 100.0, "step_seconds": 2.0}]
    history += [{"step": 5, "eval_loss": 2.5}, {"step": 15, "loss": math.nan, "trained_tokens_per_second": 50.0}]
    history[-1]["step_seconds"] = 4.0
    history += [{"step": step, "loss": 1000.0 / step} for step in range(16, 1016)]
    (tmp_path / "data").mkdir()
    curve = [
        {"turn": 1, "dialogues": 9} | dict.fromkeys(("own", "own_low", "own_high", "other", "other_low", "other_high"))
    ]
    write_json(tmp_path / "data" / "quality.json", {"profiles": curve})
    run = train(tmp_path / "sft", history, tmp_path / "data" / "dialogues.jsonl")
    diverged = train(tmp_path / "other", [{"step": 1, "loss": math.nan}])
    rows = [waiting(tmp_path, name, training=place) for name, place in (("a", run), ("twin", run), ("b", diverged))]
    result, text, page = written(tmp_path, rows)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [each["label"] for each in data["curves"]] == ["a", "b"]
    points = data["curves"][0]["points"]
    assert points["loss"][0] == [5, 1000, 3.0] and points["eval_loss"] == [[5, 1000, 2.5]]
    assert len(points["loss"]) == MAX_POINTS and points["loss"][-1] == [1015, 3000, 1000 / 1015]
    assert result["rows"][0]["training"]["eval_loss"] == 2.5 and result["rows"][2]["training"]["loss"] is None
    assert "| a | 0.9852 | 2.5 |  | 75 |" in text
    assert data["overlaps"] == [{"data": "data/dialogues.jsonl", "href": "data", "rows": curve}]


def test_the_verdict_of_a_gain_is_that_of_the_comparison(tmp_path, scored):
    gain = tmp_path / "compare"
    differences = copy.deepcopy(scored[2])
    clear = next(each for each in differences if (each["context"], each["metric"]) == ("generated", "ACC"))
    assert clear["verdict"] == "A is higher"  # 80 % right against 20 %
    doubtful = next(each for each in differences if (each["context"], each["metric"]) == ("reference", "ACC"))
    doubtful |= {"difference": -1.5, "low": -3.25, "high": 0.25, "verdict": "not significant"}
    write_json(gain / "comparison.json", {"differences": differences})
    rows = [evaluated(tmp_path, scored, "base", system="base model")]
    rows += [evaluated(tmp_path, scored, "tuned", against="base", gain=gain)]
    result, text, _ = written(tmp_path, rows)
    assert result["rows"][1]["gain"]["gen ACC"] == {"verdict": "higher"} | {
        name: clear[name] for name in ("difference", "low", "high", "adjusted")
    }
    assert "-1.50<br>[-3.25, +0.25]<br>n.s. |" in text and "| tuned | base | generated |" in text
    assert "gen BS" not in result["rows"][1]["gain"]  # not tested
    (gain / "comparison.json").write_text('{"differences": [{}]}')
    result, text, _ = written(tmp_path, rows)
    assert "comparison.json: not as its recipe writes it (KeyError: 'verdict')" in text and "n.s. |" not in text


def test_rows_without_a_published_table_are_beside_each_other(tmp_path, scored):
    rows = [evaluated(tmp_path, scored, "a"), evaluated(tmp_path, scored, "b", system="base model"), waiting(tmp_path)]
    result, text, page = written(tmp_path, rows, None)
    assert [*result["rows"][0]["figures"]] == [
        f"{context} {name}"
        for context in ("ref", "gen")
        for name in (*PUBLISHED_METRICS, "macro-F1", "preference bias")
    ]
    assert result["published"] is None and "| B-2 | B-4 | R-L | BS | BR | ACC | macro-F1 | preference bias ↓ |" in text
    assert "published" not in text and "<h1>The rows of" in page
    confusion = scored[1]["base model"]["generated"]["confusion"]
    shares = result["rows"][1]["shares"]["generated"]
    assert shares["reference"] == [sum(row) for row in confusion]
    assert shares["system"][1:] == [sum(row[column] for row in confusion) for column in range(1, 13)]
    assert "ACC" in printed(rows, None)


# --- the page ---


def test_the_page_draws_and_its_links_exist(tmp_path, scored, browser):
    history = [{"step": step, "loss": 3 / step, "eval_loss": 3.1 / step} for step in range(1, 9)]
    sft, gain = train(tmp_path / "a run" / "sft", history), tmp_path / "compare"
    (sft / "curves.html").write_bytes(b"")
    write_json(gain / "comparison.json", {"differences": scored[2]})
    (gain / "comparison.md").write_text("")
    spent = Cost(gpu_hours=3.5)
    rows = [evaluated(tmp_path, scored, "base", published="Qwen2.5-Instruct 7B", system="base model", spent=spent)]
    rows += [evaluated(tmp_path, scored, "ours", label=MARKUP, published="Qwen2.5-Instruct 7B + RoleCS", training=sft,
                       against="base", gain=gain, spent=spent)]  # fmt: skip
    rows += [waiting(tmp_path, "late", published="GPT-4o")]
    folder = tmp_path / "suite"
    write_suite_results(folder, "paper", rows, PAPER, {"code": MARKUP})
    page, said, asked = browser.new_page(), [], []
    for event in ("console", "pageerror"):
        page.on(event, lambda message: said.append(str(message)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((folder / "results.html").as_uri())
    assert page.locator("table.figures tbody tr").count() == 3
    assert page.locator("table.figures tbody th").nth(1).inner_text().startswith(MARKUP)
    assert page.locator("table.figures .inside, table.figures .above, table.figures .below").count() == 16
    links = page.locator("main a").evaluate_all("all => all.map(each => each.href.baseVal ?? each.href)")
    places = [folder / unquote(urlparse(link).path) for link in links]
    assert len(places) == 35 and all(place.exists() for place in places)
    assert {place.resolve() for place in places} == {
        *(row.evaluation / "report.html" for row in rows[:2]), sft / "curves.html", gain / "comparison.md"
    }  # fmt: skip
    assert page.locator("#curves svg").count() == 2
    title = page.locator("#curves circle title").first
    assert title.text_content() == f"{MARKUP}, step 1: 3.000"
    page.select_option("#axis", "1")
    assert page.locator("#curves svg").first.locator("text").last.text_content() == "trained tokens"
    assert page.locator("#shares tbody tr").count() == 3
    assert page.locator("#shares tbody th").all_inner_texts() == ["reference", "base", MARKUP]
    labels = page.locator("#scatter .name")
    assert {*labels.all_text_contents()} == {"base", MARKUP}
    boxes = [labels.nth(number).bounding_box() for number in range(2)]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] or boxes[1]["y"] + boxes[1]["height"] <= boxes[0]["y"]
    assert "late" in page.inner_text("#scatter figcaption")
    assert "recipes/synthesize_rolecs.py" in page.inner_text("#overlaps")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert (said, asked) == ([], [page.url])
    page.close()
