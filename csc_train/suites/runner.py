"""Run the steps of a suite through launchers; the ledger of trials keeps the state, the time and the cost of each."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import optuna
from accelerate.utils import patch_environment
from optuna.trial import Trial, TrialState

from csc_train.launching.job import Job
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.trial_runner import FailedTrialError, TrialRunner, failure_reason
from csc_train.suites.base import Cost
from csc_train.suites.plan import Step, SuitePlan

DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"


class SuiteRunner(TrialRunner):
    """Runs the steps of a suite that are not done, each after those that it needs.

    A failed step fails those that need it, and no other. A trial is an attempt at a step; its user attributes are the
    `step`, its run `directory`, and the `planned` cost.

    Args:
        slots: by placement, environment variables of each step that may start now; why there are none, if so.
        lock: see `TrialRunner`.
        finished: called with each step whose run has finished.
        changed: called after each change of a step's state.

    Attributes:
        states: by step, `done`, `failed`, `running` or `waiting`.
        reasons: by failed step, why.
    """

    def __init__(
        self,
        plan: SuitePlan,
        study: optuna.Study,
        slots: dict[str, list[dict[str, str]] | str],
        lock: int,
        planned: dict[str, Cost],
        finished: Callable[[Step], None],
        changed: Callable[["SuiteRunner"], None],
    ):
        super().__init__(study, lock, plan.config.poll)
        self._plan, self._slots, self._planned = plan, slots, planned
        self._finished, self._changed = finished, changed
        self.states = {name: DONE if step.finished else WAITING for name, step in plan.steps.items()}
        self.reasons: dict[str, str] = {}
        self._earlier = {trial.user_attrs.get("directory"): trial for trial in self.interrupted()}
        current = {str(step.directory) for name, step in plan.steps.items() if self.states[name] == WAITING}
        for directory in self._earlier.keys() - current:
            self._end(self._earlier.pop(directory), plan)
        for name, step in plan.steps.items():
            slot = slots[step.placement]
            if self.states[name] == WAITING and (reason := step.missing or (slot if isinstance(slot, str) else None)):
                self._fail(name, reason)

    def _end(self, trial: Trial, plan: SuitePlan) -> None:
        """Tell the end of an interrupted trial whose run has finished, or whose step has other inputs now."""
        name, directory = trial.user_attrs.get("step", ""), trial.user_attrs.get("directory")
        step = plan.steps.get(name)
        if step and str(step.directory) == directory:
            self.study.tell(trial, _seconds(trial))
            self._finished(step)
            return
        if job := trial.user_attrs.get("job"):
            print(f"note: step {name}: its inputs have changed, and job {job} may go on in {directory}: cancel it")
        trial.set_user_attr("reason", "its inputs have changed")
        self.study.tell(trial, state=TrialState.FAIL)

    def next_trial(self) -> tuple[Trial, list[dict[str, str]]] | None:
        """The first step whose needs are met and for which a slot is free."""
        for name, step in self._plan.steps.items():
            if self.states[name] != WAITING:
                continue
            if failed := [need for need in step.needs if self.states[need] == FAILED]:
                self._fail(name, f"needs {failed[0]}, which failed")
                continue
            pool = self._slots[step.placement]
            if pool and not isinstance(pool, str) and all(self.states[need] == DONE for need in step.needs):
                trial = self._earlier.pop(str(step.directory), None) or self._new_trial(step)
                self._change(name, RUNNING)
                return trial, pool
        return None

    def _new_trial(self, step: Step) -> Trial:
        trial = self.study.ask()
        trial.set_user_attr("step", step.name)
        trial.set_user_attr("directory", str(step.directory))
        trial.set_user_attr("planned", asdict(self._planned[step.name]))
        return trial

    def _fail(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        print(f"step {name}: not started, {reason}", flush=True)
        self._change(name, FAILED)

    def _change(self, name: str, state: str) -> None:
        self.states[name] = state
        self._changed(self)

    def job_of(self, trial: Trial, slot: dict[str, str]) -> Job:
        """The job of its step, after its preflight on the slot's GPUs; a job that runs already needs none."""
        job = self._plan.steps[trial.user_attrs["step"]].job
        if "job" not in trial.user_attrs:
            with patch_environment(**slot):
                job.preflight()
        return job

    def release(self) -> None:
        """Let the steps that end with this process wait for the next start."""
        for name, step in self._plan.steps.items():
            if self.states[name] == RUNNING and launcher_class(step.job.launch.cluster).attached:
                self._change(name, WAITING)

    def result(self, trial: Trial, directory: Path) -> float:
        """The seconds of a step whose run has finished."""
        if not self._plan.steps[trial.user_attrs["step"]].finished:
            raise FailedTrialError(failure_reason(directory))
        return _seconds(trial)

    def tell(self, trial: Trial, outcome: float | str | None) -> None:
        """Record the end of a step."""
        super().tell(trial, outcome)
        name = trial.user_attrs["step"]
        if isinstance(outcome, float):
            self._finished(self._plan.steps[name])
            self._change(name, DONE)
        else:
            self.reasons[name] = outcome or "stopped"
            self._change(name, FAILED)

    def describe(self, trial: Trial) -> str:
        """The name of its step."""
        return f"step {trial.user_attrs['step']}"

    def value_text(self, value: float) -> str:
        """The seconds that it took."""
        return f"{value:,.0f} s"


def _seconds(trial: Trial) -> float:
    return float(trial.user_attrs.get("seconds", 0.0))


def spent_seconds(study: optuna.Study) -> dict[str, float]:
    """The seconds of all attempts at a step, by its run directory."""
    found: dict[str, float] = {}
    for trial in study.get_trials(deepcopy=False):
        directory = trial.user_attrs.get("directory", "")
        found[directory] = found.get(directory, 0.0) + trial.user_attrs.get("seconds", 0.0)
    return found


def read_planned(study: optuna.Study) -> dict[str, Cost]:
    """The planned cost of each step when it was first started, by its run directory."""
    found: dict[str, Cost] = {}
    for trial in study.get_trials(deepcopy=False):
        if "planned" in trial.user_attrs:
            found.setdefault(trial.user_attrs["directory"], Cost(**trial.user_attrs["planned"]))
    return found
