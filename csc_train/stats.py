"""Bootstrap intervals, significance tests and rater agreement for turns that are clustered in dialogues.

Resampling and permutation act on whole dialogues. Turns of one dialogue are correlated: treating them as independent
makes intervals too narrow and tests reject too often.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy

CONFIDENCE_LEVEL = 0.95
"""Nominal coverage of the intervals; tests reject below 1 minus this level."""
MIN_DIALOGUES = 10
"""Minimum dialogues for an interval; a bootstrap of fewer is far too narrow."""
CERTAIN_SIGN = 2.5
"""Standard errors from 0 beyond which the sign of a part of `AbsoluteSum` counts as known."""
SEED = 0
_CHUNK = 1000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Statistic:
    """A function of sums over turns: a mean, a ratio, an F1, corpus BLEU.

    Attributes:
        terms: float [turns, terms], the contribution of each turn to the sums.
        function: maps sums, float [..., terms], to values, float [...]; NaN means undefined.
    """

    terms: numpy.ndarray
    function: Callable[[numpy.ndarray], numpy.ndarray]
    minimum: ClassVar[float] = -math.inf
    """The least possible value, for intervals."""

    @property
    def value(self) -> float:
        """The value over all turns."""
        return float(self.function(self.terms.sum(axis=0)))

    def by_dialogue(self, dialogues: numpy.ndarray) -> numpy.ndarray:
        """float [dialogues, terms]: the sums of each dialogue; `dialogues`, int [turns], counts dialogues from 0."""
        columns = [numpy.bincount(dialogues, column) for column in self.terms.T]
        return numpy.stack(columns, axis=1)

    def resample(self, sums: numpy.ndarray, counts: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Samples, float [resamples] each, whose low and high quantiles bound the interval: here the values.

        `sums` are those of each dialogue; `counts`, float [resamples, dialogues], are draws of each dialogue.
        """
        values = self.function(counts @ sums)
        return values, values


@dataclass(frozen=True)
class BinnedStatistic(Statistic):
    """A function of sums in many bins, without a column of terms for each.

    Attributes:
        terms: float [turns, 1 + k]: the bin of each turn, counted from 0, and its k contributions to the sums there.
        function: maps sums, float [..., k x bins], to values, float [...].
        bins: the number of bins.
    """

    bins: int

    @property
    def value(self) -> float:
        """The value over all turns."""
        one = numpy.zeros(len(self.terms), int)
        return float(self.function(self.by_dialogue(one).sum(axis=0)))

    def by_dialogue(self, dialogues: numpy.ndarray) -> numpy.ndarray:
        """float [dialogues, k x bins]: see `Statistic.by_dialogue`."""
        shape = int(dialogues.max(initial=-1)) + 1, self.bins
        places = dialogues * self.bins + self.terms[:, 0].astype(int)
        columns = [numpy.bincount(places, column, math.prod(shape)).reshape(shape) for column in self.terms[:, 1:].T]
        return numpy.concatenate(columns, axis=1)


def _absolute_sum(sums: numpy.ndarray) -> numpy.ndarray:
    return ratio(numpy.stack([numpy.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1]], axis=-1))


@dataclass(frozen=True)
class AbsoluteSum(Statistic):
    """The sum of the magnitudes of all sums but the last, divided by the last, such as a calibration error over bins.

    Noise raises such a value, and resampling raises it again: an interval of quantiles lies too high. So the error of a
    part counts by its magnitude in the lower bound, unless the sign of the part is known (`CERTAIN_SIGN`), and by its
    signed value in the upper bound. Parts near 0 make the interval wider than nominal, never too low or high.

    Source: Z. Fang, A. Santos, Inference on directionally differentiable functions, 2019.
    """

    function: Callable[[numpy.ndarray], numpy.ndarray] = _absolute_sum
    minimum: ClassVar[float] = 0.0

    def resample(self, sums: numpy.ndarray, counts: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """See `Statistic.resample`: the value minus the errors that count for either bound."""
        drawn, actual = counts @ sums, sums[:, :-1].sum(axis=0) / sums[:, -1].sum()
        error = drawn[:, :-1] / numpy.where(drawn[:, -1:] > 0, drawn[:, -1:], numpy.nan) - actual
        signed = numpy.sign(actual) * error
        certain = numpy.abs(actual) > CERTAIN_SIGN * numpy.nanstd(error, axis=0)
        largest = numpy.where(certain, signed, numpy.abs(error))
        return self.value - largest.sum(axis=1), self.value - signed.sum(axis=1)


def mean(values: Sequence[float] | numpy.ndarray, where: numpy.ndarray | None = None) -> Statistic:
    """The mean of a value per turn, over the turns that `where`, bool [turns], selects; `where` defaults to all."""
    values = numpy.asarray(values, float)
    counted = numpy.ones(len(values)) if where is None else where.astype(float)
    return Statistic(numpy.stack([values * counted, counted], axis=1), ratio)


def ratio(sums: numpy.ndarray) -> numpy.ndarray:
    """The first of two sums, float [..., 2], divided by the second; NaN for a divisor of 0."""
    numerator, divisor = sums[..., 0], sums[..., 1]
    return numpy.divide(numerator, divisor, out=numpy.full(divisor.shape, numpy.nan), where=divisor != 0)


def bootstrap_interval(
    statistic: Statistic, dialogues: numpy.ndarray, resamples: int, minus: Statistic | None = None
) -> Interval | None:
    """The percentile bootstrap interval over `resamples` resamples of dialogues; `AbsoluteSum` has its own.

    Resamples without a value are ignored. None if fewer than `MIN_DIALOGUES` dialogues contribute.

    Args:
        dialogues: int [turns], the dialogue of each turn, counted from 0.
        minus: the interval is of `statistic` - `minus`, on the same turns and the same resamples.
    """
    sides = [(each, each.by_dialogue(dialogues)) for each in (statistic, minus) if each]
    if any(sums.any(axis=1).sum() < MIN_DIALOGUES for _, sums in sides):
        return None
    counts = _resample_counts(len(sides[0][1]), resamples)
    (low, high), *others = (each.resample(sums, counts) for each, sums in sides)
    for other_low, other_high in others:
        low, high = low - other_high, high - other_low
    found = _quantiles(low, high)
    return (max(found[0], statistic.minimum), found[1]) if found and not minus else found


def weighted_bootstrap_interval(
    function: Callable[[numpy.ndarray], numpy.ndarray], dialogues: numpy.ndarray, resamples: int
) -> Interval | None:
    """As `bootstrap_interval`, for values that are no function of sums.

    Args:
        function: maps weights of the turns, float [n, turns], to values, float [n].
    """
    count = int(dialogues.max(initial=-1)) + 1
    if count < MIN_DIALOGUES:
        return None
    weights, step = _resample_counts(count, resamples), _CHUNK // 10
    values = numpy.concatenate([function(weights[i : i + step, dialogues]) for i in range(0, resamples, step)])
    return _quantiles(values, values)


def _quantiles(*samples: numpy.ndarray) -> Interval | None:
    low, high = (each[~numpy.isnan(each)] for each in samples)
    if not len(low):
        return None
    shares = (1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2
    return float(numpy.quantile(low, shares[0])), float(numpy.quantile(high, shares[1]))


@functools.lru_cache(maxsize=2)
def _resample_counts(count: int, resamples: int) -> numpy.ndarray:
    """float [resamples, count]: draws of each dialogue in each resample; the same for every metric of a table."""
    chosen = numpy.random.default_rng(SEED).integers(count, size=(resamples, count))
    chosen += numpy.arange(resamples)[:, None] * count
    return numpy.bincount(chosen.ravel(), minlength=resamples * count).reshape(resamples, count).astype(float)


def sign_flip_test(one: Statistic, other: Statistic, dialogues: numpy.ndarray, permutations: int) -> float:
    """The two-sided p-value of the hypothesis that two systems are equal, by a permutation test over dialogues.

    Each permutation exchanges the two systems in random dialogues. The p-value is the share of permutations, the actual
    assignment included, with a difference at least as large as the actual one. For a mean this flips the signs of the
    differences per dialogue. 1 if neither statistic is defined.
    """
    first, second = (each.by_dialogue(dialogues) for each in (one, other))
    middle, half = (first + second).sum(axis=0) / 2, (first - second) / 2
    rng = numpy.random.default_rng(SEED)
    actual = abs(one.value - other.value)
    as_large = 0
    for start in range(0, permutations, _CHUNK):
        signs = rng.integers(2, size=(min(_CHUNK, permutations - start), len(half))) * 2.0 - 1.0
        shift = signs @ half
        difference = numpy.abs(one.function(middle + shift) - one.function(middle - shift))
        as_large += int((~(difference < actual - 1e-9)).sum())  # counts values equal up to rounding, and NaN
    return (1 + as_large) / (1 + permutations)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests; rejecting those below 5 % keeps the family-wise error below 5 %.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    values = numpy.asarray(p_values, float)
    order = numpy.argsort(values, kind="stable")
    stepped = values[order] * numpy.arange(len(values), 0, -1)
    adjusted = numpy.empty(len(p_values))
    adjusted[order] = numpy.minimum(numpy.maximum.accumulate(stepped), 1)
    return adjusted.tolist()


def mcnemar_test(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test that two systems have equal accuracy.

    It assumes independent turns, so on dialogues it rejects too often. `one` and `other`, bool [turns], mark the
    correct turns of each system.
    """
    from scipy.stats import binomtest  # takes half a second to import

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def observed_agreement(one: numpy.ndarray, other: numpy.ndarray) -> Statistic:
    """The percentage of items that two raters, int [items] each, put into the same category."""
    return mean(100.0 * (one == other))


def cohen_kappa(one: numpy.ndarray, other: numpy.ndarray, categories: int) -> Statistic:
    """Cohen's kappa of two raters: int [items] each, the category of each item, counted from 0.

    (p - e) / (1 - e) with the observed agreement p and the agreement e expected from both raters' category frequencies.
    Undefined if both raters chose the same category for all items.

    Source: J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    sides = [numpy.eye(categories)[each] for each in (one, other)]

    def kappa(sums: numpy.ndarray) -> numpy.ndarray:
        agreed, items = sums[..., 0], sums[..., -1]
        first, second = sums[..., 1 : 1 + categories], sums[..., 1 + categories : -1]
        expected = (first * second).sum(axis=-1)  # times the square of the items, so that 0 is exact
        return ratio(numpy.stack([agreed * items - expected, items**2 - expected], axis=-1))

    return Statistic(numpy.column_stack([one == other, *sides, numpy.ones(len(one))]).astype(float), kappa)


def fleiss_kappa(counts: numpy.ndarray) -> Statistic:
    """Fleiss' kappa of several raters: int [items, categories], the number of raters who chose each category.

    (p - e) / (1 - e) with p the mean share of agreeing pairs of raters per item, and e the sum of squared shares of the
    categories. Every rater must rate every item. Undefined for one rater, or if all ratings are equal.

    Source: J. L. Fleiss, Measuring nominal scale agreement among many raters, 1971.
    """
    counts = counts.astype(float)
    raters = counts.sum(axis=1)
    agreeing = ratio(numpy.stack([(counts * (counts - 1)).sum(axis=1), raters * (raters - 1)], axis=-1))

    def kappa(sums: numpy.ndarray) -> numpy.ndarray:
        chosen, items = sums[..., 1:-1], sums[..., -1]
        total = chosen.sum(axis=-1)
        expected = (chosen**2).sum(axis=-1)
        above = ratio(numpy.stack([sums[..., 0], items], axis=-1)) * total**2 - expected
        return ratio(numpy.stack([above, total**2 - expected], axis=-1))

    return Statistic(numpy.column_stack([agreeing, counts, numpy.ones(len(counts))]), kappa)
