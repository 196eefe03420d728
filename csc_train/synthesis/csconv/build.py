"""The CSConv pipeline: recorded calls are filtered, rewritten into labelled turns by a model, and filtered again."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import pydantic

from csc_train.data.dialogue import SURROGATE, Dialogue, Speaker, has_surrogate
from csc_train.data.readers import ReadOptions, ReadReport, ValidationIssue, check_object, iter_checked
from csc_train.errors import InputError
from csc_train.files import digest, require_end
from csc_train.invisible import strip_invisible
from csc_train.jsonl import read_jsonl
from csc_train.llm.answer_log import AskFn, ObservedAskFn, Schema, map_concurrently
from csc_train.llm.client import LLMError, Observer
from csc_train.synthesis.config import CallFilterConfig, DuplicatesConfig, RewriteFilterConfig
from csc_train.synthesis.filters.llm_checks import check_call_manners, check_quality
from csc_train.synthesis.filters.rules import DuplicateFilter, FilterVerdict, check_call, check_rewrite
from csc_train.synthesis.prompting import task_messages
from csc_train.synthesis.utterances import Utterance, as_text, merge_turns, strip_boilerplate, turns_of

CSCONV_RULES = (
    "speakers", "rounds", "turn length", "customer's turns", "customer's words", "manners", "texts", "utterances",
    "alternation", "one strategy", "known strategies", "required strategies", "private data", "quality",
    "near-duplicates",
)  # fmt: skip
"""The rules in order of application. The paper checks the quality before it counts; the result is the same, and rules
are cheaper than a model."""
_DATA = Path(__file__).parent / "data"
BUNDLED_CALLS = {language: _DATA / f"calls.{language}.jsonl" for language in ("zh", "en")}
"""By language, a few calls of our own; every rule drops one of them."""
BUNDLED_ANSWERS = {language: _DATA / f"call_answers.{language}.jsonl" for language in BUNDLED_CALLS}
"""By language, our own answers about the bundled calls, by call and task, instead of a model's answers."""


class RewrittenTurn(pydantic.BaseModel):
    """A turn as the model writes it; `strategy` is any text, so that the rules can reject unknown labels."""

    speaker: Literal["客服", "客户"]
    strategy: str
    text: str


class RewrittenCall(pydantic.BaseModel):
    """A rewritten call."""

    turns: list[RewrittenTurn]

    def utterances(self) -> list[Utterance]:
        """The turns as utterances, without system notices at the end."""
        return strip_boilerplate(
            [Utterance(Speaker.parse(turn.speaker), turn.text, strip_invisible(turn.strategy)) for turn in self.turns]
        )


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: utterances in any order of speakers.

    `third_speaker` is the first one that is neither supporter nor customer, such as `action`; such a call is dropped.
    """

    id: str
    utterances: tuple[Utterance, ...]
    third_speaker: str | None = None


@dataclass(frozen=True)
class CallOutcome:
    """The result of the pipeline for one call.

    Attributes:
        verdicts: in order, up to the first that drops the call.
        rewritten: the model's rewriting; None if the call was dropped before.
        failure: the error of the model, which leaves the call undecided.
    """

    id: str
    verdicts: tuple[FilterVerdict, ...]
    rewritten: tuple[Utterance, ...] | None = None
    failure: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether every rule kept the call."""
        return self.failure is None and self.verdicts[-1].keep

    def dialogue(self, source: str) -> Dialogue:
        """The accepted call as a dialogue."""
        return Dialogue(self.id, turns_of(self.rewritten), source)

    def row(self) -> dict[str, Any]:
        """The reason for dropping the call, and its rewriting. The call itself is left out: it holds private data."""
        last = self.verdicts[-1]
        row: dict[str, Any] = {"id": self.id, "rule": last.rule, "reason": last.reason, "detail": last.detail}
        if self.rewritten is not None:
            row["rewritten"] = [
                {"speaker": each.speaker.value, "strategy": each.label, "text": each.text} for each in self.rewritten
            ]
        return row


def read_calls(
    path: str | os.PathLike,
    *,
    rejected_path: str | os.PathLike | None = None,
    **options: Unpack[ReadOptions],
) -> list[RecordedCall]:
    """Read calls of `{"id", "turns": [{"speaker", "text"}]}` (see `iter_records`); `id` is optional.

    `options` are those of `iter_checked`; `max_rejected` defaults to 0.1.

    Rows of another form and ids that are used twice are counted in the log and written to `rejected_path`, with their
    place and reason but without the call, which holds private data.

    Raises:
        InputError: a file cannot be read, a greater share of the rows than `max_rejected` is bad, or there are no rows.
    """
    require_end(path)
    report, places = ReadReport(str(path), settings=""), {}
    check = functools.partial(_check_call, places)
    try:
        return [call for _, call in iter_checked(path, check, report, **{"max_rejected": 0.1} | options)]
    finally:
        report.conclude(rejected_path, records=False)


def _check_call(
    places: dict[str, str], record: Any, file: Any, number: int
) -> tuple[RecordedCall | None, list[ValidationIssue]]:
    """A row as a call, or its issues; `places` are those of the calls so far, by id."""
    if issues := check_object(record):
        return None, issues
    try:
        call = _Call.model_validate(record)
    except pydantic.ValidationError as error:
        return None, [ValidationIssue(None, ".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    if any(has_surrogate(turn.speaker + turn.text) for turn in call.turns):
        return None, [ValidationIssue(None, "turns", SURROGATE)]
    name, place = str(call.id or digest(record["turns"])[:16]), f"{file}, row {number}"
    if (first := places.setdefault(name, place)) != place:
        return None, [ValidationIssue(None, "id", "used by an earlier row", f"{name!r}, {first}")]
    try:
        return RecordedCall(name, tuple(Utterance(Speaker.parse(turn.speaker), turn.text) for turn in call.turns)), []
    except ValueError as error:
        return RecordedCall(name, (), str(error)), []


class _CallTurn(pydantic.BaseModel):
    speaker: str
    text: str


class _Call(pydantic.BaseModel):
    """A row of a file of calls."""

    id: Any = None
    turns: list[_CallTurn]


async def build_csconv(
    calls: Sequence[RecordedCall],
    ask: AskFn,
    *,
    call: CallFilterConfig,
    rewrite: RewriteFilterConfig,
    duplicates: DuplicatesConfig,
    language: str,
    concurrency: int,
) -> list[CallOutcome]:
    """Filter and rewrite calls, at most `concurrency` at a time; the outcomes are in the order of the calls.

    Near-duplicates are dropped last, in the order of the calls, so that the result does not depend on timing.

    Raises:
        UnusableServerError: the model's server rejects the key; every other error becomes an outcome.
    """
    process = functools.partial(_process_call, ask=ask, call=call, rewrite=rewrite, language=language)
    outcomes = await map_concurrently(calls, process, concurrency, "calls", "call")
    repeats = DuplicateFilter(duplicates)
    return [
        CallOutcome(each.id, (*each.verdicts, repeats.check(each.dialogue(""))), each.rewritten)
        if each.accepted
        else each
        for each in outcomes
    ]


async def _process_call(
    each: RecordedCall, ask: AskFn, call: CallFilterConfig, rewrite: RewriteFilterConfig, language: str
) -> CallOutcome:
    if each.third_speaker is not None:
        return CallOutcome(each.id, (FilterVerdict("speakers", False, "a third speaker", each.third_speaker),))
    verdicts = [FilterVerdict("speakers", True), *check_call(each.utterances, call)]
    rewritten, merged = None, merge_turns(each.utterances)
    try:
        if verdicts[-1].keep:
            verdicts.append(await check_call_manners(merged, ask, language))
        if verdicts[-1].keep:
            prompt = task_messages("rewrite", language, transcript=as_text(merged, language), config=rewrite)
            rewritten = tuple((await ask("rewrite", prompt, RewrittenCall)).utterances())
            verdicts += check_rewrite(rewritten, rewrite)
            if verdicts[-1].keep:
                verdicts.append(await check_quality(rewritten, ask, language))
    except LLMError as error:
        return CallOutcome(each.id, tuple(verdicts), failure=str(error))
    return CallOutcome(each.id, tuple(verdicts), rewritten)


def ask_mock(language: str) -> ObservedAskFn:
    """Our own answers about the bundled calls, instead of a model's answers.

    Raises:
        InputError: (when asked) about any other call.
    """
    script: dict[tuple[str, str], dict[str, Any]] = {}
    answers = {row["id"]: row for _, row in read_jsonl(BUNDLED_ANSWERS[language])}
    for each in read_calls(BUNDLED_CALLS[language]):
        row, text = answers.get(each.id, {}), as_text(merge_turns(each.utterances), language)
        script |= {(task, text): row[task] for task in ("call_check", "rewrite") if task in row}
        if "quality" in row:
            rewritten = RewrittenCall.model_validate(row["rewrite"]).utterances()
            script["quality", as_text(rewritten, language)] = row["quality"]

    async def ask(
        task: str, prompt: list[dict[str, str]], schema: type[Schema], observe: Observer | None = None
    ) -> Schema:
        for (about, text), answer in script.items():
            if about == task and text in prompt[-1]["content"]:
                return schema.model_validate(answer)
        raise InputError("llm=mock: answers about the bundled calls only; choose a model, such as llm=vllm")

    return ask
