"""Filters that ask a language model, by forms that it fills in.

`ask(task, messages, form)` is whatever answers: a model on a server, a log of earlier answers, or a script. It may ask
one model for one task and another for the next. What it raises is not a verdict: that a server was down says nothing
about a conversation.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy
import pydantic

from csc_train.errors import check_range
from csc_train.stats import fleiss_kappa
from csc_train.synthesis.filters.rules import FilterVerdict, Utterance
from csc_train.synthesis.prompting import as_text, messages

Form = TypeVar("Form", bound=pydantic.BaseModel)
AskFn = Callable[[str, list[dict[str, str]], type[Form]], Awaitable[Form]]
Point = Annotated[int, pydantic.Field(ge=0, le=1)]

CRITERIA = ("strategy_followed", "unreasonable_requests", "natural", "varied", "roles_kept")
"""What a RoleCS dialogue is judged by, a point each."""


class CallCheck(pydantic.BaseModel):
    """What is wrong with the manners of a recorded call."""

    reason: str
    abusive: bool
    impatient: bool
    disrespectful: bool


class QualityCheck(pydantic.BaseModel):
    """Whether a rewritten call may go into a data set."""

    reason: str
    finished: bool
    strategies_followed: bool
    third_party: bool
    quality: Literal["high", "low"]


class RoleCSPoints(pydantic.BaseModel):
    """One judge's points for a RoleCS dialogue, by criterion."""

    reason: str
    strategy_followed: Point
    unreasonable_requests: Point
    natural: Point
    varied: Point
    roles_kept: Point


@dataclass
class RoleCSCheckConfig:
    """How RoleCS dialogues are judged."""

    points: int = 5
    """Points of 5 that a dialogue needs."""
    judges: int = 1
    """Judges; each criterion's point is given by more than half of them. The tasks of the second and later ones are
    called `rolecs_check_2` and so on, so that each may be another model."""

    def __post_init__(self):
        check_range("rolecs_check.points", self.points, 0, len(CRITERIA))
        check_range("rolecs_check.judges", self.judges, 1)


async def check_call_manners(utterances: Sequence[Utterance], ask: AskFn, language: str) -> FilterVerdict:
    """Drops a recorded call with abusive language, or an impatient, cold or disrespectful supporter."""
    prompt = messages("call_check", language, transcript=as_text(utterances, language))
    answer = await ask("call_check", prompt, CallCheck)
    reasons = {
        "abusive language": answer.abusive,
        "an impatient or cold supporter": answer.impatient,
        "a disrespectful supporter": answer.disrespectful,
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    return FilterVerdict("manners", not found, found, answer.reason if found else "")


async def check_quality(utterances: Sequence[Utterance], ask: AskFn, language: str) -> FilterVerdict:
    """Keeps a rewritten call of high quality: finished, strategies followed, nobody else speaking."""
    prompt = messages("quality", language, transcript=as_text(utterances, language))
    answer = await ask("quality", prompt, QualityCheck)
    reasons = {
        "unfinished": not answer.finished,
        "strategies not followed": not answer.strategies_followed,
        "a third party speaks": answer.third_party,
        "low quality": answer.quality == "low",
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    return FilterVerdict("quality", not found, found, answer.reason if found else "")


async def check_rolecs(
    utterances: Sequence[Utterance], scenario: str, ask: AskFn, language: str, config: RoleCSCheckConfig
) -> tuple[FilterVerdict, list[RoleCSPoints]]:
    """Keeps a RoleCS dialogue that is given enough points; with it, every judge's points."""
    prompt = messages("rolecs_check", language, transcript=as_text(utterances, language), scenario=scenario)
    tasks = ["rolecs_check", *(f"rolecs_check_{number}" for number in range(2, config.judges + 1))]
    panel = await asyncio.gather(*(ask(task, prompt, RoleCSPoints) for task in tasks))
    return rolecs_verdict(panel, config), panel


def rolecs_verdict(panel: Sequence[RoleCSPoints], config: RoleCSCheckConfig) -> FilterVerdict:
    """What the judges' points come to."""
    given = {name: sum(getattr(points, name) for points in panel) for name in CRITERIA}
    lost = [name for name, points in given.items() if 2 * points <= len(panel)]
    if len(CRITERIA) - len(lost) >= config.points:
        return FilterVerdict("five criteria", True)
    against = next((points.reason for points in panel if not getattr(points, lost[0])), "")
    return FilterVerdict("five criteria", False, f"no point for {', '.join(lost)}", against)


def agreement(panels: Sequence[Sequence[RoleCSPoints]]) -> dict[str, dict[str, Any]]:
    """How far the judges of a panel agree, over dialogues, by criterion.

    Returns:
        For each criterion `unanimous`, the share of dialogues (0..1) to which all judges give the same, and
        `fleiss_kappa`, None where it is not defined: fewer than two judges, or all points alike. Nothing where there
        are no dialogues.
    """
    found = {}
    if not panels:
        return found
    for name in CRITERIA:
        given = numpy.array([[getattr(points, name) for points in panel] for panel in panels])
        same = (given == given[:, :1]).all(axis=1).mean()
        kappa = fleiss_kappa(numpy.stack([(given == point).sum(axis=1) for point in (0, 1)], axis=1)).value
        found[name] = {"unanimous": float(same), "fleiss_kappa": None if numpy.isnan(kappa) else kappa}
    return found
