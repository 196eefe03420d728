"""The rules for calls and rewritten calls: both sides of every threshold, any input, and the reasons of verdicts."""

import itertools
import random

import pytest
from conftest import random_dialogue

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.synthesis.config import CallFilterConfig, DuplicatesConfig, RewriteFilterConfig
from csc_train.synthesis.filters.funnel import filter_funnel, funnel_table
from csc_train.synthesis.filters.rules import (
    DuplicateFilter,
    FilterVerdict,
    check_call,
    check_private_data,
    check_rewrite,
)
from csc_train.synthesis.utterances import Utterance, merge_turns, strip_boilerplate, turns_of, utterances_of

S, C = Speaker.SUPPORTER, Speaker.CUSTOMER
CALL, REWRITE = CallFilterConfig(), RewriteFilterConfig()


def call(rounds=5, text="我想问一下"):
    return [Utterance(speaker, text) for _ in range(rounds) for speaker in (S, C)]


def rewritten(count=11, strategies=(1, 2, 11)):
    """Alternating turns, the supporter's with the strategies in turn."""
    labels = [STRATEGIES[strategies[place // 2 % len(strategies)] - 1].label for place in range(count)]
    return [Utterance(C, "好的") if place % 2 else Utterance(S, "您好", labels[place]) for place in range(count)]


def dropped(verdicts):
    """The rule and reason that dropped a conversation, or None."""
    *before, last = verdicts
    assert all(verdict.keep for verdict in before)
    return None if last.keep else (last.rule, last.reason)


def test_what_all_rules_keep_has_met_every_one():
    assert [verdict.rule for verdict in check_call(call(), CALL)] == [
        "rounds", "turn length", "customer's turns", "customer's words",
    ]  # fmt: skip
    assert [verdict.rule for verdict in check_rewrite(rewritten(), REWRITE)] == [
        "texts", "utterances", "alternation", "one strategy", "known strategies", "required strategies", "private data",
    ]  # fmt: skip
    assert dropped(check_call(call(), CALL)) == dropped(check_rewrite(rewritten(), REWRITE)) is None


@pytest.mark.parametrize(
    ("rounds", "reason"),
    [(2, "fewer than 3 rounds"), (3, None), (30, None), (31, "more than 30 rounds")],
)
def test_rounds(rounds, reason):
    assert dropped(check_call(call(rounds), CALL)) == (reason and ("rounds", reason))


def test_a_round_needs_both_speakers_and_merged_turns_are_one():
    two_and_a_half = [*call(2), Utterance(S, "再见")]
    assert dropped(check_call(two_and_a_half, CALL)) == ("rounds", "fewer than 3 rounds")
    torn = [Utterance(each.speaker, part) for each in call(2) for part in ("我想", "问一下")]
    assert dropped(check_call(torn, CALL)) == ("rounds", "fewer than 3 rounds")
    assert dropped(check_call([], CALL)) == ("rounds", "fewer than 3 rounds")


@pytest.mark.parametrize("place", [4, 5])
def test_the_longest_turn(place):
    said = call()
    for length, verdict in ((500, None), (501, ("turn length", "a turn of more than 500 characters"))):
        said[place] = said[place]._replace(text="长" * length)
        assert dropped(check_call(said, CALL)) == verdict


@pytest.mark.parametrize(("supporter", "customer", "keep"), [(8, 4, False), (7, 4, True), (9, 4, False), (4, 4, True)])
def test_the_customer_has_more_than_half_of_the_supporters_turns_as_recorded(supporter, customer, keep):
    said = [Utterance(S, "您好您好")] * (supporter - customer) + call(customer)
    verdict = dropped(check_call(said, CALL))
    assert verdict == (None if keep else ("customer's turns", "the customer has at most 0.5 of the supporter's turns"))


@pytest.mark.parametrize(("long", "short", "keep"), [(7, 3, True), (6, 3, False), (14, 6, True), (13, 6, False)])
def test_seventy_percent_of_the_customers_turns_have_more_than_three_characters(long, short, keep):
    texts = ["四个字呢"] * long + ["三个字"] * short
    said = [each for text in texts for each in (Utterance(S, "您好"), Utterance(C, text))]
    assert (dropped(check_call(said, CALL)) is None) is keep
    if not keep:
        assert dropped(check_call(said, CALL))[0] == "customer's words"
        assert check_call(said, CALL)[-1].detail == f"{long} of {long + short}"


def test_thresholds_are_the_configurations():
    config = CallFilterConfig(
        min_rounds=1, max_rounds=2, max_characters=9, customer_share=1, short_characters=1, long_share=1
    )
    assert dropped(check_call(call(1, "两字"), config)) == (
        "customer's turns", "the customer has at most 1 of the supporter's turns",
    )  # fmt: skip
    assert dropped(check_call(call(3), config)) == ("rounds", "more than 2 rounds")
    assert (
        dropped(check_rewrite(rewritten(3), RewriteFilterConfig(min_utterances=3, required_strategies=[1, 2]))) is None
    )


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (CallFilterConfig, {"max_rounds": 2}, "call.min_rounds=3: must be at most call.max_rounds=2"),
        (CallFilterConfig, {"long_share": 1.1}, "call.long_share=1.1: must be between 0 and 1"),
        (
            RewriteFilterConfig,
            {"max_utterances": 9},
            "rewrite.min_utterances=10: must be at most rewrite.max_utterances=9",
        ),
        (
            RewriteFilterConfig,
            {"required_strategies": [1, 13]},
            "rewrite.required_strategies=13: must be between 1 and 12",
        ),
        (DuplicatesConfig, {"opening": 0}, "duplicates.opening=0: must be above 0 and at most 1, or null"),
        (DuplicatesConfig, {"dialogue": 1.01}, "duplicates.dialogue=1.01: must be above 0 and at most 1, or null"),
    ],
)
def test_thresholds_out_of_range_are_refused(config, values, message):
    with pytest.raises(InputError) as caught:
        config(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("count", "reason"),
    [(9, "fewer than 10 utterances"), (10, None), (50, None), (51, "more than 50 utterances")],
)
def test_utterances_of_a_rewritten_call(count, reason):
    assert dropped(check_rewrite(rewritten(count), REWRITE)) == (reason and ("utterances", reason))


def replaced(place, **changes):
    said = rewritten()
    said[place] = said[place]._replace(**changes)
    return said


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (replaced(3, text=" \n"), ("texts", "an empty text")),
        (replaced(3, text="好\ud83d"), ("texts", "a lone surrogate")),
        (replaced(0, label="策略1\udc00"), ("texts", "a lone surrogate")),
        (rewritten(12)[1:], ("alternation", "the supporter does not speak first")),
        (replaced(3, speaker=S), ("alternation", "one speaker twice in a row")),
        (replaced(4, label="策略5 情感管理+策略6 提供建议"), ("one strategy", "a turn with two strategies")),
        (replaced(4, label="情感管理＋提供建议"), ("one strategy", "a turn with two strategies")),
        (replaced(4, label="安抚客户"), ("known strategies", "an unknown strategy")),
        (replaced(4, label=""), ("known strategies", "an unknown strategy")),
        (replaced(4, label="策略13 其它"), ("known strategies", "an unknown strategy")),
        (rewritten(strategies=(2, 11)), ("required strategies", "without 策略1 礼貌问候")),
        (rewritten(strategies=(1, 11)), ("required strategies", "without 策略2 确认身份")),
        (rewritten(strategies=(1, 2)), ("required strategies", "without 策略11 感谢与告别")),
        (replaced(5, text="我的手机是13812345678"), ("private data", "a phone number")),
        (replaced(5, text="证件11010519491231002X"), ("private data", "an identity card number")),
        (replaced(5, label="策略5+策略6"), None),  # a customer's label is left out
        (replaced(5, text="我的手机是[手机号码]"), None),
    ],
)
def test_rules_for_rewritten_calls(said, verdict):
    assert dropped(check_rewrite(said, REWRITE)) == verdict


def test_each_required_strategy_is_needed_once_only():
    for number in (1, 2, 11):
        said = rewritten(strategies=(1, 2, 11) + (7,) * 3)
        there = [place for place, each in enumerate(said) if each.label == STRATEGIES[number - 1].label]
        assert len(there) == 1 and dropped(check_rewrite(said, REWRITE)) is None
        said[there[0]] = said[there[0]]._replace(label="信息传达")
        assert dropped(check_rewrite(said, REWRITE))[0] == "required strategies"


def test_private_data_is_reported_by_its_kind_and_place_and_not_repeated():
    verdict = check_private_data(replaced(5, text="我的手机是13812345678"))
    assert verdict == FilterVerdict("private data", False, "a phone number", "turn 6")


def test_merging():
    said = [
        Utterance(S, " 您好 "),
        Utterance(S, "请讲"),
        Utterance(C, ""),
        Utterance(S, "喂"),
        Utterance(C, "我想退货"),
    ]
    assert merge_turns(said) == [Utterance(S, "您好 请讲 喂"), Utterance(C, "我想退货")]
    assert merge_turns([]) == merge_turns([Utterance(C, "\n")]) == []


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (["再见。", "（通话结束）"], ["再见。"]),
        (["再见。", "【系统提示：客户已挂断】", "[通话已结束]"], ["再见。"]),
        (["再见。（电话已挂断）"], ["再见。"]),
        (["再见。 [Call ended]"], ["再见。"]),
        (["再见。（系统：通话结束）（录音已保存）。"], ["再见。"]),
        (["（笑）"], []),  # nothing but brackets at the end is nobody's turn
        (["我的号码是[手机号码]"], ["我的号码是[手机号码]"]),
        (["[手机号码]"], ["[手机号码]"]),
        (["请在App（首页）里办理（免费）"], ["请在App（首页）里办理（免费）"]),
        (["（通话结束）再见"], ["（通话结束）再见"]),
    ],
)
def test_notices_at_the_end_are_taken_off(last, kept):
    before = [Utterance(S, "您好"), Utterance(C, "（通话结束）"), Utterance(S, "请讲")]
    said = [*before, *(Utterance(C if place % 2 else S, text, "x") for place, text in enumerate(last))]
    assert [each.text for each in strip_boilerplate(said)[3:]] == kept
    assert strip_boilerplate(said)[:3] == before


def test_nothing_but_notices_leaves_nothing():
    assert (
        strip_boilerplate([Utterance(S, "（通话开始）"), Utterance(C, "（通话结束）")]) == strip_boilerplate([]) == []
    )


def random_utterances(rng):
    texts = [
        "",
        " ",
        "好",
        "您好，请问",
        "长" * 501,
        "\ud83d",
        "（结束）",
        "[手机号码]",
        "13812345678",
        "😀",
        "\n",
        "[",
        "）",
    ]
    labels = ["", "策略1 礼貌问候", "2", "AC", "策略5+策略6", "胡说", "\udc00", "策略13", "12"]
    return [
        Utterance(rng.choice((S, C)), "".join(rng.choices(texts, k=rng.randint(0, 3))), rng.choice(labels))
        for _ in range(rng.randint(0, 70))
    ]


def alternating(rng):
    """Turns that pass most rules, so that each rule has something to decide."""
    said = rewritten(rng.randint(8, 53), (*rng.sample(range(1, 13), 5), 1, 2, 11))
    for _ in range(rng.choice((0, 0, 1))):
        said[rng.randrange(len(said))] = rng.choice(random_utterances(rng) or said)
    return said


@pytest.mark.slow
def test_any_text_gets_verdicts_and_a_kept_one_makes_a_valid_dialogue(tmp_path):
    rng = random.Random(0)
    kept = []
    for number in range(3000):
        said = (random_utterances if number % 2 else alternating)(rng)
        merged = merge_turns(said)
        assert all(one.speaker is not other.speaker for one, other in itertools.pairwise(merged))
        assert merge_turns(merged) == merged
        stripped = strip_boilerplate(said)
        assert strip_boilerplate(stripped) == stripped and len(stripped) <= len(said)
        for verdicts in (check_call(said, CALL), check_rewrite(said, REWRITE)):
            assert verdicts and all(isinstance(verdict, FilterVerdict) for verdict in verdicts)
            assert all(verdict.keep and not verdict.reason for verdict in verdicts[:-1])
            assert verdicts[-1].keep or verdicts[-1].reason
        if check_rewrite(said, REWRITE)[-1].keep:
            dialogue = Dialogue(str(number), turns_of(said))
            assert utterances_of(dialogue) == [
                each._replace(text=each.text.strip(), label=each.label and turn.strategy.label if turn.strategy else "")
                for each, turn in zip(said, dialogue.turns, strict=True)
            ]
            kept.append(dialogue)
    assert 300 < len(kept) < 2000
    write_dialogues(tmp_path / "kept.jsonl", kept)
    assert read_dialogues(tmp_path / "kept.jsonl", strict=True) == kept


def long_dialogue(seed, opening=None, tail=None):
    rng = random.Random(seed)
    texts = ["".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(20)) for _ in range(20)]
    texts = (opening or texts[:4]) + texts[4:15] + (tail or texts[15:])
    said = [each._replace(text=text) for each, text in zip(rewritten(20), texts, strict=True)]
    return Dialogue(f"d{seed}", turns_of(said))


def test_repeats_are_dropped_and_the_first_is_kept():
    first, other = long_dialogue(0), long_dialogue(1)
    same_opening = long_dialogue(2, opening=[turn.text for turn in first.turns[:4]])
    nearly = long_dialogue(0, tail=["改", "了", "一", "点", "点"])
    repeats = DuplicateFilter(DuplicatesConfig(dialogue=0.6))
    assert repeats.check(first, "客户发现账单里多了一笔年费") == FilterVerdict("near-duplicates", True)
    assert repeats.check(other, "客户的宽带从昨晚开始断网") == FilterVerdict("near-duplicates", True)
    assert repeats.check(same_opening).reason == "repeats the opening of another"
    assert repeats.check(nearly).reason == "repeats another"
    again = repeats.check(long_dialogue(3), "客户发现账单里多了一笔年费")
    assert (again.reason, again.detail) == ("repeats the scenario of another", "1.00 like d0")
    # What was dropped is not remembered: its own repeat is told to be like the first.
    assert repeats.check(nearly).detail.endswith("like d0")
    assert repeats.check(long_dialogue(3), "客户想提前还清车贷") == FilterVerdict("near-duplicates", True)


def test_a_part_that_is_not_looked_at_may_repeat():
    repeats = DuplicateFilter(DuplicatesConfig(dialogue=None, opening=None, scenario=0.8))
    dialogue = random_dialogue(random.Random(0))
    assert [repeats.check(dialogue, scenario).keep for scenario in ("", "", "客户想退货", "客户想退货")] == [
        True, True, True, False,
    ]  # fmt: skip


KEPT, TOO_FEW, TOO_MANY = (
    FilterVerdict("a", True),
    FilterVerdict("a", False, "too few"),
    FilterVerdict("a", False, "too many"),
)


def test_the_filter_funnel_counts_up_to_the_first_drop():
    late = FilterVerdict("b", False, "late")
    rows = filter_funnel(
        [[KEPT, late], [TOO_FEW], [TOO_FEW], [TOO_MANY], [KEPT, FilterVerdict("b", True)], [KEPT]], "abc"
    )
    assert rows == [
        {"rule": "a", "entered": 6, "dropped": 3, "kept": 3, "reasons": {"too few": 2, "too many": 1}},
        {"rule": "b", "entered": 2, "dropped": 1, "kept": 1, "reasons": {"late": 1}},
        {"rule": "c", "entered": 0, "dropped": 0, "kept": 0, "reasons": {}},
    ]
    table = funnel_table(rows, "x")
    assert [[str(cell) for cell in column.cells] for column in table.columns[:4]] == [
        ["a", "b", "c"], ["6", "2", "0"], ["3", "1", "0"], ["3", "1", "0"],
    ]  # fmt: skip
