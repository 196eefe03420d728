"""A store of predictions on disk, from which a stopped evaluation resumes."""

import contextlib
import glob
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from csc_train.data.dialogue import Dialogue
from csc_train.errors import InputError
from csc_train.inference.predictions import (
    FailedTurn,
    Prediction,
    TurnOutcome,
    expected_turns,
    read_outcomes,
    write_predictions,
)
from csc_train.jsonl import JsonlLog


class PredictionStore(contextlib.AbstractContextManager):
    """The outcomes of one system in one context: the file `path`, and part files beside it.

    Each process appends outcomes to its own part, one line each; the last line of a turn counts. `merge` joins the
    parts into `path` in the order of the dialogues. The result does not depend on interruptions or process numbers.

    Attributes:
        path: file of all outcomes.
        earlier: predictions of earlier runs, by (dialogue id, turn). Failed turns are left out, to be tried again.

    Args:
        config_hash: see `Generator.config_hash`.
        rank: number of this process.

    Raises:
        InputError: a file cannot be read or written, a line other than an incomplete last one is broken, or the
            outcomes come from other settings.
    """

    def __init__(self, path: str | os.PathLike, config_hash: str, rank: int = 0):
        self.path = Path(path)
        self._config_hash = config_hash
        self.earlier = {key: outcome for key, outcome in self._read().items() if isinstance(outcome, Prediction)}
        self._log = JsonlLog(self.path.with_name(f"{self.path.name}.part-{rank:05}"))
        self._log.open()

    def __exit__(self, *_) -> None:
        self._log.close()

    def add(self, outcome: TurnOutcome) -> None:
        """Append an outcome. It survives the end of this process, but not a loss of power.

        Raises:
            InputError: the part cannot be written.
        """
        self._log.append(asdict(outcome))

    def merge(self, dialogues: Sequence[Dialogue]) -> list[FailedTurn]:
        """Join all parts into `path`. One process calls this after every process closed its part.

        Args:
            dialogues: the dialogues of all processes.

        Returns:
            The failed turns.
        """
        outcomes = self._read()
        expected = expected_turns(dialogues)
        missing = [key for key in expected if key not in outcomes]
        assert not missing, f"{len(missing)} of {len(expected)} turns are neither predicted nor failed: {missing[0]}"
        merged = [outcomes[key] for key in expected]
        write_predictions(self.path, merged)
        for part in _parts(self.path):
            part.unlink()
        return [outcome for outcome in merged if isinstance(outcome, FailedTurn)]

    def _read(self) -> dict[tuple[str, int], TurnOutcome]:
        """The latest outcome of each turn; a failure never replaces a prediction."""
        outcomes: dict[tuple[str, int], TurnOutcome] = {}
        for file in [self.path, *_parts(self.path)] if self.path.exists() else _parts(self.path):
            for outcome in read_outcomes(file):
                if outcome.config_hash != self._config_hash:
                    raise InputError(
                        f"{self.path}: holds predictions of other settings ({outcome.config_hash[:12]}, now "
                        f"{self._config_hash[:12]}): choose another run.directory, or run.if_exists=replace"
                    )
                if isinstance(outcome, Prediction) or not isinstance(outcomes.get(outcome.key), Prediction):
                    outcomes[outcome.key] = outcome
        return outcomes


def is_complete(path: Path, dialogues: Sequence[Dialogue]) -> bool:
    """Whether a file has a prediction for every supporter turn of these dialogues, and no parts are left."""
    if not path.exists() or _parts(path):
        return False
    return {each.key for each in read_outcomes(path) if isinstance(each, Prediction)}.issuperset(
        expected_turns(dialogues)
    )


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*"))
