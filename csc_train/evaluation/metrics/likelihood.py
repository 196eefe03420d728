"""How much a system believes in what it should say: of the 12 strategy labels, and of the reference's turns."""

import numpy

from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.metrics.strategy import NO_CHOICE
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import Statistic, mean, ratio

UNKNOWN_LABELS = "the system tells no likelihood of the labels"
UNKNOWN_REFERENCE = "the likelihood of the reference is not known here"
_TWELVE = "softmax over the log-likelihoods of the 12 labels"
BINS = 10
"""Bins of equal width that confidences are put into."""


def likelihoods(turns: PredictionTable) -> dict[str, Metric]:
    """Top-2 ACC of the labels, loss and perplexity of the reference's turns.

    A system's probability of a label is the softmax over the 12 log-likelihoods. Turns without likelihoods, or that
    hold every label impossible, do not count.
    """
    known, _, hits = _labels(turns)
    top_2 = mean(100 * hits[:, :2].any(axis=1), known)
    nll = numpy.array([each.reference_nll or 0 for each in turns.predictions], float)
    tokens = numpy.array([each.reference_tokens or 0 for each in turns.predictions], float)
    sums = numpy.stack([nll, tokens], axis=1)
    teacher = "of the reference's turns in the reference's history: strategy where predicted, reply, end of turn"
    return {
        "top-2 ACC": Metric(
            top_2, "turns", f"the reference strategy is one of the two likeliest, {_TWELVE}", _why_unknown(turns)
        ),
        "NLL": Metric(Statistic(sums, ratio), "nats per token", f"mean {teacher}", UNKNOWN_REFERENCE),
        "perplexity": Metric(Statistic(sums, _perplexity), "tokens", f"exp of the NLL {teacher}", UNKNOWN_REFERENCE),
    }


def calibration_error(turns: PredictionTable) -> MetricResult:
    """ECE: over `BINS` of confidence, the mean of how far it is from the accuracy there, weighted by turns, in percent.

    It has no interval: chance alone puts the accuracy of a bin off its confidence, on either side, and the distance
    counts. So the figure lies above the truth, that of a resample above the figure, and resamples bound neither.
    """
    signature = (
        f"expected calibration error of the likeliest label: {BINS} bins of equal width, {_TWELVE}; "
        "chance raises it, and so it has no interval"
    )
    bins = calibration(turns)
    if bins is None:
        return MetricResult(None, "turns", signature, _why_unknown(turns))
    gaps = [each["turns"] * abs(each["confidence"] - each["ACC"]) for each in bins]
    return MetricResult(sum(gaps) / sum(each["turns"] for each in bins), "turns", signature)


def calibration(turns: PredictionTable) -> list[dict[str, float]] | None:
    """How often the likeliest label is right, by its probability, in `BINS` equally wide bins; None where no turn has
    likelihoods.

    Returns:
        For each bin that is not empty its `turns`, their mean `confidence` and their `ACC`, in percent.
    """
    known, probabilities, hits = _labels(turns)
    if not known.any():
        return None
    confidence, right = probabilities.max(axis=1)[known], hits[known, 0]
    bins = _bins(confidence)
    return [
        {"turns": int(here.sum()), "confidence": 100 * confidence[here].mean(), "ACC": 100 * right[here].mean()}
        for here in (bins == number for number in numpy.unique(bins))
    ]


def _labels(turns: PredictionTable) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """By turn: whether its likelihoods are known (bool [turns]), the labels' probabilities (float [turns, 12]), and
    whether each label, the likeliest first, is the reference's (bool [turns, 12]). A label may have probability 0."""
    told = [each.label_log_likelihoods or [-numpy.inf] * 12 for each in turns.predictions]
    labels = numpy.array(told, float).reshape(-1, 12)
    known = numpy.isfinite(labels).any(axis=1)
    labels[~known] = 0
    probabilities = numpy.exp(labels - numpy.logaddexp.reduce(labels, axis=1, keepdims=True))
    order = numpy.argsort(-probabilities, axis=1, kind="stable") + 1
    return known, probabilities, order == turns.reference[:, None]


def _why_unknown(turns: PredictionTable) -> str:
    return UNKNOWN_LABELS if turns.predicts_strategy else NO_CHOICE


def _bins(confidence: numpy.ndarray) -> numpy.ndarray:
    return numpy.minimum((confidence * BINS).astype(int), BINS - 1)


def _perplexity(sums: numpy.ndarray) -> numpy.ndarray:
    return numpy.exp(ratio(sums))
