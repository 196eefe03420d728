"""Run the trials of a study: start them through a launcher, watch them, and tell Optuna their results."""

import abc
import contextlib
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from csc_train.errors import InputError
from csc_train.launching.job import Job
from csc_train.launching.launchers.base import Launcher
from csc_train.launching.supervise import signal_handler
from csc_train.runs.comparison import HISTORY_FILE
from csc_train.runs.directory import RECORD_FILE, read_run_record

OUTPUT_FILE = "output.log"
"""Output of a trial's processes, in its run directory."""
ERROR_PATTERNS = (
    r"^error: (.+)$",
    r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception): .+)$",
    r"(Signal \d+ \(\w+\) received by PID \d+)",
    r"(\S.*)",
)
"""Patterns of a failure's reason, best first: a recipe's error line, an exception, torchrun's report of a killed rank,
any line. The last match in the output counts."""


class Interrupted(BaseException):
    """A signal asks this process to end; the exception holds its number."""


class FailedTrialError(Exception):
    """A trial ended without a result; the message gives the reason."""


@dataclass
class RunningTrial:
    """A trial that runs.

    Attributes:
        pool: the free slots of its kind, to which its `slot` returns.
        submitted: time of this start; 0 for a job that an earlier runner submitted.
        started: `time.monotonic()` since which it works; None while a submitted job waits in its queue.
        pruned: whether it was stopped because of its metric.
    """

    trial: Trial
    launcher: Launcher
    pool: list[dict[str, str]]
    slot: dict[str, str]
    submitted: float = 0.0
    started: float | None = None
    pruned: bool = False

    def start_clock(self) -> None:
        """Begin to count the trial's time, once its process works."""
        directory = self.launcher.job.directory
        if self.started is None and (self.launcher.attached or _last_write(directory) > self.submitted):
            self.started = time.monotonic()
            begun = {"seconds": self.trial.user_attrs.get("seconds", 0), "time": time.time()}
            self.trial.set_user_attr("begun", begun | {"directory": str(directory)})

    @property
    def seconds(self) -> float:
        """Seconds of the trial up to now, earlier starts included."""
        since = 0 if self.started is None else time.monotonic() - self.started
        return self.trial.user_attrs.get("seconds", 0) + since

    def add_time(self) -> None:
        """Add the time since its start to the trial's seconds."""
        self.trial.set_user_attr("seconds", round(self.seconds, 1))
        self.started = None


class TrialRunner(abc.ABC):
    """Runs the trials of a study in parallel slots, from start to result.

    A trial is a run of a recipe. The study is the ledger: it keeps the state of each trial, and in its user attributes
    `job` (of a scheduler), `seconds`, the `reason` of a failure, and `begun`: its seconds before its last start, the
    time of that start and its run directory, from which a killed runner's time is recovered.

    Args:
        lock: file descriptor that attached trials keep open.
        poll: seconds between checks of the running trials.
    """

    def __init__(self, study: optuna.Study, lock: int, poll: float):
        self.study, self._lock, self._poll = study, lock, poll
        self._running: list[RunningTrial] = []

    @abc.abstractmethod
    def next_trial(self) -> tuple[Trial, list[dict[str, str]]] | None:
        """A trial that may start now, and the free slots of its kind, one at least; None if there is none."""

    @abc.abstractmethod
    def job_of(self, trial: Trial, slot: dict[str, str]) -> Job:
        """The checked job of a trial in a slot.

        Raises:
            InputError: it cannot start; the trial fails with this reason.
        """

    @abc.abstractmethod
    def result(self, trial: Trial, directory: Path) -> float:
        """The value of a trial that has ended, from its run directory.

        Raises:
            FailedTrialError: it has none, and why.
            InputError: the cause is in all trials; the runner ends.
        """

    @abc.abstractmethod
    def describe(self, trial: Trial) -> str:
        """A trial in a few words, for the log."""

    def watch(self, running: RunningTrial, ended: bool) -> None:  # noqa: B027  a sweep's trials need it, a suite's do not
        """Look at a trial that runs, or has just `ended`."""

    def exhausted(self) -> bool:
        """Whether the running trials must stop now, with a checkpoint, to be resumed another time."""
        return False

    def run(self) -> None:
        """Run trials until none is left, or `exhausted`.

        Raises:
            InputError: as `result`.
            Interrupted: a signal came; attached trials have saved a checkpoint and ended.
        """
        with signal_handler(_interrupt, (signal.SIGINT, signal.SIGTERM)):
            try:
                while True:
                    while found := self.next_trial():
                        self._start(*found)
                    if not self._running:
                        return
                    time.sleep(self._poll)
                    for each in list(self._running):
                        self._update(each)
                    if self._running and self.exhausted():
                        self._stop(self._running)
                        for each in self._running:
                            each.trial.set_user_attr("job", None)
                            self._take_result(each, stopped=True)
                        return
            except (Interrupted, InputError):
                self._stop([each for each in self._running if each.launcher.attached])
                raise

    def interrupted(self) -> list[Trial]:
        """The trials of an interrupted runner, their time recovered; Optuna has no public way to continue a trial."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        trials = [Trial(self.study, each._trial_id) for each in running]
        for trial in trials:
            _recover_time(trial)
        return trials

    def _start(self, trial: Trial, pool: list[dict[str, str]]) -> None:
        self._print(trial, "started")
        try:
            job, outcome = self.job_of(trial, pool[0]), None
            with contextlib.suppress(FailedTrialError):  # it finished while nobody watched
                outcome = self.result(trial, job.directory)
            if outcome is not None:
                self.tell(trial, outcome)
                return
            job.write()
            output = job.directory / OUTPUT_FILE
            launcher = job.launcher(environment=pool[0], output=output, inherited=(self._lock,))
            launcher.job_id = trial.user_attrs.get("job")
            if launcher.job_id is not None and launcher.attached:
                advice = f"job {launcher.job_id} of a scheduler was started for it: cancel it, or name that cluster"
                raise InputError(f"{job.directory}: {advice}")
            submitted = 0.0 if launcher.job_id else time.time()
            if launcher.job_id is None:
                launcher.start()
        except InputError as error:
            self.tell(trial, str(error))
            return
        if launcher.job_id is not None:
            trial.set_user_attr("job", launcher.job_id)
        self._running.append(RunningTrial(trial, launcher, pool, pool.pop(0), submitted))
        self._running[-1].start_clock()

    def _update(self, running: RunningTrial) -> None:
        """Watch a trial, or take its result."""
        ended = running.launcher.poll() is not None  # before what is watched: later values would be missed
        running.start_clock()
        self.watch(running, ended)
        if not ended:
            return
        self._running.remove(running)
        running.pool.append(running.slot)
        running.add_time()
        self._take_result(running)

    def _take_result(self, running: RunningTrial, stopped: bool = False) -> None:
        """Tell the outcome of a trial that has ended; one that was `stopped` before its end has none yet."""
        outcome: float | str | None
        try:
            outcome = self.result(running.trial, running.launcher.job.directory)
        except FailedTrialError as error:
            if stopped and not running.pruned:
                self._print(running.trial, "stopped; a later start resumes it")
                return
            outcome = None if running.pruned else str(error)
        except InputError as error:
            self.tell(running.trial, str(error))
            raise
        self.tell(running.trial, outcome)

    def tell(self, trial: Trial, outcome: float | str | None) -> None:
        """Tell Optuna a trial's value, the reason of its failure, or None for a pruned trial; print it."""
        if isinstance(outcome, float):
            state, text = TrialState.COMPLETE, f", {self.value_text(outcome)}"
        elif outcome is None:
            state, text = TrialState.PRUNED, ""
        else:
            trial.set_user_attr("reason", outcome)
            state, text = TrialState.FAIL, f", {outcome}"
        self.study.tell(trial, outcome if isinstance(outcome, float) else None, state=state)
        self._print(trial, state.name.lower() + text)

    @abc.abstractmethod
    def value_text(self, value: float) -> str:
        """A value with its name, for the log."""

    def _print(self, trial: Trial, text: str) -> None:
        print(f"{self.describe(trial)}: {text}", flush=True)

    def _stop(self, stopping: list[RunningTrial]) -> None:
        """Let these trials save a checkpoint and end; another signal kills the attached ones."""
        launchers = [each.launcher for each in stopping]
        for launcher in launchers:
            launcher.stop()
        while any(launcher.poll() is None for launcher in launchers):
            try:
                time.sleep(0.1 if all(launcher.attached for launcher in launchers) else self._poll)
            except Interrupted:
                for launcher in launchers:
                    launcher.stop()
        for each in self._running:
            each.add_time()


def _last_write(directory: Path) -> float:
    """The time at which a run last wrote a file that it often writes; 0 if it has not begun."""
    files = [directory / name for name in (RECORD_FILE, HISTORY_FILE, OUTPUT_FILE)]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)


def _recover_time(trial: Trial) -> None:
    """Add the seconds of a start whose end a killed runner did not see: up to the last write of the run."""
    if begun := trial.user_attrs.get("begun"):
        worked = _last_write(Path(begun["directory"])) - begun["time"]
        seconds = max(trial.user_attrs.get("seconds", 0), begun["seconds"] + worked)
        trial.set_user_attr("seconds", round(seconds, 1))


def _interrupt(signum: int, frame: Any) -> None:
    raise Interrupted(signum)


def failure_reason(directory: Path) -> str:
    """Why a run ended early, in one line: its recorded error, else the best match of `ERROR_PATTERNS` in its output."""
    record = read_run_record(directory)
    if record.get("status") == "stopped":
        return "stopped from outside"
    outputs = [directory / OUTPUT_FILE, *sorted(directory.glob("slurm-*.out"))]
    text = "\n".join(path.read_text("utf-8", "replace") for path in outputs if path.is_file())
    found = (matches[-1] for pattern in ERROR_PATTERNS if (matches := re.findall(pattern, text, re.MULTILINE)))
    reason = record.get("error") or next(found, "ended without output: it may have been killed")
    return f"out of memory: {reason}" if re.search(r"out of memory|OutOfMemory|can't allocate", reason) else reason
