"""How far people who judged the same items agree, beyond what chance alone would bring."""

import numpy

from csc_train.stats import Statistic, mean, ratio


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
    agreeing = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))

    def kappa(sums: numpy.ndarray) -> numpy.ndarray:
        chosen, items = sums[..., 1:-1], sums[..., -1]
        choices = chosen.sum(axis=-1)
        by_chance = (chosen**2).sum(axis=-1)
        above = ratio(numpy.stack([sums[..., 0], items], axis=-1)) * choices**2 - by_chance
        return ratio(numpy.stack([above, choices**2 - by_chance], axis=-1))

    return Statistic(numpy.column_stack([agreeing, counts, numpy.ones(len(counts))]), kappa)
