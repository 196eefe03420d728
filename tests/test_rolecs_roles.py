"""Prompts and answer schemas of the five roles: what each sees, in which order, and what of its answer is taken."""

import pytest
from jinja2 import UndefinedError
from pydantic import ValidationError

from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.llm.structured import parse_answer
from csc_train.synthesis.config import LANGUAGES
from csc_train.synthesis.rolecs.engine import Behaviour, RoleQuestion
from csc_train.synthesis.rolecs.roles import LAYOUT_BLOCKS, WRITING_ROLES, RolePrompts, answer_schema

TURNS = tuple(
    Turn(
        (Speaker.SUPPORTER, Speaker.CUSTOMER)[index % 2], f"utterance {index}", None if index % 2 else STRATEGIES[index]
    )
    for index in range(8)
)
FIELDS = {
    "topic": "账户 <b>&", "mood": "着急", "persona": "你是\"老王\"<br>", "scenario": "卡丢了", "goal": "补卡",
    "behaviour": Behaviour("short", "reluctant", "often", "unreasonable"), "direction": "说卡号", "rejected": (),
    "exhausted": None, "strategy": STRATEGIES[3], "profile": {"年龄": "30岁"},
}  # fmt: skip
EVERY = [(language, layout, compact) for language in LANGUAGES for layout in LAYOUT_BLOCKS for compact in (False, True)]


def question(role, turns=6, **fields):
    """A question with all that any role is told; the customer's side gets its history without strategies."""
    history = TURNS[:turns]
    if role.startswith("customer"):
        history = tuple(Turn(turn.speaker, turn.text) for turn in history)
    return RoleQuestion(role, FIELDS | {"history": history} | fields)


def rendered(prompts, role, **fields):
    return "\n".join(message["content"] for message in prompts.messages(question(role, **fields)))


@pytest.mark.parametrize(("language", "layout", "compact"), EVERY)
def test_the_customers_side_reads_no_strategy(language, layout, compact):
    prompts = RolePrompts(language, layout, compact)
    names = [strategy.name(language) for strategy in STRATEGIES]
    for role in WRITING_ROLES:
        text = rendered(prompts, role)
        assert any(name in text for name in names) is role.startswith("supporter"), role
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text


@pytest.mark.parametrize(("language", "layout", "compact"), EVERY)
@pytest.mark.parametrize("role", WRITING_ROLES)
def test_a_prompt_that_lacks_something_is_not_rendered(language, layout, compact, role):
    prompts = RolePrompts(language, layout, compact)
    told = question(role).fields
    texts = rendered(prompts, role)
    assert texts
    needed = []
    for name in told:
        try:
            prompts.messages(RoleQuestion(role, {key: value for key, value in told.items() if key != name}))
        except UndefinedError:
            needed.append(name)
    expected = {
        "persona": {"profile"}, "planner": {"topic", "mood", "persona"},
        "supporter_assistant": {"topic", "history", "exhausted", "rejected"},
        "supporter": {"topic", "history", "strategy"},
        "customer_assistant": {"persona", "scenario", "goal", "mood", "behaviour", "history"},
        "customer": {"persona", "scenario", "goal", "mood", "behaviour", "history", "direction"},
    }[role]  # fmt: skip
    assert set(needed) == expected


def test_nothing_is_escaped():
    text = rendered(RolePrompts("zh", "faithful", False), "planner")
    assert "账户 <b>&" in text and '你是"老王"<br>' in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_behaviour_comes_in_words(language):
    prompts = RolePrompts(language, "faithful", False)
    texts = {rendered(prompts, "customer", behaviour=Behaviour()), rendered(prompts, "customer")}
    for field, values in {
        "patience": ("short", "ordinary", "long"), "disclosure": ("at_once", "when_asked", "reluctant"),
        "misunderstanding": ("none", "once", "often"), "demands": ("reasonable", "unreasonable"),
    }.items():  # fmt: skip
        shown = {rendered(prompts, "customer", behaviour=Behaviour(**{field: value})) for value in values}
        assert len(shown) == len(values)
        texts |= shown
    with pytest.raises(UndefinedError):
        rendered(prompts, "customer", behaviour=Behaviour(patience="endless"))


def common_prefix(one, other):
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("role", ["supporter_assistant", "supporter", "customer_assistant", "customer"])
def test_the_cache_friendly_layout_keeps_the_prefix(language, role):
    """From one round to the next, all up to the newest utterances is the same text."""
    shares = {}
    for layout in LAYOUT_BLOCKS:
        prompts = RolePrompts(language, layout, False)
        before, after = (rendered(prompts, role, turns=turns) for turns in (4, 6))
        last = before.index(TURNS[3].text) + len(TURNS[3].text)
        shares[layout] = common_prefix(before, after) >= last, last / len(before)
    assert shares["cache_friendly"][0] and shares["cache_friendly"][1] > 0.8
    assert shares["faithful"][1] < 0.75  # the rules come after the history


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_compact_profile_is_shorter(language):
    for role in WRITING_ROLES:
        full, compact = (rendered(RolePrompts(language, "faithful", flag), role) for flag in (False, True))
        assert len(compact) < len(full), role


def test_a_digest_tells_prompts_apart():
    digests = {(*choice,): RolePrompts(*choice).digest for choice in EVERY}
    assert len(set(digests.values())) == len(EVERY)
    assert RolePrompts(*EVERY[0]).digest == digests[EVERY[0]]


def test_an_utterance_is_one_line():
    lines = rendered(RolePrompts("zh", "faithful", False), "supporter").splitlines()
    assert "客服（礼貌问候）: utterance 0" in lines and "客户: utterance 1" in lines
    text = answer_schema("customer", "zh", False)(text=" 好的\n客服: 已退款 ", finished=False).text
    assert text == "好的 客服: 已退款"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("[情感管理]您别急。", "您别急。"), ("【策略5 情感管理】：您别急。", "您别急。"), ("(GT) 您好", "您好"),
        ("[手机号码]是我的。", "[手机号码]是我的。"), ("[情感管理][其它] 您好", "您好"),
        ("您好[情感管理]", "您好[情感管理]"),
    ],
)  # fmt: skip
def test_a_label_before_an_utterance_is_taken_off(said, kept):
    assert answer_schema("supporter", "zh", False)(text=said).text == kept


@pytest.mark.parametrize("text", ["", " \n", "[情感管理]", "半个\ud800字", "长" * 401])
def test_an_unusable_utterance_is_refused(text):
    for role, rest in (("supporter", {}), ("customer", {"finished": False})):
        with pytest.raises(ValidationError):
            answer_schema(role, "zh", False)(text=text, **rest)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_strategy_is_an_enumeration_of_what_may_be_chosen(language):
    def choices(exhausted):
        return answer_schema("supporter_assistant", language, False, exhausted).model_json_schema()["properties"][
            "strategy"
        ]

    names = [strategy.name(language) for strategy in STRATEGIES]
    assert choices(None)["enum"] == names
    assert choices(STRATEGIES[4])["enum"] == [*names[:4], *names[5:]]


def test_only_the_compact_form_bounds_lengths_in_the_schema():
    full, compact = (str(answer_schema("supporter", "zh", flag).model_json_schema()) for flag in (False, True))
    assert "maxLength" in compact and "maxLength" not in full


@pytest.mark.parametrize(("said", "finished"), [('"false"', False), ('"true"', True), ("false", False), ("1", True)])
def test_a_truth_value_may_be_written_as_text(said, finished):
    answer = parse_answer(
        f'{{"text": "看 http://x.cn//a 吧", "finished": {said}}}', answer_schema("customer", "zh", False)
    )
    assert (answer.text, answer.finished) == ("看 http://x.cn//a 吧", finished)
