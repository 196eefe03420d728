"""Settings of a language model behind an OpenAI-compatible server."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from csc_train.errors import InputError, check_fields

BACKENDS = ("openai", "mock")
JSON_MODES = ("json_schema", "json_object", "text")
"""Ways to request JSON, the strictest first (see `structured.ask_structured`)."""


@dataclass
class LLMConfig:
    """A model, its server and the request limits. The key itself is never part of it."""

    backend: str = "openai"
    """openai: any OpenAI-compatible server. mock: no server; the recipe has answers for tests and demos."""
    base_url: str = MISSING
    """Address of the server, up to and including /v1."""
    model: str = MISSING
    """The model's name on the server."""
    api_key_env: str | None = None
    """Environment variable with the API key; null sends no key."""
    temperature: float | None = None
    """Sampling temperature; defaults to the task's, such as 0 for an evaluation."""
    top_p: float | None = None
    """Nucleus sampling; defaults to the server's value."""
    max_tokens: int | None = None
    """Longest answer in tokens, including a reasoning model's thoughts; defaults to the task's."""
    retry_max_tokens: int | None = None
    """Longest answer of one more request after an answer that was cut off or empty; null sends none."""
    timeout_s: float = 120.0
    """Longest duration of a request, in seconds."""
    max_retries: int = 5
    """Retries of a failed request."""
    concurrency: int = 16
    """Most requests in flight at a time; lowered while the server reports a rate limit."""
    requests_per_minute: int | None = None
    """Limit of requests per minute; defaults to none."""
    tokens_per_minute: int | None = None
    """Limit of tokens per minute, prompts and answers together; defaults to none."""
    price_per_million_input: float | None = None
    """Price of a million prompt tokens, in any currency."""
    price_per_million_output: float | None = None
    """Price of a million completion tokens, in the same currency."""
    json_mode: str = "auto"
    """How JSON is requested: json_schema, json_object or text; auto: the strictest that the server supports."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request; null removes a field, such as max_tokens."""
    user_first: bool = False
    """The model's chats must begin with the user: the supporter's greeting then answers a stock message."""

    def __post_init__(self):
        check_fields("llm.", self, "backend", choices=BACKENDS)
        if self.backend == "openai":
            address = urlsplit(self.base_url)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise InputError(f"llm.base_url={self.base_url}: give an address such as http://localhost:8000/v1")
            if address.username or address.password:
                raise InputError("llm.base_url: holds a user or password, and is recorded; use llm.api_key_env")
        check_fields("llm.", self, "json_mode", choices=("auto", *JSON_MODES))
        check_fields("llm.", self, "timeout_s", low=0.01)
        check_fields("llm.", self, "max_retries", "temperature", "top_p", low=0)
        check_fields("llm.", self, "price_per_million_input", "price_per_million_output", low=0)
        check_fields("llm.", self, "concurrency", "requests_per_minute", "tokens_per_minute", low=1)
        check_fields("llm.", self, "max_tokens", "retry_max_tokens", low=1)

    def larger_limit(self, kinds: Collection[str], default: int = 1024) -> str:
        """The override that gives four times the limit to answers that failed for it; empty if none did.

        Args:
            kinds: of the failures (see `client.CallError`).
            default: the task's limit.
        """
        if not {"cut_off", "empty"} & {*kinds}:
            return ""
        return f"llm.retry_max_tokens={4 * (self.retry_max_tokens or self.max_tokens or default)}"

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of tokens, in the prices' currency; None without prices."""
        if self.price_per_million_input is None or self.price_per_million_output is None:
            return None
        total = prompt_tokens * self.price_per_million_input + completion_tokens * self.price_per_million_output
        return total / 1e6
