"""Client of one OpenAI-compatible server: rate limits, retries, and a count of every request."""

import asyncio
import contextlib
import email.utils
import functools
import math
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import openai

from csc_train.errors import InputError, causes
from csc_train.invisible import is_blank
from csc_train.llm.config import JSON_MODES, LLMConfig
from csc_train.llm.limits import RequestLimits
from csc_train.thoughts import without_thoughts

RETRYABLE = ("connection", "rate_limit", "server_error", "malformed", "interrupted")
"""Kinds of errors (see `CallError`) that a retry of the same request may cure."""
RETRYABLE_LATER = ("timeout", "unreachable")
"""The same for a server that has answered before, and may be starting again."""
COMPLETE = (None, "stop", "eos", "eos_token", "stop_sequence", "end_turn")
AT_LIMIT = ("length", "max_tokens", "model_length")
"""Values of `finish_reason`, as servers name them; an answer with any other one is interrupted."""
CONNECT_TIMEOUT_S = 10.0
_UNREACHABLE = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
INITIAL_BACKOFF_S = 0.5
"""Wait before the first retry, unless the server names a time; doubled for each further retry."""
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer wait gets no retry."""
CHARACTERS_PER_TOKEN = 2
"""Estimates prompts before the server has counted them; between Chinese (about 1.5) and English (about 4)."""

Message = dict[str, str]
"""A chat message: `{"role", "content"}`."""
CHECK_MESSAGES = [{"role": "user", "content": "OK?"}]
"""What `Client.check` asks."""


@dataclass(frozen=True)
class RequestAttempt:
    """One request and its result.

    Attributes:
        request: the body, without the key.
        number: the attempt's number within its call, from 1.
        kind: that of a `CallError`, explained by `message`; None for an answer.
        text: the answer.
        prompt_tokens, completion_tokens: as counted by the server; 0 if it did not count.
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
    """An answer of the model.

    Attributes:
        text: without the thoughts of a reasoning model.
        cut_off: whether it ended at the limit of tokens.
        attempts: number of requests, the failed ones included.
        model: the model's name by the server.
        token_ids: ids of the text and its end token, if the server returns them (vLLM's `return_token_ids`).
        log_likelihoods: of the prompt's tokens except the first, if requested.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut_off: bool
    attempts: int
    model: str
    token_ids: tuple[int, ...] | None = None
    log_likelihoods: tuple[float, ...] | None = None


@dataclass(eq=False)
class CallError(Exception):
    """A call that failed.

    Its kind is connection, timeout, rate_limit, server_error, bad_request, authentication, or one of these. malformed:
    the answer does not match the required format. unreachable: the server's name does not resolve, or the connection is
    refused. Answers without a reply are cut_off: the limit of tokens came before it; empty; interrupted: the server
    stopped for another reason; refused: the model, or a content filter, declines.

    Attributes:
        kind: see above.
        message: one line, without the key.
        attempts, prompt_tokens, completion_tokens: totals of all its requests.
        wait_s: the wait that the server asked for, if any.
    """

    kind: str
    message: str
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wait_s: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class LLMError(CallError):
    """No usable answer after all retries."""


class UnusableServerError(CallError, InputError):
    """The server rejects the key, or cannot be reached. Every other call would fail as well, so the run ends."""

    def __str__(self) -> str:
        return self.message


class Sampling(TypedDict, total=False):
    """Keywords of a call that go into its `Client.body`."""

    seed: int | None
    temperature: float | None
    max_tokens: int | None


class Client(contextlib.AbstractAsyncContextManager):
    """A model on a server; an async context, for one event loop.

    Args:
        observe: called with every attempt of every call as soon as it ends, before the call's own `observe`.

    Attributes:
        config: the model, the server and the limits.
        limits: the limits' current state.
        json_mode: the JSON mode that the server supports, found by trying `JSON_MODES` in order (see
            `structured.ask_structured`).
        json_mode_confirmed: the mode has given a valid answer, so it is kept.

    Raises:
        InputError: the backend is not a server, or the environment variable of its key is not set.
    """

    def __init__(self, config: LLMConfig, observe: Observer | None = None):
        if config.backend != "openai":
            raise InputError(f"llm.backend={config.backend}: not a server: choose one, such as llm=vllm")
        self.config = config
        self.limits = RequestLimits(config)
        self.json_mode_confirmed = config.json_mode != "auto"
        self.json_mode = config.json_mode if self.json_mode_confirmed else JSON_MODES[0]
        # Never None: the library would send OPENAI_API_KEY to any server.
        self._key = api_key(config) or "none"
        # Without the library's retries, which could neither be counted nor lower the concurrency, and without its
        # timeout, which restarts with every byte that arrives.
        timeout = openai.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._api = openai.AsyncOpenAI(base_url=config.base_url, api_key=self._key, timeout=timeout, max_retries=0)
        self._has_answered, self._observe = False, observe

    async def __aexit__(self, *_) -> None:
        await self._api.close()

    async def check(self) -> None:
        """Ask the server once, before work starts; any answer will do.

        Raises:
            InputError: there is none, or the server refuses the key or the model.
        """
        body = self.body(max_tokens=16) | {"messages": CHECK_MESSAGES}
        try:
            await self._call("/chat/completions", body, lambda choice: read_message(choice) | _UNJUDGED, None)
        except LLMError as failure:
            place = f"llm.base_url={self.config.base_url}, llm.model={self.config.model}"
            raise InputError(f"{place}: no answer: {failure}: mend the server or correct the settings") from failure

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        response_format: dict[str, Any] | None = None,
        observe: Observer | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The model's next message.

        Args:
            messages: the chat so far.
            response_format: as in the API.
            observe: called with every attempt as soon as it ends.
            sampling: as of `body`.

        Raises:
            UnusableServerError: the server rejects the key or cannot be reached.
            LLMError: no usable answer after all retries.
        """
        body = self.body(**sampling) | {"messages": list(messages)}
        if response_format is not None:
            body["response_format"] = response_format
        return await self._call("/chat/completions", body, read_message, observe)

    async def complete(
        self, prompt: str | Sequence[int], *, observe: Observer | None = None, **sampling: Unpack[Sampling]
    ) -> Completion:
        """The continuation of a prompt, given as text or token ids; arguments and errors as in `chat`."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        body = self.body(**sampling) | {"prompt": prompt}
        return await self._call("/completions", body, _read_text, observe)

    async def log_likelihoods(self, prompt: Sequence[int], *, observe: Observer | None = None) -> tuple[float, ...]:
        """The log-likelihood of each token of a prompt except the first, in nats; [length - 1].

        Raises:
            UnusableServerError: the server rejects the key or cannot be reached.
            LLMError: no usable answer after all retries; `bad_request` if the server returns no likelihoods.
        """
        echoed = {"prompt": list(prompt), "max_tokens": 1, "echo": True, "logprobs": 1}
        read = functools.partial(_read_echo, len(prompt))
        answer = await self._call("/completions", self.body(temperature=0) | echoed, read, observe)
        return answer.log_likelihoods or ()

    async def count_tokens(self, prompt: Sequence[int]) -> int:
        """The length of a prompt by the server's count, or an LLMError of kind `bad_request` if it takes no ids."""
        body = self.body(temperature=0) | {"prompt": list(prompt), "max_tokens": 1}
        answer = await self._call("/completions", body, lambda choice: _read_text(choice) | _UNJUDGED, None)
        return answer.prompt_tokens

    def body(
        self, seed: int | None = None, temperature: float | None = None, max_tokens: int | None = None
    ) -> dict[str, Any]:
        """The common body of all requests. A null in `extra_body` removes a field.

        Args:
            seed: of the sampling.
            temperature, max_tokens: defaults of the task; the configuration takes precedence.
        """
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
        """Send a request until it is answered or all retries have failed; once more if a larger limit may help."""
        usage, number, last = [0, 0], 0, self.config.max_retries + 1
        while True:
            number += 1
            estimate = _estimate(body)
            async with self.limits.slot(estimate) as sent_in:
                start = time.perf_counter()
                failure = None
                answer: dict[str, Any]
                try:
                    answer = await self._send(path, body, read)
                except CallError as error:
                    failure, answer = error, {"text": ""} | _usage(error.prompt_tokens, error.completion_tokens)
                latency = time.perf_counter() - start
                tokens = answer["prompt_tokens"], answer["completion_tokens"]
                self.limits.adjust_tokens(sum(tokens) - estimate)
                if failure is None:
                    self.limits.on_success()
                    self._has_answered = True
                elif failure.kind == "rate_limit":
                    wait = failure.wait_s or 0
                    self.limits.on_rate_limit(sent_in, wait if wait <= MAX_RETRY_AFTER_S else 0)
            usage = [before + now for before, now in zip(usage, tokens, strict=True)]
            kind, message = (failure.kind, failure.message) if failure else (None, "")
            attempt = RequestAttempt(body, number, kind, message, answer["text"], *tokens, latency)
            for each in filter(None, (self._observe, observe)):
                each(attempt)
            cut_off = failure.kind in ("cut_off", "empty") if failure else answer["cut_off"]
            if cut_off and (larger := self._with_larger_limit(body)):
                body, last = larger, last + 1
                continue
            if failure is None:
                return Completion(**answer, attempts=number)
            retried = (*RETRYABLE, *RETRYABLE_LATER) if self._has_answered else RETRYABLE
            if failure.kind not in retried or (failure.wait_s or 0) > MAX_RETRY_AFTER_S or number >= last:
                failure.attempts, failure.prompt_tokens, failure.completion_tokens = number, *usage
                raise failure
            backoff = min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2 ** (number - 1)) * random.uniform(0.75, 1)
            await asyncio.sleep(max(backoff, failure.wait_s or 0))

    def _with_larger_limit(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The request with `LLMConfig.retry_max_tokens`; None if its limit is as large already."""
        name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        larger = self.config.retry_max_tokens or 0
        return body | {name: larger} if larger > body.get(name, 0) else None

    async def _send(self, path: str, body: dict[str, Any], read: Callable[[dict], dict]) -> dict[str, Any]:
        """Send one request; returns the fields of its `Completion`.

        Raises:
            CallError: the request failed; its tokens are those of this request.
        """
        try:
            async with asyncio.timeout(self.config.timeout_s):
                data: Any = await self._api.post(path, body=body, cast_to=object)
            usage = data.get("usage") or {}
            counted = _usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            answer = read(data["choices"][0])
            model = data.get("model") or self.config.model
        except TimeoutError as error:
            raise LLMError("timeout", f"no answer within {self.config.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            message = f"{self.config.base_url}: {type(reason).__name__} {reason}"
            for cause in causes(reason):
                if isinstance(cause, _UNREACHABLE):
                    message = f"llm.base_url={self.config.base_url}: {cause}: start the server, or correct the address"
                    raise UnusableServerError("unreachable", self._clean(message)) from cause
            kind = "timeout" if isinstance(error, openai.APITimeoutError) else "connection"
            raise LLMError(kind, self._clean(message)) from error
        except openai.APIStatusError as error:
            kind, message = _kind_of(error), self._clean(f"HTTP {error.status_code}: {error.message}")
            if kind == "authentication":
                message = f"llm.api_key_env={self.config.api_key_env}: {self.config.base_url} rejects it: {message}"
                raise UnusableServerError(kind, message) from error
            raise LLMError(kind, message, wait_s=_retry_after(error.response.headers)) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LLMError("malformed", self._clean(f"not an answer of this API: {error!r}")) from error
        if fault := answer.pop("fault"):
            raise LLMError(fault[0], self._clean(fault[1]), **counted)
        return answer | counted | {"model": model}

    def _clean(self, message: str) -> str:
        """A server's message as one line of valid UTF-8, without the key, which some servers repeat."""
        line = " ".join(str(message).split())
        if self.config.api_key_env:
            line = line.replace(self._key, "***")
        return line.encode(errors="replace").decode()[:300]


def api_key(config: LLMConfig) -> str | None:
    """The key of a server, from the environment; None if it needs none.

    Raises:
        InputError: the variable is not set.
    """
    if config.api_key_env is None:
        return None
    if not os.environ.get(config.api_key_env):
        raise InputError(f"llm.api_key_env={config.api_key_env}: this environment variable is not set")
    return os.environ[config.api_key_env]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}


def read_message(choice: dict[str, Any]) -> dict[str, Any]:
    """Parse a choice of /v1/chat/completions.

    Returns:
        `text`, without thoughts; whether it is `cut_off`; and `fault`, None if there is a reply, else the kind of the
        `CallError` and the explanation.
    """
    message = choice["message"]
    return _judge(_text(message.get("content") or ""), choice.get("finish_reason"), message.get("refusal"))


def _read_text(choice: dict[str, Any]) -> dict[str, Any]:
    """Parse a choice of /v1/completions."""
    ids = choice.get("token_ids")
    read = _judge(_text(choice["text"]), choice.get("finish_reason"), None)
    return read | {"token_ids": None if ids is None else tuple(ids)}


def _judge(text: str, reason: str | None, refusal: str | None) -> dict[str, Any]:
    """An answer, as `read_message` returns it."""
    fault, text = None, without_thoughts(text)
    if refusal or reason == "content_filter":
        fault = "refused", refusal or "stopped by a content filter"
    elif reason not in (*COMPLETE, *AT_LIMIT):
        fault = "interrupted", f"finish_reason={reason}"
    elif is_blank(text):
        fault = ("cut_off", "the limit of tokens came before a reply") if reason in AT_LIMIT else ("empty", "no text")
    return {"text": text, "cut_off": reason in AT_LIMIT, "fault": fault}


_UNJUDGED = {"cut_off": False, "fault": None}
"""Of the answer to a probe, which need not be a reply."""


def _read_echo(length: int, choice: dict[str, Any]) -> dict[str, Any]:
    """Parse a choice of /v1/completions that repeats its prompt of `length` tokens."""
    told = (choice.get("logprobs") or {}).get("token_logprobs") or []
    # The generated token may follow; the first token has no likelihood.
    if len(told) not in (length, length + 1) or not all(isinstance(each, float | int) for each in told[1:length]):
        raise LLMError("bad_request", "the server returns no likelihoods of prompt tokens")
    if not all(map(math.isfinite, told[1:length])):
        raise ValueError("a log-likelihood is not finite")
    return _read_text(choice) | _UNJUDGED | {"log_likelihoods": tuple(told[1:length])}


def _estimate(body: dict[str, Any]) -> int:
    """About how many tokens a request takes."""
    prompt = body.get("prompt") or "".join(message["content"] for message in body["messages"])
    length = len(prompt) // (CHARACTERS_PER_TOKEN if isinstance(prompt, str) else 1)
    return length + body.get("max_tokens", body.get("max_completion_tokens", 0))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {type(value).__name__}")
    value.encode()  # raises on a lone surrogate, which no file could hold
    return value


def _kind_of(error: openai.APIStatusError) -> str:
    status = error.status_code
    if status in (401, 402, 403) or error.code == "insufficient_quota":
        return "authentication"
    if status == 429:
        return "rate_limit"
    return "server_error" if status >= 500 or status in (408, 409) else "bad_request"


def _retry_after(headers: Any) -> float | None:
    """The wait in seconds that a server asks for, by `retry-after-ms` or `Retry-After` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None
