"""How well a system chooses strategies, turn by turn and over a whole dialogue.

Where a system chooses none (they are handed in, or left out), every figure of its choices is n/a: never 0, never 100.
"""

from collections.abc import Iterator

import numpy

from csc_train.data.strategies import CLOSURE, GREETING, STRATEGIES, Stage
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import Statistic, mean, ratio

NO_CHOICE = "this mode predicts no strategy"
LONGEST_RUN = 2
"""How many turns running one strategy may be used before it counts as repeated."""

_UNREAD, _ANY_STAGE = -1, len(Stage)
_STAGES = list(Stage)
_STAGE = numpy.array(
    [_UNREAD, *(_ANY_STAGE if each.stage is None else _STAGES.index(each.stage) for each in STRATEGIES)]
)
"""Of each strategy number, its stage in typical order; 0 is a strategy that was not read."""


def _figure(
    turns: PredictionTable, statistic: Statistic, unit: str, signature: str, reason: str | None = None
) -> Metric:
    if not turns.predicts_strategy:
        return Metric(None, unit, signature, NO_CHOICE)
    return Metric(statistic, unit, signature, *filter(None, [reason]))


def accuracy(turns: PredictionTable, where: numpy.ndarray | None = None) -> Metric:
    """ACC, in percent, over the turns that `where`, bool [turns], selects."""
    signature = "predicted strategy equals the reference strategy; an unparsed one counts as wrong"
    return _figure(turns, mean(100 * turns.correct, where), "turns", signature)


def stage_accuracy(turns: PredictionTable) -> Metric:
    """How often the strategy is of the reference's stage, in percent."""
    signature = "predicted stage equals the reference stage; Others is a stage of its own, an unparsed one is wrong"
    right = _STAGE[turns.predicted] == _STAGE[turns.reference]
    return _figure(turns, mean(100 * right), "turns", signature)


def parse_rate(turns: PredictionTable) -> Metric:
    """How often a known strategy could be read, in percent."""
    return _figure(turns, mean(100 * (turns.predicted > 0)), "turns", "the text starts with one known [strategy]")


def confusion(turns: PredictionTable) -> numpy.ndarray:
    """int [12, 13]: turns by reference strategy (row 0 is strategy 1) and predicted one (column 0: none was read)."""
    return _cells(turns).sum(axis=0).reshape(len(STRATEGIES), -1).astype(int)


def _cells(turns: PredictionTable) -> numpy.ndarray:
    """float [turns, 12 x 13]: 1 in the cell of `confusion` that a turn falls into."""
    cells = numpy.zeros((len(turns), len(STRATEGIES) * (len(STRATEGIES) + 1)))
    cells[numpy.arange(len(turns)), (turns.reference - 1) * (len(STRATEGIES) + 1) + turns.predicted] = 1
    return cells


def macro_f1(turns: PredictionTable) -> Metric:
    """The mean over strategies of their F1, in percent."""
    signature = "mean of the F1 of the strategies that occur in the reference or the predictions"
    return _figure(turns, Statistic(_cells(turns), _macro_f1), "strategies", signature)


def _macro_f1(sums: numpy.ndarray) -> numpy.ndarray:
    table = sums.reshape(*sums.shape[:-1], len(STRATEGIES), len(STRATEGIES) + 1)
    hits = numpy.diagonal(table[..., 1:], axis1=-2, axis2=-1)
    occurring = table.sum(axis=-1) + table[..., 1:].sum(axis=-2)
    f1 = numpy.divide(200 * hits, occurring, out=numpy.zeros_like(hits), where=occurring > 0)
    count = (occurring > 0).sum(axis=-1)
    return numpy.divide(f1.sum(axis=-1), count, out=numpy.full(count.shape, numpy.nan), where=count > 0)


def by_strategy(turns: PredictionTable) -> Iterator[tuple[str, int, dict[str, Metric]]]:
    """(label, turns in the reference, precision, recall and F1 in percent) of each of the 12 strategies."""
    for strategy in STRATEGIES:
        predicted, actual = turns.predicted == strategy.number, turns.reference == strategy.number
        hits = 200 * (predicted & actual)
        either = Statistic(numpy.stack([hits, 1.0 * predicted + actual], axis=1), ratio)
        yield (
            strategy.label,
            int(actual.sum()),
            {
                "precision": _figure(
                    turns, mean(100 * actual, predicted), "turns", "hits / predicted", "never predicted"
                ),
                "recall": _figure(
                    turns, mean(100 * predicted, actual), "turns", "hits / occurrences", "not in the reference"
                ),
                "F1": _figure(turns, either, "turns", "2 hits / (predicted + occurrences)", "never occurs"),
            },
        )


def by_position(turns: PredictionTable) -> Iterator[tuple[int, int, Metric]]:
    """(position counted from 1, turns there, ACC) of the first, second, ... supporter turn of the dialogues."""
    for position in range(turns.longest):
        here = turns.position == position
        yield position + 1, int(here.sum()), accuracy(turns, here)


def transitions(turns: PredictionTable, strategy: numpy.ndarray) -> numpy.ndarray:
    """int [12, 12]: how often a strategy (row 0 is strategy 1) is followed by which in the supporter's next turn.

    `strategy`, int [turns], is `turns.predicted` or `turns.reference`. A strategy that was not read is in no pair, and
    dialogues with turns that failed are left out.
    """
    pairs = ~turns.last[:-1] & turns.whole[:-1] & (strategy[:-1] > 0) & (strategy[1:] > 0)
    table = numpy.zeros((len(STRATEGIES), len(STRATEGIES)), int)
    numpy.add.at(table, (strategy[:-1][pairs] - 1, strategy[1:][pairs] - 1), 1)
    return table


def process(turns: PredictionTable) -> dict[str, tuple[Metric, Metric]]:
    """How the choices of a dialogue hang together, in percent: of the system, and of the reference itself.

    A strategy that was not read is no greeting and no farewell, ends a run of the same one, and is passed over where
    stages are compared, as is Others. Dialogues with turns that failed are left out.
    """
    sides = [_process(turns, turns.predicted), _process(turns, turns.reference)]
    return {
        name: (_figure(turns, system, *meaning), Metric(reference, *meaning))
        for name, (system, meaning) in sides[0].items()
        for reference, _ in [sides[1][name]]
    }


def _process(turns: PredictionTable, strategy: numpy.ndarray) -> dict[str, tuple[Statistic, tuple[str, str]]]:
    first = numpy.append(True, turns.last[:-1])[: len(turns)]
    run = numpy.zeros(len(turns), int)
    repeated = numpy.zeros(len(turns), bool)
    stage, reached = _STAGE[strategy], numpy.full(len(turns), _UNREAD)
    for index in range(len(turns)):
        before = None if first[index] else index - 1
        same = before is not None and strategy[index] and strategy[index] == strategy[before]
        run[index] = run[before] + 1 if same else 1
        repeated[index] = run[index] > LONGEST_RUN or (before is not None and repeated[before])
        # The stage that was last seen before this turn.
        if before is not None:
            reached[index] = stage[before] if _UNREAD < stage[before] < _ANY_STAGE else reached[before]
    compared = turns.whole & (reached > _UNREAD) & (stage > _UNREAD) & (stage < _ANY_STAGE)
    return {
        "greeting first": (
            mean(100 * (strategy == GREETING.number), first & turns.whole),
            ("dialogues", f"the first supporter turn is {GREETING.en}"),
        ),
        "farewell last": (
            mean(100 * (strategy == CLOSURE.number), turns.last & turns.whole),
            ("dialogues", f"the last supporter turn is {CLOSURE.en}"),
        ),
        "same strategy thrice": (
            mean(100 * repeated, turns.last & turns.whole),
            ("dialogues", f"one strategy more than {LONGEST_RUN} supporter turns running"),
        ),
        "stage regressions": (
            mean(100 * (stage < reached), compared),
            ("turns", "the stage lies before that of the supporter's last turn that has one"),
        ),
    }
