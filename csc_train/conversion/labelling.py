"""Strategies that a language model predicts for dialogues, and its agreement with labels by hand."""

import asyncio
import os
from collections.abc import Sequence
from typing import Annotated, Any

import numpy
import pydantic

from csc_train.conversion.config import ConvertConfig
from csc_train.conversion.convert import PREDICTED, WRITTEN, ConversionReport, Converted
from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import read_dialogues
from csc_train.data.strategies import STRATEGIES, Strategy, parse_strategy
from csc_train.files import digest
from csc_train.llm.answer_log import AnswerLog, AskFn, ask_model, map_concurrently
from csc_train.llm.client import Client, LLMError, Observer
from csc_train.llm.config import LLMConfig
from csc_train.stats import cohen_kappa
from csc_train.templates import render

_number = pydantic.BeforeValidator(lambda label: parse_strategy(str(label)).number)  # some models write names
_Number = Annotated[int, pydantic.Field(ge=1, le=len(STRATEGIES)), _number]


def label_dialogues(
    dialogues: Sequence[Dialogue], llm: LLMConfig, language: str, seed: int, log: str | os.PathLike
) -> list[list[Strategy] | LLMError]:
    """The strategy of each supporter turn of each dialogue, in order; an error for a dialogue without an answer.

    Every answer is in the JSONL file `log` before the next question: a killed process loses none.

    Raises:
        InputError: the server cannot be used, or the log cannot be read or written.
    """
    answers = AnswerLog(log)
    settings = [llm.model, llm.temperature, llm.top_p, llm.max_tokens, llm.extra_body, seed]
    task = f"label {digest(settings)[:16]}"

    async def label_all(ask: AskFn) -> list[list[Strategy] | LLMError]:
        async def label(dialogue: Dialogue) -> list[Strategy] | LLMError:
            schema = label_schema(len(dialogue.supporter_turns))
            try:
                answer = await ask(task, label_prompt(dialogue, language), schema)
            except LLMError as error:
                return error
            return [STRATEGIES[number - 1] for number in answer.model_dump()["strategies"]]

        return await map_concurrently(dialogues, label, llm.concurrency, "labels", "dialogue")

    async def ask_server() -> list[list[Strategy] | LLMError]:
        async with Client(llm) as client:
            await client.check()
            return await label_all(answers.cached(ask_model(client, seed)))

    return asyncio.run(label_all(answers.cached(answer_by_rule)) if llm.backend == "mock" else ask_server())


def label_prompt(dialogue: Dialogue, language: str) -> list[dict[str, str]]:
    """The question about a dialogue."""
    numbers = {turn: number for number, turn in enumerate(dialogue.supporter_turns, start=1)}
    turns = [(numbers.get(index), turn) for index, turn in enumerate(dialogue.turns)]
    text = render(
        __package__, "label.txt.jinja", strategies=STRATEGIES, language=language, turns=turns, count=len(numbers)
    )
    return [{"role": "user", "content": text.strip()}]


def label_schema(turns: int) -> type[pydantic.BaseModel]:
    """The answer about a dialogue with this many supporter turns: as many numbers of strategies."""
    numbers = Annotated[list[_Number], pydantic.Field(min_length=turns, max_length=turns)]
    fields: dict[str, Any] = {"strategies": numbers}
    return pydantic.create_model("Labels", **fields)


async def answer_by_rule(
    task: str, prompt: list[dict[str, str]], schema: type[pydantic.BaseModel], observe: Observer | None = None
) -> Any:
    """A rule instead of a model: greeting first, closure last, a question refines, all else informs."""
    lines = [line for line in prompt[-1]["content"].splitlines() if line.startswith("[")]
    numbers = [4 if line.rstrip().endswith(("?", "？")) else 7 for line in lines]
    numbers[-1], numbers[0] = 11, 1
    return schema.model_validate({"strategies": numbers})


def label_agreement(dialogues: Sequence[Dialogue], predicted: Sequence[list[Strategy] | LLMError]) -> dict[str, Any]:
    """How far predicted strategies agree with those of hand-labelled dialogues.

    Returns:
        `turns`, the supporter turns of dialogues with an answer; `accuracy` in percent; `kappa`, Cohen's (1960), None
        if it is undefined; `failed`, the dialogues without an answer.
    """
    pairs = [
        (dialogue.turns[turn].strategy.number - 1, strategy.number - 1)
        for dialogue, answer in zip(dialogues, predicted, strict=True)
        if not isinstance(answer, LLMError)
        for turn, strategy in zip(dialogue.supporter_turns, answer, strict=True)
    ]
    facts: dict[str, Any] = {"turns": len(pairs), "accuracy": None, "kappa": None}
    facts["failed"] = sum(isinstance(answer, LLMError) for answer in predicted)
    if pairs:
        hand, model = numpy.array(pairs).T
        kappa = float(cohen_kappa(hand, model, len(STRATEGIES)).value)
        facts |= {"accuracy": 100 * float((hand == model).mean()), "kappa": None if numpy.isnan(kappa) else kappa}
    return facts


def predict_labels(
    converted: Sequence[Converted], report: ConversionReport, config: ConvertConfig, log: str | os.PathLike
) -> list[Dialogue]:
    """The converted dialogues, with strategies by the model where they are missing.

    A dialogue without an answer is left out and counted in the report, which gets the agreement with `label_sample`.

    Raises:
        InputError: the sample cannot be read, or an error of `label_dialogues`.
    """
    if config.llm is None:
        return [each.dialogue for each in converted]
    sample = read_dialogues(config.label_sample) if config.label_sample else []
    asked = [each for each in converted if each.missing]
    answers = label_dialogues(
        [*(each.dialogue for each in asked), *sample], config.llm, config.language, config.seed, log
    )
    if sample:
        report.agreement = label_agreement(sample, answers[len(asked) :])
    kept, in_order = [], iter(answers)
    for each in converted:
        answer = next(in_order) if each.missing else None
        if isinstance(answer, LLMError):
            report.reject(each.file, each.row, f"no answer of the model ({answer})")
            report.counts[WRITTEN] -= len(each.dialogue.turns)
        elif answer is None:
            kept.append(each.dialogue)
        else:
            report.counts[PREDICTED] += len(each.missing)
            kept.append(each.with_strategies(answer))
    return kept


def describe_agreement(facts: dict[str, Any]) -> str:
    """The result of `label_agreement` as a line."""
    accuracy, kappa = ("-" if facts[name] is None else f"{facts[name]:.2f}" for name in ("accuracy", "kappa"))
    failed = f"; {facts['failed']} dialogues without an answer" if facts["failed"] else ""
    return f"accuracy {accuracy} % of {facts['turns']} turns, Cohen's kappa {kappa}{failed}"
