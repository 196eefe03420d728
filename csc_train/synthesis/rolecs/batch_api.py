"""Batch files in the OpenAI format, for the roles that need no answer at once: personas, planner, judges.

A run asks nothing of these roles: it leaves the dialogues that wait for them where they are, and writes what they wait
for. Given the results, the next start joins them by their ids and goes on.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from csc_train.errors import InputError
from csc_train.files import os_errors, write_text
from csc_train.llm.client import LLMError, RequestAttempt
from csc_train.llm.structured import parse_answer, response_format
from csc_train.synthesis.config import BatchConfig
from csc_train.synthesis.rolecs.backends import RoleCall, ServedModels


class PendingBatch(Exception):
    """An answer that a batch has yet to bring."""


class BatchedModels:
    """Models on servers, some roles of which are answered by batch files.

    Attributes:
        waiting: the calls that no result was found for.
    """

    def __init__(self, models: ServedModels, config: BatchConfig):
        """Read the results.

        Raises:
            InputError: a file cannot be read.
        """
        self._models = models
        self._roles = config.roles
        self._results = read_results(config.results)
        self.source = models.source
        self.concurrency = models.concurrency
        self.model = models.model
        self.cost = models.cost
        self.waiting: dict[str, RoleCall] = {}

    async def __aenter__(self) -> "BatchedModels":
        await self._models.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self._models.__aexit__(*error)

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `backends.Backend`).

        Raises:
            Waiting: the call is left to a batch that has not brought its answer yet.
        """
        if call.role not in self._roles:
            return await self._models.ask(call, observe)
        result = self._results.get(custom_id(call))
        if result is None:
            self.waiting[custom_id(call)] = call
            raise PendingBatch
        text, tokens = result
        request = {"model": self.model(call.role)}
        observe(RequestAttempt(request, 1, None, "", text, *tokens, 0.0))
        try:
            return parse_answer(text, call.form)
        except ValueError as error:
            raise LLMError("malformed", str(error), 1, *tokens) from error

    def write_requests(self, directory: str | os.PathLike) -> list[Path]:
        """Write the calls that wait, a file for each model, as batch services want it; the files."""
        lines: dict[str, list[str]] = {}
        for name, call in sorted(self.waiting.items()):
            body = self._models.request(call)
            body["response_format"] = response_format("json_schema", call.form)
            line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.setdefault(body["model"], []).append(json.dumps(line, ensure_ascii=False) + "\n")
        paths = []
        for number, (_, requests) in enumerate(sorted(lines.items()), start=1):
            paths.append(Path(directory) / f"requests-{number}.jsonl")
            write_text(paths[-1], "".join(requests))
        return paths


def custom_id(call: RoleCall) -> str:
    """The id by which a result is joined to its call: never a place in a file."""
    return f"{call.owner}.{call.key}"


def read_results(paths: Iterable[str | os.PathLike]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The answers in files of results, by id: text, and tokens of prompt and answer.

    Requests that failed or expired are left out: they wait still.

    Raises:
        InputError: a file cannot be read, or a line is no result; names file and line.
    """
    results = {}
    for path in paths:
        with os_errors(f"batch.results: {path}", "cannot read"):
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                name, response = row["custom_id"], row.get("response")
                if row.get("error") or not response or response["status_code"] != 200:
                    continue
                results[name] = _answer(response["body"])
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"batch.results: {path}, line {number}: not a result: {error!r}") from error
    return results


def _answer(body: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    usage = body.get("usage") or {}
    tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    return body["choices"][0]["message"]["content"] or "", tokens
