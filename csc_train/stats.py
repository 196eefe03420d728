"""How sure a figure is, and whether two systems differ, where the turns of a dialogue are alike.

What is resampled, or exchanged between two systems, is always a whole dialogue: turns of one dialogue stand and fall
together, and treating them as independent makes intervals too narrow and tests reject too often.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

LEVEL = 0.95
"""Of all intervals, how often they are to hold the truth."""
FEWEST = 10
"""Dialogues below which there is no interval: a bootstrap of so few is far too narrow."""
SEED = 0
_CHUNK = 1000


@dataclass(frozen=True)
class Statistic:
    """A figure that is a function of sums over turns: a mean, a ratio, an F1, corpus BLEU.

    Attributes:
        terms: float [turns, terms], what each turn adds to the sums.
        of: the figure, float [...], of such sums, float [..., terms]; NaN where it is not defined.
    """

    terms: numpy.ndarray
    of: Callable[[numpy.ndarray], numpy.ndarray]

    @property
    def value(self) -> float:
        """The figure over all turns."""
        return float(self.of(self.terms.sum(axis=0)))

    def by_dialogue(self, dialogues: numpy.ndarray) -> numpy.ndarray:
        """float [dialogues, terms]: the sums over each dialogue; `dialogues`, int [turns], counts them from 0."""
        columns = [numpy.bincount(dialogues, column) for column in self.terms.T]
        return numpy.stack(columns, axis=1)


def mean(values: Sequence[float] | numpy.ndarray, where: numpy.ndarray | None = None) -> Statistic:
    """The mean of a value per turn, over the turns that `where`, bool [turns], selects; over all if not given."""
    values = numpy.asarray(values, float)
    counted = numpy.ones(len(values)) if where is None else where.astype(float)
    return Statistic(numpy.stack([values * counted, counted], axis=1), ratio)


def ratio(sums: numpy.ndarray) -> numpy.ndarray:
    """The first of two sums, float [..., 2], over the second; NaN where that is 0."""
    above, below = sums[..., 0], sums[..., 1]
    return numpy.divide(above, below, out=numpy.full(below.shape, numpy.nan), where=below != 0)


def interval(statistic: Statistic, dialogues: numpy.ndarray, draws: int) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a figure, over `draws` resamples of dialogues.

    None where fewer than `FEWEST` dialogues have a turn that counts. A draw for which the figure is not defined is left
    out.

    Args:
        dialogues: int [turns], the dialogue of each turn, counted from 0.
    """
    return _percentiles(statistic.of, [statistic.by_dialogue(dialogues)], draws)


def difference_interval(
    one: Statistic, other: Statistic, dialogues: numpy.ndarray, draws: int
) -> tuple[float, float] | None:
    """As `interval`, of the difference `one` - `other` of a figure on the same turns: both see the same resamples."""
    return _percentiles(one.of, [each.by_dialogue(dialogues) for each in (one, other)], draws)


def weighted_interval(
    of: Callable[[numpy.ndarray], numpy.ndarray], dialogues: numpy.ndarray, draws: int
) -> tuple[float, float] | None:
    """As `interval`, of a figure that is no function of sums: `of`, float [n, turns] -> float [n], gets weights."""
    count = int(dialogues.max(initial=-1)) + 1
    if count < FEWEST:
        return None
    weights = _resamples(count, draws)
    chunks = range(0, draws, _CHUNK // 10)
    return _bounds(numpy.concatenate([of(weights[start : start + _CHUNK // 10, dialogues]) for start in chunks]))


def _percentiles(of: Callable, sides: list[numpy.ndarray], draws: int) -> tuple[float, float] | None:
    count = len(sides[0])
    if any(each.any(axis=1).sum() < FEWEST for each in sides):
        return None
    figures = [of(_resamples(count, draws) @ sums) for sums in sides]
    return _bounds(figures[0] - figures[1] if len(figures) == 2 else figures[0])


def _bounds(drawn: numpy.ndarray) -> tuple[float, float] | None:
    drawn = drawn[~numpy.isnan(drawn)]
    if not len(drawn):
        return None
    low, high = numpy.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _resamples(count: int, draws: int) -> numpy.ndarray:
    """float [draws, count]: how often each of `count` dialogues is drawn; the same for every figure of a table."""
    chosen = numpy.random.default_rng(SEED).integers(count, size=(draws, count))
    chosen += numpy.arange(draws)[:, None] * count
    return numpy.bincount(chosen.ravel(), minlength=draws * count).reshape(draws, count).astype(float)


def sign_flip_test(one: Statistic, other: Statistic, dialogues: numpy.ndarray, flips: int) -> float:
    """The two-sided p-value that two systems are alike in a figure, by exchanging them in random dialogues.

    Where they are alike, it is chance which of the two gave which of the two answers to a dialogue. The p-value is the
    share of `flips` exchanges, the actual assignment counted in, whose difference is at least as large. For a mean
    this flips the signs of the dialogues' differences. 1 where neither figure is defined.
    """
    first, second = (each.by_dialogue(dialogues) for each in (one, other))
    middle, half = (first + second).sum(axis=0) / 2, (first - second) / 2
    rng = numpy.random.default_rng(SEED)
    actual = abs(one.value - other.value)
    as_large = 0
    for start in range(0, flips, _CHUNK):
        signs = rng.integers(2, size=(min(_CHUNK, flips - start), len(half))) * 2.0 - 1.0
        shift = signs @ half
        apart = numpy.abs(one.of(middle + shift) - one.of(middle - shift))
        as_large += int((~(apart < actual - 1e-9)).sum())  # equal but for rounding counts, and so does undefined
    return (1 + as_large) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p-values of a family of tests: rejecting those below 5 % errs at all in 5 % of families.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    p_values = numpy.asarray(p_values, float)
    order = numpy.argsort(p_values, kind="stable")
    stepped = p_values[order] * numpy.arange(len(p_values), 0, -1)
    adjusted = numpy.empty(len(p_values))
    adjusted[order] = numpy.minimum(numpy.maximum.accumulate(stepped), 1)
    return adjusted.tolist()


def mcnemar(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test that two systems are right on equally many turns.

    It takes turns for independent, so on dialogues it rejects more often than it should. `one` and `other`, bool
    [turns], say where each system is right.
    """
    from scipy.stats import binomtest  # takes half a second to import

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0
