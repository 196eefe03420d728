"""The state machine of one dialogue: who is asked when, when it ends, and what becomes of unusable strategies."""

import itertools
import random

import pytest

from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import CLOSURE, OTHERS, STRATEGIES
from csc_train.synthesis.config import MAX_UTTERANCES
from csc_train.synthesis.rolecs.engine import (
    Behaviour,
    DialogueState,
    RoleQuestion,
    Scenario,
    advance,
    next_question,
    stop_reason,
)
from csc_train.synthesis.rolecs.engine import dialogue_outcome as outcome_of
from csc_train.synthesis.rolecs.roles import answer_schema

SCENE = Scenario("你是一位会计。", "产品咨询", "着急", Behaviour(patience="short"))


def say(state, **answer):
    """Answer the state's question, through the schema of the role that is asked."""
    form = answer_schema(next_question(state).role, "zh", False)
    return advance(state, form.model_validate(answer))


def planned(most=MAX_UTTERANCES):
    return say(DialogueState(SCENE, most), scenario="卡丢了", goal="补卡")


def supporter(state, label, text="请讲。"):
    return say(say(state, strategy=label), text=text)


def customer(state, text="好的。", finished=False):
    return say(say(state, direction="回答"), text=text, finished=finished)


def test_the_roles_are_asked_in_turn():
    state, asked = DialogueState(SCENE), []
    for answer in (
        {"scenario": "卡丢了", "goal": "补卡"},
        {"strategy": "礼貌问候"}, {"text": "您好。"}, {"direction": "说事"}, {"text": "卡丢了。", "finished": False},
        {"strategy": "确认身份"}, {"text": "贵姓？"}, {"direction": "回答"}, {"text": "姓王。", "finished": False},
    ):  # fmt: skip
        asked.append(next_question(state).role)
        state = say(state, **answer)
    one_round = ["supporter_assistant", "supporter", "customer_assistant", "customer"]
    assert asked == ["planner", *one_round, *one_round]
    assert [(turn.speaker, turn.strategy and turn.strategy.zh, turn.text) for turn in state.turns] == [
        (Speaker.SUPPORTER, "礼貌问候", "您好。"), (Speaker.CUSTOMER, None, "卡丢了。"),
        (Speaker.SUPPORTER, "确认身份", "贵姓？"), (Speaker.CUSTOMER, None, "姓王。"),
    ]  # fmt: skip


def test_a_farewell_ends_it():
    state = supporter(planned(), "感谢与告别")
    assert (stop_reason(state), next_question(state), len(state.turns)) == ("farewell", None, 1)


def test_a_customer_who_has_finished_gets_exactly_one_farewell():
    state = customer(supporter(planned(), "礼貌问候"), finished=True)
    assert stop_reason(state) is None
    assert next_question(state).role == "supporter"  # nobody is asked for the strategy
    state = say(state, text="再见。")
    assert state.turns[-1].strategy is CLOSURE
    assert (stop_reason(state), next_question(state), len(state.turns)) == ("customer_finished", None, 3)


@pytest.mark.parametrize("most", [MAX_UTTERANCES, 6])
def test_it_ends_at_exactly_so_many_utterances(most):
    state = planned(most)
    for label in itertools.cycle(("礼貌问候", "细化问题")):
        state = supporter(state, label)
        assert stop_reason(state) is None
        state = customer(state)
        if stop_reason(state):
            break
    assert (stop_reason(state), len(state.turns), next_question(state)) == ("length", most, None)


def test_the_first_reason_wins():
    state = planned(4)
    state = customer(supporter(state, "礼貌问候"))
    assert stop_reason(supporter(state, "感谢与告别")) == "farewell"
    last = customer(supporter(state, "细化问题"), finished=True)
    assert (stop_reason(last), len(last.turns)) == ("customer_finished", 4)  # no utterance is left for a farewell
    assert stop_reason(customer(supporter(state, "细化问题"))) == "length"
    full = supporter(customer(supporter(planned(3), "礼貌问候")), "感谢与告别")
    assert (stop_reason(full), len(full.turns)) == ("farewell", 3)


def test_an_unknown_strategy_is_asked_again_and_then_becomes_others():
    state = say(planned(), strategy="转移话题")
    question = next_question(state)
    assert (question.role, question.fields["rejected"]) == ("supporter_assistant", ("转移话题",))
    second = say(state, strategy="细化问题")
    assert (second.strategy.zh, second.unknown, second.rejected) == ("细化问题", 0, ())
    state = say(state, strategy="情感管理+提供建议")
    assert (state.strategy, state.unknown, state.overused, state.rejected) == (OTHERS, 1, 0, ())
    assert outcome_of(supporter_says(state, "嗯。"))["unknown_strategies"] == 1


def supporter_says(state, text):
    return say(state, text=text)


def test_the_same_strategy_comes_at_most_twice_running():
    state = planned()
    for _ in range(2):
        state = customer(supporter(state, "细化问题"))
    assert next_question(state).fields["exhausted"].zh == "细化问题"
    assert "细化问题" not in str(answer_schema("supporter_assistant", "zh", False, state.exhausted).model_json_schema())
    again = say(state, strategy="策略4 细化问题")
    assert next_question(again).fields["rejected"] == ("策略4 细化问题",)
    assert say(again, strategy="信息传达").strategy.zh == "信息传达"
    forced = say(again, strategy="细化问题")
    assert (forced.strategy, forced.overused, forced.unknown) == (OTHERS, 1, 0)
    other = customer(supporter(state, "信息传达"))
    assert say(other, strategy="细化问题").strategy.zh == "细化问题"  # it was interrupted


def test_where_no_strategy_is_left_the_dialogue_is_over():
    state = planned()
    for _ in range(2):
        state = customer(supporter(state, "其它"))
    for _ in range(2):
        assert stop_reason(state) is None
        state = say(state, strategy="不知道")
    assert (stop_reason(state), next_question(state), state.unknown) == ("no_strategy", None, 1)


def held(value):
    """Everything inside the fields of a question."""
    yield value
    if isinstance(value, dict):
        value = value.values()
    elif hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        for item in value:
            yield from held(item)


def answer_at_random(rng, question: RoleQuestion):
    """An answer of a model that follows no rules."""
    labels = [*(strategy.zh for strategy in STRATEGIES), "转移话题", "情感管理+其它", ""]
    return {
        "planner": lambda: {"scenario": "事情", "goal": "目标"},
        "supporter_assistant": lambda: {"strategy": rng.choice(labels[:3] if rng.random() < 0.8 else labels)},
        "supporter": lambda: {"text": f"[{rng.choice(labels[:12])}] 您好"},
        "customer_assistant": lambda: {"direction": "方向"},
        "customer": lambda: {"text": "嗯", "finished": rng.random() < 0.03},
    }[question.role]()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_answered_the_rules_hold(seed):
    rng = random.Random(seed)
    most = rng.choice([2, 3, 7, MAX_UTTERANCES])
    state, steps = DialogueState(SCENE, most), 0
    while question := next_question(state):
        if question.role in ("planner", "customer_assistant", "customer"):
            assert not [item for item in held(question.fields) if item in STRATEGIES]
        elif question.role == "supporter":
            assert [item for item in held(question.fields) if item in STRATEGIES]  # the check can fail
        state = say(state, **answer_at_random(rng, question))
        steps += 1
    assert stop_reason(state) and 1 <= len(state.turns) <= most and steps <= 5 * most + 2
    speakers = [turn.speaker for turn in state.turns]
    assert speakers == [(Speaker.SUPPORTER, Speaker.CUSTOMER)[index % 2] for index in range(len(speakers))]
    chosen = [turn.strategy for turn in state.turns if turn.speaker is Speaker.SUPPORTER]
    assert all(len(list(run)) <= 2 for _, run in itertools.groupby(chosen))
    assert not [turn.text for turn in state.turns if "[" in turn.text]
    assert CLOSURE not in chosen[:-1]


def test_the_same_answers_give_the_same_dialogue():
    def play():
        rng, state = random.Random(5), DialogueState(SCENE)
        while question := next_question(state):
            state = say(state, **answer_at_random(rng, question))
        return state

    assert play() == play()
