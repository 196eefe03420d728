"""Requests to one OpenAI-compatible server: sent again where that can help, counted whatever becomes of them."""

import asyncio
import email.utils
import functools
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from csc_train.errors import InputError
from csc_train.llm.config import JSON_MODES, LLMConfig
from csc_train.llm.limits import RequestLimits

ERROR_KINDS = (
    "connection", "timeout", "rate_limit", "server_error", "bad_request", "authentication", "malformed", "refused",
)  # fmt: skip
"""Classes of failure. malformed: an answer that is not of the form that was asked for. refused: the model, or a filter
before it, declines."""
RETRYABLE = ("connection", "timeout", "rate_limit", "server_error", "malformed")
"""Failures that the same request may not meet again."""
FIRST_WAIT_S = 0.5
"""Before a request is sent a second time, where the server names no time; each further wait is twice as long."""
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 120.0
"""A server that asks for more than this means another day, not another try."""
CHARACTERS_PER_TOKEN = 2
"""To estimate a prompt before the server has counted it; between Chinese (about 1.5) and English (about 4)."""

Message = dict[str, str]
"""`{"role", "content"}` of a chat."""


@dataclass(frozen=True)
class RequestAttempt:
    """One request as it was sent, and what came of it.

    Attributes:
        request: its body; the key is not part of it.
        number: how many-th try of a call it is, from 1.
        kind: the class of failure, None for an answer; then `message` says more.
        text: the answer.
        prompt_tokens, completion_tokens: as the server counted them; 0 where it did not.
    """

    request: dict[str, Any]
    number: int
    kind: str | None
    message: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    latency_s: float


Observer = Callable[[RequestAttempt], None]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: without the thoughts of a reasoning model.
        finish_reason: `stop`, or `length` where it was cut off.
        latency_s: seconds from sending the request that was answered.
        attempts: requests that it took, the failed ones included.
        model: what the server says answered.
        token_ids: of the text and the token that ended it, where the server tells them (vLLM's `return_token_ids`).
        log_likelihoods: of the prompt's tokens but the first, where they were asked for.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    latency_s: float
    attempts: int
    model: str
    token_ids: tuple[int, ...] | None = None
    log_likelihoods: tuple[float, ...] | None = None


class LLMError(Exception):
    """A call that came to nothing within its budget.

    Attributes:
        kind: one of `ERROR_KINDS`.
        message: one line; the key does not appear in it.
        attempts, prompt_tokens, completion_tokens: of all requests that were made for it.
    """

    def __init__(self, kind: str, message: str, attempts: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.attempts = attempts
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens


class AuthenticationError(LLMError, InputError):
    """The server does not serve this key, or no longer: every other call would fail as well, so a run ends."""


@dataclass(eq=False)
class _Refusal(Exception):
    """Why one request failed; `wait_s` is the time that the server asked for, if it did."""

    kind: str
    message: str
    wait_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def hopeless(self) -> bool:
        """Whether the same request would fail again."""
        return self.kind not in RETRYABLE or (self.wait_s or 0) > LONGEST_RETRY_AFTER_S


@dataclass
class FallbackChain:
    """How JSON is asked of a server: the way that works, once `proven` (see `structured.ask_structured`)."""

    rung: str
    proven: bool = False


class Client:
    """A model on a server. Use it as an async context, in one event loop.

    Attributes:
        config: the model, the server and the limits.
        limits: what they are at the moment.
        ladder: how JSON is asked for.

    Raises:
        InputError: there is no server to ask, or the environment variable of its key is not set.
    """

    def __init__(self, config: LLMConfig):
        if config.backend != "openai":
            raise InputError(f"llm.backend={config.backend}: this needs a model on a server")
        self.config = config
        self.limits = RequestLimits(config)
        auto = config.json_mode == "auto"
        self.ladder = FallbackChain(JSON_MODES[0] if auto else config.json_mode, proven=not auto)
        # Not left out where there is none: the library would send OPENAI_API_KEY to whatever server this is.
        self._key = api_key(config) or "none"
        # None of the library's retries: they are silent, so attempts could neither be counted nor lower the
        # concurrency. Nor its timeout: it starts anew with every byte that arrives.
        self._api = openai.AsyncOpenAI(base_url=config.base_url, api_key=self._key, timeout=None, max_retries=0)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        await self._api.close()

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        response_format: dict[str, Any] | None = None,
        observe: Observer | None = None,
    ) -> Completion:
        """The model's next message.

        Args:
            messages: the chat so far.
            seed: of the sampling.
            temperature, max_tokens: the task's; what the configuration says comes first.
            response_format: as the API has it.
            observe: told of every request, as soon as it is over.

        Raises:
            AuthenticationError: the server does not serve this key.
            LLMError: no answer within the budget.
        """
        body = self.body(seed, temperature, max_tokens) | {"messages": list(messages)}
        if response_format is not None:
            body["response_format"] = response_format
        return await self._call("/chat/completions", body, _read_message, observe)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        observe: Observer | None = None,
    ) -> Completion:
        """How a prompt, as text or as token ids, goes on; arguments and errors as of `chat`."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        body = self.body(seed, temperature, max_tokens) | {"prompt": prompt}
        return await self._call("/completions", body, _read_text, observe)

    async def log_likelihoods(self, prompt: Sequence[int], *, observe: Observer | None = None) -> tuple[float, ...]:
        """How likely each token of a prompt but the first is after those before it, in nats; [length - 1].

        Raises:
            AuthenticationError: the server does not serve this key.
            LLMError: no answer within the budget; `bad_request` where the server does not tell.
        """
        echoed = {"prompt": list(prompt), "max_tokens": 1, "echo": True, "logprobs": 1}
        read = functools.partial(_read_echo, len(prompt))
        answer = await self._call("/completions", self.body(None, 0, None) | echoed, read, observe)
        return answer.log_likelihoods

    def body(self, seed: int | None, temperature: float | None, max_tokens: int | None) -> dict[str, Any]:
        """What every request to the model holds; arguments as of `chat`. What `extra_body` has as null is left out."""
        config = self.config
        settings = {
            "temperature": temperature if config.temperature is None else config.temperature,
            "top_p": config.top_p,
            "max_tokens": max_tokens if config.max_tokens is None else config.max_tokens,
            "seed": seed,
        }
        body = {"model": config.model} | settings | config.extra_body
        return {name: value for name, value in body.items() if value is not None}

    async def _call(
        self, path: str, body: dict[str, Any], read: Callable[[dict], dict], observe: Observer | None
    ) -> Completion:
        """Send a request until it is answered or the budget is used up."""
        prompt = body.get("prompt") or "".join(message["content"] for message in body["messages"])
        estimate = len(prompt) // (CHARACTERS_PER_TOKEN if isinstance(prompt, str) else 1)
        estimate += body.get("max_tokens", body.get("max_completion_tokens", 0))
        spent = [0, 0]
        for number in range(1, self.config.max_retries + 2):
            async with self.limits.slot(estimate) as sent_in:
                start = time.perf_counter()
                refusal = None
                try:
                    answer = await self._send(path, body, read)
                except _Refusal as error:
                    refusal, answer = error, {"text": ""} | _usage(error.prompt_tokens, error.completion_tokens)
                latency = time.perf_counter() - start
                tokens = answer["prompt_tokens"], answer["completion_tokens"]
                self.limits.used(estimate, sum(tokens))
                if refusal is None:
                    self.limits.answered()
                elif refusal.kind == "rate_limit":
                    self.limits.rate_limited(sent_in, 0 if refusal.hopeless else refusal.wait_s or 0)
            spent = [before + now for before, now in zip(spent, tokens, strict=True)]
            if observe is not None:
                kind, message = (refusal.kind, refusal.message) if refusal else (None, "")
                observe(RequestAttempt(body, number, kind, message, answer["text"], *tokens, latency))
            if refusal is None:
                return Completion(**answer, latency_s=latency, attempts=number)
            if refusal.kind == "authentication":
                raise AuthenticationError(refusal.kind, refusal.message, number, *spent)
            if refusal.hopeless or number > self.config.max_retries:
                raise LLMError(refusal.kind, refusal.message, number, *spent)
            backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (number - 1)) * random.uniform(0.75, 1)
            await asyncio.sleep(max(backoff, refusal.wait_s or 0))
        raise AssertionError("the last try returns or raises")

    async def _send(self, path: str, body: dict[str, Any], read: Callable[[dict], dict]) -> dict[str, Any]:
        """One request; the fields of its `Completion`."""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                data = await self._api.post(path, body=body, cast_to=object)
            usage = data.get("usage") or {}
            counted = _usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            answer = read(data["choices"][0])
            model = data.get("model") or self.config.model
        except TimeoutError as error:
            raise _Refusal("timeout", f"no answer within {self.config.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            message = f"{self.config.base_url}: {type(reason).__name__} {reason}"
            raise _Refusal("connection", self._clean(message)) from error
        except openai.APIStatusError as error:
            kind, wait_s = _kind_of(error), _retry_after(error.response.headers)
            message = self._clean(f"HTTP {error.status_code}: {error.message}")
            if kind == "authentication":
                message = f"llm.api_key_env={self.config.api_key_env}: {self.config.base_url} refuses it: {message}"
            raise _Refusal(kind, message, wait_s) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Refusal("malformed", self._clean(f"not an answer of this API: {error!r}")) from error
        if refusal := answer.pop("refusal"):
            raise _Refusal("refused", self._clean(refusal), **counted)
        return answer | counted | {"model": model}

    def _clean(self, message: str) -> str:
        """A server's message as one line without the key, which some servers repeat, that any file can hold."""
        line = " ".join(str(message).split())
        if self.config.api_key_env:
            line = line.replace(self._key, "***")
        return line.encode(errors="replace").decode()[:300]


def api_key(config: LLMConfig) -> str | None:
    """The key of a server, from the environment; None where it needs none.

    Raises:
        InputError: the variable is not set.
    """
    if config.api_key_env is None:
        return None
    if not os.environ.get(config.api_key_env):
        raise InputError(f"llm.api_key_env={config.api_key_env}: this environment variable is not set")
    return os.environ[config.api_key_env]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}


def _read_message(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of /v1/chat/completions."""
    message, reason = choice["message"], choice.get("finish_reason")
    filtered = "stopped by a content filter" if reason == "content_filter" else None
    # Some servers leave the thoughts in front of the answer.
    _, ended, answer = _text(message.get("content") or "").rpartition("</think>")
    return {
        "text": answer.lstrip() if ended else answer,
        "finish_reason": reason,
        "refusal": message.get("refusal") or filtered,
    }


def _read_text(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of /v1/completions."""
    ids = choice.get("token_ids")
    return {
        "text": _text(choice["text"]),
        "finish_reason": choice.get("finish_reason"),
        "refusal": None,
        "token_ids": None if ids is None else tuple(ids),
    }


def _read_echo(length: int, choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of /v1/completions that repeats its prompt, of `length` tokens."""
    told = (choice.get("logprobs") or {}).get("token_logprobs") or []
    # One more is the token that was generated; of the first one nothing is known.
    if len(told) not in (length, length + 1) or not all(isinstance(each, float | int) for each in told[1:length]):
        raise _Refusal("bad_request", "the server does not tell how likely the tokens of a prompt are")
    if not all(map(math.isfinite, told[1:length])):
        raise ValueError("a log-likelihood that is no finite number")
    return _read_text(choice) | {"log_likelihoods": tuple(told[1:length])}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where there should be a text")
    value.encode()  # refuses half a character, which no file could hold
    return value


def _kind_of(error: openai.APIStatusError) -> str:
    status = error.status_code
    if status in (401, 402, 403) or error.code == "insufficient_quota":
        return "authentication"
    if status == 429:
        return "rate_limit"
    return "server_error" if status >= 500 or status in (408, 409) else "bad_request"


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, by `retry-after-ms` or `Retry-After` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None
