"""The blinded annotation form in a browser, and the results of its ratings."""

import json
import re
from dataclasses import replace

import pytest
from conftest import load_recipe

from csc_train.config.compose import compose
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import HumanConfig, JudgeConfig
from csc_train.evaluation.judges.annotation_form import AnnotationItem, UnblindingKey, draw_annotation_form, read_key
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.evaluation.judges.human_ratings import (
    MAJORITY,
    majority,
    rater_results,
    rating_tables,
    read_judge_preferences,
    read_ratings,
)
from csc_train.evaluation.judges.llm_judge import JudgeReport, judge_json, judge_questions, sample_turns, summarize
from csc_train.evaluation.table import PredictionTable, align_tables
from csc_train.files import write_json
from csc_train.inference.predictions import Prediction, write_predictions

DIALOGUES = {dialogue.id: dialogue for dialogue in generate_sample(14, seed=3)}
PLACES = [(name, turn) for name in sorted(DIALOGUES) for turn in DIALOGUES[name].supporter_turns[:3]]
NAMES = ("secret-alpha", "secret-omega")
MARKUP = '</script><script>document.title = "taken over"</script><b>粗</b>'
QUESTIONS = ["overall", *CRITERIA]
CONFIG = HumanConfig(bootstrap_resamples=200, permutations=1000)


def quality(system, n):
    """A is better at two of four places, worse at one, and as good at one."""
    return (3, 3, 1, 2)[n % 4] if system == 0 else 2


def predictions(system, predicts=True):
    ending = ("一一", "二")[system]
    return [
        Prediction(
            name, turn, "reference", f"prompt {n}", "", 5 + system, f"品质{quality(system, n)}{MARKUP}{ending}",
            DIALOGUES[name].turns[turn].strategy.number, DIALOGUES[name].turns[turn].text, predicts,
        )
        for n, (name, turn) in enumerate(PLACES)
    ]  # fmt: skip


def drawn(config=CONFIG, **changes):
    sides, _ = align_tables(predictions(0, **changes), predictions(1), *NAMES)
    return draw_annotation_form(sides, DIALOGUES, NAMES, config)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two evaluations in the current directory."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        write_predictions(tmp_path / f"run{number}/predictions/{name}-reference.jsonl", predictions(number))
        write_dialogues(tmp_path / f"run{number}/dialogues.jsonl", DIALOGUES.values())
    return tmp_path


def run_recipe(*words):
    load_recipe("human_eval").main(compose("human_eval", list(words)))


# The form


def test_a_form_does_not_tell_the_systems_apart():
    page, key = drawn()
    assert [private for private in (*NAMES, *DIALOGUES, "prompt") if private in page] == []
    assert {name for shown in data_of(page)["items"] for name in shown} == {"id", "history", "strategy", "replies"}
    assert len({item.item for item in key.items}) == len(key.items) == len(DIALOGUES)
    assert {item.first for item in key.items} == {"A", "B"}
    for item, shown in zip(key.items, data_of(page)["items"], strict=True):
        assert item.item == shown["id"]
        a, b = (predictions(side)[PLACES.index((item.dialogue_id, item.turn))].response for side in (0, 1))
        assert [each["text"] for each in shown["replies"]] == ([a, b] if item.first == "A" else [b, a])
        assert item.longer == len(a) - len(b) == 1
        history = DIALOGUES[item.dialogue_id].turns[: item.turn]
        assert shown["history"] == [[each.speaker.name == "SUPPORTER", each.text] for each in history]
        assert shown["strategy"] is None and [each["strategy"] for each in shown["replies"]] == [None, None]


def test_the_same_runs_give_the_same_form_and_others_none_of_its_ids():
    page, key = drawn()
    assert drawn() == (page, key)
    assert [item.first for item in drawn(HumanConfig(seed=1))[1].items] != [item.first for item in key.items]
    # What no form shows changes ids, order and sides: they cannot be computed from the form.
    *others, last = predictions(0)
    sides, _ = align_tables([*others, replace(last, prompt_hash="?")], predictions(1), *NAMES)
    other = draw_annotation_form(sides, DIALOGUES, NAMES, CONFIG)[1]
    assert not {item.item for item in other.items} & {item.item for item in key.items}
    place = {(item.dialogue_id, item.turn): item.first for item in key.items}
    assert place.keys() == {(item.dialogue_id, item.turn) for item in other.items}
    assert any(place[item.dialogue_id, item.turn] != item.first for item in other.items)


def test_items_are_those_that_a_judge_is_given_first():
    turns = PredictionTable(predictions(0))
    _, key = drawn(HumanConfig(num_items=10, max_items_per_dialogue=None))
    judged = {turns.keys[index] for index in sample_turns(turns, JudgeConfig(num_turns=10))}
    assert {(item.dialogue_id, item.turn) for item in key.items} == judged
    _, key = drawn(HumanConfig(num_items=20, max_items_per_dialogue=2))
    dialogues = [item.dialogue_id for item in key.items]
    assert len(dialogues) == 20 and max(map(dialogues.count, dialogues)) == 2


def test_replies_that_read_the_same_are_left_out():
    a, b = predictions(0), predictions(1)
    b[3:] = [replace(each, response=a[n].response) for n, each in enumerate(b)][3:]
    _, key = draw_annotation_form(
        align_tables(a, b, *NAMES)[0], DIALOGUES, NAMES, HumanConfig(max_items_per_dialogue=None)
    )
    assert {(item.dialogue_id, item.turn) for item in key.items} == set(PLACES[:3])
    assert (key.turns, key.differing) == (len(PLACES), 3)
    with pytest.raises(InputError, match="all replies are equal: there is nothing to compare"):
        draw_annotation_form(align_tables(a, a, *NAMES)[0], DIALOGUES, NAMES, CONFIG)
    # Where strategies are shown, another strategy is a difference.
    own = HumanConfig(show_strategies="own", max_items_per_dialogue=None)
    assert draw_annotation_form(align_tables(a, b, *NAMES)[0], DIALOGUES, NAMES, own)[1].differing == len(PLACES)


def test_strategies_are_shown_as_asked():
    page, key = drawn(HumanConfig(show_strategies="own", language="en"))
    for item, shown in zip(key.items, data_of(page)["items"], strict=True):
        names = [each["strategy"][0] for each in shown["replies"]]
        assert names == [STRATEGIES[n - 1].en for n in ((5, 6) if item.first == "A" else (6, 5))]
    page, key = drawn(HumanConfig(show_strategies="reference"))
    for item, shown in zip(key.items, data_of(page)["items"], strict=True):
        strategy = DIALOGUES[item.dialogue_id].turns[item.turn].strategy
        assert shown["strategy"] == [strategy.zh, strategy.definition("zh")]
    with pytest.raises(InputError, match=r"human\.show_strategies=own: secret-alpha predicts none"):
        drawn(HumanConfig(show_strategies="own"), predicts=False)


@pytest.mark.slow
def test_turns_that_failed_in_one_run_are_left_out_and_counted(runs, capsys):
    write_predictions("run1/predictions/secret-omega-reference.jsonl", predictions(1)[4:])
    run_recipe("export", "run0", "run1", "run.directory=form", "human.max_items_per_dialogue=null")
    assert "Left out: 4 turns that only one of the two systems has." in capsys.readouterr().out
    key = read_key("form/key.json")
    assert {(item.dialogue_id, item.turn) for item in key.items} == set(PLACES[4:])
    assert (key.turns, key.left_out) == (len(PLACES) - 4, 4)
    write_json("anna.json", rating_file(key, "Anna", "A" * len(key.items)))
    run_recipe("import", "anna.json", "key=form/key.json", "run.directory=read", "human.bootstrap_resamples=200")
    assert "Left out: 4 turns" in (runs / "read/human.md").read_text(encoding="utf-8")


# The browser


@pytest.fixture
def opened(runs, browser):
    """Opens the form that the recipe exports; what was asked for, and said to the console, is checked at the end."""
    asked, said, contexts = [], [], []

    def open_form(*options, script=None):
        run_recipe("export", "run0", "run1", "run.directory=form", "run.if_exists=replace", *options)
        context = browser.new_context()
        contexts.append(context)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((runs / "form/form.html").as_uri())
        return page

    yield open_form
    assert said == []
    assert {url for url in asked if not url.startswith("blob:")} == {(runs / "form/form.html").as_uri()}
    for context in contexts:
        context.close()


def begin(page, rater):
    page.fill("#rater", rater)
    page.keyboard.press("Enter")


def better(page):
    """The choice that the qualities of the two replies on the page plant."""
    first, second = (int(re.search(r"品质(\d)", text).group(1)) for text in page.locator(".reply").all_inner_texts())
    return "tie" if first == second else "1" if first > second else "2"


def exported(page, path):
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    assert download.value.suggested_filename in page.inner_text("#said")
    return json.loads(path.read_text(encoding="utf-8"))


def test_answers_survive_a_reload_and_come_back_as_they_were_planted(opened, runs, capsys):
    page = opened()
    begin(page, "李雷 Lei")
    assert page.title() == "客服回复对比" and MARKUP in page.locator(".reply").first.inner_text()
    count = len(DIALOGUES)
    for number in range(count):
        assert page.inner_text("#number") == f"第 {number + 1} 项，共 {count} 项"
        choice = better(page)
        if number % 2:
            page.keyboard.press({"1": "1", "2": "2", "tie": "0"}[choice])  # each key answers one question
            for _ in CRITERIA:
                page.keyboard.press("0")
        else:
            page.locator("fieldset").first.locator("label", has=page.locator(f'[value="{choice}"]')).click()
            for each in range(len(CRITERIA)):
                page.locator("fieldset").nth(each + 1).locator("label").nth(1).click()
        if number == 4:
            page.fill("#comment", "两个都提到 1 和 2，0 分")
        assert page.inner_text("#progress") == f"已完成 {number + 1} / {count}"
        if number == 5:
            page.reload()
            assert page.inner_text("#who") == "李雷 Lei" and page.inner_text("#progress") == f"已完成 6 / {count}"
            assert page.locator("input:checked").count() == len(QUESTIONS)
            page.click("#previous")
            assert page.input_value("#comment") == "两个都提到 1 和 2，0 分"
            page.keyboard.press("ArrowRight")
        page.focus("#asked summary")
        page.keyboard.press("ArrowRight")
    content = exported(page, runs / "李雷.json")
    assert [set(answer["choices"]) for answer in content["ratings"]] == [set(QUESTIONS)] * count

    run_recipe("import", "李雷.json", "key=form/key.json", "run.directory=read", "human.bootstrap_resamples=200")
    key = read_key("form/key.json")
    placed = [PLACES.index((item.dialogue_id, item.turn)) % 4 for item in key.items]
    wins, losses = sum(n < 2 for n in placed), placed.count(2)
    assert 0 < losses < wins < count
    result = json.loads((runs / "read/human.json").read_text(encoding="utf-8"))
    rates = result["questions"]["overall"]["win_rate"]
    assert (rates["wins"], rates["ties"], rates["losses"]) == (wins, count - wins - losses, losses)
    assert rates["rate"]["value"] == pytest.approx(100 * (wins + rates["ties"] / 2) / count)
    assert rates["rate"]["low"] < rates["rate"]["value"] < rates["rate"]["high"]
    assert result["questions"]["empathy"]["win_rate"]["ties"] == count
    (comment,) = result["comments"]
    assert comment["rater"] == "李雷 Lei" and comment["text"] == "两个都提到 1 和 2，0 分"
    assert comment["dialogue_id"] == key.items[4].dialogue_id
    table = (runs / "read/human.md").read_text(encoding="utf-8")
    assert f"| overall | {rates['rate']['value']:.2f} [" in table and "secret-alpha of run0" in table
    assert "A preferred" in capsys.readouterr().out


def test_each_rater_on_a_computer_has_answers_of_their_own(opened, runs):
    page = opened("human.language=en", "human.criteria=[empathy]")
    begin(page, "Anna")
    assert page.locator("legend b").all_inner_texts() == ["Overall", "Empathy"]
    page.keyboard.press("1")
    assert page.inner_text("#progress") == f"0 of {len(DIALOGUES)} done"
    page.keyboard.press("2")
    page.click("#change")
    begin(page, "Ben")
    assert page.locator("input:checked").count() == 0
    page.keyboard.press("ArrowDown")
    page.keyboard.press("0")
    assert page.locator("input:checked").get_attribute("name") == "empathy"
    ben = exported(page, runs / "ben.json")
    assert f"{len(DIALOGUES)} items are not done yet" in page.inner_text("#said")
    page.click("#change")
    begin(page, "Anna")
    anna = exported(page, runs / "anna.json")
    key = read_key("form/key.json")
    first = key.items[0].item
    assert (anna["rater"], ben["rater"]) == ("Anna", "Ben")
    assert anna["ratings"] == [{"item": first, "choices": {"overall": "1", "empathy": "2"}, "comment": ""}]
    assert ben["ratings"] == [{"item": first, "choices": {"empathy": "tie"}, "comment": ""}]
    votes, _ = read_ratings(["anna.json", "ben.json"], key)
    assert votes["overall"] == {"Anna": {first: float(key.items[0].first == "A")}, "Ben": {}}
    assert votes["empathy"]["Ben"] == {first: 0.5}


def test_keys_answer_as_soon_as_a_rater_has_begun(opened):
    """Also before the page is drawn again, until when a hidden field would keep the focus."""
    page = opened()
    focused = page.evaluate(
        """() => {
          const field = document.getElementById("rater");
          field.focus();
          field.value = "甲";
          field.form.requestSubmit();
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "2", bubbles: true }));
          return document.activeElement.id;
        }"""
    )
    assert focused == ""
    assert page.locator("input:checked").get_attribute("value") == "2"


def test_without_a_store_the_form_says_so_and_works(opened, runs):
    denied = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = opened(script=denied)
    assert "请在离开之前导出" in page.inner_text("#unkept") and not page.is_visible("#kept")
    begin(page, "甲")
    assert page.is_visible("#unkept")
    page.keyboard.press("2")
    assert len(exported(page, runs / "a.json")["ratings"]) == 1
    allowed = opened()
    assert not allowed.is_visible("#unkept") and allowed.is_visible("#kept")


# The ratings


def key_of(firsts="ABABABABABAB"):
    """A key with an item a dialogue; `firsts` says whose reply is number 1."""
    items = [
        AnnotationItem(item=f"i{n}", dialogue_id=f"d{n}", turn=2, first=first, longer=n % 3)
        for n, first in enumerate(firsts)
    ]
    return UnblindingKey(
        form="s1", a="one of x", b="other of y", questions=QUESTIONS, turns=40, differing=30, strategies="hidden",
        items=items,
    )  # fmt: skip


def rating_file(key, rater, preferences, question="overall"):
    """The file in which a rater prefers "A", "B" or "=" at each item; a blank is no answer."""
    given = [
        {"item": item.item, "choices": {question: "tie" if each == "=" else "1" if each == item.first else "2"}}
        for item, each in zip(key.items, preferences, strict=False)
        if each != " "
    ]
    return {"form": key.form, "rater": rater, "ratings": given}


def results(tmp_path, key, raters, judge=None):
    for rater, preferences in raters.items():
        write_json(tmp_path / f"{rater}.json", rating_file(key, rater, preferences))
    votes, _ = read_ratings([tmp_path / f"{rater}.json" for rater in raters], key)
    return rater_results(votes, key, CONFIG, judge)


def test_ratings_are_unblinded_and_counted(tmp_path):
    key = key_of()
    found = results(tmp_path, key, {"Anna": "AAAAAAAAAA=B", "Ben": "AAAAAAAAAAAA"})["overall"]
    rates = found.win_rate
    assert (rates.wins, rates.ties, rates.losses) == (22, 1, 1)
    assert rates.rate.value == pytest.approx(100 * 22.5 / 24)
    assert {rater: each.rate.value for rater, each in found.raters.items()} == {"Anna": pytest.approx(87.5), "Ben": 100}
    assert found.verdict == "A is preferred" and found.adjusted < 0.05
    assert results(tmp_path, key, {"Anna": "BBBBBBBBBBBB"})["overall"].verdict == "B is preferred"
    level = results(tmp_path, key, {"Anna": "ABABABABABAB"})
    assert level["overall"].verdict == "not significant" and level["overall"].win_rate.rate.value == 50
    # One question was answered: the correction is for one, and the others are n/a.
    assert level["overall"].adjusted == level["overall"].win_rate.p_value
    assert level["empathy"].adjusted is level["empathy"].verdict is level["empathy"].win_rate.rate.value is None


def test_agreement_of_raters_by_hand(tmp_path):
    """On the 8 items that all answered: Anna and Ben agree on 6, Anna and Cai on 5, Ben and Cai on 7."""
    raters = {"Anna": "AAAABBB= AA ", "Ben": "AAABBBBBAAAA", "Cai": "AAABBB=BB   "}
    found = results(tmp_path, key_of(), raters)["overall"]
    assert found.shared == 8
    pairs = {(each.one, each.other): each for each in found.pairs}
    assert [each.items for each in found.pairs] == [10, 8, 9]
    anna_cai = pairs["Anna", "Cai"]
    # A: 4 and 3 of 8; B: 3 and 4; neither: 1 and 1. They agree on A 3 times and on B twice.
    by_chance = (4 * 3 + 3 * 4 + 1 * 1) / 64
    assert anna_cai.agreement.value == pytest.approx(100 * 5 / 8)
    assert anna_cai.kappa.value == pytest.approx((5 / 8 - by_chance) / (1 - by_chance))
    assert anna_cai.kappa.low is None  # of 8 dialogues there is no interval
    # Three agree on five items, two on three. A: 4 + 3 + 3, neither: 1 + 0 + 1, B: 3 + 5 + 4 of 24.
    observed, chance = (5 * 1 + 3 / 3) / 8, (10**2 + 2**2 + 12**2) / 24**2
    assert found.fleiss.value == pytest.approx((observed - chance) / (1 - chance))
    alone = results(tmp_path, key_of(), {"Anna": raters["Anna"]})["overall"]
    assert (alone.fleiss.value, alone.fleiss.reason, alone.pairs) == (None, "one rater", [])
    same = results(tmp_path, key_of(), {"Anna": "A" * 12, "Ben": "A" * 12})["overall"]
    assert same.fleiss.reason == same.pairs[0].kappa.reason == "all ratings are equal"
    apart = results(tmp_path, key_of(), {"Anna": "AAAA", "Ben": "    BBBB"})["overall"]
    assert apart.fleiss.reason == "no item was rated by all"
    assert apart.pairs[0].agreement.reason == apart.pairs[0].kappa.reason == "no items in common"


def test_most_raters_prefer_what_more_of_them_do():
    votes = {"a": {"x": 1.0, "y": 1.0, "z": 0.0}, "b": {"x": 1.0, "y": 0.0, "z": 0.5}, "c": {"x": 0.0, "y": 0.5}}
    assert majority(votes) == {"x": 1, "y": 0.5, "z": 0}


def judged_run(directory, a, b, better, points, swapped=False):
    """What recipes/judge.py writes where the judge's answers are planted: by index of the turn."""
    config = JudgeConfig(num_turns=None, bootstrap_resamples=200, permutations=1000)
    systems = (b, a) if swapped else (a, b)
    asked = judge_questions(*systems, DIALOGUES, config)
    planted = {}
    for question in asked:
        n = PLACES.index((question.dialogue_id, question.turn))
        if question.task == "pairwise":
            winner = better(n)
            side = question.side.translate(str.maketrans("AB", "BA")) if swapped else question.side
            planted[question] = {"reason": "-", "better": "tie" if winner == "=" else str(side.index(winner) + 1)}
        else:
            side = {"A": "B", "B": "A"}[question.side] if swapped else question.side
            planted[question] = {"reason": "-"} | dict.fromkeys(CRITERIA, points(n, side))
    judged = JudgeReport(planted, {}, {"attempts": 0, "prompt_tokens": 0, "completion_tokens": 0})
    names = [f"{NAMES[0]} of ./run0/", f"{NAMES[1]} of run1"]
    facts = dict(zip("ab", reversed(names) if swapped else names, strict=True)) | {"judge": "m"}
    write_json(directory / "judge.json", facts | judge_json(summarize(*systems, judged, config), judged))


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_a_judge_is_a_rater_beside_the_people(runs, swapped):
    """The judge agrees with Anna on every item but those of two dialogues, whichever system it calls A."""
    run_recipe("export", "run0", "run1", "run.directory=form")
    key = read_key("form/key.json")
    by_place = {(item.dialogue_id, item.turn): n for n, item in enumerate(key.items)}
    wanted = "AABB=AABB=AABB"

    def better(n):
        number = by_place.get(PLACES[n], 2)
        return "=" if number < 2 else wanted[number]

    judged_run(
        runs / "judged", *map(predictions, (0, 1)), better, lambda n, side: 4 if side == "A" else 2, swapped=swapped
    )
    (runs / "anna.json").write_text(json.dumps(rating_file(key, "Anna", wanted)), encoding="utf-8")
    votes, _ = read_ratings(["anna.json"], key)
    name, preferences = read_judge_preferences("judged", key)
    (pair,) = rater_results(votes, key, CONFIG, (name, preferences))["overall"].pairs
    assert (pair.one, pair.other, pair.items) == ("Anna", "judge m", len(wanted))
    assert pair.agreement.value == pytest.approx(100 * 12 / 14)
    # Anna: A 6, B 6, neither 2; the judge: A 4, B 6, neither 4.
    by_chance = (6 * 4 + 6 * 6 + 2 * 4) / 14**2
    assert pair.kappa.value == pytest.approx((12 / 14 - by_chance) / (1 - by_chance))
    assert pair.kappa.low < pair.kappa.value < pair.kappa.high
    assert set(preferences["empathy"].values()) == {1.0}

    run_recipe("import", "anna.json", "key=form/key.json", "judge=judged", "run.directory=read")
    assert "| Anna / judge m | 14 | 85.71 [" in (runs / "read/human.md").read_text(encoding="utf-8")
    two = {"overall": {"Anna": votes["overall"]["Anna"], "Ben": {}}}
    assert rater_results(two, key, CONFIG, (name, preferences))["overall"].pairs[-1].one == MAJORITY

    other = key.model_copy(update={"b": "another of z"})
    with pytest.raises(InputError, match=r"judge\.json: judges .*, but the form compares .* and another of z$"):
        read_judge_preferences("judged", other)
    write_json(runs / "judged/judge.json", {"a": "x"})
    with pytest.raises(InputError, match=r"judge\.json: not a result of recipes/judge\.py"):
        read_judge_preferences("judged", key)


def test_tables_name_questions_and_raters(tmp_path):
    key = key_of()
    preference, raters, agreement = rating_tables(results(tmp_path, key, {"Anna": "A" * 12, "Ben": "B" * 12}), key)
    assert [row[0] for row in preference.rows] == QUESTIONS and preference.rows[1][-2:] == ["n/a", "n/a"]
    assert "2 raters, 12 items, drawn among the 30 of 40 turns" in preference.notes[0]
    assert raters.header == ["rater", "items", "overall"]  # no other question was answered
    assert [(*row[:2], row[2].value) for row in raters.rows] == [("Anna", 12, 100), ("Ben", 12, 0)]
    assert [row[:2] for row in agreement.rows] == [["all raters", 12], ["Anna / Ben", 12]]
    assert (agreement.rows[1][2].value, agreement.rows[1][3].value) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(form="s2"), "rates form s2, but the key is of form s1"),
        (lambda c: c.update(rater=" "), "field rater: empty"),
        (lambda c: c.update(rater=3), "field rater: Input should be a valid string: give a file that a form exported"),
        (lambda c: c.pop("ratings"), "field ratings: Field required: give a file that a form exported"),
        (lambda c: c.update(more=1), "field more: Extra inputs are not permitted: give a file that a form exported"),
        (lambda c: c["ratings"][1].update(item="i0"), "item i0: rated twice"),
        (lambda c: c["ratings"][1].update(item="x"), "item x: not in form s1"),
        (lambda c: c["ratings"][1]["choices"].update(overall="3"),
         "item i1, field choices.overall: Input should be '1', '2' or 'tie': give a file that a form exported"),
        (lambda c: c["ratings"][1]["choices"].update(taste="1"),
         "item i1, field choices.taste: not asked in this form"),
        (lambda c: c["ratings"][1].pop("item"),
         "item number 2, field item: Field required: give a file that a form exported"),
        (lambda c: c["ratings"].append(7), "item number 13: Input should be"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_right_are_refused(tmp_path, change, message):
    key = key_of()
    content = rating_file(key, "Anna", "A" * 12)
    path = tmp_path / "anna.json"
    write_json(path, content)
    assert read_ratings([path], key)[0]["overall"]["Anna"] == {item.item: 1.0 for item in key.items}
    change(content)
    write_json(path, content)
    with pytest.raises(InputError) as caught:
        read_ratings([path], key)
    assert str(caught.value).startswith(f"{path}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rater_counts_once_and_a_key_is_a_key(tmp_path):
    key = key_of()
    for name, rater in (("x", "Anna"), ("y", "anna ")):
        write_json(tmp_path / f"{name}.json", rating_file(key, rater, "A" * 12))
    with pytest.raises(InputError, match=r"y\.json: rater anna is also in .*x\.json"):
        read_ratings([tmp_path / "x.json", tmp_path / "y.json"], key)
    content = key.model_dump()
    content["items"][3]["first"] = "C"
    write_json(tmp_path / "key.json", content)
    with pytest.raises(InputError, match=r"key\.json, item i3, field first: Input should be 'A' or 'B'"):
        read_key(tmp_path / "key.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "x"], "action=export: give two run directories, not 1"),
        (["export", "x", "y", "key=z"], "key: only action=import takes it; leave it out"),
        (["import", "x.json"], "key is required: give the key.json of the annotation form by key=..."),
        (["import", "x.json", "key=k", "system_a=z"], "system_a: the key knows the systems; leave it out"),
        (["exprot", "x", "y"], "action=exprot: choose one of export, import. Did you mean 'export'?"),
        ([], "action is required: give action=..."),
        (["import"], "inputs is required: give inputs=..."),
        (["export", "x", "y", "human.criteria=[emphaty]"], "human.criteria=emphaty: choose one of strategy"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(words, message):
    with pytest.raises(InputError) as caught:
        compose("human_eval", words)
    assert str(caught.value).startswith(message)


def test_files_may_have_any_name():
    names = ["李雷.json", "a b/it's {1}.json", "back\\slash,.json"]
    config = compose("human_eval", ["import", *names, "key=k.json"])
    assert (config.action, config.inputs, config.key) == ("import", names, "k.json")
