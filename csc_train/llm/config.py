"""What a user may choose about a language model behind an OpenAI-compatible server."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from csc_train.errors import InputError, check_choice, check_range

BACKENDS = ("openai", "mock")
JSON_MODES = ("json_schema", "json_object", "text")
"""Ways to ask for JSON, the strictest first (see `structured.ask_structured`)."""


@dataclass
class LLMConfig:
    """A model, the server that runs it, and what may be asked of it. The key itself is never part of it."""

    backend: str = "openai"
    """openai: any OpenAI-compatible server. scripted: none, where a recipe has answers of its own."""
    base_url: str = MISSING
    """The address up to and including /v1."""
    model: str = MISSING
    """The name by which the server knows the model."""
    api_key_env: str | None = None
    """The environment variable that holds the key; no key is sent where not given."""
    temperature: float | None = None
    """What the task asks for where not given: 0 for an evaluation."""
    top_p: float | None = None
    max_tokens: int | None = None
    """The longest answer, a reasoning model's thoughts included; what the task asks for where not given."""
    timeout_s: float = 120.0
    """Seconds that a request may take."""
    max_retries: int = 5
    """How often a request that failed is sent again."""
    concurrency: int = 16
    """Requests under way at a time, at most; fewer while the server says that it is too many."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    price_per_million_input: float | None = None
    """Of prompt tokens, in whatever currency."""
    price_per_million_output: float | None = None
    json_mode: str = "auto"
    """How JSON is asked for: json_schema, json_object or text; auto: the strictest that the server accepts."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """What else goes into every request; null leaves out what would go into it, such as max_tokens."""
    user_first: bool = False
    """Whether the model's chats must begin with the user: the supporter's greeting then answers a stock message."""

    def __post_init__(self):
        check_choice("llm.backend", self.backend, BACKENDS)
        if self.backend == "openai":
            address = urlsplit(self.base_url)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise InputError(f"llm.base_url={self.base_url}: give an address such as http://localhost:8000/v1")
            if address.username or address.password:
                raise InputError("llm.base_url: holds a user or password, and is recorded; use llm.api_key_env")
        check_choice("llm.json_mode", self.json_mode, ("auto", *JSON_MODES))
        check_range("llm.timeout_s", self.timeout_s, 0.01)
        check_range("llm.max_retries", self.max_retries, 0)
        check_range("llm.concurrency", self.concurrency, 1)
        lowest = {
            "temperature": 0,
            "top_p": 0,
            "max_tokens": 1,
            "requests_per_minute": 1,
            "tokens_per_minute": 1,
            "price_per_million_input": 0,
            "price_per_million_output": 0,
        }
        for key, low in lowest.items():
            if (value := getattr(self, key)) is not None:
                check_range(f"llm.{key}", value, low)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in the prices' currency; None where a price is not given."""
        if self.price_per_million_input is None or self.price_per_million_output is None:
            return None
        spent = prompt_tokens * self.price_per_million_input + completion_tokens * self.price_per_million_output
        return spent / 1e6
