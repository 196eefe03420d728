"""How much a system believes in what it should say: of the 12 strategy labels, and of the reference's turns."""

import numpy

from csc_train.evaluation.figure import Figure
from csc_train.evaluation.strategy_metrics import NO_CHOICE
from csc_train.evaluation.turns import Turns
from csc_train.evaluation.uncertainty import Statistic, mean, ratio

UNKNOWN_LABELS = "the system tells no likelihood of the labels"
UNKNOWN_REFERENCE = "the likelihood of the reference is not known here"
BINS = 10
"""Bins of equal width that confidences are put into."""


def likelihoods(turns: Turns) -> dict[str, Figure]:
    """Top-2 ACC and expected calibration error of the labels, loss and perplexity of the reference's turns.

    A system's probability of a label is the softmax over the 12 log-likelihoods. Turns without likelihoods do not
    count.
    """
    known, probabilities, hits = _labels(turns)
    top_2 = mean(100 * hits[:, :2].any(axis=1), known)
    error = _calibration_error(probabilities.max(axis=1, initial=0), hits[:, 0], known)
    nll = numpy.array([each.reference_nll or 0 for each in turns.predictions], float)
    tokens = numpy.array([each.reference_tokens or 0 for each in turns.predictions], float)
    sums = numpy.stack([nll, tokens], axis=1)
    reason = UNKNOWN_LABELS if turns.predicts_strategy else NO_CHOICE
    twelve = "softmax over the log-likelihoods of the 12 labels"
    teacher = "of the reference's turns in the reference's history: strategy where predicted, reply, end of turn"
    return {
        "top-2 ACC": Figure(top_2, "turns", f"the reference strategy is one of the two likeliest, {twelve}", reason),
        "ECE": Figure(
            error,
            "turns",
            f"expected calibration error of the likeliest label: {BINS} bins of equal width, {twelve}",
            reason,
        ),
        "NLL": Figure(Statistic(sums, ratio), "nats per token", f"mean {teacher}", UNKNOWN_REFERENCE),
        "perplexity": Figure(Statistic(sums, _perplexity), "tokens", f"exp of the NLL {teacher}", UNKNOWN_REFERENCE),
    }


def calibration(turns: Turns) -> list[dict[str, float]] | None:
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


def _labels(turns: Turns) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """By turn: whether its likelihoods are known (bool [turns]), the labels' probabilities (float [turns, 12]), and
    whether each label, the likeliest first, is the reference's (bool [turns, 12])."""
    known = numpy.array([each.label_log_likelihoods is not None for each in turns.predictions], bool)
    labels = numpy.array([each.label_log_likelihoods or [0] * 12 for each in turns.predictions], float).reshape(-1, 12)
    probabilities = numpy.exp(labels - numpy.logaddexp.reduce(labels, axis=1, keepdims=True))
    order = numpy.argsort(-probabilities, axis=1, kind="stable") + 1
    return known, probabilities, order == turns.reference[:, None]


def _bins(confidence: numpy.ndarray) -> numpy.ndarray:
    return numpy.minimum((confidence * BINS).astype(int), BINS - 1)


def _perplexity(sums: numpy.ndarray) -> numpy.ndarray:
    return numpy.exp(ratio(sums))


def _calibration_error(confidence: numpy.ndarray, correct: numpy.ndarray, known: numpy.ndarray) -> Statistic:
    """Percent: over bins of confidence, the mean of how far it is from the accuracy there, weighted by turns."""
    bins = _bins(confidence)
    terms = numpy.zeros((len(bins), BINS, 2))
    terms[numpy.arange(len(bins)), bins] = numpy.stack([known, known * (confidence - correct)], axis=1)

    def error(sums: numpy.ndarray) -> numpy.ndarray:
        counts, gaps = numpy.moveaxis(sums.reshape(*sums.shape[:-1], BINS, 2), -1, 0)
        return 100 * ratio(numpy.stack([numpy.abs(gaps).sum(axis=-1), counts.sum(axis=-1)], axis=-1))

    return Statistic(terms.reshape(len(bins), BINS * 2), error)
