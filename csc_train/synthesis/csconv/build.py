"""The CSConv pipeline: recorded calls are filtered, rewritten into labelled turns by a model, and filtered again."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.jsonl import JsonlLog, read_jsonl
from csc_train.llm.client import AuthenticationError, Client, LLMError, RequestAttempt
from csc_train.llm.structured import ask_structured
from csc_train.synthesis.config import CallFilterConfig, DuplicatesConfig, RewriteFilterConfig
from csc_train.synthesis.filters.llm_checks import AskFn, Schema, check_call_manners, check_quality
from csc_train.synthesis.filters.rules import DuplicateFilter, FilterVerdict, check_call, check_rewrite
from csc_train.synthesis.prompting import task_messages
from csc_train.synthesis.utterances import Utterance, as_text, merge_turns, strip_boilerplate, turns_of

CSCONV_RULES = (
    "rounds", "turn length", "customer's turns", "customer's words", "manners", "texts", "utterances", "alternation",
    "one strategy", "known strategies", "required strategies", "private data", "quality", "near-duplicates",
)  # fmt: skip
"""The rules in order of application. The paper checks the quality before it counts; the result is the same, and rules
are cheaper than a model."""
BUNDLED_CALLS = Path(__file__).parent / "data" / "calls.jsonl"
"""A few calls of our own; every rule drops one of them."""
BUNDLED_ANSWERS = Path(__file__).parent / "data" / "call_answers.jsonl"
"""Our own answers about the bundled calls, by call and task, instead of a model's answers."""


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
            [Utterance(Speaker.parse(turn.speaker), turn.text, turn.strategy.strip()) for turn in self.turns]
        )


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: utterances in any order of speakers."""

    id: str
    utterances: tuple[Utterance, ...]


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


def read_calls(path: str | os.PathLike) -> list[RecordedCall]:
    """Read calls from a JSONL of `{"id", "turns": [{"speaker", "text"}]}`; `id` is optional.

    Raises:
        InputError: the file cannot be read, a row has another form, an id is used twice, or there are no rows.
    """
    calls: dict[str, RecordedCall] = {}
    for number, row in read_jsonl(path):
        call = _parse_call(row, f"{path}, line {number}")
        if call.id in calls:
            raise InputError(f"{path}, line {number}, field id: {call.id!r} is used by an earlier line")
        calls[call.id] = call
    if not calls:
        raise InputError(f"{path}: no rows")
    return list(calls.values())


def _parse_call(row: dict[str, Any], place: str) -> RecordedCall:
    try:
        turns = row["turns"]
        utterances = tuple(Utterance(Speaker.parse(turn["speaker"]), turn["text"]) for turn in turns)
        json.dumps(turns, ensure_ascii=False).encode()  # a lone surrogate cannot be sent
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}: not of the form {{'id', 'turns': [{{'speaker', 'text'}}]}} ({error})") from error
    if not all(isinstance(each.text, str) for each in utterances):
        raise InputError(f"{place}, field text: not a text")
    return RecordedCall(str(row.get("id") or digest(turns)[:16]), utterances)


async def build_csconv(
    calls: Sequence[RecordedCall],
    ask: AskFn,
    *,
    call: CallFilterConfig,
    rewrite: RewriteFilterConfig,
    duplicates: DuplicatesConfig,
    language: str,
    concurrency: int,
    on_outcome: Callable[[CallOutcome], None] = lambda outcome: None,
) -> list[CallOutcome]:
    """Filter and rewrite calls, at most `concurrency` at a time; the outcomes are in the order of the calls.

    `on_outcome` is called for each call that ends. Near-duplicates are dropped last, in the order of the calls, so that
    the result does not depend on timing.

    Raises:
        AuthenticationError: the model's server rejects the key; every other error becomes an outcome.
    """
    slots = asyncio.Semaphore(concurrency)

    async def run(each: RecordedCall) -> CallOutcome:
        async with slots:
            try:
                outcome = await _process_call(each, ask, call, rewrite, language)
            except AuthenticationError:
                # Before the next call takes this slot.
                for task in tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
                raise
        on_outcome(outcome)
        return outcome

    tasks = [asyncio.create_task(run(each)) for each in calls]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
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
    verdicts, rewritten, merged = check_call(each.utterances, call), None, merge_turns(each.utterances)
    try:
        if verdicts[-1].keep:
            verdicts.append(await check_call_manners(merged, ask, language))
        if verdicts[-1].keep:
            prompt = task_messages("rewrite", language, transcript=as_text(merged, language), config=rewrite)
            rewritten = tuple((await ask("rewrite", prompt, RewrittenCall)).utterances())
            verdicts += check_rewrite(rewritten, rewrite)
            if verdicts[-1].keep:
                verdicts.append(await check_quality(rewritten, ask, language))
    except AuthenticationError:
        raise
    except LLMError as error:
        return CallOutcome(each.id, tuple(verdicts), failure=str(error))
    return CallOutcome(each.id, tuple(verdicts), rewritten)


def ask_model(client: Client, seed: int, log: "AnswerLog") -> AskFn:
    """Answers from a model on a server, by default at temperature 0; `log` records the requests."""

    async def ask(task: str, prompt: list[dict[str, str]], schema: type[Schema]) -> Schema:
        answer = await ask_structured(client, prompt, schema, seed=seed, temperature=0.0, observe=log.record_attempt)
        return answer.value

    return ask


def ask_mock(language: str) -> AskFn:
    """Our own answers about the bundled calls, instead of a model's answers.

    Raises:
        InputError: (when asked) about any other call.
    """
    script: dict[tuple[str, str], dict[str, Any]] = {}
    answers = {row["id"]: row for _, row in read_jsonl(BUNDLED_ANSWERS)}
    for each in read_calls(BUNDLED_CALLS):
        row, text = answers.get(each.id, {}), as_text(merge_turns(each.utterances), language)
        script |= {(task, text): row[task] for task in ("call_check", "rewrite") if task in row}
        if "quality" in row:
            rewritten = RewrittenCall.model_validate(row["rewrite"]).utterances()
            script["quality", as_text(rewritten, language)] = row["quality"]

    async def ask(task: str, prompt: list[dict[str, str]], schema: type[Schema]) -> Schema:
        for (about, text), answer in script.items():
            if about == task and text in prompt[-1]["content"]:
                return schema.model_validate(answer)
        raise InputError("llm=mock: answers about the bundled calls only; choose a model, such as llm=vllm")

    return ask


class AnswerLog:
    """An append-only JSONL of answers and requests, so that no answer is paid for twice.

    Attributes:
        usage: `requests`, the `failed` ones among them, and their `prompt_tokens` and `completion_tokens`.
    """

    def __init__(self, path: str | os.PathLike):
        """Read the rows of earlier processes; a torn last line is cut off.

        Raises:
            InputError: the file cannot be read or written.
        """
        self.usage = {"requests": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._answers: dict[str, Any] = {}
        self._log = JsonlLog(path, ascii_only=True)  # an answer may hold a lone surrogate
        self._log.open()
        for row in self._log.read():
            self._count(row)

    def cached(self, ask: AskFn) -> AskFn:
        """`ask` with a cache by task, prompt and schema."""

        async def answered(task: str, prompt: list[dict[str, str]], schema: type[Schema]) -> Schema:
            key = digest([task, prompt, schema.model_json_schema()])
            if key not in self._answers:
                answer = await ask(task, prompt, schema)
                self._add({"key": key, "task": task, "answer": answer.model_dump()})
            return schema.model_validate(self._answers[key])

        return answered

    def record_attempt(self, attempt: RequestAttempt) -> None:
        """Record a request to a server, answered or not."""
        tokens = {"prompt_tokens": attempt.prompt_tokens, "completion_tokens": attempt.completion_tokens}
        self._add({"failure": attempt.kind, **tokens, "latency_s": round(attempt.latency_s, 3)})

    def _add(self, row: dict[str, Any]) -> None:
        self._count(row)
        self._log.append(row)

    def _count(self, row: dict[str, Any]) -> None:
        if "key" in row:
            self._answers[row["key"]] = row["answer"]
        else:
            self.usage["requests"] += 1
            self.usage["failed"] += row["failure"] is not None
            for name in ("prompt_tokens", "completion_tokens"):
                self.usage[name] += row[name]
