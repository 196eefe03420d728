"""Sweeps: run a recipe with other values of some settings, by Optuna, as a grid or as a list.

The sweep's directory holds the Optuna study. The same command resumes an interrupted sweep: its trials resume from
their last checkpoints, with the same numbers and values.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from csc_train.config.cli import run_command
from csc_train.config.cluster import PrunerConfig, SweepConfig
from csc_train.config.compose import compose, to_container
from csc_train.config.recipes.training import LaunchRecipe, SweepRecipe
from csc_train.errors import InputError
from csc_train.files import write_text
from csc_train.launching.gpus import probe_gpus
from csc_train.launching.job import Job, refuse_misspelt, split_arguments
from csc_train.launching.journal import check_values, open_journal
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.search_space import extreme_points, to_override
from csc_train.launching.sweep_runner import SweepRunner, keep_best
from csc_train.launching.sweep_summary import describe_trial, report_sweep, write_summary
from csc_train.launching.trial_runner import Interrupted
from csc_train.launching.warm_start import add_earlier, count_earlier, own_trials, read_earlier
from csc_train.runs.claim import claim
from csc_train.runs.directory import as_yaml, flatten_keys, read_config, refuse_other_files

STUDY_FILE = "study.log"
SWEEP_FILE = "sweep.yaml"
"""The search space and the trials' common configuration, in the sweep's directory."""
PRUNERS: dict[str, Callable[[PrunerConfig], BasePruner]] = {
    "none": lambda config: NopPruner(),
    "median": lambda config: MedianPruner(config.startup_trials),
    "asha": lambda config: SuccessiveHalvingPruner(config.first_step, config.reduction_factor or 4),
    "hyperband": lambda config: HyperbandPruner(config.first_step, reduction_factor=config.reduction_factor or 3),
}
"""Optuna's pruner by `PrunerConfig.kind`."""
RESERVED_KEYS = ("run", "resume", "run.directory", "run.if_exists")
"""Recipe keys that the sweep sets itself."""


@dataclass(frozen=True)
class Sweep:
    """A sweep command line.

    Attributes:
        launch: configuration of the sweep and the launch.
        overrides: arguments that belong to the recipe.
    """

    launch: SweepRecipe
    overrides: list[str]

    @property
    def config(self) -> SweepConfig:
        """The search space, trials, metric and pruner."""
        return self.launch.sweep

    @property
    def directory(self) -> Path:
        """The sweep's directory."""
        return Path(self.config.directory or f"runs/sweeps/{self.config.name}")

    def job(self, number: int, values: dict[str, Any]) -> Job:
        """The checked job of a trial.

        Args:
            number: the trial's number.
            values: by parameter name (see `SweepConfig.override_key`).

        Raises:
            InputError: the recipe or the cluster refuses the values.
        """
        varied = [to_override(self.config.override_key(name), value) for name, value in values.items()]
        config = compose(self.launch.recipe, [*self.overrides, *varied])
        config.run = replace(config.run, directory=str(self.directory / f"trial-{number}"), if_exists="resume")
        common = {field.name: getattr(self.launch, field.name) for field in fields(LaunchRecipe)}
        job = Job(LaunchRecipe(**common), config, new=True)
        job.check()
        return job

    def first_job(self) -> Job:
        """The job of the first extreme point, for checks and descriptions."""
        return self.job(0, extreme_points(self.config)[0])

    def describe(self) -> str:
        """The sweep, its trials if they are known in advance, and the job of the first trial, as text."""
        config = self.config
        points = [] if config.kind == "optuna" else config.grid()[: config.size]
        trials = [describe_trial(config, number, point) for number, point in enumerate(points)]
        head = [f"sweep: {self.directory}, {config.size} trials", "", as_yaml(to_container(config)), *trials]
        return "\n".join([*head, "", "the first trial, or one like it:", self.first_job().describe()])


def plan_sweep(arguments: list[str]) -> Sweep:
    """Compose and check a sweep; nothing is written.

    Args:
        arguments: those that begin with a key of `SweepRecipe` configure the sweep, the others the recipe. `cluster`
            defaults to gpu1 on a machine with a GPU, else to cpu1.

    Raises:
        InputError: an argument is wrong, or the recipe refuses a parameter or an extreme value of it.
    """
    own, others = split_arguments(arguments, SweepRecipe)
    if not any(text.startswith("cluster=") for text in own) and probe_gpus():
        own.append("cluster=gpu1")
    planned = Sweep(compose("sweep", own), others)
    refuse_misspelt(others, planned.launch)
    if taken := [text for text in others if text.split("=")[0] in RESERVED_KEYS]:
        raise InputError(f"{taken[0]}: a sweep names its runs itself: use sweep.directory")
    for point in extreme_points(planned.config):
        try:
            planned.job(0, point)
        except InputError as error:
            raise InputError(f"sweep.{'points' if planned.config.kind == 'list' else 'space'}: {error}") from error
    if planned.config.warm_start and not (planned.directory / SWEEP_FILE).exists():
        read_earlier(planned.config)
    return planned


def open_study(planned: Sweep) -> optuna.Study:
    """Create or load the Optuna study of a sweep.

    Raises:
        InputError: the directory holds another sweep, its journal is damaged, or it cannot be written.
    """
    config, file = planned.config, planned.directory / SWEEP_FILE
    names = ("kind", "space", "points", "metric", "direction", "warm_start")
    judged = {name: to_container(config)[name] for name in names}
    training = to_container(planned.first_job().config)
    del training["run"]
    facts = {"sweep": judged, "training": training}
    if file.exists():
        earlier, now = flatten_keys(read_config(file)), flatten_keys(facts)
        # A training key that only one of them has belongs to another version of the code.
        known = {key for key in {**earlier, **now} if key.startswith("sweep.") or (key in earlier and key in now)}
        if keys := sorted(key for key in known if earlier.get(key) != now.get(key)):
            differing = "; ".join(f"{key}={earlier.get(key)}, not {now.get(key)}" for key in keys)
            raise InputError(f"{planned.directory} holds a sweep with {differing}: choose another sweep.directory")
    else:
        write_text(file, as_yaml(facts))
    journal = planned.directory / STUDY_FILE
    study = optuna.create_study(
        study_name=config.name,
        storage=open_journal(journal),
        direction="minimize" if config.direction == "minimize" else "maximize",
        load_if_exists=True,
    )
    add_earlier(study, config)
    # Earlier trials have no values that a pruner could compare.
    own = replace(config.pruner, startup_trials=config.pruner.startup_trials + count_earlier(study))
    study.pruner = PRUNERS[config.pruner.kind](own)
    check_values(journal, study, config)
    return study


def sweep(arguments: list[str]) -> int:
    """Run launch/sweep.py.

    Returns:
        The exit status: 0 if a trial has a result, 1 if none has, 2 after an InputError, 128 + signal number after a
        signal.
    """
    return run_command("sweep", arguments, _sweep)


def _sweep(arguments: list[str]) -> int:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    planned = plan_sweep(arguments)
    if planned.launch.dry_run:
        print(planned.describe())
        return 0
    return _run(planned)


def _run(planned: Sweep) -> int:
    cluster, config = planned.launch.cluster, planned.config
    for name in ("WANDB_RUN_ID", "MLFLOW_RUN_ID"):  # the id of one run; each trial has its own
        os.environ.pop(name, None)
    if not (planned.directory / SWEEP_FILE).exists():
        refuse_other_files(planned.directory, f"no {SWEEP_FILE}")
    with claim(planned.directory, f"sweep {config.name}") as claimed:
        slots = launcher_class(cluster).slots(cluster, config.parallel)
        if not (planned.directory / SWEEP_FILE).exists():
            # One preflight, on the first slot: the other trials only differ in the varied values.
            os.environ.update(slots[0])
            planned.first_job().preflight()
        study = open_study(planned)
        print(f"sweep: {planned.directory}, {config.size} trials, {len(slots)} at a time", flush=True)

        def after_trial() -> None:
            keep_best(planned.directory, study, config)
            write_summary(planned.directory, study, config, cluster, running=True)

        devices = cluster.gpus or cluster.world_size
        try:
            keep_best(planned.directory, study, config)  # a killed sweep may not have come so far
            SweepRunner(config, study, planned.job, slots, claimed.descriptor, devices, after_trial).run()
        except Interrupted as interrupt:
            done = len(own_trials(study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
            print(f"interrupted after {done} of {config.size} trials; the same command resumes", flush=True)
            write_summary(planned.directory, study, config, cluster, running=not launcher_class(cluster).attached)
            return 128 + interrupt.args[0]
        except InputError:
            write_summary(planned.directory, study, config, cluster, running=not launcher_class(cluster).attached)
            raise
        report_sweep(planned.directory, study, config, cluster)
    return 0 if own_trials(study, TrialState.COMPLETE) else 1
