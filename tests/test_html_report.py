"""The page of a whole evaluation, as a browser shows it."""

import base64
import copy
import dataclasses
import functools
import gzip
import http.server
import json
import random
import re
import shutil
import threading

import pytest

from csc_train.config.compose import to_container
from csc_train.config.recipes.evaluation import EvaluateRecipe
from csc_train.data.config import DataConfig, DialogueSourceConfig, MixEntryConfig
from csc_train.data.dialogue import Dialogue
from csc_train.data.overlap import Overlap, best_overlaps, find_overlaps
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits
from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.config import EvaluationConfig, MetricsConfig
from csc_train.evaluation.contamination import Contamination, find_contamination, write_contamination
from csc_train.evaluation.evaluated_model import write_evaluated
from csc_train.evaluation.report import html
from csc_train.evaluation.report.html import write_html
from csc_train.evaluation.report.tables import write_results
from csc_train.evaluation.scoring import score_run
from csc_train.inference.config import CONTEXTS
from csc_train.inference.predictions import FailedTurn, Prediction, write_predictions
from csc_train.llm.config import LLMConfig
from csc_train.templates import render

SYSTEM, GIVEN = "a <b>model<b>", "GPT, strategy given"
MARKUP = '</script><script>document.title = "taken over"</script><b>粗</b>'
DATA = DataConfig(train=DialogueSourceConfig("train.jsonl"), evaluation=DialogueSourceConfig("csconv.jsonl"))
CONFIG = to_container(EvaluateRecipe("runs/x/model", data=DATA, evaluation=EvaluationConfig(max_new_tokens=40)))
RECORD = {
    "started": "2026-01-02T03:04:05+0000",
    "provenance": {"commit": "c0ffee" * 8, "dirty": True, "versions": {"torch": "2.13.0"}},
}


def answers(dialogues, context, right):
    """Predictions with the reference's strategy, and then its reply, with chance `right`."""
    rng = random.Random(f"{context} {right}")
    made = []
    for dialogue in dialogues:
        for turn in dialogue.supporter_turns:
            gold = dialogue.turns[turn]
            hit = rng.random() < right
            strategy = gold.strategy.number if hit else gold.strategy.number % 12 + 1
            reply = gold.text if hit else f"{MARKUP}第{strategy}种说法"
            made.append(
                Prediction(
                    dialogue.id, turn, context, "", reply, strategy, reply, gold.strategy.number, gold.text, right > 0
                )
            )
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with the predictions of three systems, scored and shown; and what was scored."""
    directory = tmp_path_factory.mktemp("run")
    train, dialogues = generate_sample(30, seed=1), generate_sample(30, seed=2)
    dialogues.append(Dialogue("copy </script>", train[0].turns, "CSConv"))
    write_dialogues(directory / "dialogues.jsonl", dialogues)
    splits = Splits(train, dialogues, best_overlaps(find_overlaps(train, dialogues)))
    write_contamination(directory, find_contamination(splits, 0.8))
    for name, right, contexts in (
        ("most frequent strategy", 0.2, CONTEXTS), (GIVEN, 0, CONTEXTS[:1]), (SYSTEM, 0.7, CONTEXTS)
    ):  # fmt: skip
        for context in contexts:
            path = directory / "predictions" / f"{name}-{context}.jsonl"
            write_predictions(path, answers(dialogues, context, right))
    scored = score_run(directory, MetricsConfig(bootstrap_resamples=200))
    write_results(directory, scored.results, scored.drifts, {}, scored.contamination)
    write_html(directory, scored, CONFIG, RECORD)
    return directory, scored


@pytest.fixture
def opened(browser):
    """Opens a run's page; that it asks for nothing but itself, and says nothing to the console, is asserted at the
    end."""
    asked, said, pages = [], [], []

    def open_page(run):
        shown = browser.new_page()
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        pages.append(shown)
        shown.goto((run[0] / "report.html").as_uri())
        shown.wait_for_selector("#list button")
        return shown

    yield open_page
    assert (asked, said) == ([page.url for page in pages], [])
    for page in pages:
        page.close()


@pytest.fixture
def page(run, opened):
    """The page of `run`."""
    return opened(run)


def unpacked(packed):
    return json.loads(gzip.decompress(base64.b64decode(packed)).decode("utf-16-le"))


def results_of(run):
    return json.loads((run[0] / "results.json").read_text(encoding="utf-8"))["results"]


def test_the_tables_show_the_metrics_with_their_intervals(run, page):
    results = results_of(run)
    systems = list(results)
    for number, profile in enumerate(("paper", "zh")):
        table = page.locator("#scores table.scores").nth(number)
        header = table.locator("thead th").all_inner_texts()
        for row, system in enumerate(systems):
            cells = table.locator("tbody tr").nth(row).locator("th, td").all_inner_texts()
            assert cells[0] == system
            shown = dict(zip(header, cells, strict=True))
            for context, scores in results[system].items():
                short = {"reference": "ref", "generated": "gen"}[context]
                for column, score in scores["profiles"][profile].items():
                    expected = ["n/a"]
                    if score["value"] is not None:
                        expected = [f"{score['value']:.2f}", f"{score['low']:.2f} to {score['high']:.2f}"]
                    assert shown[f"{short} {column}"].split("\n") == expected
    assert "n/a: no BLEURT model given" in page.inner_text("#scores")


def test_the_page_says_what_was_evaluated(run, page):
    text = page.inner_text("#about")
    assert "31 customer-support dialogues" in page.inner_text("header")
    assert "the system first chooses one of 12 support strategies" in page.inner_text("header")
    for fact in ("runs/x/model", "csconv.jsonl", "CSConv (1)", "greedy, at most 40 new tokens", "torch 2.13.0"):
        assert fact in text
    assert "commit c0ffeec0ffee with uncommitted changes" in text
    assert page.inner_text("h1") == f"How well does “{SYSTEM}” support customers?"
    assert page.title() == f"Evaluation: {SYSTEM}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        ({}, ("m, asked by chat", "by a server, greedy, at most 256 new tokens")),
        ({"temperature": 0.7, "max_tokens": 9}, ("m, asked by chat", "by a server, temperature 0.7, at most 9 new")),
    ],
)
def test_a_served_system_is_named_and_so_is_its_decoding(run, tmp_path, decoding, expected):
    served = LLMConfig(model="m", base_url="http://localhost:8000/v1", **decoding)
    write_html(tmp_path, run[1], to_container(EvaluateRecipe(llm=served, data=DATA)), RECORD)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name, fact in zip(("evaluated", "decoding"), expected, strict=True):
        assert f'<th scope="row">{name}</th><td>{fact}' in text


def test_dialogues_that_are_split_off_a_mix_are_named_by_its_sources(run, tmp_path):
    mix = [MixEntryConfig("calls.jsonl"), MixEntryConfig("chats.jsonl", kind="chat"), MixEntryConfig("roles.jsonl")]
    write_html(tmp_path, run[1], to_container(EvaluateRecipe("runs/x/model", data=DataConfig(mix=mix))), RECORD)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>split from calls.jsonl, roles.jsonl, share 0.1, seed 0</td>" in text


def test_a_page_of_a_system_with_given_strategies_does_not_say_that_it_chooses_them(run, tmp_path):
    scored = dataclasses.replace(run[1], results={name: run[1].results[name] for name in (SYSTEM, GIVEN)})
    write_html(tmp_path, scored, CONFIG, RECORD)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "first chooses" not in text and "not choose the\nsupport strategy" in text


def test_the_page_is_no_wider_than_a_phone(run, browser):
    shown = browser.new_page(viewport={"width": 400, "height": 800})
    shown.goto((run[0] / "report.html").as_uri())
    shown.wait_for_selector("#list button")
    assert shown.evaluate("document.documentElement.scrollWidth") == 400
    shown.close()


def test_the_score_chart_is_as_wide_as_the_page_and_drawn_again_when_that_changes(run, opened):
    page = opened(run)
    place = """() => {
        const box = (each) => each.getBoundingClientRect();
        const [chart, figure] = ["#forest svg", "#forest"].map((each) => box(document.querySelector(each)));
        const drawn = [...document.querySelectorAll("#forest svg > *")].map(box);
        const left = Math.min(...drawn.map((each) => each.left)), right = Math.max(...drawn.map((each) => each.right));
        return [chart.width, figure.width, left - figure.left, figure.right - right];
    }"""
    for width, found in ((1440, 1176), (390, 350), (800, 760)):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("width => document.querySelector('#forest svg').clientWidth === width", arg=found)
        chart, figure, left, right = page.evaluate(place)
        assert chart == figure == found and left > -1 and 0 < right < 75, (width, chart, figure, left, right)
        assert page.locator("#forest circle").count() == 4
    assert page.locator("#forest .name").all_text_contents()[-1].startswith("a <b>model<b>")


def test_the_training_overlap_is_listed_with_the_metrics_of_the_rest(run, page):
    text = page.inner_text("#overlap")
    assert str(run[1].contamination) in text
    assert "copy </script>" in text and "equal texts" in text
    score = results_of(run)[SYSTEM]["reference"]["decontaminated"]["profiles"]["paper"]["ACC"]["value"]
    row = page.locator("#overlap table.scores").first.locator("tbody tr").last
    assert row.locator("td").nth(5).inner_text().split("\n")[0] == f"{score:.2f}"


def test_the_maps_are_of_the_system_and_context_that_are_chosen(run, page):
    results = results_of(run)
    for system, context in ((SYSTEM, "generated"), ("most frequent strategy", "reference")):
        page.select_option("#system", system)
        page.select_option("#context", context)
        cells = page.locator("#confusion tbody tr").nth(4).locator("td").all_inner_texts()
        counts = results[system][context]["confusion"][4]
        assert cells == [str(count) if count else "" for count in (*counts[1:], counts[0])]
        table = results[system][context]["transitions"]["system"]
        cells = page.locator("#transitions table").nth(1).locator("tbody tr").nth(0).locator("td").all_inner_texts()
        assert cells == [str(int(100 * count / sum(table[0]) + 0.5)) if count else "" for count in table[0]]
        for chart in ("#drift", "#lengths"):
            assert page.locator(f"{chart} svg").first.is_visible()
        label = STRATEGIES[1].label
        row = page.locator("#by-strategy tr", has_text=label).inner_text().split()
        assert row[2] == str(results[system][context]["by_strategy"][label]["turns"])
    assert page.locator("#drift circle").count() == 4 * len(results[SYSTEM]["reference"]["by_position"])


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A run whose systems failed in generated context: in all turns, or after the first in three of 12 dialogues."""
    directory = tmp_path_factory.mktemp("failing")
    dialogues = generate_sample(12, seed=4)
    write_dialogues(directory / "dialogues.jsonl", dialogues)
    for name, ends in (("never there", [0] * 12), ("fails", [1] * 3 + [99] * 9)):
        for context in CONTEXTS:
            outcomes = answers(dialogues, context, 0.6)
            if context == "generated":
                end = {dialogue.id: end for dialogue, end in zip(dialogues, ends, strict=True)}
                outcomes = [
                    each
                    if each.turn < end[each.dialogue_id]
                    else FailedTurn(each.dialogue_id, each.turn, context, "t", "-")
                    for each in outcomes
                ]
            write_predictions(directory / "predictions" / f"{name}-{context}.jsonl", outcomes)
    scored = score_run(directory, MetricsConfig(profiles=["zh"], bootstrap_resamples=200))
    write_results(directory, scored.results, scored.drifts, {}, scored.contamination)
    write_html(directory, scored, CONFIG, RECORD)
    return directory, scored


def test_curves_and_their_table_are_of_the_turns_that_both_contexts_have(failing, opened):
    page = opened(failing)
    page.select_option("#system", "fails")
    rows = failing[1].drifts["fails"]
    assert rows[0]["turns"] == 12 and rows[1]["turns"] == 9
    titles = page.locator("#drift figure").first.locator("circle title").all_text_contents()
    values = [f"{row[context]['ACC'].value:.2f}" for context in CONTEXTS for row in rows if row["turns"]]
    assert [title.split(": ")[1].split()[0] for title in titles] == values
    assert any(
        f"{row['reference']['ACC'].value:.2f}" != f"{each['ACC'].value:.2f}"
        for row, each in zip(rows, failing[1].results["fails"]["reference"]["by_position"], strict=True)
    )
    page.locator("#detail summary").click()
    cells = page.locator("#positions tbody tr").nth(1).locator("td").all_inner_texts()
    second = rows[1]
    shown = [second[context][name] for context in CONTEXTS for name in ("ACC", "R-L char")]
    assert cells == ["9", *(f"{each.value:.2f}" for each in (*shown, second["ACC"], second["R-L char"]))]
    # Of 9 dialogues there is no interval.
    hollow = page.locator("#drift figure").first.locator("circle.hollow title").all_text_contents()
    assert hollow == [title for title in titles if not title.startswith("turn 1,")]
    assert "a hollow point has no interval" in page.inner_text("#detail")


def test_a_context_without_turns_is_not_drawn(failing, opened):
    page = opened(failing)
    page.select_option("#system", "never there")
    assert page.locator("#drift svg").count() == 2
    assert page.locator("#drift path").count() == page.locator("#drift path.one").count() == 2
    assert page.locator("#drift figcaption").first.inner_text().endswith("reference context")


def test_a_system_with_given_strategies_shows_none(run, page):
    page.select_option("#system", GIVEN)
    assert page.locator("#context option").all_inner_texts() == ["reference"]
    assert page.inner_text("#confusion") == "This system does not choose strategies."
    assert page.locator("#drift svg").count() == 1 and "ACC: n/a" in page.inner_text("#drift")
    assert page.locator("#scores table.scores").first.locator("tbody tr").nth(1).inner_text().count("n/a") == 9
    page.select_option("#speaker", GIVEN)
    page.check("#wrong")
    assert found(page, (0, 0))
    assert page.locator("#talk .wrong").count() == 0


def counted(run, system, keep):
    """(dialogues, turns) of those supporter turns for which `keep` says so, given both contexts' predictions."""
    columns = [run[1].run.predictions[system][context] for context in CONTEXTS]
    kept = [both[0].dialogue_id for both in zip(*columns, strict=True) if keep(*both)]
    return len(set(kept)), len(kept)


def found(page, pair):
    """Whether the page comes to show that it found this many (dialogues, turns)."""
    page.wait_for_function(
        "text => document.getElementById('found').textContent === text",
        arg=f"{pair[0]} of 31 dialogues, {pair[1]} turns found",
    )
    return True


def test_dialogues_are_filtered_by_strategy_and_by_wrong_ones(run, page):
    assert page.inner_text("#found") == "31 of 31 dialogues"
    page.check("#wrong")
    wrong = counted(run, SYSTEM, lambda *both: any(each.strategy != each.reference_strategy for each in both))
    everything = counted(run, SYSTEM, lambda *both: True)
    assert found(page, wrong) and 0 < wrong[1] < everything[1]
    page.uncheck("#wrong")
    page.select_option("#strategy", "7")
    page.select_option("#chooser", "reference")
    assert found(page, counted(run, SYSTEM, lambda one, _: one.reference_strategy == 7))
    page.select_option("#chooser", "system")
    assert found(page, counted(run, SYSTEM, lambda *both: 7 in [each.strategy for each in both]))
    page.select_option("#speaker", "most frequent strategy")
    other = counted(run, "most frequent strategy", lambda *both: 7 in [each.strategy for each in both])
    assert found(page, other)
    assert "most frequent strategy, generated context" in page.inner_text("#talk thead")


def test_dialogues_are_searched_and_their_texts_are_not_markup(run, page):
    page.fill("#search", "第3种说法")
    assert found(page, counted(run, SYSTEM, lambda *both: any("第3种说法" in each.response for each in both)))
    shown = page.locator("#talk tr.found").first
    assert MARKUP in shown.inner_text() and page.title() == f"Evaluation: {SYSTEM}"
    page.fill("#search", "COPY </scr")
    page.wait_for_function("() => document.querySelectorAll('#list button').length === 1")
    page.fill("#search", "没有人说过这句话")
    assert found(page, (0, 0))
    assert page.inner_text("#talk") == "No dialogue matches."


def test_the_list_is_walked_with_the_keyboard(run, page):
    page.focus("#list button")
    page.keyboard.press("ArrowDown")
    ids = [dialogue.id for dialogue in run[1].dialogues]
    assert page.inner_text("#talk caption") == ids[1]
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#talk caption") == ids[0]
    turn = run[1].dialogues[0].turns[1]
    assert turn.text in page.locator("#talk tbody tr").nth(1).inner_text()


def test_the_lowest_scoring_turns_link_to_their_dialogues(run, page):
    page.check("#wrong")
    lowest = results_of(run)[SYSTEM]["reference"]["lowest_scoring"][0]
    button = page.locator("#lowest-scoring button").first
    assert button.inner_text() == f"{lowest['dialogue_id']}, turn {lowest['turn'] + 1}"
    button.click()
    assert page.inner_text("#talk caption") == lowest["dialogue_id"]
    assert page.locator("#talk tr.found th").all_inner_texts() == [str(lowest["turn"] + 1)]


def test_calibration_and_coverage_are_shown_where_they_are_known(run, page, tmp_path, browser):
    assert page.inner_text("#calibration") == ""
    bins = [
        {"turns": 9, "confidence": 35.0, "ACC": 30.0, "low": None, "high": None},
        {"turns": 20, "confidence": 92.0, "ACC": 85.0, "low": 75.5, "high": 95.0},
    ]
    curve = [{"coverage": 50, "ACC": 90.0}, {"coverage": 100, "ACC": 66.0}]
    _, scored = run
    kept = scored.results[SYSTEM]["reference"]
    scored.results[SYSTEM]["reference"] = kept | {"calibration": bins, "coverage": curve}
    write_html(tmp_path, scored, CONFIG, RECORD)
    scored.results[SYSTEM]["reference"] = kept
    other = browser.new_page()
    other.goto((tmp_path / "report.html").as_uri())
    by_confidence, by_coverage = other.locator("#calibration figure").all()
    assert by_confidence.locator("circle title").all_text_contents() == [
        "confidence 35.0, right 30.0, 9 turns", "confidence 92.0, right 85.0, 20 turns, interval 75.5 to 95.0",
    ]  # fmt: skip
    assert by_confidence.locator("circle.hollow").count() == 1
    assert by_coverage.locator("circle title").all_text_contents() == [
        f"{SYSTEM}, reference context: {accuracy} at {share} % coverage"
        for share, accuracy in ((50, "90.0"), (100, "66.0"))
    ]
    assert by_coverage.locator("line.dash").count() == 1  # any share in random order
    other.close()


def test_a_page_is_not_written_with_numbers_that_no_browser_reads():
    with pytest.raises(ValueError, match="not JSON compliant"):
        data = {"form": "s", "questions": [], "items": [float("nan")]}
        render("csc_train.evaluation.report", "form.html.jinja", language="en", spoken="en", data=data)


def test_the_page_could_not_reach_a_network_even_if_it_tried(run, browser, tmp_path):
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r"<meta http-equiv=.*>", text)
    (tmp_path / "without.html").write_text(text.replace(policy, ""), encoding="utf-8")
    for path, requests in ((run[0] / "report.html", 1), (tmp_path / "without.html", 2)):
        shown = browser.new_page()
        asked = []
        shown.on("request", lambda request, asked=asked: asked.append(request.url))
        shown.goto(path.as_uri())
        shown.evaluate("address => fetch(address).then(() => 0, () => 0)", "http://localhost:9/")
        assert len(asked) == requests
        shown.close()


def test_texts_are_embedded_once_and_turns_that_failed_are_marked(run, tmp_path):
    directory, scored = run
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert text.count("<script>") == text.count("</script>") - 2 == 1
    start = text.index('id="transcripts">') + len('id="transcripts">')
    packed = unpacked(text[start : text.index("<", start)])
    assert len(packed["texts"]) == len(set(packed["texts"]))
    said = packed["replies"][SYSTEM]["reference"]
    predictions = scored.run.predictions[SYSTEM]["reference"]
    assert [packed["texts"][place] for place in said["texts"]] == [each.response for each in predictions]
    assert said["strategies"] == [each.strategy for each in predictions]
    predictions.pop(0)
    write_html(tmp_path, scored, CONFIG, RECORD)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    start = text.index('id="transcripts">') + len('id="transcripts">')
    packed = unpacked(text[start : text.index("<", start)])
    replies = packed["replies"][SYSTEM]["reference"]
    assert replies["texts"][0] == replies["strategies"][0] == -1


# --- of many dialogues ---


@pytest.fixture
def large(run, tmp_path, monkeypatch):
    """A folder with a page that holds few of its dialogues and the file of all of them; what was scored."""
    monkeypatch.setattr(html, "SAMPLE_SIZE", 3)
    results = copy.deepcopy(run[1].results)
    for contexts in results.values():
        for scores in contexts.values():
            del scores["lowest_scoring"][2:]
    scored = dataclasses.replace(run[1], results=results)
    write_html(tmp_path, scored, CONFIG, RECORD)
    return tmp_path, scored


def transcripts_of(page):
    start = page.index('id="transcripts">') + len('id="transcripts">')
    return page[start : page.index("<", start)]


def test_a_large_page_holds_a_sample_and_the_lowest_scoring_dialogues_within_its_limit(large, tmp_path, monkeypatch):
    directory, scored = large
    text = (directory / "report.html").read_text("utf-8")
    held = [name for name, _ in unpacked(transcripts_of(text))["dialogues"]]
    lowest = {turn["dialogue_id"] for contexts in scored.results.values() for scores in contexts.values()
              for turn in scores["lowest_scoring"]}  # fmt: skip
    order = [dialogue.id for dialogue in scored.dialogues]
    assert lowest < set(held) and len(held) <= len(lowest) + 3 < 31
    assert held == sorted(held, key=order.index)
    everything = (directory / "report_dialogues.js").read_text("utf-8").split('"')[3]
    assert [name for name, _ in unpacked(everything)["dialogues"]] == order
    # 2 MB for four systems in both contexts; here are five tables of the eight.
    rest = len(text.encode()) - len(transcripts_of(text))
    assert rest * 8 / 5 + html.MAX_TRANSCRIPT_BYTES < 2_000_000
    for limit in (len(transcripts_of(text)) * 2 // 3, 0):
        monkeypatch.setattr(html, "MAX_TRANSCRIPT_BYTES", limit)
        chosen, packed = html._embedded(scored)
        assert len(packed) <= limit or not chosen
        assert (limit == 0) == (not chosen) and len(chosen) < len(held)
    # Without a limit on the sample, there is no other file.
    monkeypatch.undo()
    write_html(directory / "whole", scored, CONFIG, RECORD)
    assert [file.name for file in (directory / "whole").iterdir()] == ["report.html"]


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_all_dialogues_are_loaded_from_beside_the_page(large, browser, scheme):
    directory, scored = large
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = directory.as_uri() if scheme == "file" else f"http://127.0.0.1:{server.server_port}"
        shown, asked, said = browser.new_page(), [], []
        shown.on("request", lambda request: asked.append(request.url.removeprefix(f"{place}/")))
        shown.on("console", lambda message: said.append(message.text))
        shown.goto(f"{place}/report.html")
        shown.wait_for_selector("#list button")
        names = shown.locator("#list button").all_text_contents()
        held = len(names)
        absent = next(each for each in scored.dialogues if not any(name.startswith(each.id) for name in names))
        assert shown.inner_text("#found") == f"{held} of {held} dialogues on this page"
        assert shown.inner_text("#part").startswith(f"This page holds {held} of them: a random sample")
        shown.fill("#search", absent.id)
        hint = f"0 of {held} dialogues on this page, 0 turns found; load all dialogues to search the rest"
        shown.wait_for_function("text => document.getElementById('found').textContent === text", arg=hint)
        shown.focus("#load")
        shown.keyboard.press("Enter")
        shown.wait_for_selector("#load", state="hidden")
        assert found(shown, (1, len(absent.turns)))
        assert shown.inner_text("#talk caption") == absent.id
        assert shown.evaluate("document.activeElement.id") == "search"
        shown.fill("#search", "")
        shown.wait_for_function("() => document.querySelectorAll('#list button').length === 31")
        assert shown.inner_text("#found") == "31 of 31 dialogues"
        assert shown.inner_text("#talk caption") == absent.id
        assert asked[:2] == ["report.html", "report_dialogues.js"] and set(asked[2:]) <= {"favicon.ico"}
        assert [text for text in said if "favicon" not in text and "404" not in text] == []
        # Scripts come from beside the page, and from nowhere else.
        evaluate = """address => new Promise((done) => document.head.append(
            make("script", { src: address, onload: () => done("loaded"), onerror: () => done("refused") })))"""
        assert shown.evaluate(evaluate, "http://localhost:9/report_dialogues.js") == "refused"
        shown.close()
        server.shutdown()


def test_a_page_without_its_file_says_so_and_shows_its_sample(large, browser, tmp_path):
    alone = tmp_path / "mailed"
    alone.mkdir()
    shutil.copy(large[0] / "report.html", alone)
    shown = browser.new_page()
    shown.goto((alone / "report.html").as_uri())
    held = shown.locator("#list button").count()
    shown.click("#load")
    missing = f"put it there and try again. This page holds {held} dialogues; the results are of all."
    shown.wait_for_function("text => document.getElementById('part').textContent.endsWith(text)", arg=missing)
    assert shown.inner_text("#found") == f"{held} of {held} dialogues on this page"
    (alone / "report_dialogues.js").write_text('receiveDialogues("another", "AAAA");')
    shown.click("#load")
    shown.wait_for_function("() => document.getElementById('part').textContent.includes('belongs to another report')")
    shutil.copy(large[0] / "report_dialogues.js", alone)
    shown.click("#load")
    shown.wait_for_selector("#load", state="hidden")
    assert shown.inner_text("#found") == "31 of 31 dialogues"
    shown.close()


# --- in English ---


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A run in English, with an overlap of every kind."""
    directory = tmp_path_factory.mktemp("english")
    dialogues = generate_sample(12, 1, "en")
    write_dialogues(directory / "dialogues.jsonl", dialogues)
    write_evaluated(directory, None, "en", [])
    kinds = ("exact", "near", "shared", "edited")
    overlaps = tuple(Overlap("t", each.id, kind, 0.9) for kind, each in zip(kinds, dialogues, strict=False))
    write_contamination(directory, Contamination("By hand.", 1, len(dialogues), overlaps))
    for context in CONTEXTS:
        write_predictions(directory / "predictions" / f"system-{context}.jsonl", answers(dialogues, context, 0.6))
    scored = score_run(directory, MetricsConfig(bootstrap_resamples=200))
    write_html(directory, scored, CONFIG, RECORD)
    return directory, scored


def test_a_page_in_english_has_no_chinese_but_in_dialogues_and_names(english, opened):
    page = opened(english)
    assert list(english[1].results["system"]["reference"]["profiles"]) == english[1].profiles == ["en"]
    assert page.locator("#confusion tbody th").nth(4).inner_text() == "Emotional Management EM"
    assert page.locator("#by-strategy tbody th").nth(4).inner_text() == "5 Emotional Management"
    assert page.locator("#strategy option").nth(5).inner_text() == "Emotional Management"
    assert page.locator("#about details td").first.text_content() == "1 Greeting"
    names = page.locator("#talk .strategy").all_inner_texts()
    assert names[0] == "Greeting" and "Customer" in names
    assert page.get_attribute("#talk", "lang") == page.get_attribute("#lowest-scoring", "lang") == "en"
    assert "edited under the same id" in page.inner_text("#overlap")
    for part in ("#about", "#scores", "#behaviour", "#overlap"):
        assert not re.search("[\u4e00-\u9fff]", page.inner_text(part)), part
