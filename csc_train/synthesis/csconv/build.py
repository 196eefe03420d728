"""Real calls -> CSConv: rules, a model's judgement, its rewriting into labelled turns, and rules for what it wrote."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.errors import InputError
from csc_train.files import digest, os_errors
from csc_train.jsonl import JsonlLog
from csc_train.llm.client import AuthenticationError, Client, LLMError, RequestAttempt
from csc_train.llm.structured import ask_structured as ask_server
from csc_train.synthesis.filters.llm_checks import AskFn, Form, check_call_manners, check_quality
from csc_train.synthesis.filters.rules import (
    CallConfig,
    DuplicateFilter,
    DuplicatesConfig,
    FilterVerdict,
    RewriteConfig,
    Utterance,
    check_call,
    check_rewrite,
    merge_turns,
    strip_boilerplate,
    turns_of,
)
from csc_train.synthesis.prompting import as_text, messages

RULES = (
    "rounds", "turn length", "customer's turns", "customer's words", "manners", "texts", "utterances", "alternation",
    "one strategy", "known strategies", "required strategies", "private data", "quality", "near-duplicates",
)  # fmt: skip
"""What a call goes through, in order. The paper asks for the quality before it counts; what is kept is the same, and a
rule costs nothing."""
BUNDLED = resources.files(__package__).joinpath("data", "calls.jsonl")
"""A handful of calls that we made up, on which every rule drops one."""
BUNDLED_ANSWERS = resources.files(__package__).joinpath("data", "call_answers.jsonl")
"""What a model might answer about them, by call and task."""


class RewrittenTurn(pydantic.BaseModel):
    """A turn as the model writes it; `strategy` is whatever it says, so that a bad label is seen, not bent."""

    speaker: Literal["客服", "客户"]
    strategy: str
    text: str


class RewrittenCall(pydantic.BaseModel):
    """A rewritten call."""

    turns: list[RewrittenTurn]


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: who said what, in whatever order."""

    id: str
    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class CallOutcome:
    """What became of a call.

    Attributes:
        verdicts: in order, up to the first that drops it.
        rewritten: as the model wrote it, without system notices; None where it was not asked.
        failure: why the model gave no answer; then it is not decided what becomes of the call.
    """

    id: str
    verdicts: tuple[FilterVerdict, ...]
    rewritten: tuple[Utterance, ...] | None = None
    failure: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether it was kept by everything that it came to."""
        return self.failure is None and self.verdicts[-1].keep

    def dialogue(self, source: str) -> Dialogue:
        """The accepted call as a dialogue."""
        return Dialogue(self.id, turns_of(self.rewritten), source)

    def row(self) -> dict[str, Any]:
        """Why it was dropped, and what the model had written; the call itself, with its private data, is left out."""
        last = self.verdicts[-1]
        row = {"id": self.id, "rule": last.rule, "reason": last.reason, "detail": last.detail}
        if self.rewritten is not None:
            row["rewritten"] = [
                {"speaker": each.speaker.value, "strategy": each.label, "text": each.text} for each in self.rewritten
            ]
        return row


def read_calls(path: str | os.PathLike) -> list[RecordedCall]:
    """Read calls from a JSONL of `{"id", "turns": [{"speaker", "text"}]}`; `id` is optional.

    Raises:
        InputError: the file cannot be read, a row is not such an object, an id comes twice, or there are no rows.
    """
    calls: dict[str, RecordedCall] = {}
    with os_errors(path, "cannot read"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        call = _call(line, f"{path}, row {number}")
        if call.id in calls:
            raise InputError(f"{path}, row {number}, field id: {call.id!r} is used by an earlier row")
        calls[call.id] = call
    if not calls:
        raise InputError(f"{path}: no rows")
    return list(calls.values())


def _call(line: str, place: str) -> RecordedCall:
    try:
        row = json.loads(line)
        turns = row["turns"]
        said = tuple(Utterance(Speaker.parse(turn["speaker"]), turn["text"]) for turn in turns)
        json.dumps(turns, ensure_ascii=False).encode()  # half a character cannot be sent
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}: not of the form {{'id', 'turns': [{{'speaker', 'text'}}]}} ({error})") from error
    if not all(isinstance(each.text, str) for each in said):
        raise InputError(f"{place}, field text: not a text")
    return RecordedCall(str(row.get("id") or digest(turns)[:16]), said)


async def build(
    calls: Sequence[RecordedCall],
    ask: AskFn,
    *,
    call: CallConfig,
    rewrite: RewriteConfig,
    duplicates: DuplicatesConfig,
    language: str,
    concurrency: int,
    done: Callable[[CallOutcome], None] = lambda outcome: None,
) -> list[CallOutcome]:
    """Filter and rewrite calls, at most `concurrency` at a time; their outcomes in the order of the calls.

    `done` hears of each as it ends. Near-duplicates are looked for at the end, in the order of the calls, so that what
    is kept does not depend on who answered first.

    Raises:
        AuthenticationError: the model's server does not serve this key; all else that fails is an outcome.
    """
    places = asyncio.Semaphore(concurrency)

    async def one(each: RecordedCall) -> CallOutcome:
        async with places:
            try:
                outcome = await _build_one(each, ask, call, rewrite, language)
            except AuthenticationError:
                # Before this place is free, and the next call takes it.
                for task in tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
                raise
        done(outcome)
        return outcome

    tasks = [asyncio.create_task(one(each)) for each in calls]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    repeats = DuplicateFilter(duplicates)
    return [_with_repeats(outcome, repeats) for outcome in outcomes]


async def _build_one(
    each: RecordedCall, ask: AskFn, call: CallConfig, rewrite: RewriteConfig, language: str
) -> CallOutcome:
    verdicts, rewritten = check_call(each.utterances, call), None
    try:
        if verdicts[-1].keep:
            verdicts.append(await check_call_manners(merge_turns(each.utterances), ask, language))
        if verdicts[-1].keep:
            rewritten = strip_boilerplate(await _rewrite(each, ask, rewrite, language))
            verdicts += check_rewrite(rewritten, rewrite)
            if verdicts[-1].keep:
                verdicts.append(await check_quality(rewritten, ask, language))
    except AuthenticationError:
        raise
    except LLMError as error:
        return CallOutcome(each.id, tuple(verdicts), failure=str(error))
    return CallOutcome(each.id, tuple(verdicts), None if rewritten is None else tuple(rewritten))


async def _rewrite(each: RecordedCall, ask: AskFn, config: RewriteConfig, language: str) -> list[Utterance]:
    transcript = as_text(merge_turns(each.utterances), language)
    answer = await ask("rewrite", messages("rewrite", language, transcript=transcript, config=config), RewrittenCall)
    return _rewritten(answer)


def _rewritten(answer: RewrittenCall) -> list[Utterance]:
    return [Utterance(Speaker.parse(turn.speaker), turn.text, turn.strategy.strip()) for turn in answer.turns]


def _with_repeats(outcome: CallOutcome, repeats: DuplicateFilter) -> CallOutcome:
    if not outcome.accepted:
        return outcome
    verdicts = (*outcome.verdicts, repeats.check(outcome.dialogue("")))
    return CallOutcome(outcome.id, verdicts, outcome.rewritten)


def ask_model(client: Client, seed: int, log: "AnswerLog") -> AskFn:
    """Ask a model on a server, at temperature 0 unless its configuration says otherwise; requests go to the log."""

    async def ask(task: str, prompt: list[dict[str, str]], form: type[Form]) -> Form:
        answer = await ask_server(client, prompt, form, seed=seed, temperature=0.0, observe=log.observe)
        return answer.value

    return ask


def ask_mock(language: str) -> AskFn:
    """Answers of ours about the bundled calls, in the place of a model's.

    Raises:
        InputError: (when asked) about anything else.
    """
    script: dict[tuple[str, str], dict[str, Any]] = {}
    answers = {row["id"]: row for row in map(json.loads, BUNDLED_ANSWERS.read_text(encoding="utf-8").splitlines())}
    for each in read_calls(BUNDLED):
        row, text = answers.get(each.id, {}), as_text(merge_turns(each.utterances), language)
        script |= {(task, text): row[task] for task in ("call_check", "rewrite") if task in row}
        if "quality" in row:
            rewritten = strip_boilerplate(_rewritten(RewrittenCall.model_validate(row["rewrite"])))
            script["quality", as_text(rewritten, language)] = row["quality"]

    async def ask(task: str, prompt: list[dict[str, str]], form: type[Form]) -> Form:
        for (about, text), answer in script.items():
            if about == task and text in prompt[-1]["content"]:
                return form.model_validate(answer)
        raise InputError("llm=mock answers about the bundled calls only: choose a model, such as llm=vllm")

    return ask


class AnswerLog:
    """Answers and requests in an append-only JSONL, each written as it comes: what was paid for once is kept.

    A last line that was cut off by the end of a process is dropped.
    """

    def __init__(self, path: str | os.PathLike):
        """Read what an earlier process left.

        Raises:
            InputError: the file cannot be read or written.
        """
        self.usage = {"requests": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0}
        """Requests, those of them that failed, and the tokens of all."""
        self._answers: dict[str, Any] = {}
        self._log = JsonlLog(path, ascii_only=True)  # an answer may hold what UTF-8 cannot
        self._log.open()
        for row in self._log.read():
            self._take(row)

    def first(self, ask: AskFn) -> AskFn:
        """Ask only what has not been answered yet: the same task, prompt and form."""

        async def answered(task: str, prompt: list[dict[str, str]], form: type[Form]) -> Form:
            key = digest([task, prompt, form.model_json_schema()])
            if key not in self._answers:
                answer = await ask(task, prompt, form)
                self._add({"key": key, "task": task, "answer": answer.model_dump()})
            return form.model_validate(self._answers[key])

        return answered

    def observe(self, attempt: RequestAttempt) -> None:
        """Note a request to a server, answered or not."""
        self._add(
            {"failure": attempt.kind, "prompt_tokens": attempt.prompt_tokens,
             "completion_tokens": attempt.completion_tokens, "latency_s": round(attempt.latency_s, 3)}
        )  # fmt: skip

    def _add(self, row: dict[str, Any]) -> None:
        self._take(row)
        self._log.append(row)

    def _take(self, row: dict[str, Any]) -> None:
        if "key" in row:
            self._answers[row["key"]] = row["answer"]
        else:
            self.usage["requests"] += 1
            self.usage["failed"] += row["failure"] is not None
            self.usage["prompt_tokens"] += row["prompt_tokens"]
            self.usage["completion_tokens"] += row["completion_tokens"]
