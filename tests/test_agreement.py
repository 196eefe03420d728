"""Kappas: worked by hand, equal to nltk's, and told what they cannot say."""

import numpy
import pytest
from nltk.metrics.agreement import AnnotationTask

from csc_train.evaluation.judges.agreement import cohen_kappa, fleiss_kappa, observed_agreement
from csc_train.evaluation.metrics.base import Metric


def counts_of(ratings, categories=3):
    """int [items, categories] of int [raters, items]."""
    return numpy.eye(categories, dtype=int)[ratings].sum(axis=0)


def test_cohens_kappa_by_hand():
    """Of 50 items both say yes to 20 and no to 15; 5 and 10 are said yes to by one alone."""
    one = numpy.array([1] * 20 + [1] * 5 + [0] * 10 + [0] * 15)
    other = numpy.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    by_chance = (25 / 50) * (30 / 50) + (25 / 50) * (20 / 50)
    assert cohen_kappa(one, other, 2).value == pytest.approx((35 / 50 - by_chance) / (1 - by_chance)) == 0.4
    assert observed_agreement(one, other).value == pytest.approx(70)


def test_fleiss_kappa_by_hand():
    """Three raters, four items: of the pairs of raters agree all, all, one of three, none."""
    counts = numpy.array([[3, 0, 0], [0, 3, 0], [2, 1, 0], [1, 1, 1]])
    observed = (1 + 1 + 1 / 3 + 0) / 4
    by_chance = (6 / 12) ** 2 + (5 / 12) ** 2 + (1 / 12) ** 2
    assert fleiss_kappa(counts).value == pytest.approx((observed - by_chance) / (1 - by_chance))
    assert fleiss_kappa(counts).value == pytest.approx(11 / 41)


@pytest.mark.parametrize("seed", range(5))
def test_kappas_equal_nltks(seed):
    rng = numpy.random.default_rng(seed)
    truth = rng.integers(3, size=40)
    ratings = numpy.where(rng.random((4, 40)) < 0.6, truth, rng.integers(3, size=(4, 40)))
    task = AnnotationTask([(str(r), str(i), str(ratings[r, i])) for r in range(4) for i in range(40)])
    assert fleiss_kappa(counts_of(ratings)).value == pytest.approx(task.pi())
    pair = AnnotationTask([(str(r), str(i), str(ratings[r, i])) for r in range(2) for i in range(40)])
    assert cohen_kappa(*ratings[:2], 3).value == pytest.approx(pair.kappa())


def test_kappas_at_the_edges():
    items = numpy.array([0, 1, 2, 2])
    assert cohen_kappa(items, items, 3).value == fleiss_kappa(counts_of(numpy.stack([items] * 3))).value == 1
    opposite = cohen_kappa(numpy.array([0, 1]), numpy.array([1, 0]), 3)
    assert opposite.value == -1
    # All of one category, or no items at all: nothing to say.
    same, none = numpy.ones(7, int), numpy.zeros(0, int)
    for each in (same, none):
        assert numpy.isnan(cohen_kappa(each, each, 3).value)
        assert numpy.isnan(fleiss_kappa(counts_of(numpy.stack([each] * 3))).value)


def test_a_kappa_has_an_interval_and_chance_is_zero():
    rng = numpy.random.default_rng(0)
    dialogues = numpy.repeat(numpy.arange(500), 4)
    ratings = rng.choice(3, p=[0.6, 0.3, 0.1], size=(3, 2000))
    for statistic in (cohen_kappa(*ratings[:2], 3), fleiss_kappa(counts_of(ratings))):
        score = Metric(statistic, "kappa", "").score(dialogues, 300)
        assert score.low < 0 < score.high and score.high - score.low < 0.15
