"""Score the predictions of a run: every metric of every system in every context."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from csc_train.data.dialogue import Dialogue, accept_sets_digest, data_digest
from csc_train.data.readers import read_accept_sets, read_dialogues
from csc_train.data.splits import Splits
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.contamination import Contamination, read_contamination
from csc_train.evaluation.evaluated_model import read_language
from csc_train.evaluation.general import TextScore, run_scores
from csc_train.evaluation.metrics import likelihood, replies, strategy
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.metrics.model_based import fetch_models
from csc_train.evaluation.metrics.registry import SECTIONS, chosen_profiles, compute_metrics, metrics_in_profiles
from csc_train.evaluation.table import PredictionTable, TextCache, align_tables
from csc_train.inference.config import CONTEXTS
from csc_train.inference.predictions import FailedTurn, Prediction, RunPredictions, missing_turns, read_run_predictions
from csc_train.invisible import is_blank
from csc_train.overrides import resume_hint
from csc_train.progress import ProgressBar

Results = dict[str, dict[str, dict[str, Any]]]
"""By system and context, the results of `score_predictions`, in the order of table rows; the last is the evaluated
system."""
Drifts = dict[str, list[dict[str, Any]]]
"""By system, the rows of `context_drift`, if it was evaluated in both contexts."""


@dataclass(frozen=True)
class ScoredRun:
    """The predictions of a run and their metrics.

    Attributes:
        run: predictions and failed turns.
        dialogues: the evaluation dialogues.
        contamination: None if the run did not search for it.
        language: of the dialogues.
    """

    results: Results
    drifts: Drifts
    run: RunPredictions
    dialogues: list[Dialogue]
    contamination: Contamination | None
    language: str

    @property
    def profiles(self) -> list[str]:
        """The metric profiles, in the order of the tables."""
        return list(next(iter(self.results[next(iter(self.results))].values()))["profiles"])

    @property
    def incomplete(self) -> bool:
        """Whether too many turns of a system have no reply."""
        return any(scores["counts"]["incomplete"] for row in self.results.values() for scores in row.values())


def score_run(directory: str | os.PathLike, config: MetricsConfig, max_failed: float = 1.0) -> ScoredRun:
    """Score the predictions in a run directory of recipes/evaluate.py.

    Args:
        max_failed: see `EvaluationConfig`.

    Raises:
        InputError: a file is missing or cannot be read, such as `metrics.accepted`, a turn is neither predicted nor
            failed, or a metric model cannot be loaded.
    """
    dialogues = [*read_accept_sets(config.accepted, read_dialogues(Path(directory) / "dialogues.jsonl"))]
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    run = read_run_predictions(directory)
    check_complete(run, dialogues)
    contamination = read_contamination(directory)
    flagged, language = contamination.flagged if contamination else (), read_language(directory)
    results: Results = {name: {} for name in run.predictions}
    cache = TextCache()
    places = [(name, context) for name, contexts in run.predictions.items() for context in contexts]
    for name, context in ProgressBar(places, "scoring", unit="table"):
        failed = {"failures": run.failures[name][context], "max_failed": max_failed}
        failed |= {"texts": None if results[name] else run_scores(directory, name)}
        results[name][context] = score_predictions(
            run.predictions[name][context], by_id, config, **failed, flagged=flagged, language=language, cache=cache
        )
    drifts = {
        name: context_drift(contexts["reference"], contexts["generated"], by_id, config, language, cache)
        for name, contexts in run.predictions.items()
        if len(contexts) == 2
    }
    cache.clear()  # the last tables outlive their run
    return ScoredRun(results, drifts, run, dialogues, contamination, language)


def data_inputs(splits: Splits, config: MetricsConfig) -> dict[str, str]:
    """The hashes of the dialogues that an evaluation reads, for `Run.start`; of accept sets if there are any.

    Raises:
        InputError: `metrics.accepted` cannot be read.
    """
    inputs = {"train": data_digest(splits.train), "evaluation": data_digest(splits.evaluation)}
    accepted = accept_sets_digest(read_accept_sets(config.accepted, splits.evaluation))
    return inputs | ({"accepted": accepted} if accepted else {})


def prepare_metrics(config: MetricsConfig) -> None:
    """Download metric models, before hours of generating.

    Raises:
        InputError: a model cannot be loaded.
    """
    fetch_models(config)


def check_complete(run: RunPredictions, dialogues: Sequence[Dialogue]) -> None:
    """Check that every system has a prediction or a failed turn for each expected turn of its contexts.

    Raises:
        InputError: a turn is missing.
    """
    for name, contexts in run.predictions.items():
        for context, predictions in contexts.items():
            found = {each.key for each in [*predictions, *run.failures[name][context]]}
            if missing := missing_turns(dialogues, found):
                place = f"{run.directory}: {name}, {context} context"
                raise InputError(f"{place}: {missing}: predict them with {resume_hint(run.directory)}")


def score_predictions(
    predictions: Sequence[Prediction],
    dialogues: Mapping[str, Dialogue],
    config: MetricsConfig,
    *,
    failures: Sequence[FailedTurn] = (),
    max_failed: float = 1.0,
    texts: Sequence[TextScore] | None = (),
    flagged: Collection[str] = (),
    language: str = "zh",
    cache: TextCache | None = None,
) -> dict[str, Any]:
    """Score one system's predictions in one context.

    Args:
        dialogues: by id, those to predict.
        failures: turns that could not be predicted; they are counted, not scored.
        max_failed: see `EvaluationConfig`.
        texts: see `PredictionTable`.
        flagged: ids of contaminated dialogues (see `contamination`).
        language: of the dialogues; the names of strategies are in it.
        cache: see `PredictionTable`.

    Returns:
        `profiles`: by profile and name, a `MetricResult`. `strategy`, `likelihood`: results by name. `process`,
        `reply`: by name, the result of the `system` and of the `reference` replies. `by_strategy`: by label, its
        `turns` and results. `by_position`: by supporter turn, its `position` from 1, `turns` and results.
        `confusion`, `transitions`, `calibration`, `lengths`, `lowest_scoring`: see the functions of these names.
        `coverage`: see `coverage_curve`.
        `decontaminated`: `dialogues`, `turns` and `profiles` without flagged dialogues; None if none are flagged.
        `counts`: `dialogues`, `turns`, `failed`, `failures` by class of error, whether they leave the figures
        `incomplete`, `unparsed` strategies (None if the system predicts none), `empty_replies`, which score 0 in every
        text metric, and replies that were `cut_off` at the limit of tokens, which are scored as they are.

    Raises:
        InputError: a metric model cannot be loaded, or a turn is predicted twice.
    """
    table, resamples = PredictionTable(predictions, dialogues, language, cache), config.bootstrap_resamples
    table.texts = texts
    chosen_tables = chosen_profiles(config, table)
    metrics = compute_metrics(table, config, (*chosen_tables, *SECTIONS))
    gold = compute_metrics(table.gold, config, ("process", "reply"))
    profiles = {profile: metrics[profile] for profile in chosen_tables}
    by_position = _position_metrics(table, config)
    chosen = table.predicts_strategy
    return {
        "profiles": {profile: _results(row, table, resamples) for profile, row in profiles.items()},
        "decontaminated": _decontaminated(flagged, table, profiles, resamples),
        **{section: _results(metrics[section], table, resamples) for section in ("strategy", "likelihood")},
        "by_strategy": {
            label: {"turns": count} | _results(cells, table, resamples)
            for label, count, cells in strategy.by_strategy(table)
        },
        "confusion": strategy.confusion(table).tolist() if chosen else None,
        "transitions": {
            "system": strategy.transitions(table, table.predicted).tolist() if chosen else None,
            "reference": strategy.transitions(table, table.reference).tolist(),
        },
        "by_position": [
            {"position": position + 1, "turns": int(here.sum())} | _results(by_position, table, resamples, here)
            for position in range(table.longest)
            for here in [table.position == position]
        ],
        "calibration": likelihood.calibration(table, resamples) if chosen else None,
        "coverage": likelihood.coverage_curve(table) if chosen else None,
        **{
            section: {
                name: {"system": system[name], "reference": found}
                for name, found in _results(row, table, resamples).items()
            }
            for section, row in gold.items()
            for system in [_results(metrics[section], table, resamples)]
        },
        "lengths": replies.length_histogram(table),
        "lowest_scoring": replies.lowest_scoring(table),
        "counts": {
            "dialogues": len(set(table.dialogue.tolist())),
            "turns": len(table),
            "failed": len(failures),
            "failures": Counter(each.kind for each in failures),
            "incomplete": len(failures) > max_failed * (len(failures) + len(table)),
            "unparsed": int((table.predicted == 0).sum()) if chosen else None,
            "empty_replies": sum(is_blank(reply) for reply, _ in table.pairs),
            "cut_off": sum(each.cut_off for each in table.predictions),
        },
    }


def _results(
    metrics: Mapping[str, Metric], table: PredictionTable, resamples: int, where: numpy.ndarray | None = None
) -> dict[str, MetricResult]:
    """The results over all turns of a table, or over those that `where`, bool [turns], selects."""
    chosen = metrics if where is None else {name: each.restrict(where) for name, each in metrics.items()}
    return {name: each.compute(table.dialogue, resamples) for name, each in chosen.items()}


def _position_metrics(table: PredictionTable, config: MetricsConfig) -> dict[str, Metric]:
    """The metrics that are shown by supporter turn: ACC first, then those of earlier columns."""
    specs = [spec for spec in metrics_in_profiles((*chosen_profiles(config, table), *SECTIONS)) if spec.by_position]
    return {spec.name: spec.function(table, config) for spec in reversed(specs)}


def _decontaminated(
    flagged: Collection[str], table: PredictionTable, profiles: dict[str, dict[str, Metric]], resamples: int
) -> dict[str, Any] | None:
    """The profiles over the dialogues that are not flagged."""
    if not flagged:
        return None
    kept = numpy.array([each.dialogue_id not in flagged for each in table.predictions], bool)
    return {
        "dialogues": len(set(table.dialogue[kept].tolist())),
        "turns": int(kept.sum()),
        "profiles": {profile: _results(row, table, resamples, kept) for profile, row in profiles.items()},
    }


def context_drift(
    reference: Sequence[Prediction],
    generated: Sequence[Prediction],
    dialogues: Mapping[str, Dialogue],
    config: MetricsConfig,
    language: str = "zh",
    cache: TextCache | None = None,
) -> list[dict[str, Any]]:
    """The drop of each metric when a system continues from its own turns, by supporter turn.

    Turns that failed in one context are left out of both, so that both curves are of the same turns.

    Returns:
        For each `position`, from 1: its `turns`; by context, the results of the metrics by position; by name, the
        results in reference context minus generated context. Empty if the contexts have no turn in common.

    Raises:
        InputError: the references of the two differ.
    """
    places = "reference context", "generated context"
    sides, _ = align_tables(reference, generated, *places, [dialogues] * 2, language, cache)
    resamples = config.bootstrap_resamples
    metrics = [_position_metrics(table, config) for table in sides]
    rows = []
    for position in range(sides[0].longest if len(sides[0]) else 0):
        here = sides[0].position == position
        by_context = {
            context: _results(side, table, resamples, here)
            for context, side, table in zip(CONTEXTS, metrics, sides, strict=True)
        }
        drifts = {
            name: one.restrict(here).difference(metrics[1][name].restrict(here), sides[0].dialogue, resamples)
            for name, one in metrics[0].items()
        }
        rows.append({"position": position + 1, "turns": int(here.sum()), **by_context, **drifts})
    return rows
