"""Win rate of one system over another, plain and length-controlled."""

from dataclasses import dataclass

import numpy

from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.stats import mean, sign_flip_test, weighted_bootstrap_interval

RIDGE = 0.01
"""L2 penalty of the logistic regression; it keeps the coefficients finite if one system always wins."""
_CONTROLLED = "logistic regression on tanh(difference in characters / twice its median size), at difference 0"


@dataclass(frozen=True)
class WinRate:
    """System A against system B.

    Attributes:
        wins, ties, losses: turns, as A sees them.
        rate: A's share of the wins in percent; a tie is half a win of each.
        length_controlled: the win rate at equal length of the replies (see `length_controlled`), in percent.
        p_value: of the hypothesis that neither is preferred, by a sign-flip test over dialogues; None for no turns.
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
        preferences: float [turns]; 1 if A is preferred, 0 if B is, 0.5 for a tie.
        longer: float [turns]; characters of A's reply minus characters of B's.
        dialogues: int [turns]; the dialogue of each turn, counted from 0.
        resamples: bootstrap resamples of the dialogues for the intervals.
        permutations: permutations of the sign-flip test.
    """
    metric = Metric(mean(100 * preferences), "A preferred, ties half", "no turns were judged", "turns")
    rate = metric.compute(dialogues, resamples)
    if not len(preferences):
        return WinRate(0, 0, 0, rate, MetricResult(None, "turns", _CONTROLLED, metric.reason), None)
    wins, losses = int((preferences == 1).sum()), int((preferences == 0).sum())
    return WinRate(
        wins,
        len(preferences) - wins - losses,
        losses,
        rate,
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

    low, high = weighted_bootstrap_interval(controlled, dialogues, resamples) or (None, None)
    value = float(controlled(numpy.ones((1, len(preferences))))[0])
    return MetricResult(value, "turns", _CONTROLLED, None, low, high)


def length_controlled(preferences: numpy.ndarray, longer: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """The win rate at equal length, float [n] in 0..1, for `weights` of the turns, float [n, turns].

    The model is P(A is preferred) = s(a + b tanh(d / 2 D)) with s the logistic function, d the difference in length and
    D the median of its size (the root mean square if the median is 0). tanh bounds the influence of replies that run
    to the token limit. a and b maximise the weighted log-likelihood minus `RIDGE` / 2 (a^2 + b^2), by Newton's method;
    a tie counts as half a win and half a loss. The result is s(a).
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
        # Steps are bounded to where the quadratic approximation holds.
        step_a, step_b = (
            numpy.clip(step / (aa * bb - ab * ab), -1, 1)
            for step in (bb * slope_a - ab * slope_b, aa * slope_b - ab * slope_a)
        )
        a, b = a + step_a, b + step_b
        if max(numpy.abs(step_a).max(), numpy.abs(step_b).max()) < 1e-9:
            break
    return 1 / (1 + numpy.exp(-a))
