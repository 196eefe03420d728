"""What a user may choose about the machines that a job runs on, and about what is checked before it starts."""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from csc_train.errors import InputError, check_choice, check_range


@dataclass
class SlurmConfig:
    """How a job is submitted to SLURM; what is not given is left to the cluster's own defaults."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Limit of the job's time, such as `24:00:00` or `2-00:00:00`."""
    cpus: int | None = None
    """CPU cores of each node; the whole node with all its memory where not given."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as `--qos=high`."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of srun, such as `--container-image=...`."""
    prologue: list[str] = field(default_factory=list)
    """Lines of shell that come first: modules, an environment to activate, NCCL variables."""
    python: str = "python"
    """The Python of the nodes, as it is called after the prologue."""
    requeue: bool = True
    """Queue the job again when its time is up before the training's end, or when a node fails; it goes on from the last
    saved state."""
    save_before: int = 300
    """Seconds before the time limit at which a state of training is saved and the job ends."""

    def __post_init__(self):
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise InputError(f"cluster.slurm.time={self.time}: write hours as 24:00:00, days as 2-00:00:00")
        check_range("cluster.slurm.cpus", self.cpus or 1, 1)
        check_range("cluster.slurm.save_before", self.save_before, 0, 65535)
        for key in ("options", "srun_options"):
            for option in getattr(self, key):
                if not option.startswith("-"):
                    raise InputError(f"cluster.slurm.{key}: {option} is no option; options start with -")


@dataclass
class ClusterConfig:
    """The machines that a job runs on (the `cluster` group); one process for each GPU."""

    name: str = "cpu2"
    nodes: int = 1
    gpus_per_node: int = 2
    device: str = "cpu"
    """cpu or cuda."""
    gpu: str | None = None
    """What the GPU is called, for the memory plan; None on a CPU."""
    gpu_memory_gib: float | None = None
    """GiB of memory of one GPU."""
    gpu_tflops: float | None = None
    """Dense bf16 TFLOP/s of one GPU, by its data sheet."""
    host_memory_gib: float | None = None
    """GiB of memory of one node."""
    scheduler: str = "local"
    """local: start here. slurm: submit a job."""
    launcher: str = "torchrun"
    """What starts the processes of a node: torchrun or accelerate."""
    port: int = 29500
    """First of the thousand ports of which a SLURM job's nodes meet at one, by the job's number."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self):
        check_range("cluster.nodes", self.nodes, 1)
        check_range("cluster.gpus_per_node", self.gpus_per_node, 1)
        check_choice("cluster.device", self.device, ("cpu", "cuda"))
        check_choice("cluster.scheduler", self.scheduler, ("local", "slurm"))
        check_choice("cluster.launcher", self.launcher, ("torchrun", "accelerate"))
        check_range("cluster.port", self.port, 1024, 64535)

    @property
    def world_size(self) -> int:
        """Number of processes of the job, over all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass
class PreflightConfig:
    """How a training is checked before it starts."""

    force: bool = False
    """Launch although a check failed."""
    probe: bool = True
    """Ask the driver (nvidia-smi) which GPUs this machine has and how much of their memory is free."""
    port: int = 29500
    """The port at which the processes of several nodes meet."""
    mfu: float = 0.4
    """Share of the GPU's dense bf16 FLOP/s that training is assumed to reach: an assumption, for the hours alone."""
    dialogues: int | None = None
    """How many dialogues there will be, for the estimate where the data cannot be read yet."""
    tokens_per_dialogue: int | None = None
    """Their mean length in tokens, likewise."""

    def __post_init__(self):
        check_range("preflight.port", self.port, 1, 65535)
        check_range("preflight.mfu", self.mfu, 0.01, 1)
        for key in ("dialogues", "tokens_per_dialogue"):
            if getattr(self, key) is not None:
                check_range(f"preflight.{key}", getattr(self, key), 1)


@dataclass
class OnFinishConfig:
    """What is started when a training has ended."""

    recipe: str | None = None
    """evaluate: the evaluation of its checkpoint, into the run directory's `evaluation`."""
    overrides: list[str] = field(default_factory=list)
    """Settings of that recipe, each in quotes: `on_finish.overrides=['data=rolecs','evaluation.include_base=false']`.
    Checked before
    the training starts."""

    def __post_init__(self):
        check_choice("on_finish.recipe", self.recipe or "evaluate", ("evaluate",))
        if self.overrides and not self.recipe:
            raise InputError(f"on_finish.overrides={self.overrides}: say of which recipe, by on_finish=evaluate")


@dataclass
class ParameterConfig:
    """A setting that a sweep varies."""

    key: str = ""
    """The recipe's key or group, such as `trainer.learning_rate` or `adapter`."""
    type: str = "float"
    """float, int: from `low` to `high`. categorical: one of `choices`."""
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw from the logarithm of the range."""
    step: float | None = None
    """Draw multiples of this above `low` alone."""
    choices: list[Any] = field(default_factory=list)
    """Numbers, booleans, or texts as they would stand on the command line after `key=`."""

    def check(self, name: str) -> None:
        """Refuse what is no range and no choice.

        Args:
            name: where it stands, for the message.

        Raises:
            InputError: says what is wrong.
        """
        if not self.key:
            raise InputError(f"{name}.key is required: give {name}.key=...")
        check_choice(f"{name}.type", self.type, ("float", "int", "categorical"))
        if self.type == "categorical":
            if (self.low, self.high, self.step, self.log) != (None, None, None, False) or not self.choices:
                raise InputError(f"{name}: a categorical parameter has choices, and no low, high, step or log")
            check_scalars(f"{name}.choices", self.choices)
            return
        if self.low is None or self.high is None or not self.low < self.high or self.choices:
            raise InputError(f"{name}: type={self.type} goes from low to a greater high, and has no choices")
        if self.log and (self.low <= 0 or self.step is not None):
            raise InputError(f"{name}: log=true goes with a low above 0 and without a step")
        if self.step is not None and self.step <= 0:
            raise InputError(f"{name}.step={self.step}: must be above 0")
        whole = (self.low, self.high, self.step or 1)
        if self.type == "int" and any(value % 1 for value in whole):
            raise InputError(f"{name}: type=int goes from a whole number to another by whole steps")


@dataclass
class PrunerConfig:
    """When a trial is ended early, by what it has logged so far."""

    kind: str = "none"
    """none. median: when it is worse than the median of the earlier trials at the same step. hyperband: by brackets of
    successive halving."""
    startup_trials: int = 5
    """median: trials that come to their end first."""
    first_step: int = 1
    """Optimizer steps before which none is ended."""

    def __post_init__(self):
        check_choice("sweep.pruner.kind", self.kind, ("none", "median", "hyperband"))
        check_range("sweep.pruner.startup_trials", self.startup_trials, 1)
        check_range("sweep.pruner.first_step", self.first_step, 1)


@dataclass
class SweepConfig:
    """What a sweep tries out, and by what it judges (the `sweep` group)."""

    name: str = "sweep"
    directory: str | None = None
    """Of the sweep: its study, its summary, and a run directory `trial-N` for each trial. runs/sweeps/<name> where not
    given. What it holds is gone on with."""
    kind: str = "optuna"
    """optuna: trials drawn from `space`, by Optuna's TPE sampler. grid: every combination of the choices in `space`.
    list: `points`."""
    space: dict[str, ParameterConfig] = field(default_factory=dict)
    """What is varied, by the names of the summary's columns."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """For a list: the values of each trial, by the recipe's keys and groups; values as `ParameterConfig.choices`."""
    trials: int | None = None
    """How many trials there are in all, failed ones included; those of a grid or list are all of its points where not
    given."""
    metric: str = "eval_loss"
    """A figure that the training logs: trials are pruned by its values, and judged by the last, or by the one of the
    checkpoint where that is made from an earlier state."""
    direction: str = "minimize"
    """minimize or maximize."""
    seed: int = 0
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    parallel: int | None = None
    """Trials at a time. On GPUs as many as fit on the free ones where not given, else 1; under SLURM, jobs in the
    queue."""
    poll: float = 5.0
    """Seconds between looks at the trials."""

    def __post_init__(self):
        check_choice("sweep.kind", self.kind, ("optuna", "grid", "list"))
        check_choice("sweep.direction", self.direction, ("minimize", "maximize"))
        check_range("sweep.poll", self.poll, 0.1)
        check_range("sweep.seed", self.seed, 0, 2**31)
        for key in ("trials", "parallel"):
            if getattr(self, key) is not None:
                check_range(f"sweep.{key}", getattr(self, key), 1)
        for name, parameter in self.space.items():
            parameter.check(f"sweep.space.{name}")
        if self.kind == "list":
            self._check_list()
        elif not self.space or self.points:
            raise InputError(f"sweep.kind={self.kind}: give what is varied by sweep.space, and no sweep.points")
        if self.kind == "optuna" and self.trials is None:
            raise InputError("sweep.trials is required: give sweep.trials=...")
        if self.kind == "grid":
            for name, parameter in self.space.items():
                if parameter.type != "categorical":
                    raise InputError(f"sweep.space.{name}.type={parameter.type}: a grid is made of categorical choices")
        if self.kind != "optuna" and (self.trials or 0) > len(self.grid()):
            raise InputError(f"sweep.trials={self.trials}: the {self.kind} has {len(self.grid())} points")

    def _check_list(self) -> None:
        if not self.points or self.space:
            raise InputError("sweep.kind=list: give the trials by sweep.points, and no sweep.space")
        for number, point in enumerate(self.points):
            check_scalars(f"sweep.points, number {number}", point.values())

    @property
    def size(self) -> int:
        """How many trials there are in all."""
        return self.trials if self.trials is not None else len(self.grid())

    def grid(self) -> list[dict[str, Any]]:
        """The points of a grid or list in order: the values of each, by parameter (see `key_of`)."""
        if self.kind == "list":
            return self.points
        choices = (parameter.choices for parameter in self.space.values())
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)]

    def key_of(self, parameter: str) -> str:
        """The recipe's key or group that a parameter stands for."""
        return self.space[parameter].key if parameter in self.space else parameter


def check_scalars(name: str, values: Any) -> None:
    """Raise an InputError unless `values` are numbers, booleans, texts or null."""
    for value in values:
        if not isinstance(value, bool | int | float | str | None):
            raise InputError(f"{name}: {value}: write a list or mapping as a text, such as '[1,2]'")
