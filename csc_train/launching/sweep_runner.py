"""Run the trials of a sweep: sample their values, prune them, and rank them by a metric."""

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from csc_train.config.cluster import SweepConfig
from csc_train.errors import InputError, suggestion
from csc_train.launching.job import Job
from csc_train.launching.journal import values_of
from csc_train.launching.search_space import distributions
from csc_train.launching.sweep_summary import describe_trial, ranked
from csc_train.launching.trial_runner import FailedTrialError, RunningTrial, TrialRunner, failure_reason
from csc_train.launching.warm_start import count_earlier, own_trials
from csc_train.runs.cleanup import remove_weights
from csc_train.runs.comparison import METRICS_FILE, history_log, last_metrics
from csc_train.runs.directory import read_run_record


class NoSuchMetricError(InputError):
    """A finished trial never logged `sweep.metric`."""


class SweepRunner(TrialRunner):
    """Runs the trials of a sweep until the study has `config.size` of them.

    Args:
        job_of: makes the job of a trial from its number and parameter values.
        slots: environment variables of each trial that may start now.
        lock: see `TrialRunner`.
        devices: GPUs of a trial; processes on CPUs.
        changed: called after each trial.
    """

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        job_of: Callable[[int, dict[str, Any]], Job],
        slots: list[dict[str, str]],
        lock: int,
        devices: int = 1,
        changed: Callable[[], None] = lambda: None,
    ):
        super().__init__(study, lock, config.poll)
        self.config, self._job_of, self._slots = config, job_of, slots
        self._devices, self._changed = devices, changed
        self._first = count_earlier(study)
        self._reported: dict[int, int] = {}
        self._interrupted = self.interrupted()
        frozen = {each.number: each for each in study.get_trials(states=(TrialState.RUNNING,))}
        for trial in self._interrupted:
            sampler, each = self._seed_sampler(trial.number - self._first), frozen[trial.number]
            for name, distribution in values_of(self.config, each).items():
                if name in each.params:  # draws as much as it did for this one
                    sampler.sample_independent(self.study, each, name, distribution)
                else:
                    trial._suggest(name, distribution)  # a value that a killed sweep did not record

    def next_trial(self) -> tuple[Trial, list[dict[str, str]]] | None:
        """An interrupted trial, else a new one that the budget allows."""
        if not self._slots or self.exhausted():
            return None
        trial = self._interrupted.pop(0) if self._interrupted else self._new_trial()
        return trial and (trial, self._slots)

    def exhausted(self) -> bool:
        """Whether the budget is used up."""
        return self._hours_left() <= 0

    def _hours_left(self) -> float:
        """GPU hours of the budget that are left now; the running trials' time counts."""
        if self.config.budget_gpu_hours is None:
            return math.inf
        running = {each.trial.number: each.seconds for each in self._running}
        used = {each.number: _seconds(each) for each in self.study.get_trials(deepcopy=False)} | running
        return self.config.budget_gpu_hours - sum(used.values()) * self._devices / 3600

    def _affordable(self) -> bool:
        """Whether the budget allows another trial beside the running ones, by the median time of ended ones."""
        ended = own_trials(self.study, TrialState.COMPLETE, TrialState.PRUNED)
        expected = statistics.median(map(_seconds, ended)) if ended else 0.0
        open_seconds = sum(max(0.0, expected - each.seconds) for each in self._running)
        return (open_seconds + expected) * self._devices / 3600 <= self._hours_left()

    def _new_trial(self) -> Trial | None:
        space, config = distributions(self.config), self.config
        trials = own_trials(self.study)
        waiting = [each for each in trials if each.state == TrialState.WAITING]
        if len(trials) - len(waiting) >= config.size or not self._affordable():
            return None
        if config.kind == "optuna":
            self._seed_sampler(len(trials))
            return self.study.ask(space)
        point = config.grid()[len(trials) - len(waiting)]
        if not waiting:
            self.study.enqueue_trial(point)
        return self.study.ask({name: space[name] for name in point})

    def _seed_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A seed for each trial, so that its values do not depend on how often the sweep was started.

        After a warm start others than those of the earlier sweep, whose first values would be drawn again.
        """
        self.study.sampler = optuna.samplers.TPESampler(seed=self.config.seed + number + 10_000 * self._first)
        return self.study.sampler

    def job_of(self, trial: Trial, slot: dict[str, str]) -> Job:
        """The job with the values of a trial."""
        return self._job_of(trial.number - self._first, trial.params)

    def result(self, trial: Trial, directory: Path) -> float:
        """The metric (see `trial_result`); values that nobody watched are reported."""
        found = trial_result(directory, self.config.metric)
        list(self._report(trial, directory))
        return found

    def watch(self, running: RunningTrial, ended: bool) -> None:
        """Report a trial's new metric values, and prune it."""
        trial, pruner = running.trial, self.config.pruner
        for step in self._report(trial, running.launcher.job.directory):
            if pruner.kind != "none" and step >= pruner.first_step and not running.pruned:
                running.pruned = trial.should_prune()
                if running.pruned and not ended:
                    running.launcher.stop()

    def tell(self, trial: Trial, outcome: float | str | None) -> None:
        """Record the end of a trial."""
        super().tell(trial, outcome)
        self._changed()

    def _report(self, trial: Trial, directory: Path) -> Iterator[int]:
        """Report the metric's values that the study does not know yet, one by one, and yield the step of each."""
        known = self._reported.get(trial.number) or self.study.trials[trial.number].last_step or 0
        new = [(step, value) for step, value in metric_values(directory, self.config.metric) if step > known]
        for step, value in new:
            trial.report(value, step)
            self._reported[trial.number] = step
            yield step

    def describe(self, trial: Trial) -> str:
        """Its number and values."""
        return describe_trial(self.config, trial.number - self._first, trial.params)

    def value_text(self, value: float) -> str:
        """The metric and its value."""
        return f"{self.config.metric} {value:.6g}"


def _seconds(trial: FrozenTrial) -> float:
    """The time of a trial, as far as the study knows."""
    return trial.user_attrs.get("seconds", 0.0)


def keep_best(directory: Path, study: optuna.Study, config: SweepConfig) -> None:
    """Under `sweep.keep=best`, remove the weights of the ended trials that are not among the best ones.

    A trial in whose directory another process works keeps them until the next call.
    """
    if config.keep == "all":
        return
    kept = {trial.number for trial in ranked(study, config)[: config.keep_number]}
    for number, trial in enumerate(own_trials(study)):
        if trial.state.is_finished() and trial.number not in kept:
            try:
                remove_weights(directory / f"trial-{number}", "sweep.keep=best")
            except InputError as error:
                print(f"note: its model and checkpoints are kept: {error}", flush=True)


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
