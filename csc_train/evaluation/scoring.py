"""A run directory with predictions -> the scores of every system in every context."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import read_dialogues
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.contamination import Contamination, read_contamination
from csc_train.evaluation.metrics.profiles import drift, score
from csc_train.evaluation.report.tables import Drifts, Results
from csc_train.inference.predictions import RunPredictions, expected_turns, read_run_predictions


@dataclass(frozen=True)
class Scored:
    """What a run predicted, and how it scores.

    Attributes:
        results, drifts: see `report`.
        run: predictions and failed turns.
        dialogues: those that were predicted.
        contamination: None where the run did not look for it.
    """

    results: Results
    drifts: Drifts
    run: RunPredictions
    dialogues: list[Dialogue]
    contamination: Contamination | None


def score_run(directory: str | os.PathLike, config: MetricsConfig) -> Scored:
    """Score the predictions that a run directory of recipes/evaluate.py holds.

    Raises:
        InputError: a file of it is missing or cannot be read, turns are neither predicted nor failed, or a metric model
            cannot be loaded.
    """
    dialogues = read_dialogues(Path(directory) / "dialogues.jsonl")
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    run = read_run_predictions(directory)
    check_complete(run, dialogues)
    contamination = read_contamination(directory)
    flagged = contamination.flagged if contamination else ()
    results = {
        name: {
            context: score(predictions, by_id, config, failed=len(run.failures[name][context]), flagged=flagged)
            for context, predictions in contexts.items()
        }
        for name, contexts in run.predictions.items()
    }
    drifts = {
        name: drift(contexts["reference"], contexts["generated"], by_id, config)
        for name, contexts in run.predictions.items()
        if len(contexts) == 2
    }
    return Scored(results, drifts, run, dialogues, contamination)


def check_complete(run: RunPredictions, dialogues: Sequence[Dialogue]) -> None:
    """Check that every system has a prediction or a failed turn for each expected turn of its contexts.

    Raises:
        InputError: a turn is missing.
    """
    expected = expected_turns(dialogues)
    for name, contexts in run.predictions.items():
        for context, predictions in contexts.items():
            found = {each.key for each in [*predictions, *run.failures[name][context]]}
            if missing := [key for key in expected if key not in found]:
                raise InputError(
                    f"{run.directory}: {name}, {context} context: {len(missing)} of {len(expected)} turns are missing, "
                    f"first turn {missing[0][1]} of dialogue {missing[0][0]}: predict them with run={run.directory} "
                    "resume=true"
                )
