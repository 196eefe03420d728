"""Filters that ask a language model to judge a conversation.

`ask(task, messages, schema)` is any source of answers: a model on a server, a log of earlier answers, or a mock. Its
errors are not verdicts: a failing server says nothing about a conversation.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy
import pydantic

from csc_train.llm.answer_log import AskFn
from csc_train.stats import fleiss_kappa
from csc_train.synthesis.config import CRITERIA, RoleCSCheckConfig
from csc_train.synthesis.filters.rules import FilterVerdict
from csc_train.synthesis.prompting import task_messages
from csc_train.synthesis.utterances import Utterance, as_text

Point = Annotated[int, pydantic.Field(ge=0, le=1)]


class CallCheck(pydantic.BaseModel):
    """Bad manners in a recorded call."""

    reason: str
    abusive: bool
    impatient: bool
    disrespectful: bool


class QualityCheck(pydantic.BaseModel):
    """The quality of a rewritten call."""

    reason: str
    finished: bool
    strategies_followed: bool
    third_party: bool
    quality: Literal["high", "low"]


class RoleCSChecklist(pydantic.BaseModel):
    """The points of one judge for a RoleCS dialogue, by criterion."""

    reason: str
    strategy_followed: Point
    unreasonable_requests: Point
    natural: Point
    varied: Point
    roles_kept: Point


async def check_call_manners(utterances: Sequence[Utterance], ask: AskFn, language: str) -> FilterVerdict:
    """Drop a recorded call with abusive language, or an impatient, cold or disrespectful supporter."""
    prompt = task_messages("call_check", language, transcript=as_text(utterances, language))
    answer = await ask("call_check", prompt, CallCheck)
    reasons = {
        "abusive language": answer.abusive,
        "an impatient or cold supporter": answer.impatient,
        "a disrespectful supporter": answer.disrespectful,
    }
    return _first_reason("manners", reasons, answer.reason)


async def check_quality(utterances: Sequence[Utterance], ask: AskFn, language: str) -> FilterVerdict:
    """Keep a rewritten call of high quality: finished, strategies followed, no third speaker."""
    prompt = task_messages("quality", language, transcript=as_text(utterances, language))
    answer = await ask("quality", prompt, QualityCheck)
    reasons = {
        "unfinished": not answer.finished,
        "strategies not followed": not answer.strategies_followed,
        "a third party speaks": answer.third_party,
        "low quality": answer.quality == "low",
    }
    return _first_reason("quality", reasons, answer.reason)


def _first_reason(rule: str, reasons: Mapping[str, bool], detail: str) -> FilterVerdict:
    """Drop for the first reason that holds."""
    found = next((reason for reason, holds in reasons.items() if holds), "")
    return FilterVerdict(rule, not found, found, detail if found else "")


async def check_rolecs(
    utterances: Sequence[Utterance], scenario: str, ask: AskFn, language: str, config: RoleCSCheckConfig
) -> tuple[FilterVerdict, list[RoleCSChecklist]]:
    """Keep a RoleCS dialogue with enough points; returns the verdict and the points of every judge."""
    prompt = task_messages("rolecs_check", language, transcript=as_text(utterances, language), scenario=scenario)
    tasks = ["rolecs_check", *(f"rolecs_check_{number}" for number in range(2, config.judges + 1))]
    panel = await asyncio.gather(*(ask(task, prompt, RoleCSChecklist) for task in tasks))
    return rolecs_verdict(panel, config), panel


def rolecs_verdict(panel: Sequence[RoleCSChecklist], config: RoleCSCheckConfig) -> FilterVerdict:
    """The verdict by the points of a panel of judges."""
    given = {name: sum(getattr(points, name) for points in panel) for name in CRITERIA}
    lost = [name for name, points in given.items() if 2 * points <= len(panel)]
    if len(CRITERIA) - len(lost) >= config.points:
        return FilterVerdict("five criteria", True)
    against = next((points.reason for points in panel if not getattr(points, lost[0])), "")
    return FilterVerdict("five criteria", False, f"no point for {', '.join(lost)}", against)


def panel_agreement(panels: Sequence[Sequence[RoleCSChecklist]]) -> dict[str, dict[str, Any]]:
    """The agreement of the judges over dialogues, by criterion.

    Returns:
        For each criterion `unanimous`, the share of dialogues (0..1) with equal points of all judges, and
        `fleiss_kappa`, None if it is not defined (one judge, or all points equal). Empty if there are no dialogues.
    """
    agreement = {}
    for name in CRITERIA if panels else ():
        given = numpy.array([[getattr(points, name) for points in panel] for panel in panels])
        ones, judges = given.sum(axis=1), given.shape[1]
        kappa = fleiss_kappa(numpy.stack([judges - ones, ones], axis=1)).value
        agreement[name] = {
            "unanimous": float((ones % judges == 0).mean()),
            "fleiss_kappa": None if numpy.isnan(kappa) else kappa,
        }
    return agreement
