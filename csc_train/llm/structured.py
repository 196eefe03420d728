"""Structured answers: JSON that matches a pydantic schema.

Accepted are a JSON object in a code fence or between other words, raw line breaks inside its strings, and pydantic's
conversions ("false" becomes False, "3" becomes 3). Anything else is returned to the model with the error; text is never
repaired by guessing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Unpack

import openai
import pydantic

from csc_train.llm.client import CallError, Client, Completion, LLMError, Message, Observer, RequestAttempt, Sampling
from csc_train.llm.config import JSON_MODES

MAX_REPAIRS = 2
"""Times that the model is shown the error of its answer, before one fresh sample."""
_DECODER = json.JSONDecoder(strict=False)

AnswerSchema = TypeVar("AnswerSchema", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class StructuredAnswer(Generic[AnswerSchema]):
    """A valid answer.

    Attributes:
        value: an instance of the schema.
        attempts, prompt_tokens, completion_tokens: totals of all its requests.
        model: the model's name by the server.
    """

    value: AnswerSchema
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    model: str


async def ask_structured(
    client: Client,
    messages: Sequence[Message],
    schema: type[AnswerSchema],
    *,
    observe: Observer | None = None,
    **sampling: Unpack[Sampling],
) -> StructuredAnswer[AnswerSchema]:
    """Ask for an answer that matches `schema`.

    The first calls of a client find the strictest JSON mode that the server supports: a JSON schema, a JSON object, or
    text. An answer that does not match is returned to the model with the error, twice; then the model is asked again
    with another seed.

    Args:
        schema: all its fields are required. The prompt describes the fields, as far as the model needs it.
        observe, sampling: as of `Client.chat`.

    Raises:
        UnusableServerError: the server rejects the key or cannot be reached.
        LLMError: of kind `malformed` if no answer matches, or another one of `Client.chat`; its totals are those of all
            requests.
    """
    attempts: list[RequestAttempt] = []

    def record(attempt: RequestAttempt) -> None:
        attempts.append(attempt)
        if observe is not None:
            observe(attempt)

    chat, seed = list(messages), sampling.get("seed")
    try:
        for turn in range(MAX_REPAIRS + 2):
            if fresh := turn > MAX_REPAIRS:
                chat = list(messages)
            repair = len(chat) > len(messages)
            settings: Sampling = {**sampling, "seed": seed if seed is None else seed + fresh}
            completion = await _request(client, chat, schema, repair, record, settings)
            try:
                value = parse_answer(completion.text, schema)
            except ValueError as error:
                problem = "It is too long and was cut off." if completion.cut_off else str(error)
                complaint = f"That answer is not valid. {problem}"
                chat += [{"role": "assistant", "content": completion.text}, {"role": "user", "content": complaint}]
                continue
            client.json_mode_confirmed = True
            return StructuredAnswer(value, **_totals(attempts), model=completion.model)
        raise LLMError("malformed", f"no answer matches the schema {schema.__name__}: {problem}")
    except CallError as failure:
        vars(failure).update(_totals(attempts))
        raise


def parse_answer(text: str, schema: type[AnswerSchema]) -> AnswerSchema:
    """The last JSON object in a text that matches the schema.

    Raises:
        ValueError: there is none; the message tells the model why.
    """
    problem = "There is no complete JSON object in it."
    found = None
    for value in _objects(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
            found = schema.model_validate(value)
        except UnicodeEncodeError:
            problem = "It contains a lone surrogate."
        except pydantic.ValidationError as error:
            places = ((".".join(map(str, each["loc"])) or "the object", each["msg"]) for each in error.errors())
            problem = "; ".join(f"{place}: {message}" for place, message in places)
    if found is None:
        raise ValueError(problem)
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):  # RecursionError: endless nesting of a looping model
            end = start + 1
        start = text.find("{", end)


async def _request(
    client: Client,
    chat: list[Message],
    schema: type[AnswerSchema],
    repair: bool,
    observe: Observer,
    sampling: Sampling,
) -> Completion:
    """One answer in the strictest JSON mode that the server supports; a repair always includes the schema."""
    for mode in JSON_MODES[JSON_MODES.index(client.json_mode) :]:
        prompt = chat if mode == "json_schema" and not repair else [*chat[:-1], _with_schema(chat[-1], schema)]
        try:
            form = response_format(mode, schema)
            completion = await client.chat(prompt, response_format=form, observe=observe, **sampling)
        except LLMError as failure:
            # Once a mode is confirmed, a bad request has another cause.
            if failure.kind != "bad_request" or client.json_mode_confirmed or mode == JSON_MODES[-1]:
                raise
            continue
        if not client.json_mode_confirmed:
            # Some servers accept a response format and ignore it; then the prompt has to describe the schema.
            ignored = not completion.cut_off and not any(_objects(completion.text))
            client.json_mode = JSON_MODES[-1] if ignored else mode
        return completion
    raise AssertionError("the last mode returns or raises")


def response_format(mode: str, schema: type[AnswerSchema]) -> dict[str, Any] | None:
    """The `response_format` of a request in a JSON mode (one of `JSON_MODES`)."""
    if mode == "text":
        return None
    if mode == "json_object":
        return {"type": "json_object"}
    named = {"name": schema.__name__, "strict": True, "schema": _json_schema(schema)}
    return {"type": "json_schema", "json_schema": named}


def _json_schema(schema: type[AnswerSchema]) -> dict[str, Any]:
    """The JSON schema in the dialect of strict servers: every property required, no others allowed."""
    function: dict[str, Any] = {**openai.pydantic_function_tool(schema)["function"]}
    return function["parameters"]


def _with_schema(message: Message, schema: type[AnswerSchema]) -> Message:
    text = json.dumps(_json_schema(schema), ensure_ascii=False)
    return message | {"content": f"{message['content']}\n\nAnswer with one JSON object of this JSON schema:\n{text}"}


def _totals(attempts: list[RequestAttempt]) -> dict[str, Any]:
    return {
        "attempts": len(attempts),
        "prompt_tokens": sum(each.prompt_tokens for each in attempts),
        "completion_tokens": sum(each.completion_tokens for each in attempts),
    }
