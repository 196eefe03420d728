"""LLM judge: preferences between two systems, scores of replies by five criteria, admissible strategies of turns.

Replies are judged in reference context, in which both systems answer the same history. Admissible strategies are those
of the reference's turns, whatever a system says there.
"""

import asyncio
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy
import pydantic

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError
from csc_train.evaluation.comparison import left_out_note
from csc_train.evaluation.config import JudgeConfig
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.report.tables import INCOMPLETE, NOTES, cell_text
from csc_train.evaluation.table import PredictionTable
from csc_train.evaluation.win_rate import WinRate, win_rate
from csc_train.files import digest
from csc_train.inference.predictions import Prediction, build_prediction, describe_kinds
from csc_train.jsonl import JsonlLog
from csc_train.llm.answer_log import map_concurrently
from csc_train.llm.client import Client, LLMError, Message
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import ask_structured
from csc_train.stats import mean
from csc_train.template.reply import Reply, format_reply
from csc_train.templates import render

SIDES = {"pairwise": ("AB", "BA"), "rubric": ("A", "B"), "accepted": ("R",)}
"""Questions per turn: the pair in both orders, each reply, or the reference reply."""

_Points = Annotated[int, pydantic.Field(ge=1, le=5)]


class Preference(pydantic.BaseModel):
    """Which of two replies is better."""

    reason: str
    better: Annotated[Literal["1", "2", "tie"], pydantic.BeforeValidator(str)]  # some models write the number 1


_rubric_fields: dict[str, Any] = {"reason": str} | dict.fromkeys(CRITERIA, _Points)
Rubric = pydantic.create_model("Rubric", __doc__="One to five points by each of `CRITERIA`.", **_rubric_fields)
_number = pydantic.BeforeValidator(lambda label: parse_strategy(str(label)).number)  # some models write names
_Number = Annotated[int, pydantic.Field(ge=1, le=len(STRATEGIES)), _number]
_once = pydantic.AfterValidator(lambda numbers: sorted(set(numbers)))


class Admissible(pydantic.BaseModel):
    """The numbers of the strategies that are admissible at a turn."""

    reason: str
    strategies: Annotated[list[_Number], pydantic.Field(min_length=1), _once]


ANSWER_SCHEMAS = {"pairwise": Preference, "rubric": Rubric, "accepted": Admissible}


@dataclass(frozen=True)
class JudgeQuestion:
    """A question about the reply or replies at one turn; `side` is one of `SIDES[task]`."""

    task: str
    dialogue_id: str
    turn: int
    side: str
    messages: tuple[Message, ...] = field(compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields without the messages."""
        return {"task": self.task, "dialogue_id": self.dialogue_id, "turn": self.turn, "side": self.side}


@dataclass(frozen=True)
class JudgeReport:
    """The answers of a judge; each question is answered or failed.

    Attributes:
        answers: by question, the fields of its schema in `ANSWER_SCHEMAS`.
        failures: by question.
        usage: requests, prompt tokens and completion tokens of all answers, including those of earlier runs, and of
            this run's failures.
    """

    answers: dict[JudgeQuestion, dict[str, Any]]
    failures: dict[JudgeQuestion, LLMError]
    usage: dict[str, int]

    @property
    def failed_kinds(self) -> list[str]:
        """The class of error of each failed question."""
        return [why.kind for why in self.failures.values()]


def sample_turns(table: PredictionTable, config: JudgeConfig) -> numpy.ndarray:
    """int [sampled]: indices of the turns to judge, in order."""
    if config.num_turns is None:
        return numpy.arange(len(table))
    return numpy.array(sorted(table.shuffled_indices(config.seed)[: config.num_turns]), int)


def reference_table(dialogues: Iterable[Dialogue]) -> PredictionTable:
    """All supporter turns of the dialogues, as predictions of a system that says what the reference says."""
    places = [(each, turn) for each in dialogues for turn in each.supporter_turns]
    said = [(each, turn, Reply(each.turns[turn].strategy, each.turns[turn].text)) for each, turn in places]
    return PredictionTable([build_prediction(each, turn, "reference", "", reply, "") for each, turn, reply in said])


def judge_questions(
    a: Sequence[Prediction], b: Sequence[Prediction], dialogues: Mapping[str, Dialogue], config: JudgeConfig
) -> list[JudgeQuestion]:
    """The questions about the replies of two systems, `a` and `b`, to the same turns.

    Strategies are shown if both systems predict them; that of the reference is not. Pairs of equal replies are not
    compared.

    Raises:
        InputError: a dialogue is missing.
    """
    language = config.language or "zh"
    labelled = all(each.predicts_strategy for each in (*a, *b))
    asked = []
    for pair in zip(a, b, strict=True):
        if pair[0].dialogue_id not in dialogues:
            raise InputError(f"dialogue {pair[0].dialogue_id} is not among the run's dialogues")
        shown = dict(zip("AB", (_shown(each, labelled, language) for each in pair), strict=True))
        dialogue, turn = dialogues[pair[0].dialogue_id], pair[0].turn
        shown["R"] = dialogue.turns[turn].text
        for task in config.tasks:
            if task == "pairwise" and shown["A"] == shown["B"]:
                continue
            for side in SIDES[task]:
                replies = [shown[name] for name in side]
                facts = {"task": task, "history": dialogue.turns[:turn], "replies": replies}
                messages = (
                    {"role": "system", "content": _render(language, part="instructions", **facts)},
                    {"role": "user", "content": _render(language, part="question", **facts)},
                )
                asked.append(JudgeQuestion(task, dialogue.id, turn, side, messages))
    return asked


def _shown(prediction: Prediction, labelled: bool, language: str) -> str:
    strategy = STRATEGIES[prediction.strategy - 1] if labelled and prediction.strategy else None
    return format_reply(Reply(strategy, prediction.response), language)


def _render(language: str, **facts: Any) -> str:
    name = f"judge.{get_language(language).texts}.jinja"
    return render(__package__, name, CRITERIA=CRITERIA, STRATEGIES=STRATEGIES, language=language, **facts).strip()


def judge(asked: Sequence[JudgeQuestion], llm: LLMConfig, config: JudgeConfig, cache: str | os.PathLike) -> JudgeReport:
    """Ask a model, and append each answer to the JSONL file `cache`; cached questions are not asked again.

    The cache key is a hash of the question's text, the model, its settings and the seed. A failed question is recorded
    and the others continue.

    Raises:
        InputError: the cache cannot be read or written, or the server rejects the API key.
    """
    log = _judgement_log(cache)
    known = {row["key"]: row for row in log.read()}
    keys = {question: _key(question, llm, config) for question in asked}
    todo = {key: question for question, key in keys.items() if key not in known}  # equal questions are asked once
    failures: dict[str, LLMError] = {}

    async def ask(client: Client, key: str) -> None:
        question = todo[key]
        schema, seed = ANSWER_SCHEMAS[question.task], int(key[:7], 16)
        try:
            answer = await ask_structured(client, question.messages, schema, seed=seed, temperature=0)
        except LLMError as error:
            failures[key] = error
        else:
            usage = {name: getattr(answer, name) for name in _USAGE}
            known[key] = {"key": key, **question.identity, "answer": answer.value.model_dump(), **usage}
            log.append(known[key] | {"model": answer.model})

    async def ask_all() -> None:
        async with Client(llm) as client:
            await client.check()
            asking = functools.partial(ask, client)
            await map_concurrently(list(todo), asking, llm.concurrency, "judging", "question")

    if todo:
        with log:
            log.open()
            asyncio.run(ask_all())
    counted = [known[key] if key in known else vars(failures[key]) for key in dict.fromkeys(keys.values())]
    return JudgeReport(
        {question: known[key]["answer"] for question, key in keys.items() if key in known},
        {question: failures[key] for question, key in keys.items() if key in failures},
        {name: sum(each[name] for each in counted) for name in _USAGE},
    )


_USAGE = ("attempts", "prompt_tokens", "completion_tokens")


def _key(question: JudgeQuestion, llm: LLMConfig, config: JudgeConfig) -> str:
    settings = [llm.model, llm.temperature, llm.top_p, llm.max_tokens, llm.extra_body, config.seed]
    return digest([question.task, *question.messages, *settings])


class _Judgement(pydantic.BaseModel):
    """A line of a judge's answers; it also holds the rest of `JudgeQuestion.identity` and the model."""

    key: str
    task: Literal["pairwise", "rubric", "accepted"]
    answer: dict[str, Any]
    attempts: int
    prompt_tokens: int
    completion_tokens: int


def _judgement_log(path: str | os.PathLike) -> JsonlLog[dict[str, Any]]:
    """The answers of a judge, which are paid for: a bad line is refused."""

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        judgement = _Judgement.model_validate(row)
        ANSWER_SCHEMAS[judgement.task].model_validate(judgement.answer)
        return row

    return JsonlLog(
        path, parse, key=lambda row: f"key {row['key']}", advice="delete the line: its question is asked again"
    )


@dataclass(frozen=True)
class JudgeSummary:
    """The results of two systems with a judge.

    Attributes:
        win_rate: None if pairs were not compared.
        identical: ties between equal replies, which were not asked about.
        disagreements: ties in which the judge preferred the same position in both orders.
        first: percentage of the preferences that are for the first reply; None without preferences.
        scores: by criterion, the mean points of A, of B and their difference; empty if not asked for.
        admissible: admissible strategies of a turn, and how often that of the reference is one; empty if not asked for.
        judged: by task, turns with answers to all questions.
        expected: turns that were to be judged.
        by_turn: `dialogue_id`, `turn` and preferences: 1 for A, 0 for B, 0.5 for neither; `overall` from pairs, and by
            criterion from the points.
    """

    win_rate: WinRate | None
    identical: int
    disagreements: int
    first: float | None
    scores: dict[str, dict[str, MetricResult]]
    admissible: dict[str, MetricResult]
    judged: dict[str, int]
    expected: int
    by_turn: list[dict[str, Any]]


def summarize(
    a: Sequence[Prediction], b: Sequence[Prediction], report: JudgeReport, config: JudgeConfig
) -> JudgeSummary:
    """Win rates and scores of two systems. A turn with a failed question does not count."""
    answers = {(each.task, each.dialogue_id, each.turn, each.side): answer for each, answer in report.answers.items()}
    failed = {(each.task, each.dialogue_id, each.turn) for each in report.failures}
    counts: dict[str, int] = {}
    preferred: list[dict[str, float]] = [{} for _ in a]
    rates, identical, disagreements, first, scores, admissible = None, 0, 0, None, {}, {}
    resamples = config.bootstrap_resamples
    if "pairwise" in config.tasks:
        judged, firsts = [], []
        # Ties of equal replies alone would show 50 % by a judge that said nothing.
        told = "pairwise" not in {task for task, *_ in failed} or any(task == "pairwise" for task, *_ in answers)
        for index, each in enumerate(a):
            place = "pairwise", each.dialogue_id, each.turn
            if place in failed or not told:
                continue
            pair = [answers[*place, side]["better"] if (*place, side) in answers else None for side in ("AB", "BA")]
            identical += pair == [None, None]
            firsts += [better == "1" for better in pair if better in ("1", "2")]
            disagreements += pair in (["1", "1"], ["2", "2"])
            preferred[index]["overall"] = 1.0 if pair == ["1", "2"] else 0.0 if pair == ["2", "1"] else 0.5
            judged.append(index)
        preferences = numpy.array([preferred[index]["overall"] for index in judged])
        longer = numpy.array([len(a[index].response) - len(b[index].response) for index in judged])
        dialogues = PredictionTable([a[index] for index in judged]).dialogue
        rates = win_rate(preferences, longer, dialogues, resamples, config.permutations)
        first = 100 * sum(firsts) / len(firsts) if firsts else None
        counts["pairwise"] = len(judged)
    if "rubric" in config.tasks:
        judged = [index for index, each in enumerate(a) if ("rubric", each.dialogue_id, each.turn) not in failed]
        places = [("rubric", a[index].dialogue_id, a[index].turn) for index in judged]
        dialogues = PredictionTable([a[index] for index in judged]).dialogue
        for criterion in CRITERIA:
            points = {side: [answers[*place, side][criterion] for place in places] for side in "AB"}
            for index, one, other in zip(judged, *points.values(), strict=True):
                preferred[index][criterion] = 0.5 if one == other else float(one > other)
            metrics = {side: Metric(mean(each), "mean of 1 to 5", unit="points") for side, each in points.items()}
            scores[criterion] = {side: metric.compute(dialogues, resamples) for side, metric in metrics.items()}
            scores[criterion]["A - B"] = metrics["A"].difference(metrics["B"], dialogues, resamples)
        counts["rubric"] = len(judged)
    if "accepted" in config.tasks:
        judged = [each for each in a if ("accepted", *each.key) not in failed]
        sets = [answers["accepted", *each.key, "R"]["strategies"] for each in judged]
        agreed = [100 * (each.reference_strategy in found) for each, found in zip(judged, sets, strict=True)]
        rows = {"strategies of a turn": [*map(len, sets)], "reference strategy among them (percent)": agreed}
        dialogues = PredictionTable(judged).dialogue
        admissible = {name: Metric(mean(values)).compute(dialogues, resamples) for name, values in rows.items()}
        counts["accepted"] = len(judged)
    by_turn = [
        {"dialogue_id": each.dialogue_id, "turn": each.turn, **values}
        for each, values in zip(a, preferred, strict=True)
        if values
    ]
    return JudgeSummary(rates, identical, disagreements, first, scores, admissible, counts, len(a), by_turn)


def accepted_rows(report: JudgeReport) -> list[dict[str, Any]]:
    """The admissible strategies of the judged turns: the rows of a file for `metrics.accepted`."""
    return [
        {"dialogue_id": each.dialogue_id, "turn": each.turn, "accepted": [STRATEGIES[n - 1].label for n in numbers]}
        for each, answer in report.answers.items()
        if (numbers := answer.get("strategies"))
    ]


def judge_json(summary: JudgeSummary, report: JudgeReport) -> dict[str, Any]:
    """The results with failures and usage, as plain values."""
    failures = [each.identity | {"kind": why.kind, "message": why.message} for each, why in report.failures.items()]
    return asdict(summary) | {"incomplete": bool(failures), "failures": failures, "usage": report.usage}


def judge_markdown(
    summary: JudgeSummary, report: JudgeReport, names: Sequence[str], judge_name: str, left_out: int = 0
) -> str:
    """The results as Markdown.

    Args:
        names: of the two systems; or one, of the dialogues.
        left_out: turns that only one of the systems has.
    """
    footnotes: dict[str, int] = {}
    return render(
        "csc_train.evaluation.report",
        "judge.md.jinja",
        summary=summary,
        report=report,
        names=names,
        judge_name=judge_name,
        left_out=left_out_note(left_out),
        failed=describe_kinds(report.failed_kinds),
        mark=INCOMPLETE if report.failures else "",
        intervals=NOTES["intervals"],
        cell=lambda result: cell_text(result, footnotes),
        footnotes=footnotes,
    )
