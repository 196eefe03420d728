"""Sweeps: trials of a recipe with other values of some of its settings, each a run of its own, and what came of them.

The study is kept in the sweep's directory. A sweep that was interrupted goes on by the same command: trials that were
running go on from their last saved states, under the same numbers and with the same values.
"""

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from csc_train.config.cluster import ParameterConfig, PrunerConfig, SweepConfig
from csc_train.config.compose import compose, to_container
from csc_train.config.recipes.training import LaunchRecipe, SweepRecipe
from csc_train.errors import InputError
from csc_train.files import os_errors, write_text
from csc_train.launching.executors import (
    FailedTrialError,
    LocalExecutor,
    LocalTrial,
    MetricTail,
    NoSuchMetricError,
    SlurmExecutor,
    SlurmTrial,
    trial_result,
)
from csc_train.launching.job import (
    Job,
    check_job,
    describe_job,
    refuse_misspelt,
    run_preflight,
    split_arguments,
    write_job,
)
from csc_train.launching.preflight.checks import probe_gpus
from csc_train.launching.sweep_summary import describe_trial, show_summary, write_summary
from csc_train.runs.config import RunConfig
from csc_train.runs.directory import as_yaml, flatten_keys

STUDY, LOCK = "study.log", "lock"
CONFIGURATION = "sweep.yaml"
"""In a sweep's directory: what its trials have in common, and what is varied."""
OWN = ("run", "resume", "run.directory", "run.if_exists")
"""Keys of the recipe that a sweep sets itself."""


class Interrupted(BaseException):
    """This process was told to end, by the signal that it holds."""


@dataclass(frozen=True)
class Sweep:
    """What launch/sweep.py was asked for."""

    launch: SweepRecipe
    others: list[str]
    """The arguments that are the recipe's."""

    @property
    def config(self) -> SweepConfig:
        """What is tried out."""
        return self.launch.sweep

    @property
    def directory(self) -> Path:
        """The sweep's."""
        return Path(self.config.directory or f"runs/sweeps/{self.config.name}")

    def job(self, number: int, values: dict[str, Any]) -> Job:
        """The job of a trial.

        Args:
            values: by parameter (see `SweepConfig.key_of`).

        Raises:
            InputError: the recipe refuses the values, or the cluster does not go with them.
        """
        overrides = [override(self.config.key_of(name), value) for name, value in values.items()]
        config = compose(self.launch.recipe, [*self.others, *overrides])
        config.run = RunConfig(str(self.directory / f"trial-{number}"), "resume")
        common = {field.name: getattr(self.launch, field.name) for field in fields(LaunchRecipe)}
        job = Job(LaunchRecipe(**common), config, new=True)
        check_job(job)
        return job


def override(key: str, value: Any) -> str:
    """A value of a key as it stands on the command line."""
    return f"{key}={yaml.safe_dump(value).splitlines()[0] if value is None or isinstance(value, bool) else value}"


def plan_trial(arguments: list[str]) -> Sweep:
    """The sweep that the arguments of launch/sweep.py ask for; checked, nothing written.

    Raises:
        InputError: an argument is wrong, or the recipe does not know what is varied, or refuses a value of it.
    """
    own, others = split_arguments(arguments, SweepRecipe)
    if not any(text.startswith("cluster=") for text in own) and probe_gpus():
        own.append("cluster=gpu1")
    asked = Sweep(compose("sweep", own), others)
    refuse_misspelt(others, asked.launch)
    if taken := [text for text in others if text.split("=")[0] in OWN]:
        raise InputError(f"{taken[0]}: a sweep names the directories of its runs; its own is sweep.directory")
    for point in extreme_trials(asked.config):
        try:
            asked.job(0, point)
        except InputError as error:
            raise InputError(f"sweep.{'points' if asked.config.kind == 'list' else 'space'}: {error}") from error
    return asked


def extreme_trials(config: SweepConfig) -> list[dict[str, Any]]:
    """Points in which every extreme and every choice of every parameter occurs; of a list, all of it."""
    if config.kind == "list":
        return config.points
    values = {name: extremes(parameter) for name, parameter in config.space.items()}
    first = {name: each[0] for name, each in values.items()}
    return [first, *(first | {name: value} for name, each in values.items() for value in each[1:])]


def extremes(parameter: ParameterConfig) -> list[Any]:
    """The choices of a parameter, or the ends of its range."""
    if parameter.type == "categorical":
        return parameter.choices
    kind = int if parameter.type == "int" else float
    return [kind(parameter.low), kind(parameter.high)]


def distributions(config: SweepConfig) -> dict[str, BaseDistribution]:
    """What each parameter is drawn from."""
    if config.kind == "list":
        names = dict.fromkeys(name for point in config.points for name in point)
        values = {name: [point[name] for point in config.points if name in point] for name in names}
        return {name: CategoricalDistribution(list(dict.fromkeys(each))) for name, each in values.items()}
    return {name: _distribution(parameter) for name, parameter in config.space.items()}


def _distribution(parameter: ParameterConfig) -> BaseDistribution:
    ends = extremes(parameter)
    if parameter.type == "categorical":
        return CategoricalDistribution(ends)
    if parameter.type == "int":
        return IntDistribution(*ends, log=parameter.log, step=int(parameter.step or 1))
    return FloatDistribution(*ends, log=parameter.log, step=parameter.step)


def _pruner(config: PrunerConfig) -> optuna.pruners.BasePruner:
    if config.kind == "median":
        return optuna.pruners.MedianPruner(config.startup_trials)
    if config.kind == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=config.first_step)
    return optuna.pruners.NopPruner()


def open_study(asked: Sweep) -> optuna.Study:
    """The study of a sweep, begun or gone on with.

    Raises:
        InputError: the directory holds another sweep, or cannot be written.
    """
    config, file = asked.config, asked.directory / CONFIGURATION
    judged = {name: to_container(config)[name] for name in ("kind", "space", "points", "metric", "direction")}
    training = to_container(asked.job(0, extreme_trials(config)[0]).config)
    del training["run"]
    what = {"sweep": judged, "training": training}
    if file.exists():
        began, now = flatten_keys(yaml.safe_load(file.read_text(encoding="utf-8"))), flatten_keys(what)
        # A training's key that one of them does not know is that of other code.
        known = {key for key in {**began, **now} if key.startswith("sweep.") or (key in began and key in now)}
        if keys := sorted(key for key in known if began.get(key) != now.get(key)):
            differing = "; ".join(f"{key}={began.get(key)}, not {now.get(key)}" for key in keys)
            raise InputError(f"{asked.directory} holds a sweep with {differing}: choose another sweep.directory")
    else:
        write_text(file, as_yaml(what))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(asked.directory / STUDY)),
    )
    study = optuna.create_study(
        study_name=config.name,
        storage=storage,
        direction=config.direction,
        pruner=_pruner(config.pruner),
        load_if_exists=True,
    )
    # Begun anew with the same seed, it would draw the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    return study


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[int]:
    """Hold the lock of a sweep's directory, and yield its descriptor: trials that inherit it hold it too.

    Raises:
        InputError: the sweep, or a trial that it left, is running; or the directory cannot be written.
    """
    with os_errors(directory, "cannot write"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError(f"{directory}: the sweep is running, or its last trials are still ending") from error
    try:
        yield lock
    finally:
        os.close(lock)


class Trials:
    """The trials of a sweep that are running, from start to result."""

    def __init__(self, asked: Sweep, study: optuna.Study, places: LocalExecutor | SlurmExecutor):
        """Nothing is started yet.

        Args:
            places: where trials run.
        """
        self.asked, self.study, self.places = asked, study, places
        self.running: list[_Running] = []
        # What an earlier start of the sweep left; Optuna has no other way to take up a trial.
        left = study.get_trials(states=(TrialState.RUNNING,))
        self._left = [Trial(study, each._trial_id) for each in left]

    def run(self) -> None:
        """Run trials until there are as many as were asked for.

        Raises:
            NoSuchMetricError: a trial logged nothing to judge it by.
            Interrupted: a signal came; trials of this machine have saved a state of training and ended by then.
        """
        try:
            while True:
                while len(self.running) < self.places.count and (trial := self._next()):
                    self._start(trial)
                if not self.running:
                    return
                time.sleep(self.asked.config.poll)
                for each in list(self.running):
                    self._look_at(each)
        except (Interrupted, NoSuchMetricError):
            self._stop()
            raise

    def _next(self) -> Trial | None:
        if self._left:
            return self._left.pop(0)
        drawn, config = distributions(self.asked.config), self.asked.config
        trials = self.study.get_trials(deepcopy=False)
        waiting = [each for each in trials if each.state == TrialState.WAITING]
        if len(trials) - len(waiting) >= config.size:
            return None
        if config.kind == "optuna":
            return self.study.ask(drawn)
        point = config.grid()[len(trials) - len(waiting)]
        if not waiting:
            self.study.enqueue_trial(point)
        return self.study.ask({name: drawn[name] for name in point})

    def _start(self, trial: Trial) -> None:
        print(f"{describe_trial(self.asked.config, trial.number, trial.params)}: started", flush=True)
        attributes = dict(trial.user_attrs)
        try:
            job = self.asked.job(trial.number, trial.params)
            running = _Running(trial, job, MetricTail(job.directory, self.asked.config.metric), time.monotonic())
            running.reported = self.study.trials[trial.number].last_step or 0
            with contextlib.suppress(FailedTrialError):  # it ended while nobody looked
                self._tell(running, trial_result(job.directory, self.asked.config.metric))
                return
            write_job(job)
            running.process = self.places.start(job, attributes)
        except InputError as error:
            self._fail(trial, str(error))
            return
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self.running.append(running)

    def _look_at(self, running: "_Running") -> None:
        """Report what a trial has logged, prune it, or take its result."""
        ended = running.process.ended()  # asked first: what is logged after it would be missed
        trial, pruner = running.trial, self.asked.config.pruner
        for step, value in running.figures.new():
            if step > running.reported:  # a trial that went on from a saved state does some steps again
                running.reported = step
                trial.report(value, step)
                if pruner.kind != "none" and step >= pruner.first_step and not running.pruned:
                    running.pruned = trial.should_prune()
                    if running.pruned and not ended:
                        running.process.stop()
        if not ended:
            return
        self.running.remove(running)
        self.places.release(running.process)
        running.keep_time()
        try:
            value = trial_result(running.job.directory, self.asked.config.metric)
        except FailedTrialError as error:
            if running.pruned:
                self._say(self.study.tell(trial, state=TrialState.PRUNED))
            else:
                self._fail(trial, str(error))
        except NoSuchMetricError as error:
            self._fail(trial, str(error))
            raise
        else:
            self._tell(running, value)

    def _tell(self, running: "_Running", value: float) -> None:
        self._say(self.study.tell(running.trial, value))

    def _fail(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr("reason", reason)
        self._say(self.study.tell(trial, state=TrialState.FAIL))

    def _say(self, trial: FrozenTrial) -> None:
        outcome = trial.state.name.lower()
        if trial.value is not None:
            outcome += f", {self.asked.config.metric} {trial.value:.6g}"
        if "reason" in trial.user_attrs:
            outcome += f", {trial.user_attrs['reason']}"
        print(f"{describe_trial(self.asked.config, trial.number, trial.params)}: {outcome}", flush=True)

    def _stop(self) -> None:
        """Let the trials of this machine save a state and end; a second signal kills them."""
        local = [each.process for each in self.running if isinstance(each.process, LocalTrial)]
        for process in local:
            process.stop()
        for each in self.running:
            each.keep_time()
        while any(not process.ended() for process in local):
            try:
                time.sleep(0.1)
            except Interrupted:
                for process in local:
                    process.stop()


@dataclass
class _Running:
    trial: Trial
    job: Job
    figures: MetricTail
    began: float
    process: LocalTrial | SlurmTrial | None = None
    pruned: bool = False
    reported: int = 0

    def keep_time(self) -> None:
        seconds = self.trial.user_attrs.get("seconds", 0) + time.monotonic() - self.began
        self.trial.set_user_attr("seconds", round(seconds, 1))


def sweep(arguments: list[str]) -> int:
    """What launch/sweep.py does.

    Returns:
        Its exit status: 0 where a trial came to a result, 1 where none did, 2 after an InputError, and 128 and the
        number of the signal that interrupted it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        asked = plan_trial(arguments)
        if asked.launch.dry_run:
            print(_description(asked))
            return 0
        return _run(asked)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(asked: Sweep) -> int:
    cluster, config = asked.launch.cluster, asked.config
    with only_one(asked.directory) as lock:
        places = (
            LocalExecutor(cluster, config.parallel, lock)
            if cluster.scheduler == "local"
            else SlurmExecutor(config.parallel)
        )
        if not (asked.directory / CONFIGURATION).exists():
            _preflight(asked, places)
        study = open_study(asked)
        print(f"sweep: {asked.directory}, {config.size} trials, {places.count} at a time", flush=True)
        with _signals():
            try:
                Trials(asked, study, places).run()
            except Interrupted as interrupt:
                done = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)))
                print(f"interrupted after {done} of {config.size} trials; the same command goes on", flush=True)
                return 128 + interrupt.args[0]
        write_summary(asked.directory, study, config)
        show_summary(asked.directory, study, config)
    return 0 if study.get_trials(states=(TrialState.COMPLETE,)) else 1


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise `Interrupted` on Ctrl-C and SIGTERM."""

    def interrupt(signum, frame):
        raise Interrupted(signum)

    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _preflight(asked: Sweep, places: LocalExecutor | SlurmExecutor) -> None:
    """Check the first point on the first place as any job is checked; the others differ in what is varied alone."""
    os.environ.update(places.first)
    outcome = run_preflight(asked.job(0, extreme_trials(asked.config)[0]))
    if outcome.failed and not asked.launch.preflight.force:
        outcome.show()
        names = ", ".join(each.name for each in outcome.failed)
        raise InputError(f"preflight: {names} failed (see above); preflight.force=true starts the sweep all the same")


def _description(asked: Sweep) -> str:
    """All that a sweep would do, as text: its trials where they are known ahead, and the job of the first."""
    config = asked.config
    parts = [f"sweep: {asked.directory}, {config.size} trials", "", as_yaml(to_container(config))]
    if config.kind != "optuna":
        parts += [describe_trial(config, number, point) for number, point in enumerate(config.grid()[: config.size])]
    return "\n".join(
        [*parts, "", "the first trial, or one like it:", describe_job(asked.job(0, extreme_trials(config)[0]))]
    )
