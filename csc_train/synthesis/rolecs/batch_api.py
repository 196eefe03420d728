"""The backend of batch files in OpenAI's format, for roles whose answers may come later: personas, planner, judges.

A run does not wait for these roles. It writes their requests to batch files and leaves the dialogues pending. The next
start gets the results, matches them by id and resumes the dialogues.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from csc_train.jsonl import read_jsonl, write_jsonl
from csc_train.llm.client import LLMError, RequestAttempt, read_message
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import parse_answer, response_format
from csc_train.synthesis.config import BatchConfig, RolesConfig
from csc_train.synthesis.rolecs.backends import RoleCall, ServerBackend


class PendingBatch(Exception):
    """The answer is still to come from a batch."""


class BatchBackend(ServerBackend):
    """Models on servers, some roles of which are answered by batch files.

    Attributes:
        pending: calls without a result, by custom id.
    """

    def __init__(self, shared: LLMConfig, roles: RolesConfig, config: BatchConfig):
        """Read the results.

        Raises:
            InputError: a file cannot be read.
        """
        super().__init__(shared, roles)
        self._batch_roles = config.roles
        self._asked_roles = [role for role in self._models if role not in config.roles]
        self._results = read_batch_results(config.results)
        self.pending: dict[str, RoleCall] = {}

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `backends.Backend`).

        Raises:
            PendingBatch: the role is answered by a batch, and there is no result yet.
        """
        if call.role not in self._batch_roles:
            return await super().ask(call, observe)
        result = self._results.get(custom_id(call))
        if result is None:
            self.pending[custom_id(call)] = call
            raise PendingBatch
        answer, tokens = result
        kind, message = answer["fault"] or (None, "")
        observe(RequestAttempt({"model": self.model(call.role)}, 1, kind, message, answer["text"], *tokens, 0.0))
        if kind:
            raise LLMError(kind, message, 1, *tokens)
        try:
            return parse_answer(answer["text"], call.schema)
        except ValueError as error:
            raise LLMError("malformed", str(error), 1, *tokens) from error

    def write_requests(self, directory: str | os.PathLike) -> list[Path]:
        """Write the pending calls to one batch file per model; returns the files."""
        requests: dict[str, list[dict[str, Any]]] = {}
        for name, call in sorted(self.pending.items()):
            body = self.request_body(call) | {"response_format": response_format("json_schema", call.schema)}
            request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            requests.setdefault(body["model"], []).append(request)
        paths = []
        for number, (_, rows) in enumerate(sorted(requests.items()), start=1):
            paths.append(Path(directory) / f"requests-{number}.jsonl")
            write_jsonl(paths[-1], rows)
        return paths


def custom_id(call: RoleCall) -> str:
    """The id that matches a result to its call, whatever the order of the files."""
    return f"{call.owner}.{call.key}"


class _BatchResponse(BaseModel):
    status_code: int
    body: Any = None


class _BatchResult(BaseModel):
    """A line of a result file."""

    custom_id: str
    error: Any = None
    response: _BatchResponse | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


BatchAnswer = tuple[dict[str, Any], tuple[int, int]]
"""An answer (see `read_message`), and (prompt tokens, completion tokens)."""


def _parse_result(row: dict[str, Any]) -> tuple[str, BatchAnswer | None]:
    """The custom id of a result, and its answer; None for a request that failed or expired."""
    result = _BatchResult.model_validate(row)
    if result.error or result.response is None or result.response.status_code != 200:
        return result.custom_id, None
    completion = _Completion.model_validate(result.response.body)
    usage = completion.usage or _Usage()
    tokens = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return result.custom_id, (read_message(completion.choices[0].model_dump()), tokens)


def read_batch_results(paths: Iterable[str | os.PathLike]) -> dict[str, BatchAnswer]:
    """The answers in result files, by custom id; of several files with one id, the last counts.

    Failed and expired requests are left out, so they stay pending.

    Raises:
        InputError: a file cannot be read, or a line is not a result; names file and line.
    """
    results: dict[str, BatchAnswer] = {}
    for path in paths:
        advice = "delete the line: its request stays pending"
        rows = (row for _, row in read_jsonl(path, _parse_result, key=lambda row: f"custom_id {row[0]}", advice=advice))
        results |= {name: answer for name, answer in rows if answer is not None}
    return results
