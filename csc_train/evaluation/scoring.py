"""A run directory with predictions -> the scores of every system in every context."""

import os
from dataclasses import dataclass
from pathlib import Path

from csc_train.dialogue import Dialogue, read_dialogues
from csc_train.evaluation.contamination import Contamination, read_contamination
from csc_train.evaluation.metrics import MetricsConfig, drift, score
from csc_train.evaluation.predictions import Prediction, read_failures, read_run
from csc_train.evaluation.report import Drifts, Results


@dataclass(frozen=True)
class Scored:
    """What a run predicted, and how it scores.

    Attributes:
        results, drifts: see `report`.
        predictions: by system and context.
        dialogues: those that were predicted.
        contamination: None where the run did not look for it.
    """

    results: Results
    drifts: Drifts
    predictions: dict[str, dict[str, list[Prediction]]]
    dialogues: list[Dialogue]
    contamination: Contamination | None


def score_run(directory: str | os.PathLike, config: MetricsConfig) -> Scored:
    """Score the predictions that a run directory of recipes/evaluate.py holds.

    Raises:
        InputError: a file of it is missing or cannot be read, or a metric model cannot be loaded.
    """
    dialogues = read_dialogues(Path(directory) / "dialogues.jsonl")
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    systems, failures = read_run(directory), read_failures(directory)
    contamination = read_contamination(directory)
    flagged = contamination.flagged if contamination else ()
    results = {
        name: {
            context: score(predictions, by_id, config, failed=len(failures[name][context]), flagged=flagged)
            for context, predictions in contexts.items()
        }
        for name, contexts in systems.items()
    }
    drifts = {
        name: drift(contexts["reference"], contexts["generated"], by_id, config)
        for name, contexts in systems.items()
        if len(contexts) == 2
    }
    return Scored(results, drifts, systems, dialogues, contamination)
