"""Bootstrap intervals, significance tests and rater agreement for turns that are clustered in dialogues.

Resampling and permutation act on whole dialogues. Turns of one dialogue are correlated: treating them as independent
makes intervals too narrow and tests reject too often.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

CONFIDENCE_LEVEL = 0.95
"""Nominal coverage of the intervals; tests reject below 1 minus this level."""
MIN_DIALOGUES = 10
"""Minimum dialogues for an interval; a bootstrap of fewer is far too narrow."""
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

    @property
    def value(self) -> float:
        """The value over all turns."""
        return float(self.function(self.terms.sum(axis=0)))

    def by_dialogue(self, dialogues: numpy.ndarray) -> numpy.ndarray:
        """float [dialogues, terms]: the sums of each dialogue; `dialogues`, int [turns], counts dialogues from 0."""
        columns = [numpy.bincount(dialogues, column) for column in self.terms.T]
        return numpy.stack(columns, axis=1)


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
    """The percentile bootstrap interval over `resamples` resamples of dialogues.

    Resamples without a value are ignored. None if fewer than `MIN_DIALOGUES` dialogues contribute.

    Args:
        dialogues: int [turns], the dialogue of each turn, counted from 0.
        minus: the interval is of `statistic` - `minus`, on the same turns and the same resamples.
    """
    sides = [each.by_dialogue(dialogues) for each in (statistic, minus) if each]
    if any(each.any(axis=1).sum() < MIN_DIALOGUES for each in sides):
        return None
    counts = _resample_counts(len(sides[0]), resamples)
    values = [statistic.function(counts @ sums) for sums in sides]
    return _quantiles(values[0] - values[1] if minus else values[0])


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
    return _quantiles(
        numpy.concatenate([function(weights[i : i + step, dialogues]) for i in range(0, resamples, step)])
    )


def _quantiles(values: numpy.ndarray) -> Interval | None:
    values = values[~numpy.isnan(values)]
    if not len(values):
        return None
    low, high = numpy.quantile(values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


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
