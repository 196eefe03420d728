"""Questions to a model, and a log of its answers, so that no answer is paid for twice."""

import asyncio
import os
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pydantic

from csc_train.files import digest
from csc_train.jsonl import JsonlLog
from csc_train.llm.client import Client, Observer, RequestAttempt
from csc_train.llm.structured import ask_structured
from csc_train.progress import ProgressBar

Item = TypeVar("Item")
Found = TypeVar("Found")
Schema = TypeVar("Schema", bound=pydantic.BaseModel)
AskFn = Callable[[str, list[dict[str, str]], type[Schema]], Awaitable[Schema]]
"""A source of answers: task, messages, schema. A model on a server, a log of earlier answers, or a mock."""
ObservedAskFn = Callable[..., Awaitable[Any]]
"""An `AskFn` that also takes `observe`, which it calls with every request to a server."""


def ask_model(client: Client, seed: int) -> ObservedAskFn:
    """Answers from a model on a server, by default at temperature 0."""

    async def ask(
        task: str, prompt: list[dict[str, str]], schema: type[Schema], observe: Observer | None = None
    ) -> Schema:
        answer = await ask_structured(client, prompt, schema, seed=seed, temperature=0.0, observe=observe)
        return answer.value

    return ask


async def map_concurrently(
    items: Sequence[Item], work: Callable[[Item], Awaitable[Found]], concurrency: int, desc: str, unit: str
) -> list[Found]:
    """What `work` returns for each item, in the order of the items, at most `concurrency` at a time.

    After an error no further item begins, the others in progress are cancelled, and the error is raised.

    Args:
        desc, unit: of the progress bar.
    """
    pending, found = iter(enumerate(items)), {}
    with ProgressBar(total=len(items), desc=desc, unit=unit) as bar:

        async def worker() -> None:
            try:
                for place, item in pending:
                    found[place] = await work(item)
                    bar.update()
            except BaseException:
                deque(pending, maxlen=0)
                raise

        workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()
    return [found[place] for place in range(len(items))]


class _Request(pydantic.BaseModel):
    failure: str | None
    prompt_tokens: int
    completion_tokens: int
    latency_s: float


class _AnswerRow(pydantic.BaseModel):
    """A question, by its hash; its answer, None if it got none; and its requests to a server."""

    key: str
    task: str
    answer: dict[str, Any] | None
    requests: list[_Request]


class AnswerLog:
    """An append-only JSONL of answers with their requests, so that no answer is paid for twice.

    Attributes:
        usage: `requests`, the `failed` ones among them, and their `prompt_tokens` and `completion_tokens`.
    """

    def __init__(self, path: str | os.PathLike):
        """Read the rows of earlier processes; a torn last line is cut off.

        Raises:
            InputError: the file cannot be read or written, or a line is bad.
        """
        self.usage = {"requests": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._answers: dict[str, Any] = {}
        self._locks = defaultdict(asyncio.Lock)
        self._log = JsonlLog(
            path,
            _AnswerRow.model_validate,
            key=lambda row: None if row.answer is None else f"key {row.key}",
            advice="delete the line: its question is asked again",
            ascii_only=True,  # an answer may hold a lone surrogate
        )
        self._log.open()
        for row in self._log.read():
            self._count(row)

    def cached(self, ask: ObservedAskFn) -> AskFn:
        """`ask` with a cache by task, prompt and schema; equal questions are asked once."""

        async def answered(task: str, prompt: list[dict[str, str]], schema: type[Schema]) -> Schema:
            key = digest([task, prompt, schema.model_json_schema()])
            async with self._locks[key]:
                if key not in self._answers:
                    await self._ask(ask, key, task, prompt, schema)
            return schema.model_validate(self._answers[key])

        return answered

    async def _ask(
        self, ask: ObservedAskFn, key: str, task: str, prompt: list[dict[str, str]], schema: type[Schema]
    ) -> None:
        """Ask, and record the answer with its requests in one row: a killed process leaves both or neither."""
        requests: list[_Request] = []

        def observe(attempt: RequestAttempt) -> None:
            tokens = {"prompt_tokens": attempt.prompt_tokens, "completion_tokens": attempt.completion_tokens}
            requests.append(_Request(failure=attempt.kind, **tokens, latency_s=round(attempt.latency_s, 3)))

        answer = None
        try:
            answer = (await ask(task, prompt, schema, observe=observe)).model_dump()
        finally:
            if answer is not None or requests:
                row = _AnswerRow(key=key, task=task, answer=answer, requests=requests)
                self._log.append(row.model_dump())
                self._count(row)

    def _count(self, row: _AnswerRow) -> None:
        if row.answer is not None:
            self._answers[row.key] = row.answer
        self.usage["requests"] += len(row.requests)
        for request in row.requests:
            self.usage["failed"] += request.failure is not None
            self.usage["prompt_tokens"] += request.prompt_tokens
            self.usage["completion_tokens"] += request.completion_tokens
