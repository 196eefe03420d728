"""BERTScore and BLEURT of replies, computed by metric models; n/a without a model."""

import csv
import functools
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import numpy

from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable
from csc_train.models.hub import snapshot
from csc_train.stats import mean

# `metric_models` is imported in functions: it imports torch and transformers, and most runs have no metric model.
_NO_BERTSCORE = "no BERTScore model given"


def fetch_models(config: MetricsConfig) -> None:
    """Download the metric models from the hub and check their files, before hours of generating.

    Raises:
        InputError: a model cannot be downloaded (see `hub.snapshot`), or lacks a file.
    """
    if config.bertscore_model is None and config.bleurt_model is None:
        return
    from csc_train.evaluation.metrics import metric_models

    files = ((config.bertscore_model, metric_models.BERTSCORE_FILES), (config.bleurt_model, metric_models.BLEURT_FILES))
    for path, groups in files:
        if path is not None:
            metric_models.check_files(snapshot(path, "metric model"), groups)


def bertscore_baseline(model: str, layers: int, table: str | os.PathLike | None = None) -> float | None:
    """BERTScore F1 of unrelated texts, times 100; None if not known.

    Args:
        model: name of the model; the bert-score package has Chinese baselines of bert-base-chinese and others.
        layers: the layer that BERTScore compares.
        table: a file to use instead of the package's (LAYER,P,R,F).

    Raises:
        InputError: `table` cannot be read, or has no such layer.
    """
    package = Path(importlib.util.find_spec("bert_score").origin).parent
    path = Path(table) if table is not None else package / "rescale_baseline" / "zh" / f"{model}.tsv"
    if table is None and not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {int(row["LAYER"]): 100 * float(row["F"]) for row in csv.DictReader(file)}[layers]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a baseline table (LAYER,P,R,F) with layer {layers}: {error!r}") from error


def rescale_bertscore(scores: numpy.ndarray, baseline: float) -> numpy.ndarray:
    """BERTScores, float [pairs], rescaled as the bert-score package does: unrelated texts score about 0.

    A pair with an empty side keeps its 0, the score of unrelated texts.
    """
    return numpy.where(scores == 0, 0.0, 100 * (scores - baseline) / (100 - baseline))


@functools.lru_cache(maxsize=2)
def _bertscores(table: PredictionTable, model: str, layers: int, batch_size: int) -> numpy.ndarray:
    from csc_train.evaluation.metrics import metric_models

    return metric_models.bertscore(table.pairs, snapshot(model, "metric model"), layers, batch_size)


def _bertscore(table: PredictionTable, config: MetricsConfig, rescale: bool) -> Metric:
    kind = "rescaled" if rescale else "not rescaled"
    name = f"bert-score {version('bert-score')} F1, layer {config.bertscore_layers}"
    if config.bertscore_model is None:
        return Metric(None, f"{name}, {kind}", _NO_BERTSCORE)
    model, unverified = Path(config.bertscore_model).resolve().name, "unverified on real weights"
    scores = _bertscores(table, config.bertscore_model, config.bertscore_layers, config.batch_size)
    if not rescale:
        return Metric(mean(scores), f"{name} of {model}, not rescaled, {unverified}")
    baseline = bertscore_baseline(model, config.bertscore_layers, config.bertscore_baseline)
    if baseline is None:
        reason = f"bert-score has no baseline for a model named {model}: give metrics.bertscore_baseline"
        return Metric(None, f"{name}, rescaled", reason)
    signature = f"{name} of {model}, rescaled with the baseline {baseline:.2f}, {unverified}"
    return Metric(mean(rescale_bertscore(scores, baseline)), signature)


@metric(name="BS", unit="contextual token vectors", direction="higher", profiles=["paper", "zh", "en"])
def bertscore_raw(table: PredictionTable, config: MetricsConfig) -> Metric:
    """BERTScore F1, not rescaled; the paper's 55 to 67 fit bert-base-chinese, layer 8."""
    return _bertscore(table, config, rescale=False)


@metric(name="BS rescaled", unit="contextual token vectors", direction="higher", profiles=["zh"], compare=False)
def bertscore_rescaled(table: PredictionTable, config: MetricsConfig) -> Metric:
    """BERTScore F1, rescaled by the score of unrelated texts; not compared, since BS is."""
    return _bertscore(table, config, rescale=True)


@metric(name="BR", unit="learned score of the pair", direction="higher", profiles=["paper", "en"])
def bleurt_20(table: PredictionTable, config: MetricsConfig) -> Metric:
    """BLEURT-20."""
    name = "BLEURT by our own loader, unverified on real weights"
    if config.bleurt_model is None:
        return Metric(None, name, "no BLEURT model given")
    from csc_train.evaluation.metrics import metric_models

    scores = metric_models.bleurt(table.pairs, snapshot(config.bleurt_model, "metric model"), config.batch_size)
    return Metric(mean(scores), f"{name}, weights {Path(config.bleurt_model).resolve().name}")
