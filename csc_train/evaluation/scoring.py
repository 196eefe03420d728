"""A run directory with predictions -> the scores of every system in every context."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csc_train.data.dialogue import Dialogue, read_dialogues
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.contamination import Contamination, read_contamination
from csc_train.evaluation.metrics.profiles import drift, score
from csc_train.evaluation.report.tables import Drifts, Results
from csc_train.inference.predictions import Prediction, TurnOutcome, expected_turns, read_failures, read_run


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
        InputError: a file of it is missing or cannot be read, turns are neither predicted nor failed, or a metric model
            cannot be loaded.
    """
    dialogues = read_dialogues(Path(directory) / "dialogues.jsonl")
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    systems, failures = read_run(directory), read_failures(directory)
    check_complete(directory, dialogues, systems, failures)
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


def check_complete(
    directory: str | os.PathLike,
    dialogues: Sequence[Dialogue],
    predicted: Mapping[str, Mapping[str, Sequence[TurnOutcome]]],
    failed: Mapping[str, Mapping[str, Sequence[TurnOutcome]]],
) -> None:
    """Refuse a run in which predicted and failed turns of a system in a context are not together what was expected.

    Raises:
        InputError: a turn is missing.
    """
    expected = expected_turns(dialogues)
    for name, contexts in predicted.items():
        for context, predictions in contexts.items():
            found = {(each.dialogue_id, each.turn) for each in [*predictions, *failed[name][context]]}
            if missing := [key for key in expected if key not in found]:
                raise InputError(
                    f"{directory}: {name}, {context} context lacks {len(missing)} of {len(expected)} turns, the first "
                    f"is turn {missing[0][1]} of dialogue {missing[0][0]}; to predict them: run={directory} resume=true"
                )
