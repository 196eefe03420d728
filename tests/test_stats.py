"""Intervals and tests keep their promises on simulated dialogues whose turns are alike."""

import numpy
import pytest
from nltk.metrics.agreement import AnnotationTask
from scipy.stats import binomtest

from csc_train.evaluation.metrics.base import Metric
from csc_train.stats import (
    MIN_DIALOGUES,
    AbsoluteSum,
    BinnedStatistic,
    Statistic,
    bootstrap_interval,
    cohen_kappa,
    fleiss_kappa,
    holm_correction,
    mcnemar_test,
    mean,
    observed_agreement,
    ratio,
    sign_flip_test,
    weighted_bootstrap_interval,
)

SIMULATIONS = 1000
DIALOGUES = 100
TRUTH = 0.43


def simulated(rng, truth, dialogues):
    """bool [turns]: right answers of a system that finds some dialogues much harder than others."""
    likely = rng.beta(3 * truth, 3 * (1 - truth), size=dialogues.max() + 1)
    return rng.random(len(dialogues)) < likely[dialogues]


def lengths(rng):
    """int [turns]: dialogues of 8 to 18 supporter turns."""
    return numpy.repeat(numpy.arange(DIALOGUES), rng.integers(8, 19, size=DIALOGUES))


def share(outcomes):
    return numpy.mean(list(outcomes))


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = numpy.random.default_rng(1)
    clustered, naive = [], []
    for _ in range(SIMULATIONS):
        dialogues = lengths(rng)
        right = mean(simulated(rng, TRUTH, dialogues))
        for kept, groups in ((clustered, dialogues), (naive, numpy.arange(len(dialogues)))):
            if kept is naive and len(naive) >= 200:
                continue
            low, high = bootstrap_interval(right, groups, resamples=400)
            kept.append(low <= TRUTH <= high)
    assert 0.92 <= share(clustered) <= 0.98
    assert share(naive) < 0.85  # as if turns were independent


@pytest.mark.slow
def test_equal_systems_are_rarely_told_apart_and_mcnemar_is_fooled():
    rng = numpy.random.default_rng(2)
    flips, clusters_ignored, covered = [], [], []
    for _ in range(SIMULATIONS):
        dialogues = lengths(rng)
        a, b = (simulated(rng, TRUTH, dialogues) for _ in range(2))
        flips.append(sign_flip_test(mean(a), mean(b), dialogues, permutations=1000) < 0.05)
        clusters_ignored.append(mcnemar_test(a, b) < 0.05)
        low, high = bootstrap_interval(mean(a), dialogues, resamples=400, minus=mean(b))
        covered.append(low <= 0 <= high)
    assert 0.03 <= share(flips) <= 0.08
    assert 0.92 <= share(covered) <= 0.98
    assert share(clusters_ignored) > 0.09


@pytest.mark.slow
def test_a_real_difference_is_found_as_often_as_it_can_be():
    """A difference of three standard errors exceeds the 1.96 that decide in 85 % of samples, if it is normal."""
    rng = numpy.random.default_rng(3)
    found, differences = [], []
    for _ in range(SIMULATIONS):
        dialogues = lengths(rng)
        a, b = (mean(simulated(rng, truth, dialogues)) for truth in (TRUTH + 0.12, TRUTH))
        found.append(sign_flip_test(a, b, dialogues, permutations=400) < 0.05)
        differences.append(a.value - b.value)
    assert 0.12 / numpy.std(differences) == pytest.approx(3, abs=0.15)
    assert share(found) == pytest.approx(0.85, abs=0.04)


@pytest.mark.slow
def test_a_metric_that_is_no_mean_is_tested_as_exactly():
    """An F1 is no sum over dialogues: they are exchanged between the systems before it is computed."""
    rng = numpy.random.default_rng(4)

    def f1(right, dialogues):
        positive = dialogues % 2 == 0
        return Statistic(numpy.stack([2.0 * (right & positive), 1.0 * right + positive], axis=1), ratio)

    rejected = []
    for _ in range(SIMULATIONS):
        dialogues = lengths(rng)
        a, b = (f1(simulated(rng, TRUTH, dialogues), dialogues) for _ in range(2))
        rejected.append(sign_flip_test(a, b, dialogues, permutations=400) < 0.05)
    assert 0.03 <= share(rejected) <= 0.08


def test_the_interval_of_a_ratio_weighs_turns_not_dialogues():
    # Nine dialogues of one wrong turn and one of nine right ones.
    dialogues = numpy.array([*range(9), *[9] * 9])
    right = dialogues == 9
    assert mean(right).value == 0.5
    low, high = bootstrap_interval(mean(right), dialogues, resamples=1000)
    assert low == 0 and 0.6 < high < 0.9
    assert mean(right, where=~right).value == 0
    assert numpy.isnan(mean(right, where=right & ~right).value)


def test_too_few_dialogues_have_no_interval():
    dialogues = numpy.arange(MIN_DIALOGUES - 1).repeat(50)
    assert bootstrap_interval(mean(dialogues), dialogues, resamples=100) is None
    dialogues = numpy.arange(MIN_DIALOGUES).repeat(50)
    assert bootstrap_interval(mean(dialogues), dialogues, resamples=100) is not None
    # Those whose turns do not count are none.
    assert bootstrap_interval(mean(dialogues, where=dialogues > 0), dialogues, resamples=100) is None


def test_a_difference_of_a_system_from_itself_is_nothing():
    dialogues = numpy.arange(40).repeat(5)
    right = numpy.random.default_rng(0).random(200) < 0.5
    assert bootstrap_interval(mean(right), dialogues, resamples=100, minus=mean(right)) == (0, 0)
    assert sign_flip_test(mean(right), mean(right), dialogues, permutations=1000) == 1


def test_sign_flips_by_hand():
    # Of three dialogues A wins all: of the 8 assignments of signs two are as far apart, so the p-value nears 1/4.
    dialogues = numpy.array([0, 1, 2])
    p_value = sign_flip_test(mean([1, 1, 1]), mean([0, 0, 0]), dialogues, permutations=20_000)
    assert p_value == pytest.approx(1 / 4, abs=0.01)


def test_holm_by_hand():
    # Smallest times 4, then 3, 2, 1, never falling: .01 -> .04, .02 -> .06, .03 -> .06, .04 -> .06.
    assert holm_correction([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm_correction([0.6, 0.5]) == [1, 1]
    assert holm_correction([0.03]) == [0.03]
    assert holm_correction([]) == []


def test_mcnemar_by_hand():
    # 5 turns that only A has right and one that only B has: twice the chance of at most 1 head in 6.
    a = numpy.array([True] * 5 + [False] + [True, False] * 10)
    b = numpy.array([False] * 5 + [True] + [True, False] * 10)
    assert mcnemar_test(a, b) == pytest.approx(2 * (1 + 6) / 2**6) == pytest.approx(binomtest(5, 6).pvalue)
    assert mcnemar_test(a, a) == 1


def test_weights_give_the_interval_that_sums_give():
    rng = numpy.random.default_rng(0)
    dialogues, values = numpy.repeat(numpy.arange(30), 4), rng.normal(size=120)
    found = weighted_bootstrap_interval(lambda weights: weights @ values / weights.sum(axis=1), dialogues, 300)
    assert found == pytest.approx(bootstrap_interval(mean(values), dialogues, 300))
    few = dialogues < 9
    assert weighted_bootstrap_interval(lambda weights: weights @ values[few], dialogues[few], 300) is None


def test_bins_give_what_columns_give():
    rng = numpy.random.default_rng(0)
    dialogues, bins = numpy.repeat(numpy.arange(30), 4), rng.integers(5, size=(2, 120))
    counted = rng.random((2, 120, 2))
    weights = numpy.arange(10.0)

    def function(sums):
        return (sums * weights).sum(axis=-1) / sums[..., :5].sum(axis=-1)

    binned = [BinnedStatistic(numpy.column_stack(each), function, 5) for each in zip(bins, counted, strict=True)]
    columns = [
        Statistic(numpy.concatenate([numpy.eye(5)[place] * each[:, [i]] for i in (0, 1)], axis=1), function)
        for place, each in zip(bins, counted, strict=True)
    ]
    assert [each.value for each in binned] == pytest.approx([each.value for each in columns])
    for measure in (bootstrap_interval, sign_flip_test):
        args = (dialogues, 300, binned[1]) if measure is bootstrap_interval else (binned[1], dialogues, 300)
        dense = (dialogues, 300, columns[1]) if measure is bootstrap_interval else (columns[1], dialogues, 300)
        assert measure(binned[0], *args) == pytest.approx(measure(columns[0], *dense))
    nothing = BinnedStatistic(numpy.zeros((0, 3)), function, 5)
    with numpy.errstate(invalid="ignore"):
        assert numpy.isnan(nothing.value)
    assert bootstrap_interval(nothing, numpy.zeros(0, int), 300) is None


@pytest.mark.slow
def test_the_interval_of_a_sum_of_magnitudes_holds_the_truth_also_where_it_is_near_0():
    """Ten parts, as the bins of a calibration error: all 0, or some of them not."""
    rng = numpy.random.default_rng(5)
    plain, wider = [], []
    for truth in (numpy.zeros(10), numpy.linspace(0, 0.6, 10)):
        for _ in range(SIMULATIONS // 5):
            dialogues = numpy.repeat(numpy.arange(DIALOGUES), 5)
            noise = rng.normal(size=(len(dialogues), 10)) + rng.normal(size=(DIALOGUES, 10))[dialogues] / 2
            terms = numpy.column_stack([truth + noise, numpy.ones(len(dialogues))])
            own = AbsoluteSum(terms)
            for kept, each in ((wider, own), (plain, Statistic(terms, own.function))):
                low, high = bootstrap_interval(each, dialogues, resamples=200)
                kept.append(low <= truth.sum() <= high)
    assert share(wider) >= 0.93
    assert share(plain) < 0.5  # quantiles of the values, which noise raises twice


def test_the_interval_of_a_sum_of_magnitudes_by_hand():
    dialogues = numpy.arange(40)
    signs = numpy.where(dialogues % 2, 1.0, -1.0)
    none = AbsoluteSum(numpy.column_stack([signs, numpy.ones(40)]))
    low, high = bootstrap_interval(none, dialogues, 1000)
    assert none.value == 0 == low and high == pytest.approx(0)  # a part of exactly 0 moves in neither direction
    sure = AbsoluteSum(numpy.column_stack([signs - 10, signs + 10, numpy.ones(40)]))
    assert sure.value == 20  # its noise cancels, so the interval is a point
    assert bootstrap_interval(sure, dialogues, 1000) == pytest.approx((20, 20))
    low, high = bootstrap_interval(sure, dialogues, 1000, minus=none)
    assert low == pytest.approx(20) and high > 20.1


# --- agreement of raters ---


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
        score = Metric(statistic, "kappa", "").compute(dialogues, 300)
        assert score.low < 0 < score.high and score.high - score.low < 0.15


def test_fleiss_kappa_of_points_by_hand():
    def kappa(given):
        return fleiss_kappa(counts_of(numpy.array(given).T, 2)).value

    # 4 dialogues, 3 judges; agreeing pairs 1, 1/3, 1/3, 1: mean 2/3. Ones are 6 of 12: by chance 1/2.
    assert kappa([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]) == pytest.approx((2 / 3 - 1 / 2) / (1 - 1 / 2))
    assert kappa([[1, 1], [0, 0], [1, 1]]) == 1
    assert kappa([[1, 0], [0, 1]]) == -1
    assert numpy.isnan(kappa([[1, 1], [1, 1]]))
    assert numpy.isnan(kappa([[1], [0]]))


def test_independent_raters_agree_by_chance_only():
    given = (numpy.random.default_rng(0).random((20_000, 3)) < 0.8).astype(int)
    assert abs(fleiss_kappa(counts_of(given.T, 2)).value) < 0.02
