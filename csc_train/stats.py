"""How sure a figure is, and whether two systems differ, where the turns of a dialogue are alike.

What is resampled, or exchanged between two systems, is always a whole dialogue: turns of one dialogue stand and fall
together, and treating them as independent makes intervals too narrow and tests reject too often.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

CONFIDENCE_LEVEL = 0.95
"""Of all intervals, how often they are to hold the truth."""
MIN_DIALOGUES = 10
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


def bootstrap_interval(statistic: Statistic, dialogues: numpy.ndarray, resamples: int) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a figure, over `resamples` resamples of dialogues.

    None where fewer than `MIN_DIALOGUES` dialogues have a turn that counts. A draw for which the figure is not defined is left
    out.

    Args:
        dialogues: int [turns], the dialogue of each turn, counted from 0.
    """
    return _percentiles(statistic.of, [statistic.by_dialogue(dialogues)], resamples)


def paired_bootstrap_interval(
    one: Statistic, other: Statistic, dialogues: numpy.ndarray, resamples: int
) -> tuple[float, float] | None:
    """As `bootstrap_interval`, of the difference `one` - `other` of a figure on the same turns: both see the same resamples."""
    return _percentiles(one.of, [each.by_dialogue(dialogues) for each in (one, other)], resamples)


def weighted_bootstrap_interval(
    of: Callable[[numpy.ndarray], numpy.ndarray], dialogues: numpy.ndarray, resamples: int
) -> tuple[float, float] | None:
    """As `bootstrap_interval`, of a figure that is no function of sums: `of`, float [n, turns] -> float [n], gets weights."""
    count = int(dialogues.max(initial=-1)) + 1
    if count < MIN_DIALOGUES:
        return None
    weights = _resamples(count, resamples)
    chunks = range(0, resamples, _CHUNK // 10)
    return _bounds(numpy.concatenate([of(weights[start : start + _CHUNK // 10, dialogues]) for start in chunks]))


def _percentiles(of: Callable, sides: list[numpy.ndarray], resamples: int) -> tuple[float, float] | None:
    count = len(sides[0])
    if any(each.any(axis=1).sum() < MIN_DIALOGUES for each in sides):
        return None
    figures = [of(_resamples(count, resamples) @ sums) for sums in sides]
    return _bounds(figures[0] - figures[1] if len(figures) == 2 else figures[0])


def _bounds(drawn: numpy.ndarray) -> tuple[float, float] | None:
    drawn = drawn[~numpy.isnan(drawn)]
    if not len(drawn):
        return None
    low, high = numpy.quantile(drawn, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _resamples(count: int, resamples: int) -> numpy.ndarray:
    """float [resamples, count]: how often each of `count` dialogues is drawn; the same for every figure of a table."""
    chosen = numpy.random.default_rng(SEED).integers(count, size=(resamples, count))
    chosen += numpy.arange(resamples)[:, None] * count
    return numpy.bincount(chosen.ravel(), minlength=resamples * count).reshape(resamples, count).astype(float)


def sign_flip_test(one: Statistic, other: Statistic, dialogues: numpy.ndarray, permutations: int) -> float:
    """The two-sided p-value that two systems are alike in a figure, by exchanging them in random dialogues.

    Where they are alike, it is chance which of the two gave which of the two answers to a dialogue. The p-value is the
    share of `permutations` exchanges, the actual assignment counted in, whose difference is at least as large. For a mean
    this permutations the signs of the dialogues' differences. 1 where neither figure is defined.
    """
    first, second = (each.by_dialogue(dialogues) for each in (one, other))
    middle, half = (first + second).sum(axis=0) / 2, (first - second) / 2
    rng = numpy.random.default_rng(SEED)
    actual = abs(one.value - other.value)
    as_large = 0
    for start in range(0, permutations, _CHUNK):
        signs = rng.integers(2, size=(min(_CHUNK, permutations - start), len(half))) * 2.0 - 1.0
        shift = signs @ half
        apart = numpy.abs(one.of(middle + shift) - one.of(middle - shift))
        as_large += int((~(apart < actual - 1e-9)).sum())  # equal but for rounding counts, and so does undefined
    return (1 + as_large) / (1 + permutations)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p-values of a family of tests: rejecting those below 5 % errs at all in 5 % of families.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    p_values = numpy.asarray(p_values, float)
    order = numpy.argsort(p_values, kind="stable")
    stepped = p_values[order] * numpy.arange(len(p_values), 0, -1)
    adjusted = numpy.empty(len(p_values))
    adjusted[order] = numpy.minimum(numpy.maximum.accumulate(stepped), 1)
    return adjusted.tolist()


def mcnemar_test(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test that two systems are right on equally many turns.

    It takes turns for independent, so on dialogues it rejects more often than it should. `one` and `other`, bool
    [turns], say where each system is right.
    """
    from scipy.stats import binomtest  # takes half a second to import

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def observed_agreement(one: numpy.ndarray, other: numpy.ndarray) -> Statistic:
    """The percentage of items that two raters, int [items] each, put into the same category."""
    return mean(100.0 * (one == other))


def cohen_kappa(one: numpy.ndarray, other: numpy.ndarray, categories: int) -> Statistic:
    """Cohen's kappa of two raters: int [items] each, the category of every item, counted from 0.

    (p - e) / (1 - e), where p is the share of items on which they agree, and e what it would be if each chose at
    random with the frequencies of all that rater's choices. Not defined where both chose one category throughout.

    Source: J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    sides = [numpy.eye(categories)[each] for each in (one, other)]

    def kappa(sums: numpy.ndarray) -> numpy.ndarray:
        agreed, items = sums[..., 0], sums[..., -1]
        first, second = sums[..., 1 : 1 + categories], sums[..., 1 + categories : -1]
        by_chance = (first * second).sum(axis=-1)  # times the square of the items, so that 0 is exact
        return ratio(numpy.stack([agreed * items - by_chance, items**2 - by_chance], axis=-1))

    return Statistic(numpy.column_stack([one == other, *sides, numpy.ones(len(one))]).astype(float), kappa)


def fleiss_kappa(counts: numpy.ndarray) -> Statistic:
    """Fleiss' kappa of several raters: int [items, categories], how many chose each; all rated every item, at least 2.

    (p - e) / (1 - e), where p is the mean over items of the share of pairs of raters who agree, and e the sum of
    squares of the categories' shares in all choices. Not defined where all choices are of one category.

    Source: J. L. Fleiss, Measuring nominal scale agreement among many raters, 1971.
    """
    counts = counts.astype(float)
    raters = counts.sum(axis=1)
    agreeing = ratio(numpy.stack([(counts * (counts - 1)).sum(axis=1), raters * (raters - 1)], axis=-1))

    def kappa(sums: numpy.ndarray) -> numpy.ndarray:
        chosen, items = sums[..., 1:-1], sums[..., -1]
        choices = chosen.sum(axis=-1)
        by_chance = (chosen**2).sum(axis=-1)
        above = ratio(numpy.stack([sums[..., 0], items], axis=-1)) * choices**2 - by_chance
        return ratio(numpy.stack([above, choices**2 - by_chance], axis=-1))

    return Statistic(numpy.column_stack([agreeing, counts, numpy.ones(len(counts))]), kappa)
