"""The journal of a sweep's Optuna study, read and repaired before Optuna replays it, which stops at any bad line."""

from pathlib import Path
from typing import Any

import optuna
import pydantic
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from csc_train.config.cluster import SweepConfig
from csc_train.errors import InputError
from csc_train.files import os_errors
from csc_train.jsonl import JsonlLog, write_jsonl
from csc_train.launching.search_space import distributions

CREATE_STUDY, CREATE_TRIAL = 0, 4
"""Optuna's numbers of two operations."""
ADVICE = "restore a copy of it, or choose another sweep.directory"


class _Operation(pydantic.BaseModel):
    """A line of the journal."""

    op_code: int
    worker_id: str
    trial_id: int | None = None


class _ClaimedLock(JournalFileOpenLock):
    """No lock of its own: the claim of the sweep's directory keeps others out, and ends with a killed process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _Journal(JournalFileBackend):
    """A journal whose errors end in one line."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with os_errors(self._file_path, "cannot write"):
            super().append_logs(logs)


def open_journal(file: Path) -> JournalStorage:
    """Open or create a journal; a torn end is cut off, and a bad line is said and left out.

    What a lost line said about a trial is found out again from the trial's directory.

    Raises:
        InputError: a lost line created the study or a trial, or the file cannot be read or written.
    """

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        _Operation.model_validate(row)
        return row

    with JsonlLog(file, parse) as log:
        log.open()
        rows = log.read()
    created = [row["op_code"] for row in rows if row["op_code"] in (CREATE_STUDY, CREATE_TRIAL)]
    named = max((row["trial_id"] for row in rows if row.get("trial_id") is not None), default=-1)
    if rows and (created[:1] != [CREATE_STUDY] or named >= created.count(CREATE_TRIAL)):
        raise InputError(f"{file}: a lost line created the study or a trial: {ADVICE}")
    with os_errors(file, "cannot read"):
        whole = file.read_bytes().count(b"\n") == len(rows)
    if not whole:
        write_jsonl(file, rows)
    with os_errors(file, "cannot read"):
        return JournalStorage(_Journal(str(file), lock_obj=_ClaimedLock(str(file))))


def check_values(file: Path, study: optuna.Study, config: SweepConfig) -> None:
    """Check that all trials which have ended still have their values.

    Raises:
        InputError: a trial lacks one.
    """
    for trial in study.get_trials(deepcopy=False):
        ended = trial.state not in (TrialState.RUNNING, TrialState.WAITING)
        if ended and (lost := values_of(config, trial).keys() - trial.params):
            raise InputError(f"{file}: a lost line held {', '.join(lost)} of trial {trial.number}: {ADVICE}")


def values_of(config: SweepConfig, trial: FrozenTrial) -> dict[str, optuna.distributions.BaseDistribution]:
    """The distributions of the values that a trial has, by parameter name."""
    space = distributions(config)
    return space if config.kind == "optuna" else {name: space[name] for name in config.grid()[trial.number]}
