"""How often one system is preferred to another, as it stands and with the length of the replies taken out."""

from dataclasses import dataclass

import numpy

from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.stats import mean, sign_flip_test, weighted_bootstrap_interval

RIDGE = 0.01
"""Of the logistic regression: keeps its coefficients finite where one system always wins."""
_CONTROLLED = "logistic regression on tanh(difference in characters / twice its median size), at difference 0"


@dataclass(frozen=True)
class WinRate:
    """System A against system B.

    Attributes:
        wins, ties, losses: turns, as A sees it.
        rate: A's share of the wins, a tie being half a win of each, in percent.
        length_controlled: the same if both replies were always equally long (see `length_controlled`), in percent.
        p_value: that neither is preferred, by a sign-flip test over dialogues; None for no turns.
    """

    wins: int
    ties: int
    losses: int
    rate: MetricResult
    length_controlled: MetricResult
    p_value: float | None


def win_rate(
    preferences: numpy.ndarray, longer: numpy.ndarray, dialogues: numpy.ndarray, resamples: int, permutations: int
) -> WinRate:
    """The win rates of A.

    Args:
        preferences: float [turns]; 1 where A is preferred, 0 where B is, 0.5 for a tie.
        longer: float [turns]; by how many characters A's reply is longer.
        dialogues: int [turns]; the dialogue of each, counted from 0.
        resamples: resamples of the dialogues for the intervals.
        permutations: random exchanges of the two systems for the p-value.
    """
    figure = Metric(mean(100 * preferences), "turns", "A preferred, ties half", "no turns were judged")
    if not len(preferences):
        nothing = MetricResult(None, "turns", _CONTROLLED, figure.reason)
        return WinRate(0, 0, 0, figure.score(dialogues, resamples), nothing, None)
    wins, losses = int((preferences == 1).sum()), int((preferences == 0).sum())
    return WinRate(
        wins,
        len(preferences) - wins - losses,
        losses,
        figure.score(dialogues, resamples),
        _length_controlled(preferences, longer, dialogues, resamples),
        sign_flip_test(mean(preferences), mean(1 - preferences), dialogues, permutations),
    )


def _length_controlled(
    preferences: numpy.ndarray, longer: numpy.ndarray, dialogues: numpy.ndarray, resamples: int
) -> MetricResult:
    if longer.any() and not numpy.ptp(longer):
        return MetricResult(None, "turns", _CONTROLLED, f"A's reply is {longer[0]:+g} characters longer in every turn")

    def controlled(weights: numpy.ndarray) -> numpy.ndarray:
        return 100 * length_controlled(preferences, longer, weights)

    bounds = weighted_bootstrap_interval(controlled, dialogues, resamples) or (None, None)
    value = float(controlled(numpy.ones((1, len(preferences))))[0])
    return MetricResult(value, "turns", _CONTROLLED, None, *bounds)


def length_controlled(preferences: numpy.ndarray, longer: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """The win rate, float [n] in 0..1, that replies of equal length would have, for `weights`, float [n, turns].

    The model is P(A is preferred) = s(a + b tanh(d / 2 D)) with s the logistic function, d the difference in length of
    a turn and D the median of its size (the root mean square where that is 0): a few replies that run on to the limit
    of tokens count as much longer and no more, where they would else decide the slope. a and b maximise the weighted
    log-likelihood, a tie counting as half a win and half a loss, less `RIDGE` / 2 (a^2 + b^2), by Newton's method; the
    answer is s(a).
    """
    longer = longer.astype(float)
    size = numpy.median(numpy.abs(longer)) or numpy.sqrt(numpy.mean(longer**2)) or 1.0
    x = numpy.tanh(longer / (2 * size))
    a, b = numpy.zeros((2, len(weights)))
    for _ in range(100):
        p = 1 / (1 + numpy.exp(-(a[:, None] + b[:, None] * x)))
        error, spread = weights * (preferences - p), weights * p * (1 - p)
        slope_a, slope_b = error.sum(axis=1) - RIDGE * a, (error * x).sum(axis=1) - RIDGE * b
        aa, ab, bb = spread.sum(axis=1) + RIDGE, (spread * x).sum(axis=1), (spread * x * x).sum(axis=1) + RIDGE
        # Never further than where the curve still looks like what the step was computed from.
        step_a, step_b = (
            numpy.clip(step / (aa * bb - ab * ab), -1, 1)
            for step in (bb * slope_a - ab * slope_b, aa * slope_b - ab * slope_a)
        )
        a, b = a + step_a, b + step_b
        if max(numpy.abs(step_a).max(), numpy.abs(step_b).max()) < 1e-9:
            break
    return 1 / (1 + numpy.exp(-a))
