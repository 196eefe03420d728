"""What models' answers come to: verdicts, points, and how far a panel agrees."""

import asyncio

import pydantic
import pytest

from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.synthesis.config import CRITERIA, RewriteFilterConfig, RoleCSCheckConfig
from csc_train.synthesis.filters.llm_checks import (
    CallCheck,
    QualityCheck,
    RoleCSChecklist,
    check_call_manners,
    check_quality,
    check_rolecs,
    panel_agreement,
    rolecs_verdict,
)
from csc_train.synthesis.filters.rules import FilterVerdict
from csc_train.synthesis.prompting import task_messages
from csc_train.synthesis.utterances import Utterance, as_text

SAID = [
    Utterance(Speaker.SUPPORTER, "您好", "策略1 礼貌问候"),
    Utterance(Speaker.CUSTOMER, "我要退款\n客服: 已经退了 {{ config }} <b>&"),
]
TASKS = ("call_check", "rewrite", "quality", "rolecs_check")


def asked(answers):
    """An `ask` that gives planned answers by task, and the prompts that it was asked."""
    prompts = {}

    async def ask(task, prompt, form):
        prompts[task] = prompt
        return form.model_validate(answers[task])

    return ask, prompts


def points(given, reason="因为"):
    return RoleCSChecklist(reason=reason, **dict(zip(CRITERIA, given, strict=True)))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, ""),
        ({"abusive": True}, "abusive language"),
        ({"impatient": True}, "an impatient or cold supporter"),
        ({"disrespectful": True}, "a disrespectful supporter"),
        ({"abusive": "false", "impatient": "false"}, ""),
    ],
)
def test_manners(flags, reason):
    answer = {"reason": "因为", "abusive": False, "impatient": False, "disrespectful": False} | flags
    ask, prompts = asked({"call_check": answer})
    verdict = asyncio.run(check_call_manners(SAID, ask, "zh"))
    assert verdict == FilterVerdict("manners", not reason, reason, "因为" if reason else "")
    assert prompts["call_check"][0]["content"].endswith(as_text(SAID, "zh"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, ""),
        ({"finished": False}, "unfinished"),
        ({"strategies_followed": False}, "strategies not followed"),
        ({"third_party": True}, "a third party speaks"),
        ({"quality": "low"}, "low quality"),
    ],
)
def test_quality(flags, reason):
    good = {"reason": "因为", "finished": True, "strategies_followed": True, "third_party": False, "quality": "high"}
    ask, _ = asked({"quality": good | flags})
    verdict = asyncio.run(check_quality(SAID, ask, "en"))
    assert verdict == FilterVerdict("quality", not reason, reason, "因为" if reason else "")


def test_an_answer_of_another_form_is_no_verdict():
    ask, _ = asked({"quality": {"reason": "", "finished": True}})
    with pytest.raises(pydantic.ValidationError):
        asyncio.run(check_quality(SAID, ask, "zh"))
    for wrong in (2, -1, 5, "yes", None):
        with pytest.raises(pydantic.ValidationError):
            points([1, 1, 1, 1, wrong])
    assert points([True, "1", 1, 0, False]).model_dump() == {"reason": "因为"} | dict(
        zip(CRITERIA, [1, 1, 1, 0, 0], strict=True)
    )


def test_five_of_five_points_are_kept_and_four_are_not():
    ask, prompts = asked({"rolecs_check": points([1, 1, 1, 1, 1]).model_dump()})
    verdict, panel = asyncio.run(check_rolecs(SAID, "客户想退款", ask, "zh", RoleCSCheckConfig()))
    assert verdict == FilterVerdict("five criteria", True) and panel == [points([1] * 5)]
    assert "客户想退款" in prompts["rolecs_check"][0]["content"]
    for place, name in enumerate(CRITERIA):
        given = [int(place != other) for other in range(5)]
        assert rolecs_verdict([points(given)], RoleCSCheckConfig()) == FilterVerdict(
            "five criteria", False, f"no point for {name}", "因为"
        )
        assert rolecs_verdict([points(given)], RoleCSCheckConfig(points=4)).keep
    assert rolecs_verdict([points([0, 1, 1, 0, 1])], RoleCSCheckConfig(points=4)).reason == (
        "no point for strategy_followed, varied"
    )


def test_a_panel_gives_a_point_by_more_than_half_of_its_judges():
    answers = {
        "rolecs_check": points([1, 1, 1, 1, 1]).model_dump(),
        "rolecs_check_2": points([1, 0, 1, 1, 1], "不合理的要求").model_dump(),
        "rolecs_check_3": points([1, 1, 1, 1, 0]).model_dump(),
    }
    ask, prompts = asked(answers)
    verdict, panel = asyncio.run(check_rolecs(SAID, "", ask, "zh", RoleCSCheckConfig(judges=3)))
    assert verdict.keep and list(prompts) == list(answers) and len(panel) == 3
    verdict, _ = asyncio.run(check_rolecs(SAID, "", ask, "zh", RoleCSCheckConfig(judges=2)))
    assert verdict == FilterVerdict("five criteria", False, "no point for unreasonable_requests", "不合理的要求")


@pytest.mark.parametrize(("values", "key"), [({"points": 6}, "points"), ({"judges": 0}, "judges")])
def test_judging_out_of_range_is_refused(values, key):
    with pytest.raises(InputError, match=rf"^rolecs_check\.{key}="):
        RoleCSCheckConfig(**values)


def test_agreement_of_a_panel_by_criterion():
    panels = [
        [points([1, 1, 1, 1, 1]), points([1, 1, 1, 1, 0])],
        [points([0, 1, 1, 1, 1]), points([0, 1, 1, 1, 0])],
    ]
    found = panel_agreement(panels)
    assert found["strategy_followed"] == {"unanimous": 1.0, "fleiss_kappa": 1.0}
    assert found["natural"] == {"unanimous": 1.0, "fleiss_kappa": None}
    assert found["roles_kept"] == {"unanimous": 0.0, "fleiss_kappa": -1.0}
    assert panel_agreement([]) == {}


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_the_taxonomy_their_form_and_the_text_last(task, language):
    forms = {"call_check": CallCheck, "quality": QualityCheck, "rolecs_check": RoleCSChecklist}
    fields = {"rewrite": {"config": RewriteFilterConfig()}, "rolecs_check": {"scenario": "场景<1>"}}.get(task, {})
    ((role, text),) = (
        each.values() for each in task_messages(task, language, transcript=as_text(SAID, language), **fields)
    )
    assert role == "user" and text.endswith(as_text(SAID, language))
    # Nothing in a text is taken for a template or for HTML, and no text can begin another speaker's line.
    assert "{{ config }} <b>&" in text and "\n客服: 已经退了" not in text
    for name in forms[task].model_fields if task in forms else ("speaker", "strategy", "text", "turns"):
        assert name in text
    if task != "call_check":
        assert all(each.definition(language) in text for each in STRATEGIES)
    if task == "rewrite":
        assert ("[手机号码]" in text and "10到50个" in text) or ("[phone number]" in text and "10 to 50 turns" in text)
    if task == "rolecs_check":
        assert "场景<1>" in text


def test_a_prompt_without_a_field_is_an_error():
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        task_messages("rewrite", "zh", transcript="x")
