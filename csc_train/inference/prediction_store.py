"""Outcomes on disk as they come, so that an evaluation that was stopped at any point goes on from there."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

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


class PredictionStore:
    """The outcomes of one system in one context, kept in `path` and in parts beside it.

    Each process appends to a part of its own, a line per outcome that is written at once. What was known of a turn
    before is superseded by a later line. `finish` puts the parts together in `path`, in the order of the dialogues, so
    that it does not matter how often the work was interrupted, nor how many processes did it.

    Attributes:
        path: the file of all outcomes.
        earlier: what is known of each (dialogue id, turn) from before; failures are not, so that they are tried again.

    Args:
        config_hash: of the system; see `Generator.config_hash`.
        process: the number of this process.

    Raises:
        InputError: a file cannot be read or written, a line is broken (a last one aside, which is left out where it was
            not written to its end), or the outcomes are of a system under other settings.
    """

    def __init__(self, path: str | os.PathLike, config_hash: str, process: int = 0):
        self.path = Path(path)
        self._config_hash = config_hash
        self.earlier: dict[tuple[str, int], Prediction] = {
            key: outcome for key, outcome in self._outcomes().items() if isinstance(outcome, Prediction)
        }
        self._log = JsonlLog(self.path.with_name(f"{self.path.name}.part-{process:05}"))
        self._log.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's part."""
        self._log.close()

    def add(self, outcome: TurnOutcome) -> None:
        """Keep an outcome; it is on disk when this returns, unless the machine itself fails.

        Raises:
            InputError: it cannot be written.
        """
        self._log.append(asdict(outcome))

    def finish(self, dialogues: Sequence[Dialogue]) -> list[FailedTurn]:
        """Put all parts together, once every process has closed its own; for one process to do.

        Args:
            dialogues: all that were to be predicted, by all processes.

        Returns:
            The turns that failed.
        """
        outcomes = self._outcomes()
        expected = expected_turns(dialogues)
        missing = [key for key in expected if key not in outcomes]
        assert not missing, f"{len(missing)} of {len(expected)} turns are neither predicted nor failed: {missing[0]}"
        write_predictions(self.path, [outcomes[key] for key in expected])
        for part in _parts(self.path):
            part.unlink()
        return [outcomes[key] for key in expected if isinstance(outcomes[key], FailedTurn)]

    def _outcomes(self) -> dict[tuple[str, int], TurnOutcome]:
        """What is known of each turn; that it was predicted is known for good."""
        outcomes: dict[tuple[str, int], TurnOutcome] = {}
        for outcome in self._lines():
            if outcome.config_hash != self._config_hash:
                raise InputError(
                    f"{self.path}: holds turns of a system under other settings ({outcome.config_hash[:12]}, now "
                    f"{self._config_hash[:12]}): choose another run.directory, or run.if_exists=replace"
                )
            key = outcome.dialogue_id, outcome.turn
            if isinstance(outcome, Prediction) or not isinstance(outcomes.get(key), Prediction):
                outcomes[key] = outcome
        return outcomes

    def _lines(self) -> Iterator[TurnOutcome]:
        if self.path.exists():
            yield from read_outcomes(self.path)
        for part in _parts(self.path):
            yield from read_outcomes(part)


def is_complete(path: Path, dialogues: Sequence[Dialogue]) -> bool:
    """Whether a file holds every supporter turn of these dialogues, none of them failed, and no parts are left."""
    if not path.exists() or _parts(path):
        return False
    found = {(each.dialogue_id, each.turn) for each in read_outcomes(path) if isinstance(each, Prediction)}
    return found.issuperset(expected_turns(dialogues))


def _parts(path: Path) -> list[Path]:
    """Where the processes append what is put together in `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*"))
