"""Accuracy of strategy choices, turn by turn and over a dialogue, and preference for some strategies.

For a system that chooses no strategies (they are given or omitted), these metrics are n/a: never 0, never 100.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy

from csc_train.data.strategies import CLOSURE, GREETING, STRATEGIES, Stage
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import Statistic, mean, ratio

MAX_REPETITIONS = 2
"""Consecutive supporter turns with one strategy that do not yet count as repeated."""

PRIOR = 1.0
"""Weight of the logistic prior on Bradley-Terry preferences, in pairs of turns; it decides where there are no turns."""
_UNPARSED, _ANY_STAGE = -1, len(Stage)
_STAGES = list(Stage)
_STAGE = numpy.array(
    [_UNPARSED, *(_ANY_STAGE if each.stage is None else _STAGES.index(each.stage) for each in STRATEGIES)]
)
"""The stage of each strategy number, in typical order; 0 is an unparsed strategy."""


def _choice(
    table: PredictionTable, values: numpy.ndarray | Statistic | float, signature: str = "", reason: str = ""
) -> Metric:
    """A metric of the system's choices; n/a if it makes none."""
    if not table.predicts_strategy:
        return Metric(None, signature, table.NO_CHOICE)
    statistic = values if isinstance(values, Statistic | float) else mean(100 * values)
    return Metric(statistic, signature, reason or Metric.reason)


@metric(name="ACC", unit="turns", direction="higher", profiles=["paper", "zh", "en"], by_position=True)
def accuracy(table: PredictionTable) -> Metric:
    """Predicted strategy equals the reference strategy; an unparsed one counts as wrong."""
    return _choice(table, table.correct)


@metric(name="ACC accepted", unit="turns", direction="higher", profiles=["strategy"])
def accepted_accuracy(table: PredictionTable, config: MetricsConfig | None = None) -> Metric:
    """Predicted strategy is any that the reference turn accepts; n/a if no turn accepts several."""
    if table.dialogues is None:
        return Metric(None, reason=table.NO_DIALOGUES)
    sets = accept_sets(table)
    several, path = int((sets.sum(axis=1) > 1).sum()), config and config.accepted
    source = f"{Path(path).name}, else from the data" if path else "the data, joined turns included"
    signature = f"any accepted strategy; {several} of {len(table)} turns accept several, from {source}"
    found = _choice(table, sets[numpy.arange(len(table)), table.predicted], signature)
    if table.predicts_strategy and not several and len(table):
        found = Metric(None, signature, "no turn accepts several strategies")
    unpaired = "the two runs accept different strategies: give metrics.accepted=PATH"
    return replace(found, gold=sets.tobytes(), unpaired=unpaired)


def accept_sets(table: PredictionTable) -> numpy.ndarray:
    """bool [turns, 13]: the strategies, by number, that the reference accepts, its own included; never 0, unparsed.

    The table must know its dialogues.
    """
    sets = numpy.zeros((len(table), len(STRATEGIES) + 1), bool)
    sets[numpy.arange(len(table)), table.reference] = True
    for row, (name, turn) in zip(sets, table.keys, strict=True):
        row[[each.number for each in table.dialogues[name].turns[turn].accepted]] = True
    return sets


@metric(name="macro-F1", unit="strategies", direction="higher", profiles=["strategy"])
def macro_f1(table: PredictionTable) -> Metric:
    """Mean of the F1 of the strategies that occur in the reference or the predictions; proficiency Q of Kang et al."""
    return _choice(table, Statistic(_confusion_cells(table), _macro_f1))


@metric(name="weighted-F1", unit="strategies", direction="higher", profiles=["strategy"], compare=False)
def weighted_f1(table: PredictionTable) -> Metric:
    """Mean of the F1 of the strategies, weighted by their turns in the reference; reported by Kang et al. beside Q."""
    return _choice(table, Statistic(_confusion_cells(table), _weighted_f1))


@metric(name="preference bias", unit="standard deviation", direction="lower", profiles=["strategy"])
def preference_bias(table: PredictionTable) -> Metric:
    """Preference bias B of Kang et al.: how far the system's preferences of strategies are from equal.

    B is the standard deviation of `preferences` over the strategies that occur in the reference or the predictions of
    parsed turns. 0: errors favour no strategy; the maximum, the square root of the strategies minus 1, is one
    predicted for all. Source: D. Kang et al., arXiv 2402.13211, 2024.
    """
    signature = f"B of Kang et al. 2024: Bradley-Terry preferences of mean 1, logistic prior of weight {PRIOR:g}"
    reason = "no strategy was parsed"
    return _choice(table, Statistic(_confusion_cells(table), _preference_bias), signature, reason)


@metric(name="stage ACC", unit="turns", direction="higher", profiles=["strategy"])
def stage_accuracy(table: PredictionTable) -> Metric:
    """Predicted stage equals the reference stage; Others is a separate stage, an unparsed one is wrong."""
    return _choice(table, _STAGE[table.predicted] == _STAGE[table.reference])


@metric(name="parse rate", unit="turns", direction="higher", profiles=["strategy"], compare=False)
def parse_rate(table: PredictionTable) -> Metric:
    """The text starts with one known [strategy]."""
    return _choice(table, table.predicted > 0)


def confusion(table: PredictionTable) -> numpy.ndarray:
    """int [12, 13]: turns by reference strategy (row 0 is strategy 1) and predicted one (column 0 is unparsed)."""
    return _confusion_cells(table).sum(axis=0).reshape(len(STRATEGIES), -1).astype(int)


def _confusion_cells(table: PredictionTable) -> numpy.ndarray:
    """float [turns, 12 x 13]: one-hot, the cell of `confusion` of each turn."""
    cells = numpy.zeros((len(table), len(STRATEGIES) * (len(STRATEGIES) + 1)))
    cells[numpy.arange(len(table)), (table.reference - 1) * (len(STRATEGIES) + 1) + table.predicted] = 1
    return cells


def _square(sums: numpy.ndarray) -> numpy.ndarray:
    return sums.reshape(*sums.shape[:-1], len(STRATEGIES), len(STRATEGIES) + 1)


def _f1(sums: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """By strategy, [..., 12]: F1 in percent, turns in the reference, and whether it occurs on either side."""
    table = _square(sums)
    hits, reference = numpy.diagonal(table[..., 1:], axis1=-2, axis2=-1), table.sum(axis=-1)
    occurring = reference + table[..., 1:].sum(axis=-2)
    f1 = numpy.divide(200 * hits, occurring, out=numpy.zeros_like(hits), where=occurring > 0)
    return f1, reference, occurring > 0


def _macro_f1(sums: numpy.ndarray) -> numpy.ndarray:
    f1, _, occurs = _f1(sums)
    return ratio(numpy.stack([f1.sum(axis=-1), occurs.sum(axis=-1)], axis=-1))


def _weighted_f1(sums: numpy.ndarray) -> numpy.ndarray:
    f1, reference, _ = _f1(sums)
    return ratio(numpy.stack([(f1 * reference).sum(axis=-1), reference.sum(axis=-1)], axis=-1))


def preferences(confusion: numpy.ndarray, prior: float = PRIOR) -> numpy.ndarray:
    """How strongly a system prefers each strategy where it errs, by the Bradley-Terry model; their mean is 1.

    A turn that is predicted as i but is j in the reference is a win of i over j, with probability p_i / (p_i + p_j).
    Correct turns say nothing. The p are those of the highest posterior, by Newton's method. The logistic prior is as
    `prior` wins and losses against a strategy with p = 1: it keeps p finite if a strategy only wins or only loses, and
    fades with more turns. With a `prior` near 0 this is the maximum likelihood, as Kang et al. have it, if errors lead
    from each strategy to each other; otherwise there is none.

    Args:
        confusion: float [..., n, n], turns by reference strategy (rows) and predicted strategy.

    Returns:
        float [..., n]; NaN for strategies without turns.

    Source: M. E. J. Newman, Efficient computation of rankings from pairwise comparisons, 2023.
    """
    n = confusion.shape[-1]
    wins = numpy.swapaxes(confusion, -1, -2) * (1 - numpy.eye(n))
    won, lost, pairs = wins.sum(axis=-1), wins.sum(axis=-2), wins + numpy.swapaxes(wins, -1, -2)
    score = numpy.log((won + 1) / (lost + 1))
    for _ in range(100):
        p = numpy.exp(score)
        prior_share, share = p / (1 + p), p[..., :, None] / (p[..., :, None] + p[..., None, :])
        gradient = won - (pairs * share).sum(axis=-1) + prior * (1 - 2 * prior_share)
        curvature = pairs * share * (1 - share)
        diagonal = curvature.sum(axis=-1) + 2 * prior * prior_share * (1 - prior_share)
        hessian = diagonal[..., None] * numpy.eye(n) - curvature
        step = numpy.clip(numpy.linalg.solve(hessian, gradient[..., None])[..., 0], -2, 2)
        score = score + step
        if numpy.abs(step).max(initial=0) < 1e-6:  # the next error is of the order of its square
            break
    p = numpy.where(confusion.sum(axis=-1) + confusion.sum(axis=-2) > 0, numpy.exp(score), numpy.nan)
    total, count = numpy.nansum(p, axis=-1, keepdims=True), (~numpy.isnan(p)).sum(axis=-1, keepdims=True)
    return p * count / numpy.where(total > 0, total, numpy.nan)


def _preference_bias(sums: numpy.ndarray) -> numpy.ndarray:
    found = preferences(_square(sums)[..., 1:])
    count = (~numpy.isnan(found)).sum(axis=-1)
    return numpy.sqrt(ratio(numpy.stack([numpy.nansum((found - 1) ** 2, axis=-1), count], axis=-1)))


def by_strategy(table: PredictionTable) -> Iterator[tuple[str, int, dict[str, Metric]]]:
    """(numbered name, turns in the reference, results) of each of the 12 strategies.

    The results are precision, recall and F1 in percent, and the preference, which has no interval.
    """
    preferred = preferences(confusion(table)[:, 1:].astype(float))
    for strategy in STRATEGIES:
        predicted, actual = table.predicted == strategy.number, table.reference == strategy.number
        f1 = Statistic(numpy.stack([200 * (predicted & actual), 1.0 * predicted + actual], axis=1), ratio)
        yield (
            strategy.numbered(table.language),
            int(actual.sum()),
            {
                "precision": _choice(table, mean(100 * actual, predicted), "hits / predicted", "never predicted"),
                "recall": _choice(table, mean(100 * predicted, actual), "hits / occurrences", "not in the reference"),
                "F1": _choice(table, f1, "2 hits / (predicted + occurrences)", "never occurs"),
                "preference": _choice(table, preferred[strategy.number - 1], "1: as the mean strategy", "never occurs"),
            },
        )


def transitions(table: PredictionTable, strategy: numpy.ndarray) -> numpy.ndarray:
    """int [12, 12]: how often a strategy (row 0 is strategy 1) is followed by each strategy in the next supporter turn.

    `strategy`, int [turns], is `table.predicted` or `table.reference`. Pairs with an unparsed strategy and dialogues
    with failed turns are left out.
    """
    pairs = ~table.last[:-1] & table.whole[:-1] & (strategy[:-1] > 0) & (strategy[1:] > 0)
    counts = numpy.zeros((len(STRATEGIES), len(STRATEGIES)), int)
    numpy.add.at(counts, (strategy[:-1][pairs] - 1, strategy[1:][pairs] - 1), 1)
    return counts


# Process metrics leave out dialogues with failed turns. An unparsed strategy is neither greeting nor farewell and ends
# a repetition; stages are compared across unparsed strategies and Others.


@functools.lru_cache(maxsize=2)
def _history(table: PredictionTable) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Of each turn: whether it is its dialogue's first (bool), whether the dialogue has repeated a strategy so far
    (bool), and the last stage before it (int, -1 for none)."""
    strategy, stage = table.predicted, _STAGE[table.predicted]
    first = numpy.append(True, table.last[:-1])[: len(table)]
    run = numpy.zeros(len(table), int)
    repeated = numpy.zeros(len(table), bool)
    reached = numpy.full(len(table), _UNPARSED)
    for index in range(len(table)):
        before = None if first[index] else index - 1
        same = before is not None and strategy[index] and strategy[index] == strategy[before]
        run[index] = run[before] + 1 if same else 1
        repeated[index] = run[index] > MAX_REPETITIONS or (before is not None and repeated[before])
        if before is not None:
            reached[index] = stage[before] if _UNPARSED < stage[before] < _ANY_STAGE else reached[before]
    return first, repeated, reached


@metric(name="greeting first", unit="dialogues", direction="none", profiles=["process"], compare=False)
def greeting_first(table: PredictionTable) -> Metric:
    """The strategy of the first supporter turn is a greeting."""
    first, _, _ = _history(table)
    greets = mean(100 * (table.predicted == GREETING.number), first & table.whole)
    return _choice(table, greets, f"the first supporter turn is {GREETING.en}")


@metric(name="farewell last", unit="dialogues", direction="none", profiles=["process"], compare=False)
def farewell_last(table: PredictionTable) -> Metric:
    """The strategy of the last supporter turn is a farewell."""
    farewell = mean(100 * (table.predicted == CLOSURE.number), table.last & table.whole)
    return _choice(table, farewell, f"the last supporter turn is {CLOSURE.en}")


@metric(name="repeated strategy", unit="dialogues", direction="lower", profiles=["process"], compare=False)
def repeated_strategy(table: PredictionTable) -> Metric:
    """One strategy in three or more consecutive supporter turns."""
    _, repeated, _ = _history(table)
    return _choice(table, mean(100 * repeated, table.last & table.whole))


@metric(name="stage regressions", unit="turns", direction="lower", profiles=["process"], compare=False)
def stage_regressions(table: PredictionTable) -> Metric:
    """The stage is earlier than that of the last supporter turn with a stage."""
    _, _, reached = _history(table)
    stage = _STAGE[table.predicted]
    compared = table.whole & (reached > _UNPARSED) & (stage > _UNPARSED) & (stage < _ANY_STAGE)
    return _choice(table, mean(100 * (stage < reached), compared))
