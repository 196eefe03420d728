"""Known answers for every number of the quality report, and the page that shows them."""

import json
import random
import re

import numpy
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.synthesis.quality_report import (
    jensen_shannon,
    quality_report,
    self_bleu,
    text_variety,
    write_quality_report,
)


def dialogue(name, numbers, customer=("好的",), **extra):
    turns = []
    for place, number in enumerate(numbers):
        turns.append(Turn(Speaker.SUPPORTER, "您好", STRATEGIES[number - 1]))
        if place < len(numbers) - 1:
            turns.append(Turn(Speaker.CUSTOMER, customer[place % len(customer)]))
    return Dialogue(name, tuple(turns), extra=extra)


def test_strategies_stages_and_transitions_are_counted():
    report = quality_report([dialogue("a", [1, 2, 12, 3, 3, 11]), dialogue("b", [1, 11])])
    counts = dict(enumerate(report["strategies"]["set"], start=1))
    assert {number: count for number, count in counts.items() if count} == {1: 2, 2: 1, 3: 2, 11: 2, 12: 1}
    stages = numpy.array(report["stage_by_strategy"]["set"])
    # none yet: greetings; Connecting: 2, then Others leaves it, so 12 and 3, and in b 11; Identifying: 3, then 11.
    expected = {(0, 1): 2, (1, 2): 1, (1, 12): 1, (1, 3): 1, (1, 11): 1, (2, 3): 1, (2, 11): 1}
    assert {(row, column + 1): stages[row, column] for row, column in zip(*stages.nonzero(), strict=True)} == expected
    pairs = numpy.array(report["transitions"]["set"])
    expected = {(1, 2): 1, (2, 12): 1, (12, 3): 1, (3, 3): 1, (3, 11): 1, (1, 11): 1}
    assert {(i + 1, j + 1): pairs[i, j] for i, j in zip(*pairs.nonzero(), strict=True)} == expected
    progress = numpy.array(report["progress_by_strategy"]["set"])
    assert progress.sum(axis=1).tolist() == [3, 1, 2, 1, 1] and progress[0].tolist()[:2] == [2, 1]


def test_divergence_by_hand():
    assert jensen_shannon(numpy.array([3, 1]), numpy.array([30, 10])) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(numpy.array([5, 0]), numpy.array([0, 7])) == pytest.approx(1)
    # (1, 0) against (1/2, 1/2), middle (3/4, 1/4): log2(4/3)/2 + (log2(2/3)/2 + log2(2)/2)/2.
    by_hand = numpy.log2(4 / 3) / 2 + (numpy.log2(2 / 3) + 1) / 4
    assert jensen_shannon(numpy.array([2, 0]), numpy.array([4, 4])) == pytest.approx(by_hand)
    assert jensen_shannon(numpy.zeros(2), numpy.array([1, 1])) is None


def test_a_set_is_like_itself_and_unlike_another():
    own, other = [dialogue("a", [1, 2, 3, 11])], [dialogue("b", [1, 4, 8, 11])]
    alike = quality_report(own, reference=own)["divergence"]
    assert alike == pytest.approx({"strategies": 0, "stage_by_strategy": 0, "transitions": 0}, abs=1e-12)
    apart = quality_report(own, reference=other)["divergence"]
    assert apart["transitions"] == pytest.approx(1) and 0 < apart["strategies"] < 1
    assert quality_report(own)["divergence"] is None


def test_lengths():
    report = quality_report([dialogue("a", [1, 2, 11], ("一二三四",)), dialogue("b", [1, 11], ("一二",))])["lengths"][
        "set"
    ]
    assert report["histogram"] == [(3, 1), (5, 1)]
    found = report["summary"]
    assert found["utterances per dialogue"] == {"mean": 4, "min": 3, "p5": 3.1, "median": 4, "p95": 4.9, "max": 5}
    assert found["characters per customer utterance"]["mean"] == pytest.approx(10 / 3)
    assert found["characters per supporter utterance"]["max"] == 2


def test_variety_by_hand():
    found = text_variety([["您好", "请讲"], ["您好", "请", "讲"]], seed=0)
    assert found["distinct-1"] == 100 * 4 / 5
    assert found["distinct-2"] == 100 and found["distinct-3"] == 100
    repeated = text_variety([["您好", "请讲"]] * 50, seed=0)
    assert repeated["distinct-1"] == 2 and repeated["compression"] > 5
    same = text_variety([["一", "二", "三", "四", "五"]] * 9, seed=0)
    apart = text_variety([[str(10 * text + word) for word in range(5)] for text in range(9)], seed=0)
    assert same["self-BLEU"] == pytest.approx(100) and apart["self-BLEU"] == 0
    assert text_variety([], seed=0) == dict.fromkeys(
        ("distinct-1", "distinct-2", "distinct-3", "compression", "self-BLEU"), None
    )


def test_self_bleu_is_that_of_nltk():
    rng = random.Random(0)
    smoothing = SmoothingFunction().method1
    for most in (2, 5, 30):
        texts = [rng.choices("一二三四五", k=rng.randint(1, 9)) for _ in range(most)]
        texts += [["六"] * 3, ["一"] * 9, texts[0]]
        others = [[*texts[:place], *texts[place + 1 :]] for place in range(len(texts))]
        expected = [
            sentence_bleu(rest, text, smoothing_function=smoothing) for rest, text in zip(others, texts, strict=True)
        ]
        assert self_bleu(texts) == pytest.approx(expected)


def test_variety_is_compared_on_as_many_words():
    few, many = generate_sample(3, 0), generate_sample(40, 0)
    own = quality_report(few)["variety"]["supporter"]
    beside = quality_report(few, reference=many)["variety"]["supporter"]
    assert beside["words"] == own["words"] and beside["set"] == own["set"]
    alone = quality_report(many)["variety"]["supporter"]
    assert alone["words"] > 5 * own["words"]
    # A larger set has fewer different words per word; cut to the same length it has about as many.
    assert alone["set"]["distinct-1"] < own["set"]["distinct-1"] / 2
    assert beside["reference"]["distinct-1"] > own["set"]["distinct-1"] / 1.5


PROFILES = {"退款": "客户想办理退款，信用卡丢失", "宽带": "客户家里宽带断网，路由器故障"}


def described(count):
    """Dialogues whose customers use the words of their own profile, one in the first turn, another in the second."""
    said = {"退款": ("我要退款。", "信用卡不见了。"), "宽带": ("我的宽带坏了。", "路由器没有亮。")}
    names = [list(PROFILES)[place % 2] for place in range(count)]
    dialogues = [dialogue(str(place), [1, 2, 11], said[name], topic="同一") for place, name in enumerate(names)]
    return dialogues, {str(place): PROFILES[name] for place, name in enumerate(names)}


def test_customers_who_speak_of_their_own_profile_are_distinguished_from_others():
    dialogues, profiles = described(20)
    rows = quality_report(dialogues, profiles=profiles)["profiles"]
    assert [(row["turn"], row["dialogues"]) for row in rows] == [(1, 20), (2, 20)]
    # Of 客户, 办理, 退款, 信用卡 and 丢失 one word, then two; of 客户, 家里, 宽带, 断网, 路由器 and 故障 as well.
    assert [row["own"] for row in rows] == pytest.approx([(1 / 5 + 1 / 6) / 2, (2 / 5 + 2 / 6) / 2])
    assert [row["other"] for row in rows] == [0, 0]
    assert rows[1]["own_low"] <= rows[1]["own"] <= rows[1]["own_high"] and rows[1]["own_low"] > rows[1]["other_high"]


def test_profiles_that_are_exchanged_change_the_sides():
    dialogues, profiles = described(20)
    exchanged = {name: next(other for other in PROFILES.values() if other != text) for name, text in profiles.items()}
    straight = quality_report(dialogues, profiles=profiles)["profiles"][1]
    crossed = quality_report(dialogues, profiles=exchanged)["profiles"][1]
    assert (crossed["own"], crossed["other"]) == pytest.approx((straight["other"], straight["own"]))


def test_profiles_need_another_of_their_topic_and_intervals_need_dialogues():
    dialogues, profiles = described(6)
    rows = quality_report(dialogues, profiles=profiles)["profiles"]
    assert rows[0]["own"] > 0 and rows[0]["own_low"] is None
    apart = [Dialogue(each.id, each.turns, extra={"topic": profiles[each.id]}) for each in dialogues]
    assert quality_report(apart, profiles=profiles)["profiles"] == []
    assert quality_report(dialogues)["profiles"] is None


def test_cost_is_reported_per_accepted_dialogue():
    dialogues = [dialogue(str(place), [1, 11]) for place in range(4)]
    report = quality_report(dialogues, usage={"requests": 10, "cost": 2.0})
    assert report["per_accepted"] == {"requests": 2.5, "cost": 0.5}
    assert quality_report([], usage={"requests": 10})["per_accepted"] == {}


def test_the_page_and_the_numbers_are_written_whole(tmp_path):
    dialogues, profiles = described(12)
    rows = [{"rule": "rounds", "entered": 3, "dropped": 1, "kept": 2, "reasons": {"fewer than 3 <rounds>": 1}}]
    report = quality_report(
        dialogues,
        reference=generate_sample(5, 0),
        profiles=profiles,
        funnel=rows,
        usage={"cost": 1.5},
        agreement={"roles_kept": {"unanimous": 0.75, "fleiss_kappa": None}},
    )
    write_quality_report(tmp_path, report, "A & B")
    assert json.loads((tmp_path / "quality.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "quality.html").read_text()
    assert "<title>A &amp; B</title>" in page and "fewer than 3 &lt;rounds&gt;" in page
    assert '<td class="name">roles kept</td><td>75</td><td>n/a</td>' in page
    assert not re.search(r"https?://|<script|src=|\{\{|\bnan\b|\bNone\b", page)
    assert page.count("<svg") == 2 and page.count('<i style="width:') == 24 and page.count('class="map"') == 6


@pytest.mark.parametrize("width", [360, 390, 800, 1440])
def test_the_page_does_not_scroll_sideways_and_its_drawings_are_readable(tmp_path, browser, width):
    dialogues, profiles = described(12)
    reasons = {"unknown_strategy_of_a_turn_" * 4: 12, "fewer than 3 rounds": 123456, "客服没有回答" * 30: 1}
    row = {"rule": "five criteria", "entered": 123456, "dropped": 99999, "kept": 23457, "reasons": reasons}
    report = quality_report(
        dialogues,
        reference=generate_sample(40, 0),
        profiles=profiles,
        funnel=[row] * 5,
        usage={"prompt_tokens": 12345678901, "cost": 1.5},
        agreement={"roles_kept": {"unanimous": 1, "fleiss_kappa": 1}},
    )
    write_quality_report(tmp_path, report, "1,000 synthetic dialogues (source=synthetic-sample)")
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "quality.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for kind, least in (("svg text", 9), (".bars .name", 12), ("td", 12)):
        heights = page.locator(kind).evaluate_all("found => found.map(each => each.getBoundingClientRect().height)")
        assert min(heights) > least, kind
    # Each bar and the number behind it are in one line, in the page.
    bars = page.locator(".bars div div")
    assert bars.count() == 24 and bars.evaluate_all("found => Math.max(...found.map(each => each.clientHeight))") < 20
    assert bars.evaluate_all("found => Math.max(...found.map(each => each.scrollWidth - each.clientWidth))") == 0
    page.close()


@pytest.mark.parametrize("dialogues", [[], [dialogue("a", [1])]])
def test_a_tiny_set_has_a_report(tmp_path, dialogues):
    report = quality_report(dialogues, profiles={"a": "客户"}, usage={"cost": 1.5})
    write_quality_report(tmp_path, report, "x")
    assert f"<p>{len(dialogues)} dialogues" in (tmp_path / "quality.html").read_text()


def test_the_same_set_has_the_same_report_whatever_the_order_of_profiles():
    dialogues, profiles = described(20)
    backwards = dict(reversed(profiles.items()))
    assert quality_report(dialogues, profiles=profiles) == quality_report(dialogues, profiles=backwards)
