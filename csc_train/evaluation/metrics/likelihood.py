"""Likelihoods of the 12 strategy labels and of the reference turns: top-2 accuracy, calibration, perplexity."""

import functools

import numpy

from csc_train.evaluation.metrics.base import Items, Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import Statistic, mean, ratio

UNKNOWN_LABELS = "the system reports no likelihoods of the labels"
UNKNOWN_REFERENCE = "the likelihood of the reference is not known here"
NO_TEXTS = "no general texts were scored: evaluation.general names them, and only a model that runs here scores them"
OTHER_CONTEXT = "it does not depend on the context, and stands in the other one"
_SOFTMAX = "softmax over the log-likelihoods of the 12 labels"
_NLL_TOKENS = "of the reference turns in reference context: strategy if predicted, reply, end of turn"
BINS = 10
"""Bins of equal width for the confidences."""


@metric(name="top-2 ACC", unit="turns", direction="higher", profiles=["likelihood"], compare=False)
def top_2_accuracy(table: PredictionTable) -> Metric:
    """The reference strategy is one of the two likeliest; turns without likelihoods do not count."""
    known, _, hits = _labels(table)
    signature = f"the reference strategy is one of the two likeliest, {_SOFTMAX}"
    return Metric(mean(100 * hits[:, :2].any(axis=1), known), signature, _why_unknown(table))


def _reference_sums(table: PredictionTable) -> numpy.ndarray:
    """float [turns, 2]: negative log-likelihood in nats, and tokens."""
    return numpy.array(
        [(each.reference_nll or 0, each.reference_tokens or 0) for each in table.predictions], float
    ).reshape(-1, 2)


@metric(name="NLL", unit="nats per token", direction="lower", profiles=["likelihood"], compare=False)
def reference_nll(table: PredictionTable) -> Metric:
    """Mean negative log-likelihood of the reference turns."""
    return Metric(Statistic(_reference_sums(table), ratio), f"mean {_NLL_TOKENS}", UNKNOWN_REFERENCE)


def _perplexity(sums: numpy.ndarray) -> numpy.ndarray:
    return numpy.exp(ratio(sums))


@metric(name="perplexity", unit="tokens", direction="lower", profiles=["likelihood"], compare=False)
def perplexity(table: PredictionTable) -> Metric:
    """Perplexity of the reference turns."""
    statistic = Statistic(_reference_sums(table), _perplexity)
    return Metric(statistic, f"exp of the NLL {_NLL_TOKENS}", UNKNOWN_REFERENCE)


@metric(name="general perplexity", unit="tokens", direction="lower", profiles=["likelihood"])
def general_perplexity(table: PredictionTable) -> Metric:
    """Perplexity of the general texts that evaluation.general names, the same in each context; bootstrap over texts."""
    if not (texts := table.texts):
        return Metric(None, reason=OTHER_CONTEXT if texts is None else NO_TEXTS)
    sums = numpy.array([(each.nll, each.tokens) for each in texts], float)
    # Another tokenizer counts other tokens, whose perplexities cannot be compared.
    items = Items(tuple((each.text_hash, each.tokens) for each in texts), numpy.arange(len(texts)))
    return Metric(Statistic(sums, _perplexity), reason="no text has two tokens", items=items)


@metric(name="ECE", unit="turns", direction="lower", profiles=["likelihood"], compare=False)
def calibration_error(table: PredictionTable) -> Metric:
    """Expected calibration error: the mean distance of confidence and accuracy over bins, weighted by turns.

    It has no interval. Chance moves the accuracy of a bin off its confidence in either direction, so the value is above
    the truth, and resamples are above the value.
    """
    signature = (
        f"expected calibration error of the likeliest label: {BINS} bins of equal width, {_SOFTMAX}; "
        "chance raises it, so it has no interval"
    )
    bins = calibration(table)
    if bins is None:
        return Metric(None, signature, _why_unknown(table))
    distances = [each["turns"] * abs(each["confidence"] - each["ACC"]) for each in bins]
    return Metric(sum(distances) / sum(each["turns"] for each in bins), signature)


def calibration(table: PredictionTable) -> list[dict[str, float]] | None:
    """Accuracy of the likeliest label by its probability, in `BINS` bins; None if no turn has likelihoods.

    Returns:
        For each non-empty bin its `turns`, their mean `confidence` and their `ACC`, in percent.
    """
    known, probabilities, hits = _labels(table)
    if not known.any():
        return None
    confidence, right = probabilities.max(axis=1)[known], hits[known, 0]
    bins = numpy.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {"turns": int(here.sum()), "confidence": 100 * confidence[here].mean(), "ACC": 100 * right[here].mean()}
        for here in (bins == number for number in numpy.unique(bins))
    ]


@functools.lru_cache(maxsize=2)
def _labels(table: PredictionTable) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """By turn: whether likelihoods are known (bool [turns]), probabilities of the labels (float [turns, 12]), and
    whether each label, the likeliest first, is the reference's (bool [turns, 12]). Labels may have probability 0; a
    turn with 12 such labels is unknown."""
    likelihoods = [each.label_log_likelihoods or [-numpy.inf] * 12 for each in table.predictions]
    labels = numpy.array(likelihoods, float).reshape(-1, 12)
    known = numpy.array(numpy.isfinite(labels).any(axis=1))
    labels[~known] = 0
    probabilities = numpy.exp(labels - numpy.logaddexp.reduce(labels, axis=1, keepdims=True))
    order = numpy.argsort(-probabilities, axis=1, kind="stable") + 1
    return known, probabilities, order == table.reference[:, None]


def _why_unknown(table: PredictionTable) -> str:
    return UNKNOWN_LABELS if table.predicts_strategy else table.NO_CHOICE
