"""Likelihoods of the 12 strategy labels and of the reference turns.

Top-2 accuracy, perplexity, calibration, and accuracy if the least sure turns go to a person. A turn's confidence is the
probability of its likeliest label. Turns without likelihoods do not count.
"""

import functools
import math
from collections.abc import Callable

import numpy

from csc_train.evaluation.metrics.base import Items, Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import AbsoluteSum, BinnedStatistic, Statistic, bootstrap_interval, mean, ratio

UNKNOWN_LABELS = "the system reports no likelihoods of the labels"
UNKNOWN_REFERENCE = "the likelihood of the reference is not known here"
NO_TEXTS = "no general texts were scored: evaluation.general names them, and only a model that runs here scores them"
OTHER_CONTEXT = "it does not depend on the context, and stands in the other one"
_SOFTMAX = "softmax over the log-likelihoods of the 12 labels"
_NLL_TOKENS = "of the reference turns in reference context: strategy if predicted, reply, end of turn"
_TIES = "turns whose confidence agrees to three decimals are in random order"
BINS = 10
"""Bins of equal width for the confidences."""
COVERAGE = 0.8
"""Share of the turns, the surest ones, that the system answers itself."""
CURVE_POINTS = 20


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


@metric(name="perplexity", unit="per token", direction="lower", profiles=["likelihood"], compare=False)
def perplexity(table: PredictionTable) -> Metric:
    """Perplexity of the reference turns."""
    statistic = Statistic(_reference_sums(table), _perplexity)
    return Metric(statistic, f"exp of the NLL {_NLL_TOKENS}", UNKNOWN_REFERENCE)


@metric(name="general perplexity", unit="per token", direction="lower", profiles=["likelihood"])
def general_perplexity(table: PredictionTable) -> Metric:
    """Perplexity of the general texts that evaluation.general names, the same in each context; bootstrap over texts."""
    if not (texts := table.texts):
        return Metric(None, reason=OTHER_CONTEXT if texts is None else NO_TEXTS)
    sums = numpy.array([(each.nll, each.tokens) for each in texts], float)
    # Another tokenizer counts other tokens, whose perplexities cannot be compared.
    items = Items(tuple((each.text_hash, each.tokens) for each in texts), numpy.arange(len(texts)))
    return Metric(Statistic(sums, _perplexity), reason="no text has two tokens", items=items)


@metric(name="ECE", unit="turns", direction="lower", profiles=["likelihood"])
def calibration_error(table: PredictionTable) -> Metric:
    """Expected calibration error: the mean distance of confidence and accuracy over bins, weighted by turns.

    Chance moves the accuracy of a bin off its confidence in either direction, so the value is above the truth. The
    interval allows for that; see `AbsoluteSum`.
    """
    signature = f"expected calibration error of the likeliest label: {BINS} bins of equal width, {_SOFTMAX}"
    known, confidence, right = _surest(table)
    bins = numpy.eye(BINS)[numpy.minimum((confidence * BINS).astype(int), BINS - 1)]
    terms = numpy.column_stack([100 * (confidence - right)[:, None] * bins, numpy.ones(len(table))])
    return Metric(AbsoluteSum(terms * known[:, None]), signature, _why_unknown(table))


@metric(name="overconfidence", unit="turns", direction="none", profiles=["likelihood"])
def overconfidence(table: PredictionTable) -> Metric:
    """Mean confidence minus accuracy of the likeliest label; below 0 for a system that doubts too much."""
    known, confidence, right = _surest(table)
    signature = f"mean confidence minus accuracy of the likeliest label, {_SOFTMAX}; chance does not raise it"
    return Metric(mean(100 * (confidence - right), known), signature, _why_unknown(table))


def calibration(table: PredictionTable, resamples: int) -> list[dict[str, float | None]] | None:
    """Accuracy of the likeliest label by its probability, in `BINS` bins; None if no turn has likelihoods.

    Returns:
        For each non-empty bin its `turns`, their mean `confidence` and their `ACC`, in percent, with bounds `low` and
        `high` by `resamples` resamples of dialogues; they are None if too few dialogues have such turns.
    """
    known, confidence, right = _surest(table)
    bins = numpy.where(known, numpy.minimum((confidence * BINS).astype(int), BINS - 1), -1)
    rows = []
    for here in (bins == number for number in numpy.unique(bins[known])):
        accuracy = mean(100 * right, here)
        low, high = bootstrap_interval(accuracy, table.dialogue, resamples) or (None, None)
        row = {"turns": int(here.sum()), "confidence": 100 * confidence[here].mean(), "ACC": accuracy.value}
        rows.append(row | {"low": low, "high": high})
    return rows or None


@metric(name="ACC at 80 % coverage", unit="turns", direction="higher", profiles=["likelihood"])
def covered_accuracy(table: PredictionTable) -> Metric:
    """Accuracy of the likeliest label over the 80 % of the turns with the highest confidence."""
    signature = f"accuracy of the likeliest label over the surest {COVERAGE:.0%} of the turns, {_SOFTMAX}; {_TIES}"
    return Metric(_coverage(table, _covered), signature, _why_unknown(table))


@metric(name="AURC", unit="turns", direction="lower", profiles=["likelihood"])
def risk_coverage_area(table: PredictionTable) -> Metric:
    """Area under the risk-coverage curve: the mean, over all numbers of surest turns, of their share of errors.

    Source: Y. Geifman, G. Uziel, R. El-Yaniv, Bias-reduced uncertainty estimation for deep neural classifiers, 2019.
    """
    signature = f"mean error of the likeliest label over the surest 1, 2, ... all turns, {_SOFTMAX}; {_TIES}"
    return Metric(_coverage(table, _risk_area), signature, _why_unknown(table))


def coverage_curve(table: PredictionTable) -> list[dict[str, float]] | None:
    """`ACC` of the likeliest label over the surest turns, in percent, at each `coverage` in percent, in steps of 5.

    The last is the accuracy of all turns, and of any share in random order. None if no turn has likelihoods.
    """
    sums = _coverage(table, _covered)
    if math.isnan(sums.value):
        return None
    turns, hits = _cumulative(sums.by_dialogue(numpy.zeros(len(table), int)).sum(axis=0))
    shares = [(number + 1) / CURVE_POINTS for number in range(CURVE_POINTS)]
    return [{"coverage": 100 * share, "ACC": float(_accuracy_at(share, turns, hits))} for share in shares]


def _coverage(table: PredictionTable, function: Callable[[numpy.ndarray], numpy.ndarray]) -> BinnedStatistic:
    """A function of turns and percent of right ones by confidence, of which a bin is a thousandth."""
    known, confidence, right = _surest(table)
    terms = numpy.stack([(1000 * confidence).round(), numpy.ones(len(table)), 100.0 * right], axis=1)
    return BinnedStatistic(terms * known[:, None], function, 1001)


def _cumulative(sums: numpy.ndarray) -> numpy.ndarray:
    """float [2, ..., 1 + bins]: turns and hits down to each confidence, from 0."""
    down = numpy.stack(numpy.split(sums, 2, axis=-1))[..., ::-1].cumsum(axis=-1)
    return numpy.concatenate([numpy.zeros_like(down[..., :1]), down], axis=-1)


def _accuracy_at(share: float, turns: numpy.ndarray, hits: numpy.ndarray) -> numpy.ndarray:
    """float [...]: accuracy over the surest share of the turns; NaN if there are none."""
    wanted = share * turns[..., -1:]
    end = numpy.clip((turns < wanted).sum(axis=-1, keepdims=True), 1, turns.shape[-1] - 1)
    (n, end_n), (hit, end_hit) = (
        (numpy.take_along_axis(each, end - 1, -1), numpy.take_along_axis(each, end, -1)) for each in (turns, hits)
    )
    found = hit + (wanted - n) * ratio(numpy.stack([end_hit - hit, end_n - n], axis=-1))
    return ratio(numpy.concatenate([found, wanted], axis=-1))


def _covered(sums: numpy.ndarray) -> numpy.ndarray:
    return _accuracy_at(COVERAGE, *_cumulative(sums))


def _risk_area(sums: numpy.ndarray) -> numpy.ndarray:
    """float [...]; the expectation over random orders of turns of equal confidence.

    Of n such turns with rate r behind N turns with H hits, the sum of (H + (k - N) r) / k over k = N + 1, ..., N + n is
    n r + (H - N r) (1 / (N + 1) + ... + 1 / (N + n)).
    """
    turns, hits = _cumulative(sums)
    size, new = numpy.diff(turns), numpy.diff(hits)
    rate = numpy.divide(new, size, out=numpy.zeros(new.shape), where=size > 0)
    harmonic = numpy.cumsum([0, *(1 / numpy.arange(1, turns[..., -1].max() + 1.5))])
    steps = numpy.diff(harmonic[numpy.rint(turns).astype(int)])
    accuracies = (new + (hits[..., :-1] - turns[..., :-1] * rate) * steps).sum(axis=-1)
    return 100 - ratio(numpy.stack([accuracies, turns[..., -1]], axis=-1))


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


def _surest(table: PredictionTable) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """By turn: whether likelihoods are known (bool [turns]), the confidence, and whether its label is right (bool)."""
    known, probabilities, hits = _labels(table)
    return known, probabilities.max(axis=1, initial=0), hits[:, 0]


def _why_unknown(table: PredictionTable) -> str:
    return UNKNOWN_LABELS if table.predicts_strategy else table.NO_CHOICE
