"""A language model as the judge of replies: which of two is better, and how good each is by five criteria.

Replies are judged in the reference context, where both systems answer the same history.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import pydantic
from tqdm import tqdm

from csc_train.data.dialogue import Dialogue
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.comparison import left_out_note
from csc_train.evaluation.config import JudgeConfig
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.table import PredictionTable
from csc_train.evaluation.win_rate import WinRate, win_rate
from csc_train.files import digest
from csc_train.inference.predictions import Prediction
from csc_train.jsonl import JsonlLog, read_jsonl
from csc_train.llm.client import AuthenticationError, Client, LLMError, Message
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import ask_structured
from csc_train.stats import mean
from csc_train.template.reply import Reply, format_reply
from csc_train.templates import render

SIDES = {"pairwise": ("AB", "BA"), "rubric": ("A", "B")}
"""What is asked of a turn: the pair in both orders, or each reply."""

_Points = Annotated[int, pydantic.Field(ge=1, le=5)]


class Preference(pydantic.BaseModel):
    """Which of two replies is better."""

    reason: str
    better: Annotated[Literal["1", "2", "tie"], pydantic.BeforeValidator(str)]  # many write the number 1


class Rubric(pydantic.BaseModel):
    """One to five points by each of `CRITERIA`."""

    reason: str
    strategy: _Points
    helpfulness: _Points
    empathy: _Points
    wording: _Points
    faithfulness: _Points


ANSWER_SCHEMAS = {"pairwise": Preference, "rubric": Rubric}


@dataclass(frozen=True)
class JudgeQuestion:
    """What is asked about the reply, or the pair of replies, at one turn; `side` is one of `SIDES[task]`."""

    task: str
    dialogue_id: str
    turn: int
    side: str
    messages: tuple[Message, ...] = field(compare=False)

    @property
    def place(self) -> dict[str, Any]:
        """All but the messages."""
        return {"task": self.task, "dialogue_id": self.dialogue_id, "turn": self.turn, "side": self.side}


@dataclass(frozen=True)
class JudgeReport:
    """What a judge made of a list of questions: every one is answered, or failed.

    Attributes:
        answers: by question, in the fields of its form.
        failures: by question.
        spent: requests, prompt tokens and completion tokens of all answers, earlier runs' included, and of this run's
            failures.
    """

    answers: dict[JudgeQuestion, dict[str, Any]]
    failures: dict[JudgeQuestion, LLMError]
    spent: dict[str, int]


def chosen_turns(turns: PredictionTable, config: JudgeConfig) -> numpy.ndarray:
    """int [chosen]: which of the turns are judged, in order."""
    if config.num_turns is None:
        return numpy.arange(len(turns))
    return numpy.array(sorted(turns.shuffled(config.seed)[: config.num_turns]), int)


def judge_questions(
    a: Sequence[Prediction], b: Sequence[Prediction], dialogues: Mapping[str, Dialogue], config: JudgeConfig
) -> list[JudgeQuestion]:
    """What to ask about the replies of two systems, `a` and `b`, to the same turns.

    Strategies are shown where both systems name them. Two replies that read the same are not compared.

    Raises:
        InputError: a dialogue is not there.
    """
    labelled = all(each.predicts_strategy for each in (*a, *b))
    asked = []
    for pair in zip(a, b, strict=True):
        if pair[0].dialogue_id not in dialogues:
            raise InputError(f"dialogue {pair[0].dialogue_id} is not among the run's dialogues")
        shown = dict(zip("AB", (_shown(each, labelled, config.language) for each in pair), strict=True))
        dialogue, turn = dialogues[pair[0].dialogue_id], pair[0].turn
        for task in config.tasks:
            if task == "pairwise" and shown["A"] == shown["B"]:
                continue
            for side in SIDES[task]:
                replies = [shown[name] for name in side]
                facts = {"task": task, "history": dialogue.turns[:turn], "replies": replies}
                messages = (
                    {"role": "system", "content": _render(config.language, part="instructions", **facts)},
                    {"role": "user", "content": _render(config.language, part="question", **facts)},
                )
                asked.append(JudgeQuestion(task, dialogue.id, turn, side, messages))
    return asked


def _shown(prediction: Prediction, labelled: bool, language: str) -> str:
    strategy = STRATEGIES[prediction.strategy - 1] if labelled and prediction.strategy else None
    return format_reply(Reply(strategy, prediction.response), language)


def _render(language: str, **facts: Any) -> str:
    return render(__package__, f"judge.{language}.jinja", CRITERIA=CRITERIA, **facts).strip()


def judge(asked: Sequence[JudgeQuestion], llm: LLMConfig, config: JudgeConfig, cache: str | os.PathLike) -> JudgeReport:
    """Ask a model, and keep each answer in the JSONL file `cache` as it comes; what is there is not asked again.

    An answer belongs to the text of its question, the model, its settings and the seed. A question that fails within
    its budget is recorded, and the others go on.

    Raises:
        InputError: the cache cannot be read or written, or the server does not serve the key.
    """
    known = _read_cache(Path(cache))
    keys = {question: _key(question, llm, config) for question in asked}
    todo = {key: question for question, key in keys.items() if key not in known}  # equal questions once
    failures: dict[str, LLMError] = {}

    async def work(client: Client, pending: Iterator[str], log: JsonlLog, bar: tqdm) -> None:
        for key in pending:
            question = todo[key]
            try:
                seed = int(key[:7], 16)
                answer = await ask_structured(
                    client, question.messages, ANSWER_SCHEMAS[question.task], seed=seed, temperature=0
                )
            except AuthenticationError:
                raise
            except LLMError as failure:
                failures[key] = failure
            else:
                spent = {name: getattr(answer, name) for name in _SPENT}
                known[key] = {"key": key, **question.place, "answer": answer.value.model_dump(), **spent}
                log.append(known[key] | {"model": answer.model})
            bar.update()

    async def ask_all(log: JsonlLog) -> None:
        pending = iter(todo)
        with tqdm(total=len(todo), desc="judging", unit="question", disable=None) as bar:
            async with Client(llm) as client:
                await asyncio.gather(*(work(client, pending, log, bar) for _ in range(llm.concurrency)))

    if todo:
        with JsonlLog(cache) as log:
            log.open()
            asyncio.run(ask_all(log))
    counted = [known[key] if key in known else vars(failures[key]) for key in dict.fromkeys(keys.values())]
    return JudgeReport(
        {question: known[key]["answer"] for question, key in keys.items() if key in known},
        {question: failures[key] for question, key in keys.items() if key in failures},
        {name: sum(each[name] for each in counted) for name in _SPENT},
    )


_SPENT = ("attempts", "prompt_tokens", "completion_tokens")


def _key(question: JudgeQuestion, llm: LLMConfig, config: JudgeConfig) -> str:
    settings = [llm.model, llm.temperature, llm.top_p, llm.max_tokens, llm.extra_body, config.seed]
    return digest([question.task, *question.messages, *settings])


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """The answers in a cache, by key."""
    rows = {}
    for number, row in read_jsonl(path, allow_torn=True) if path.exists() else ():
        try:
            ANSWER_SCHEMAS[row["task"]].model_validate(row["answer"])
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not an answer of a judge: {error!r}") from error
    return rows


@dataclass(frozen=True)
class JudgeSummary:
    """Two systems before a judge.

    Attributes:
        win_rate: None where pairs were not compared.
        identical: of its ties, those of replies that read the same, about which nothing was asked.
        disagreements: of its ties, those where the judge preferred either reply for its place.
        first: share of the answers that prefer one reply which prefer the first, in percent; None for no such answer.
        scores: by criterion, the mean points of A, of B and their difference; empty where none were asked for.
        judged, expected: turns whose questions of a task were all answered, and turns that there were, by task.
        by_turn: `dialogue_id`, `turn` and, by what was asked, who is preferred: 1 for A, 0 for B, 0.5 for neither;
            `overall` in pairs, by each criterion as the points say.
    """

    win_rate: WinRate | None
    identical: int
    disagreements: int
    first: float | None
    scores: dict[str, dict[str, MetricResult]]
    judged: dict[str, int]
    expected: int
    by_turn: list[dict[str, Any]]


def summarize(
    a: Sequence[Prediction], b: Sequence[Prediction], judged: JudgeReport, config: JudgeConfig
) -> JudgeSummary:
    """What the answers to `judge_questions` say about two systems. A turn with a failed question does not count."""
    answers = {(each.task, each.dialogue_id, each.turn, each.side): answer for each, answer in judged.answers.items()}
    failed = {(each.task, each.dialogue_id, each.turn) for each in judged.failures}
    counts: dict[str, int] = {}
    preferred: dict[int, dict[str, float]] = {index: {} for index in range(len(a))}
    rates, identical, disagreements, first, scores = None, 0, 0, None, {}
    if "pairwise" in config.tasks:
        rows, firsts = [], []
        for index, one in enumerate(a):
            place = "pairwise", one.dialogue_id, one.turn
            if place in failed:
                continue
            pair = [answers[*place, side]["better"] if (*place, side) in answers else None for side in ("AB", "BA")]
            identical += pair == [None, None]
            firsts += [better == "1" for better in pair if better in ("1", "2")]
            disagreements += pair in (["1", "1"], ["2", "2"])
            rows.append((index, {("1", "2"): 1.0, ("2", "1"): 0.0}.get(tuple(pair), 0.5)))
            preferred[index]["overall"] = rows[-1][1]
        turns = [a[index] for index, _ in rows]
        longer = [len(each.response) - len(b[index].response) for each, (index, _) in zip(turns, rows, strict=True)]
        preferences = numpy.array([preference for _, preference in rows])
        rates = win_rate(
            preferences,
            numpy.array(longer),
            PredictionTable(turns).dialogue,
            config.bootstrap_resamples,
            config.permutations,
        )
        first = 100 * sum(firsts) / len(firsts) if firsts else None
        counts["pairwise"] = len(rows)
    if "rubric" in config.tasks:
        rated = [index for index, each in enumerate(a) if ("rubric", each.dialogue_id, each.turn) not in failed]
        turns = [a[index] for index in rated]
        dialogues = PredictionTable(turns).dialogue
        for criterion in CRITERIA:
            sides = {
                side: [answers["rubric", each.dialogue_id, each.turn, side][criterion] for each in turns]
                for side in "AB"
            }
            for index, one, other in zip(rated, *sides.values(), strict=True):
                preferred[index][criterion] = 0.5 if one == other else float(one > other)
            figures = {side: Metric(mean(points), "points", "mean of 1 to 5") for side, points in sides.items()}
            scores[criterion] = {
                side: figure.score(dialogues, config.bootstrap_resamples) for side, figure in figures.items()
            }
            scores[criterion]["A - B"] = figures["A"].minus(figures["B"], dialogues, config.bootstrap_resamples)
        counts["rubric"] = len(turns)
    by_turn = [
        {"dialogue_id": each.dialogue_id, "turn": each.turn, **preferred[index]}
        for index, each in enumerate(a)
        if preferred[index]
    ]
    return JudgeSummary(rates, identical, disagreements, first, scores, counts, len(a), by_turn)


def as_json(result: JudgeSummary, judged: JudgeReport) -> dict[str, Any]:
    """A judgement with its failures and what it took, as plain values."""
    failures = [each.place | {"kind": why.kind, "message": why.message} for each, why in judged.failures.items()]
    return asdict(result) | {"failures": failures, "spent": judged.spent}


def markdown(
    result: JudgeSummary, judged: JudgeReport, names: tuple[str, str], judge_name: str, left_out: int = 0
) -> str:
    """A judgement as Markdown; `left_out` turns are those that only one of the systems has."""
    lines = [f"A: {names[0]}  ", f"B: {names[1]}  ", f"judge: {judge_name}, reference context", ""]
    if result.win_rate:
        rates = result.win_rate
        lines += ["| | A preferred (percent) |", "|---|---:|"]
        lines += [f"| as judged | {_cell(rates.rate)} |", f"| at equal length | {_cell(rates.length_controlled)} |", ""]
        lines += [
            f"Turns: A preferred {rates.wins}, B preferred {rates.losses}, ties {rates.ties}, of which "
            f"{result.disagreements} changed with the order of the replies and {result.identical} read the same. "
            f"First place preferred: {'n/a' if result.first is None else f'{result.first:.1f} %'}. "
            f"Sign-flip test over dialogues: p = {'n/a' if rates.p_value is None else f'{rates.p_value:.4f}'}.",
            "",
        ]
    if result.scores:
        lines += ["| criterion (1 to 5 points) | A | B | A - B |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {' | '.join(map(_cell, cells.values()))} |" for name, cells in result.scores.items()]
        lines += [""]
    lines += ["In brackets: 95 % interval, percentile bootstrap over dialogues; none for fewer than 10 dialogues.", ""]
    judged_turns = ", ".join(f"{task} {count} of {result.expected}" for task, count in result.judged.items())
    spent = f"{judged.spent['prompt_tokens']} + {judged.spent['completion_tokens']} tokens"
    lines += [f"Turns judged: {judged_turns}. Questions that failed: {len(judged.failures)}. Spent: {spent}."]
    lines += filter(None, [left_out_note(left_out)])
    return "\n".join(lines) + "\n"


def _cell(score: MetricResult) -> str:
    if score.value is None:
        return f"n/a ({score.reason})"
    return f"{score.value:.2f}" + ("" if score.low is None else f" [{score.low:.2f}, {score.high:.2f}]")
