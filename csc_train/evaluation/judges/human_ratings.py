"""Human ratings: read rating files, unblind them, and compute win rates and rater agreement."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy

from csc_train.errors import InputError
from csc_train.evaluation.comparison import NOT_SIGNIFICANT, left_out_note
from csc_train.evaluation.config import HumanConfig
from csc_train.evaluation.judges.annotation_form import (
    OVERALL,
    AnnotationItem,
    StrictModel,
    UnblindingKey,
    read_strict_json,
)
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.report.tables import NOTES, ReportTable
from csc_train.evaluation.win_rate import WinRate, win_rate
from csc_train.files import read_json
from csc_train.stats import CONFIDENCE_LEVEL, cohen_kappa, fleiss_kappa, holm_correction, observed_agreement

MAJORITY = "majority of raters"

Preferences = dict[str, float]
"""By item: 1 if A is preferred, 0 if B is, 0.5 for a tie."""
Ratings = dict[str, dict[str, Preferences]]
"""Preferences by question and rater."""


class ItemRating(StrictModel):
    """One rater's choices on one item: the better reply by question."""

    item: str
    choices: dict[str, Literal["1", "2", "tie"]]
    comment: str = ""


class RatingFile(StrictModel):
    """The file that an annotation form exports."""

    form: str
    rater: str
    ratings: list[ItemRating]


def read_ratings(paths: Sequence[str | os.PathLike], key: UnblindingKey) -> tuple[Ratings, list[dict[str, Any]]]:
    """Read and unblind rating files.

    Returns:
        The ratings; and the comments, each with its `rater`, `dialogue_id`, `turn` and `text`.

    Raises:
        InputError: a file cannot be read, is no rating file or one of another form, or has a rater or item twice; names
            file, item and field.
    """
    items = {each.item: each for each in key.items}
    ratings: Ratings = {question: {} for question in key.questions}
    comments, files = [], {}
    for path in paths:
        file = read_strict_json(path, RatingFile, "a file that a form exported")
        if file.form != key.form:
            raise InputError(f"{path}: rates form {file.form}, but the key is of form {key.form}")
        rater = file.rater.strip()
        if not rater:
            raise InputError(f"{path}: field rater: empty")
        if rater.casefold() in files:
            raise InputError(f"{path}: rater {rater} is also in {files[rater.casefold()]}: give one file per rater")
        files[rater.casefold()] = path
        seen = set()
        for by_rater in ratings.values():
            by_rater[rater] = {}
        for rating in file.ratings:
            item = items.get(rating.item)
            if item is None:
                raise InputError(f"{path}, item {rating.item}: not in form {key.form}")
            if rating.item in seen:
                raise InputError(f"{path}, item {rating.item}: rated twice")
            seen.add(rating.item)
            preferred = {"1": float(item.first == "A"), "2": float(item.first == "B"), "tie": 0.5}
            for question, choice in rating.choices.items():
                if question not in ratings:
                    raise InputError(f"{path}, item {rating.item}, field choices.{question}: not asked in this form")
                ratings[question][rater][rating.item] = preferred[choice]
            if text := rating.comment.strip():
                place = {"dialogue_id": item.dialogue_id, "turn": item.turn}
                comments.append({"rater": rater, **place, "text": text})
    return ratings, comments


def read_judge_preferences(directory: str | os.PathLike, key: UnblindingKey) -> tuple[str, dict[str, Preferences]]:
    """Name and preferences of the LLM judge of a run of recipes/judge.py, by question, on the items of a form.

    Raises:
        InputError: the directory is no such run, or judges other systems.
    """
    path = Path(directory) / "judge.json"
    found = read_json(path)
    try:
        systems = [_place(found[side]) for side in "ab"]
        by_turn = {(each["dialogue_id"], each["turn"]): each for each in found["by_turn"]}
        name = f"judge {found['judge']}"
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of recipes/judge.py: {error!r}") from error
    asked = [_place(each) for each in (key.a, key.b)]
    if sorted(systems) != sorted(asked):
        raise InputError(f"{path}: judges {found['a']} and {found['b']}, but the form compares {key.a} and {key.b}")
    preferences: dict[str, Preferences] = {question: {} for question in key.questions}
    for item in key.items:
        judged = by_turn.get((item.dialogue_id, item.turn), {})
        for question in key.questions:
            if question in judged:
                value = judged[question]
                preferences[question][item.item] = value if systems == asked else 1 - value
    return name, preferences


def _place(system: str) -> tuple[str, str]:
    """A system's name and its absolute run directory, from its name in `reference_sides`."""
    name, _, directory = system.rpartition(" of ")
    return name, os.path.abspath(directory)


@dataclass(frozen=True)
class RaterPair:
    """Agreement of two raters on one question, over the items that both rated.

    Attributes:
        agreement: percentage of equal ratings.
        kappa: Cohen's kappa.
    """

    one: str
    other: str
    items: int
    agreement: MetricResult
    kappa: MetricResult


@dataclass(frozen=True)
class RaterResult:
    """The ratings of one question.

    Attributes:
        win_rate: over all ratings of all raters.
        adjusted: the p-value after Holm's correction over the questions; None without ratings.
        verdict: `A is preferred`, `B is preferred` or `not significant`, by `adjusted`; None without ratings.
        raters: win rates by rater.
        shared: items that every rater rated, the basis of `fleiss`.
        pairs: pairs of raters; then each rater, and their majority, paired with the LLM judge.
    """

    win_rate: WinRate
    adjusted: float | None
    verdict: str | None
    raters: dict[str, WinRate]
    shared: int
    fleiss: MetricResult
    pairs: list[RaterPair]


def rater_results(
    ratings: Ratings, key: UnblindingKey, config: HumanConfig, judge: tuple[str, dict[str, Preferences]] | None = None
) -> dict[str, RaterResult]:
    """Win rates, tests and agreement by question."""
    items = {each.item: each for each in key.items}
    found: dict[str, RaterResult] = {}
    for question, by_rater in ratings.items():
        shared = sorted(set.intersection(*map(set, by_rater.values())))
        pairs = list(itertools.combinations(by_rater.items(), 2))
        if judge is not None:
            by_judge = judge[0], judge[1][question]
            pairs += [(rating, by_judge) for rating in by_rater.items()]
            if len(by_rater) > 1:
                pairs.append(((MAJORITY, majority(by_rater)), by_judge))
        found[question] = RaterResult(
            _win_rate(by_rater, items, config),
            adjusted=None,
            verdict=None,
            raters={rater: _win_rate({rater: given}, items, config) for rater, given in by_rater.items()},
            shared=len(shared),
            fleiss=_fleiss(by_rater, shared, items, config),
            pairs=[_pair(one, other, items, config) for one, other in pairs],
        )
    tested = {question: each.win_rate for question, each in found.items() if each.win_rate.p_value is not None}
    corrected = holm_correction([each.p_value for each in tested.values()])
    for (question, rates), adjusted in zip(tested.items(), corrected, strict=True):
        preferred = "A is preferred" if rates.rate.value > 50 else "B is preferred"
        verdict = preferred if adjusted < 1 - CONFIDENCE_LEVEL else NOT_SIGNIFICANT
        found[question] = replace(found[question], adjusted=adjusted, verdict=verdict)
    return found


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
    """By item, the system that more raters prefer; a tie for equal numbers."""
    values: dict[str, list[float]] = {}
    for given in ratings.values():
        for name, value in given.items():
            values.setdefault(name, []).append(value - 0.5)
    return {name: (numpy.sign(sum(each)) + 1) / 2 for name, each in values.items()}


def _categories(given: Preferences, names: Sequence[str]) -> numpy.ndarray:
    """int [names]: 0 if B is preferred, 1 for a tie, 2 if A is preferred."""
    return numpy.array([2 * given[name] for name in names], int)


def _pair(
    one: tuple[str, Preferences],
    other: tuple[str, Preferences],
    items: Mapping[str, AnnotationItem],
    config: HumanConfig,
) -> RaterPair:
    names = sorted(one[1].keys() & other[1].keys())
    one_side, other_side = (_categories(given, names) for _, given in (one, other))
    same = Metric(observed_agreement(one_side, other_side), "equal ratings of A, tie, B", "no items in common", "items")
    reason = _UNDEFINED if names else same.reason
    kappa = Metric(cohen_kappa(one_side, other_side, 3), "Cohen 1960, A, tie, B", reason, "kappa")
    agreement, agreed = (each.compute(_dialogues(names, items), config.bootstrap_resamples) for each in (same, kappa))
    return RaterPair(one[0], other[0], len(names), agreement, agreed)


def _fleiss(
    ratings: Mapping[str, Preferences], shared: Sequence[str], items: Mapping[str, AnnotationItem], config: HumanConfig
) -> MetricResult:
    signature = "Fleiss 1971, A, tie, B"
    if len(ratings) < 2:
        return MetricResult(None, "kappa", signature, "one rater")
    categories = numpy.stack([_categories(given, shared) for given in ratings.values()], axis=1)
    counts = numpy.eye(3)[categories].sum(axis=1)
    kappa = Metric(fleiss_kappa(counts), signature, _UNDEFINED if shared else "no item was rated by all", "kappa")
    return kappa.compute(_dialogues(shared, items), config.bootstrap_resamples)


_UNDEFINED = "all ratings are equal"


def rating_tables(found: Mapping[str, RaterResult], key: UnblindingKey) -> list[ReportTable]:
    """Preference by question, preference by rater, and agreement."""
    overall = found[OVERALL]
    rates = [
        [
            question, each.win_rate.rate, each.win_rate.length_controlled, each.win_rate.wins, each.win_rate.ties,
            each.win_rate.losses, "n/a" if each.adjusted is None else f"{each.adjusted:.4f}", each.verdict or "n/a",
        ]
        for question, each in found.items()
    ]  # fmt: skip
    preference = ReportTable(
        "Preferred replies (percent)",
        ["question", "A preferred", "length-controlled", "A", "tie", "B", "p, Holm", "verdict"],
        rates,
        notes=(
            NOTES["ratings"].format(raters=len(overall.raters), items=len(key.items), key=key),
            NOTES["ratings_verdict"],
            *filter(None, [left_out_note(key.left_out)]),
            NOTES["intervals"],
        ),
    )
    rated = {question: each for question, each in found.items() if each.win_rate.rate.value is not None}
    raters = ReportTable(
        "A preferred, by rater (percent)",
        ["rater", "items", *rated],
        [
            [rater, each.wins + each.ties + each.losses, *(result.raters[rater].rate for result in rated.values())]
            for rater, each in overall.raters.items()
        ],
    )
    names = ["all raters", *(f"{each.one} / {each.other}" for each in overall.pairs)]
    kappas = [[each.fleiss, *(pair.kappa for pair in each.pairs)] for each in rated.values()]
    equal = ["", *(each.agreement for each in overall.pairs)]
    shared = [overall.shared, *(each.items for each in overall.pairs)]
    agreement = ReportTable(
        "Agreement: equal overall ratings (percent), and kappa by question",
        ["between", "items", "equal ratings", *rated],
        [list(row) for row in zip(names, shared, equal, *kappas, strict=True)],
        notes=(NOTES["agreement"].format(majority=MAJORITY),),
    )
    return [preference, raters, agreement]
