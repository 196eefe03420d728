"""People as judges of two systems: a blinded sheet for the browser, and what its answers say.

Replies are compared in the reference context, where both systems answer the same history. A sheet calls them 1 and 2;
which system that is differs from item to item, and only its key says.
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import pydantic

from csc_train.data.dialogue import Dialogue
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.evaluation.comparison import ALIKE, left_out_note
from csc_train.evaluation.config import HumanConfig
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.report.tables import INTERVALS, Section
from csc_train.evaluation.table import PredictionTable
from csc_train.evaluation.win_rate import WinRate, win_rate
from csc_train.files import digest, read_json
from csc_train.inference.predictions import Prediction
from csc_train.jsonl import to_line
from csc_train.stats import CONFIDENCE_LEVEL, cohen_kappa, fleiss_kappa, holm_correction, observed_agreement
from csc_train.templates import render

SHEET, KEY = "sheet.html", "key.json"
OVERALL = "overall"
"""The question that is always asked, before the criteria."""
MAJORITY = "most raters"

Preferences = dict[str, float]
"""By item: 1 where A is preferred, 0 where B is, 0.5 where neither."""
Ratings = dict[str, dict[str, Preferences]]
"""By question, then by rater."""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class AnnotationItem(_Strict):
    """What the key says of an item: its turn, the system whose reply is number 1, and how much longer A's reply is."""

    item: str
    dialogue_id: str
    turn: int
    first: Literal["A", "B"]
    longer: int


class UnblindingKey(_Strict):
    """What undoes the blinding of a sheet.

    Attributes:
        sheet: the sheet's id, a hash of its content.
        a, b: the systems, with the runs they are of.
        questions: `OVERALL` and the criteria.
        turns, differing: turns that both systems answered, and those of them where the replies differ.
        left_out: turns that only one of them answered.
        strategies: what the sheet shows of them (see `HumanConfig.show_strategies`).
    """

    sheet: str
    a: str
    b: str
    questions: list[str]
    turns: int
    differing: int
    strategies: str
    items: list[AnnotationItem]
    left_out: int = 0


class ItemRating(_Strict):
    """What a rater says of one item: by question, the better reply."""

    item: str
    choices: dict[str, Literal["1", "2", "tie"]]
    comment: str = ""


class RatingFile(_Strict):
    """The file that a sheet exports."""

    sheet: str
    rater: str
    answers: list[ItemRating]


def draw_annotation_form(
    sides: tuple[PredictionTable, PredictionTable],
    dialogues: Mapping[str, Dialogue],
    names: tuple[str, str],
    config: HumanConfig,
    left_out: int = 0,
) -> tuple[str, UnblindingKey]:
    """Draw the items; the sheet as an HTML page, and its key.

    Order, sides and the items' ids follow from the seed and all that the two systems predicted: the same runs give the
    same sheet again, and without them a sheet does not tell.

    Args:
        sides: systems A and B on the same turns.
        dialogues: by id.
        names: of the systems, for the key alone.
        left_out: turns that only one of the systems has, for the key alone.

    Raises:
        InputError: the replies differ nowhere, a dialogue is not there, or a system names no strategies where they are
            to be shown.
    """
    pairs = list(zip(*(side.predictions for side in sides), strict=True))
    if config.show_strategies == "own":
        for side, name in zip(sides, names, strict=True):
            if not side.predicts_strategy:
                raise InputError(f"human.show_strategies=own: {name} names no strategies")
    differing = [index for index in sides[0].shuffled(config.seed) if _differ(*pairs[index], config)]
    if not differing:
        raise InputError(f"the replies of {names[0]} and {names[1]} differ nowhere: there is nothing to compare")
    chosen, taken = [], Counter()
    for index in differing:
        dialogue = pairs[index][0].dialogue_id
        if config.max_items_per_dialogue is None or taken[dialogue] < config.max_items_per_dialogue:
            taken[dialogue] += 1
            chosen.append(index)
    secret = digest([config.seed, [[to_line(asdict(each)) for each in pair] for pair in pairs]])
    rng = random.Random(secret)
    chosen = chosen[: config.num_items]
    rng.shuffle(chosen)
    shown, items = [], []
    for number, index in enumerate(chosen):
        a, b = pairs[index]
        if a.dialogue_id not in dialogues:
            raise InputError(f"dialogue {a.dialogue_id} is not among the run's dialogues")
        item, first = digest([secret, number])[:12], rng.choice("AB")
        ordered = (a, b) if first == "A" else (b, a)
        shown.append({"id": item, **_shown(dialogues[a.dialogue_id], ordered, config)})
        longer = len(a.response) - len(b.response)
        items.append(AnnotationItem(item=item, dialogue_id=a.dialogue_id, turn=a.turn, first=first, longer=longer))
    questions = [OVERALL, *config.criteria]
    data = {"questions": _questions(config), "items": shown}
    sheet = digest(data)[:16]
    values = {"language": config.language, "data": data | {"sheet": sheet}}
    page = render("csc_train.evaluation.report", "sheet.html.jinja", **values)
    key = UnblindingKey(
        sheet=sheet, a=names[0], b=names[1], questions=questions, turns=len(pairs), differing=len(differing),
        strategies=config.show_strategies, items=items, left_out=left_out,
    )  # fmt: skip
    return page, key


def _differ(a: Prediction, b: Prediction, config: HumanConfig) -> bool:
    """Whether a reader of the sheet sees two different replies."""
    return a.response != b.response or (config.show_strategies == "own" and a.strategy != b.strategy)


def _shown(dialogue: Dialogue, replies: Sequence[Prediction], config: HumanConfig) -> dict[str, Any]:
    """What the sheet shows of an item: the turns before, as (whether the supporter's, text), and the replies."""
    turn = replies[0].turn
    own = [each.strategy if config.show_strategies == "own" else None for each in replies]
    reference = replies[0].reference_strategy if config.show_strategies == "reference" else None
    return {
        "history": [[each.strategy is not None, each.text] for each in dialogue.turns[:turn]],
        "strategy": _strategy(reference, config.language),
        "replies": [
            {"strategy": _strategy(number, config.language), "text": each.response}
            for number, each in zip(own, replies, strict=True)
        ],
    }


def _strategy(number: int | None, language: str) -> list[str] | None:
    """A strategy's name and definition; None for none."""
    strategy: Strategy | None = STRATEGIES[number - 1] if number else None
    return [strategy.name(language), strategy.definition(language)] if strategy else None


def _questions(config: HumanConfig) -> list[dict[str, str]]:
    criteria = [(name, CRITERIA[name]) for name in config.criteria]
    return [
        {"id": OVERALL},
        *(
            {"id": name, "name": each.name(config.language), "definition": each.definition(config.language)}
            for name, each in criteria
        ),
    ]


def read_key(path: str | os.PathLike) -> UnblindingKey:
    """Read the key of a sheet.

    Raises:
        InputError: the file cannot be read or is not a key; names the field.
    """
    return _read(path, UnblindingKey, "the key of a sheet")


def read_ratings(paths: Sequence[str | os.PathLike], key: UnblindingKey) -> tuple[Ratings, list[dict[str, Any]]]:
    """What the raters answered, unblinded; and their comments, each with its `rater`, `dialogue_id`, `turn`, `text`.

    Raises:
        InputError: a file cannot be read, is not what a sheet exports or answers another sheet, or a rater or an item
            is there twice; names file, item and field.
    """
    items = {each.item: each for each in key.items}
    votes: Ratings = {question: {} for question in key.questions}
    comments, files = [], {}
    for path in paths:
        sheet = _read(path, RatingFile, "the answers to a sheet")
        if sheet.sheet != key.sheet:
            raise InputError(f"{path}: answers sheet {sheet.sheet}, and the key is that of sheet {key.sheet}")
        rater = sheet.rater.strip()
        if not rater:
            raise InputError(f"{path}: field rater: empty")
        if rater.casefold() in files:
            raise InputError(f"{path}: rater {rater} has answered in {files[rater.casefold()]} already")
        files[rater.casefold()] = path
        seen = set()
        for ratings in votes.values():
            ratings[rater] = {}
        for answer in sheet.answers:
            item = items.get(answer.item)
            if item is None:
                raise InputError(f"{path}, item {answer.item}: not on sheet {key.sheet}")
            if answer.item in seen:
                raise InputError(f"{path}, item {answer.item}: answered twice")
            seen.add(answer.item)
            preferred = {"1": float(item.first == "A"), "2": float(item.first == "B"), "tie": 0.5}
            for question, choice in answer.choices.items():
                if question not in votes:
                    raise InputError(f"{path}, item {answer.item}, field choices.{question}: not asked on this sheet")
                votes[question][rater][answer.item] = preferred[choice]
            if text := answer.comment.strip():
                place = {"dialogue_id": item.dialogue_id, "turn": item.turn}
                comments.append({"rater": rater, **place, "text": text})
    return votes, comments


def _read(path: str | os.PathLike, form: type[pydantic.BaseModel], what: str) -> Any:
    content = read_json(path)
    try:
        return form.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = list(first["loc"])
        item = ""
        if place[:1] in (["answers"], ["items"]) and len(place) > 1:
            entry = content[place[0]][place[1]]
            name = entry.get("item") if isinstance(entry, dict) else None
            item, place = f", item {name or f'number {place[1] + 1}'}", place[2:]
        field = f", field {'.'.join(map(str, place))}" if place else ""
        raise InputError(f"{path}{item}{field}: {first['msg']} (expected {what})") from error


def read_judge(directory: str | os.PathLike, key: UnblindingKey) -> tuple[str, dict[str, Preferences]]:
    """The name of the judge of a run of recipes/judge.py, and by question what it prefers on the items of a sheet.

    Raises:
        InputError: it is not such a run, or one of other systems.
    """
    path = Path(directory) / "judge.json"
    found = read_json(path)
    try:
        systems = [_place(found[side]) for side in "ab"]
        by_turn = {(each["dialogue_id"], each["turn"]): each for each in found["by_turn"]}
        name = f"judge {found['judge']}"
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not what recipes/judge.py writes: {error!r}") from error
    asked = [_place(each) for each in (key.a, key.b)]
    if sorted(systems) != sorted(asked):
        raise InputError(f"{path}: judges {found['a']} and {found['b']}, and the sheet compares {key.a} and {key.b}")
    preferences: dict[str, Preferences] = {question: {} for question in key.questions}
    for item in key.items:
        judged = by_turn.get((item.dialogue_id, item.turn), {})
        for question in key.questions:
            if question in judged:
                value = judged[question]
                preferences[question][item.item] = value if systems == asked else 1 - value
    return name, preferences


def _place(system: str) -> tuple[str, str]:
    """A system's name and its run directory, of what `reference_sides` calls it, however the directory was given."""
    name, _, directory = system.rpartition(" of ")
    return name, os.path.abspath(directory)


@dataclass(frozen=True)
class RaterPair:
    """How far two raters agree on one question, over the items that both answered.

    Attributes:
        agreement: share of equal answers, in percent.
        kappa: Cohen's.
    """

    one: str
    other: str
    items: int
    agreement: MetricResult
    kappa: MetricResult


@dataclass(frozen=True)
class RaterResult:
    """What people say to one question.

    Attributes:
        win_rate: over all answers, each rater's counting as one.
        adjusted: the p-value after Holm's correction over the questions; None for no answers.
        verdict: `A is preferred`, `B is preferred` or `cannot be told apart`, by `adjusted`; None for no answers.
        raters: by rater, the same over that rater's answers.
        shared: items that every rater answered, over which `fleiss` is taken.
        pairs: the raters two by two; then each, and most of them, beside the judge.
    """

    win_rate: WinRate
    adjusted: float | None
    verdict: str | None
    raters: dict[str, WinRate]
    shared: int
    fleiss: MetricResult
    pairs: list[RaterPair]


def rater_results(
    votes: Ratings, key: UnblindingKey, config: HumanConfig, judge: tuple[str, dict[str, Preferences]] | None = None
) -> dict[str, RaterResult]:
    """What the answers say, by question."""
    items = {each.item: each for each in key.items}
    found = {}
    for question, ratings in votes.items():
        shared = sorted(set.intersection(*map(set, ratings.values())))
        pairs = list(itertools.combinations(ratings.items(), 2))
        if judge is not None:
            by_judge = judge[0], judge[1][question]
            pairs += [(rating, by_judge) for rating in ratings.items()]
            if len(ratings) > 1:
                pairs.append(((MAJORITY, majority(ratings)), by_judge))
        found[question] = {
            "win_rate": _win_rate(ratings, items, config),
            "raters": {rater: _win_rate({rater: given}, items, config) for rater, given in ratings.items()},
            "shared": len(shared),
            "fleiss": _fleiss(ratings, shared, items, config),
            "pairs": [_pair(*one, *other, items, config) for one, other in pairs],
        }
    tested = {question: each["win_rate"] for question, each in found.items() if each["win_rate"].p_value is not None}
    adjusted = dict(zip(tested, holm_correction([each.p_value for each in tested.values()]), strict=True))
    return {
        question: RaterResult(
            adjusted=adjusted.get(question), verdict=_verdict(each["win_rate"], adjusted.get(question)), **each
        )
        for question, each in found.items()
    }


def _verdict(rates: WinRate, adjusted: float | None) -> str | None:
    if adjusted is None:
        return None
    if adjusted >= 1 - CONFIDENCE_LEVEL:
        return ALIKE
    return "A is preferred" if rates.rate.value > 50 else "B is preferred"


def _dialogues(names: Sequence[str], items: Mapping[str, AnnotationItem]) -> numpy.ndarray:
    """int [names]: the dialogue of each item, counted from 0."""
    return numpy.unique([items[name].dialogue_id for name in names], return_inverse=True)[1]


def _win_rate(ratings: Mapping[str, Preferences], items: Mapping[str, AnnotationItem], config: HumanConfig) -> WinRate:
    rows = [(name, value) for given in ratings.values() for name, value in given.items()]
    names = [name for name, _ in rows]
    preferences = numpy.array([value for _, value in rows], float)
    longer = numpy.array([items[name].longer for name in names], float)
    return win_rate(preferences, longer, _dialogues(names, items), config.bootstrap_resamples, config.permutations)


def majority(ratings: Mapping[str, Preferences]) -> Preferences:
    """By item, the system that more of the raters who answered prefer than the other; neither for as many."""
    values: dict[str, list[float]] = {}
    for given in ratings.values():
        for name, value in given.items():
            values.setdefault(name, []).append(value - 0.5)
    return {name: (numpy.sign(sum(each)) + 1) / 2 for name, each in values.items()}


def _categories(given: Preferences, names: Sequence[str]) -> numpy.ndarray:
    """int [names]: 0 where B is preferred, 1 where neither, 2 where A."""
    return numpy.array([2 * given[name] for name in names], int)


def _pair(
    one: str,
    first: Preferences,
    other: str,
    second: Preferences,
    items: Mapping[str, AnnotationItem],
    config: HumanConfig,
) -> RaterPair:
    names = sorted(first.keys() & second.keys())
    sides, dialogues = [_categories(given, names) for given in (first, second)], _dialogues(names, items)
    same = Metric(observed_agreement(*sides), "items", "equal answers of A, tie, B", "no items in common")
    kappa = Metric(cohen_kappa(*sides, 3), "kappa", "Cohen 1960, A, tie, B", _UNDEFINED if names else same.reason)
    return RaterPair(
        one,
        other,
        len(names),
        same.score(dialogues, config.bootstrap_resamples),
        kappa.score(dialogues, config.bootstrap_resamples),
    )


def _fleiss(
    ratings: Mapping[str, Preferences], shared: Sequence[str], items: Mapping[str, AnnotationItem], config: HumanConfig
) -> MetricResult:
    unit, signature = "kappa", "Fleiss 1971, A, tie, B"
    if len(ratings) < 2:
        return MetricResult(None, unit, signature, "one rater")
    categories = numpy.stack([_categories(given, shared) for given in ratings.values()], axis=1)
    counts = numpy.eye(3)[categories].sum(axis=1)
    figure = Metric(fleiss_kappa(counts), unit, signature, _UNDEFINED if shared else "no item was answered by all")
    return figure.score(_dialogues(shared, items), config.bootstrap_resamples)


_UNDEFINED = "all answers are the same"


def sections(found: Mapping[str, RaterResult], key: UnblindingKey) -> list[Section]:
    """The results as tables."""
    some = found[OVERALL]
    rates = [
        [
            question, each.win_rate.rate, each.win_rate.length_controlled, each.win_rate.wins, each.win_rate.ties,
            each.win_rate.losses, "n/a" if each.adjusted is None else f"{each.adjusted:.4f}", each.verdict or "n/a",
        ]
        for question, each in found.items()
    ]  # fmt: skip
    preference = Section(
        "Preferred replies (percent)",
        ["question", "A preferred", "at equal length", "A", "tie", "B", "p, Holm", "verdict"],
        rates,
        notes=(
            f"{len(some.raters)} raters, {len(key.items)} items, drawn among the {key.differing} of {key.turns} turns "
            f"where the replies differ; strategies shown: {key.strategies}. Every answer of every rater counts once, a "
            "tie as half a win of each side; A, tie and B count answers.",
            "Decided by a sign-flip permutation test over dialogues at 5 %, after Holm's correction for the questions. "
            "It and the intervals speak of other dialogues, not of other raters.",
            *filter(None, [left_out_note(key.left_out)]),
            INTERVALS,
        ),
    )
    answered = {question: each for question, each in found.items() if each.win_rate.rate.value is not None}
    raters = Section(
        "Rater by rater: A preferred (percent)",
        ["rater", "items", *answered],
        [
            [rater, each.wins + each.ties + each.losses, *(opinion.raters[rater].rate for opinion in answered.values())]
            for rater, each in some.raters.items()
        ],
    )
    names = ["all raters", *(f"{each.one} / {each.other}" for each in some.pairs)]
    kappas = {question: [each.fleiss, *(pair.kappa for pair in each.pairs)] for question, each in answered.items()}
    equal = ["", *(each.agreement for each in some.pairs)]
    shared = [some.shared, *(each.items for each in some.pairs)]
    agreement = Section(
        "Agreement: equal answers overall (percent), and kappa by question",
        ["between", "items", "equal answers", *answered],
        [list(row) for row in zip(names, shared, equal, *kappas.values(), strict=True)],
        notes=(
            "kappa: 1 is agreement on every item, 0 is what chance alone brings, over the answers A, tie and B. All "
            "raters: Fleiss', over the items that each of them answered; two: Cohen's, over those that both did. "
            f"{MAJORITY}: the system that more of them prefer. Items and equal answers: overall.",
        ),
    )
    return [preference, raters, agreement]


def as_json(found: Mapping[str, RaterResult], comments: list[dict[str, Any]]) -> dict[str, Any]:
    """The results as plain values."""
    return {"questions": {question: asdict(each) for question, each in found.items()}, "comments": comments}
