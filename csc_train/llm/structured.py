"""Answers of a given form: JSON that a pydantic model has checked.

Text is never repaired by guessing. What can be read for sure is read: a JSON object in a code fence or between other
words, raw line breaks inside its strings, and pydantic's conversions, by which "false" as a string becomes False (it is
never true for being a non-empty text) and "3" becomes 3. Anything else goes back to the model with what is wrong.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import openai
import pydantic

from csc_train.llm.client import Client, Completion, LLMError, Message, Observer, RequestAttempt
from csc_train.llm.config import JSON_MODES

REPAIRS = 2
"""How often the model is shown what is wrong with its answer, before one fresh sample."""
_DECODER = json.JSONDecoder(strict=False)

AnswerSchema = TypeVar("Form", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class StructuredAnswer(Generic[AnswerSchema]):
    """A checked answer.

    Attributes:
        value: an instance of the form.
        text: of which it was read.
        attempts, prompt_tokens, completion_tokens, latency_s: of all requests that it took.
        model: what the server says answered.
    """

    value: AnswerSchema
    text: str
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    model: str


async def ask_structured(
    client: Client,
    messages: Sequence[Message],
    form: type[AnswerSchema],
    *,
    seed: int | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    observe: Observer | None = None,
) -> StructuredAnswer[AnswerSchema]:
    """Ask for an answer of the form `form`.

    The first calls of a client find out how the server lets itself be asked: with a JSON schema, else for a JSON
    object, else in words. Where an answer is not of the form, the model is told what is wrong, twice; then it is asked
    anew with another seed.

    Args:
        form: its fields are required, and described in the prompt as far as the model needs it.
        seed, temperature, max_tokens, observe: as of `Client.chat`.

    Raises:
        AuthenticationError: the server does not serve this key.
        LLMError: of kind `malformed` where no answer was of the form, or another one of `Client.chat`; counts the
            requests and tokens of all answers.
    """
    made: list[RequestAttempt] = []

    def note(attempt: RequestAttempt) -> None:
        made.append(attempt)
        if observe is not None:
            observe(attempt)

    settings = {"temperature": temperature, "max_tokens": max_tokens, "observe": note}
    chat = list(messages)
    try:
        for turn in range(REPAIRS + 2):
            if fresh := turn > REPAIRS:
                chat = list(messages)
            repair = len(chat) > len(messages)
            completion = await _request(client, chat, form, repair, seed if seed is None else seed + fresh, settings)
            try:
                value = parse_answer(completion.text, form)
            except ValueError as error:
                problem = str(error) if completion.finish_reason != "length" else "It was cut off for its length."
                complaint = f"That answer cannot be used. {problem}"
                chat += [{"role": "assistant", "content": completion.text}, {"role": "user", "content": complaint}]
                continue
            client.ladder.proven = True
            latency = sum(each.latency_s for each in made)
            return StructuredAnswer(value, completion.text, **_totals(made), latency_s=latency, model=completion.model)
        raise LLMError("malformed", f"no answer of the form {form.__name__}: {problem}")
    except LLMError as failure:
        vars(failure).update(_totals(made))
        raise


def parse_answer(text: str, form: type[AnswerSchema]) -> AnswerSchema:
    """The last JSON object in a text that is of the form.

    Raises:
        ValueError: there is none; the message says what is wrong, for the model to read.
    """
    problem = "There is no complete JSON object in it."
    found = None
    for value in _objects(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
            found = form.model_validate(value)
        except UnicodeEncodeError:
            problem = "It holds half a character (a lone surrogate)."
        except pydantic.ValidationError as error:
            places = ((".".join(map(str, each["loc"])) or "the object", each["msg"]) for each in error.errors())
            problem = "; ".join(f"{place}: {message}" for place, message in places)
    if found is None:
        raise ValueError(problem)
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, those inside others aside."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):  # the latter where a model went round in circles
            end = start + 1
        start = text.find("{", end)


async def _request(
    client: Client,
    chat: list[Message],
    form: type[AnswerSchema],
    repair: bool,
    seed: int | None,
    settings: dict[str, Any],
) -> Completion:
    """One answer, asked for in the strictest way that the server accepts; a repair spells the form out in any case."""
    ladder = client.ladder
    for rung in JSON_MODES[JSON_MODES.index(ladder.rung) :]:
        asked = chat if rung == "json_schema" and not repair else [*chat[:-1], _with_schema(chat[-1], form)]
        try:
            completion = await client.chat(asked, seed=seed, response_format=response_format(rung, form), **settings)
        except LLMError as failure:
            # Once a way has worked, what the server refuses is something else than the way.
            if failure.kind != "bad_request" or ladder.proven or rung == JSON_MODES[-1]:
                raise
            continue
        if not ladder.proven:
            # Some servers accept a format and do not look at it; words say at least what is wanted.
            ignored = completion.finish_reason != "length" and not any(_objects(completion.text))
            ladder.rung = JSON_MODES[-1] if ignored else rung
        return completion
    raise AssertionError("the last rung returns or raises")


def response_format(rung: str, form: type[AnswerSchema]) -> dict[str, Any] | None:
    """What a request says about the form of its answer, for a way of asking (one of `JSON_MODES`)."""
    if rung == "text":
        return None
    if rung == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": form.__name__, "strict": True, "schema": _schema(form)}}


def _schema(form: type[AnswerSchema]) -> dict[str, Any]:
    """The JSON schema in the dialect of strict servers: every property required, no others allowed."""
    return openai.pydantic_function_tool(form)["function"]["parameters"]


def _with_schema(message: Message, form: type[AnswerSchema]) -> Message:
    schema = json.dumps(_schema(form), ensure_ascii=False)
    return message | {"content": f"{message['content']}\n\nAnswer with one JSON object of this JSON schema:\n{schema}"}


def _totals(attempts: list[RequestAttempt]) -> dict[str, int]:
    return {
        "attempts": len(attempts),
        "prompt_tokens": sum(each.prompt_tokens for each in attempts),
        "completion_tokens": sum(each.completion_tokens for each in attempts),
    }
