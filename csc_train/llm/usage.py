"""The tokens that a run's requests to a server took, in its directory: a row for each request, kept when killed."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from csc_train.jsonl import JsonlLog
from csc_train.llm.client import Observer, RequestAttempt
from csc_train.llm.config import LLMConfig

USAGE_FILE = "usage.jsonl"


@dataclass(frozen=True)
class Usage:
    """Requests to a server and their tokens, as the server counts them.

    Attributes:
        failed: those of the requests that got no usable answer; retries are requests.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def describe(self, llm: LLMConfig) -> str:
        """The counts in words, with their cost if the prices are known."""
        cost = llm.cost(self.prompt_tokens, self.completion_tokens)
        money = "price unknown (llm.price_per_million_*)" if cost is None else f"cost {cost:,.2f}"
        return (
            f"{self.requests:,} requests ({self.failed:,} failed), {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens, {money}"
        )


def usage_observer(directory: str | os.PathLike) -> Observer:
    """A function that writes each request to the usage of a run directory; it raises an InputError if it cannot."""
    log = JsonlLog(Path(directory) / USAGE_FILE)

    def observe(attempt: RequestAttempt) -> None:
        failed = int(attempt.kind is not None)
        log.append(asdict(Usage(1, failed, attempt.prompt_tokens, attempt.completion_tokens)))

    return observe


def read_usage(directory: str | os.PathLike) -> Usage:
    """The usage of a run directory, over all its starts; a line that is broken is said and left out.

    Raises:
        InputError: the file cannot be read.
    """
    rows = JsonlLog(Path(directory) / USAGE_FILE, _parse).read()
    return Usage(*(sum(getattr(row, each.name) for row in rows) for each in fields(Usage)))


def _parse(row: dict[str, Any]) -> Usage:
    if wrong := [name for name, value in row.items() if type(value) is not int]:
        raise ValueError(f"field {wrong[0]}: not a whole number")
    return Usage(**row)
