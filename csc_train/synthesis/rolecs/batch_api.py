"""The backend of batch files in OpenAI's format, for roles whose answers may come later: personas, planner, judges.

A run does not wait for these roles. It writes their requests to batch files and leaves the dialogues pending. The next
start gets the results, matches them by id and resumes the dialogues.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from csc_train.errors import InputError
from csc_train.jsonl import read_jsonl, write_jsonl
from csc_train.llm.client import LLMError, RequestAttempt
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
        text, tokens = result
        observe(RequestAttempt({"model": self.model(call.role)}, 1, None, "", text, *tokens, 0.0))
        try:
            return parse_answer(text, call.schema)
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


def read_batch_results(paths: Iterable[str | os.PathLike]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The answers in result files, by custom id: text, and (prompt tokens, completion tokens).

    Failed and expired requests are skipped, so they stay pending.

    Raises:
        InputError: a file cannot be read, or a line is not a result; names file and line.
    """
    results = {}
    for path in paths:
        for number, row in read_jsonl(path):
            try:
                response = row.get("response")
                if row.get("error") or not response or response["status_code"] != 200:
                    continue
                body = response["body"]
                usage = body.get("usage") or {}
                tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
                results[row["custom_id"]] = body["choices"][0]["message"]["content"] or "", tokens
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"batch.results: {path}, line {number}: not a batch result: {error!r}") from error
    return results
