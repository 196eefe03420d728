"""Run the trials of a sweep: start them through a launcher, prune them, and tell Optuna their results."""

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from csc_train.config.cluster import SweepConfig
from csc_train.errors import InputError, suggestion
from csc_train.launching.job import Job
from csc_train.launching.journal import values_of
from csc_train.launching.launchers.base import Launcher
from csc_train.launching.search_space import distributions
from csc_train.launching.sweep_summary import describe_trial
from csc_train.runs.comparison import METRICS_FILE, history_log, last_metrics
from csc_train.runs.directory import read_run_record

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


class NoSuchMetricError(InputError):
    """A finished trial never logged `sweep.metric`."""


@dataclass
class _RunningTrial:
    trial: Trial
    launcher: Launcher
    slot: dict[str, str]
    started: float
    reported: int
    pruned: bool = False

    def add_time(self) -> None:
        seconds = self.trial.user_attrs.get("seconds", 0) + time.monotonic() - self.started
        self.trial.set_user_attr("seconds", round(seconds, 1))


@dataclass
class TrialRunner:
    """Runs the trials of a study in parallel slots, from start to result.

    Attributes:
        job_of: makes the job of a trial from its number and parameter values.
        slots: environment variables of each trial that may start now.
        lock: file descriptor that attached trials keep open.
    """

    config: SweepConfig
    study: optuna.Study
    job_of: Callable[[int, dict[str, Any]], Job]
    slots: list[dict[str, str]]
    lock: int

    def __post_init__(self):
        self._running: list[_RunningTrial] = []
        # Trials of an interrupted sweep; Optuna offers no public way to continue a trial.
        interrupted = self.study.get_trials(states=(TrialState.RUNNING,))
        self._interrupted = [Trial(self.study, each._trial_id) for each in interrupted]
        for each, trial in zip(interrupted, self._interrupted, strict=True):
            sampler = self._seed_sampler(each.number)
            for name, distribution in values_of(self.config, each).items():
                if name in each.params:  # draws as much as it did for this one
                    sampler.sample_independent(self.study, each, name, distribution)
                else:
                    trial._suggest(name, distribution)  # a value that a killed sweep did not record

    def run(self) -> None:
        """Run trials until the study has `config.size` of them.

        Raises:
            NoSuchMetricError: a trial did not log the metric.
            Interrupted: a signal came; attached trials have saved a checkpoint and ended.
        """
        try:
            while True:
                while self.slots and (trial := self._next()):
                    self._start(trial)
                if not self._running:
                    return
                time.sleep(self.config.poll)
                for each in list(self._running):
                    self._update(each)
        except (Interrupted, InputError):
            self._stop()
            raise

    def _next(self) -> Trial | None:
        if self._interrupted:
            return self._interrupted.pop(0)
        space, config = distributions(self.config), self.config
        trials = self.study.get_trials(deepcopy=False)
        waiting = [each for each in trials if each.state == TrialState.WAITING]
        if len(trials) - len(waiting) >= config.size:
            return None
        if config.kind == "optuna":
            self._seed_sampler(len(trials))
            return self.study.ask(space)
        point = config.grid()[len(trials) - len(waiting)]
        if not waiting:
            self.study.enqueue_trial(point)
        return self.study.ask({name: space[name] for name in point})

    def _seed_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A seed for each trial, so that its values do not depend on how often the sweep was started."""
        self.study.sampler = optuna.samplers.TPESampler(seed=self.config.seed + number)
        return self.study.sampler

    def _start(self, trial: Trial) -> None:
        self._print(trial, "started")
        reported = self.study.trials[trial.number].last_step or 0
        try:
            job = self.job_of(trial.number, trial.params)
            with contextlib.suppress(FailedTrialError):  # it finished while no sweep ran
                result = trial_result(job.directory, self.config.metric)
                for step, value in metric_values(job.directory, self.config.metric):
                    if step > reported:
                        trial.report(value, step)
                self._tell(trial, result)
                return
            job.write()
            output = job.directory / OUTPUT_FILE
            launcher = job.launcher(environment=self.slots[0], output=output, inherited=(self.lock,))
            launcher.job_id = trial.user_attrs.get("job")
            if launcher.job_id is None:
                launcher.start()
        except InputError as error:
            self._tell(trial, str(error))
            return
        if launcher.job_id is not None:
            trial.set_user_attr("job", launcher.job_id)
        self._running.append(_RunningTrial(trial, launcher, self.slots.pop(0), time.monotonic(), reported))

    def _update(self, running: _RunningTrial) -> None:
        """Report a trial's new metric values, prune it, or take its result."""
        ended = running.launcher.poll() is not None  # before the metrics: later values would be missed
        trial, pruner, directory = running.trial, self.config.pruner, running.launcher.job.directory
        for step, value in metric_values(directory, self.config.metric):
            if step <= running.reported:
                continue
            running.reported = step
            trial.report(value, step)
            if pruner.kind != "none" and step >= pruner.first_step and not running.pruned:
                running.pruned = trial.should_prune()
                if running.pruned and not ended:
                    running.launcher.stop()
        if not ended:
            return
        self._running.remove(running)
        self.slots.append(running.slot)
        running.add_time()
        try:
            self._tell(trial, trial_result(directory, self.config.metric))
        except FailedTrialError as error:
            self._tell(trial, None if running.pruned else str(error))
        except NoSuchMetricError as error:
            self._tell(trial, str(error))
            raise

    def _tell(self, trial: Trial, outcome: float | str | None) -> None:
        """Tell Optuna a trial's value, the reason of its failure, or None for a pruned trial; print it."""
        if isinstance(outcome, float):
            state, text = TrialState.COMPLETE, f", {self.config.metric} {outcome:.6g}"
        elif outcome is None:
            state, text = TrialState.PRUNED, ""
        else:
            trial.set_user_attr("reason", outcome)
            state, text = TrialState.FAIL, f", {outcome}"
        self.study.tell(trial, outcome if isinstance(outcome, float) else None, state=state)
        self._print(trial, state.name.lower() + text)

    def _print(self, trial: Trial, text: str) -> None:
        print(f"{describe_trial(self.config, trial.number, trial.params)}: {text}", flush=True)

    def _stop(self) -> None:
        """Let attached trials save a checkpoint and end; another signal kills them."""
        attached = [each.launcher for each in self._running if each.launcher.attached]
        for launcher in attached:
            launcher.stop()
        for each in self._running:
            each.add_time()
        while any(launcher.poll() is None for launcher in attached):
            try:
                time.sleep(0.1)
            except Interrupted:
                for launcher in attached:
                    launcher.stop()


def metric_values(directory: Path, metric: str) -> list[tuple[int, float]]:
    """(optimizer step, value) of each line of a run's history that has the metric; the run may still write it."""
    return [(row["step"], row[metric]) for row in history_log(directory).read() if metric in row]


def trial_result(directory: Path, metric: str) -> float:
    """The metric of a trial that has ended: the final model's, else the last logged value.

    Raises:
        FailedTrialError: the run is unfinished, or the metric is not a finite number.
        NoSuchMetricError: the run is finished, but did not log the metric.
    """
    if not read_run_record(directory).get("finished"):
        raise FailedTrialError(failure_reason(directory))
    logged = last_metrics(directory)
    if metric not in logged:
        raise NoSuchMetricError(
            f"sweep.metric={metric}: {directory} logged no such metric.{suggestion(metric, logged)} "
            f"See its {METRICS_FILE}"
        )
    if not isinstance(logged[metric], int | float) or not math.isfinite(logged[metric]):
        raise FailedTrialError(f"{metric} is {logged[metric]}")
    return float(logged[metric])


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
