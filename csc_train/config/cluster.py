"""Settings of the cluster, the preflight, sweeps and the recipe that follows a training."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from csc_train.config.schedulers import KubernetesConfig, SkyPilotConfig, SlurmConfig
from csc_train.errors import InputError, check_fields, check_range


@dataclass
class ClusterConfig:
    """The machines of a job (the `cluster` group)."""

    name: str = "cpu2"
    """Name of the cluster in messages."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 2
    """GPUs of each node, with one process per GPU; the number of processes per node on CPUs."""
    device: str = "cpu"
    """Device of the training: cpu or cuda."""
    gpu: str | None = None
    """Name of the GPU; null on CPUs."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU, in GiB."""
    gpu_tflops: float | None = None
    """Dense bf16 TFLOP/s of one GPU, from its data sheet."""
    gpu_bandwidth_gbs: float | None = None
    """Memory bandwidth of one GPU, in GB/s, from its data sheet. Only estimates of evaluations use it."""
    host_memory_gib: float | None = None
    """Memory of one node, in GiB."""
    scheduler: str = "local"
    """local: start the job on this machine. slurm, kubernetes, skypilot: submit it. Or the name of one that a plugin
    registers."""
    launcher_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that launcher."""
    process_launcher: str = "torchrun"
    """Program that starts the processes of a node: torchrun or accelerate. none: one process that sees all
    `gpus_per_node` GPUs, such as for the evaluation of a model that needs several."""
    port: int = 29500
    """First of 1000 rendezvous ports; a SLURM job takes `port` + job number modulo 1000,
    others take `port`."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    skypilot: SkyPilotConfig = field(default_factory=SkyPilotConfig)

    def __post_init__(self):
        check_fields("cluster.", self, "nodes", "gpus_per_node", low=1, high=10**6)
        check_fields("cluster.", self, "gpu_memory_gib", "gpu_tflops", "host_memory_gib", "gpu_bandwidth_gbs", low=0.01)
        check_fields("cluster.", self, "device", choices=("cpu", "cuda"))
        check_fields("cluster.", self, "process_launcher", choices=("torchrun", "accelerate", "none"))
        if self.process_launcher == "none" and self.nodes > 1:
            raise InputError("cluster.process_launcher=none: one process has one node: set cluster.nodes=1")
        check_fields("cluster.", self, "port", low=1024, high=64535)
        check_range("cluster.slurm.nodes_min", self.slurm.nodes_min, 1, self.nodes)
        if self.slurm.nodes_min and self.process_launcher != "torchrun":
            raise InputError(f"cluster.process_launcher={self.process_launcher}: nodes_min needs torchrun")

    @property
    def world_size(self) -> int:
        """Number of processes of the job, over all nodes."""
        return 1 if self.process_launcher == "none" else self.nodes * self.gpus_per_node

    @property
    def gpus(self) -> int:
        """Number of GPUs of the job, over all nodes; 0 on CPUs."""
        return self.nodes * self.gpus_per_node if self.device == "cuda" else 0


@dataclass
class PreflightConfig:
    """Checks of a training before it starts."""

    force: bool = False
    """Launch even if a check failed."""
    probe: bool = True
    """Ask nvidia-smi for this machine's GPUs and their free memory."""
    mfu: float = 0.4
    """Assumed model FLOPs utilization: fraction of `cluster.gpu_tflops`. Only the estimate of hours uses it."""
    dialogues: int | None = None
    """Number of dialogues for the estimate if the data cannot be read yet."""
    evaluation_dialogues: int | None = None
    """The same of the evaluation dialogues; defaults to `dialogues`."""
    tokens_per_dialogue: int | None = None
    """Mean tokens per dialogue for the estimate if the data cannot be read yet."""

    def __post_init__(self):
        check_fields("preflight.", self, "mfu", low=0.01, high=1)
        check_fields("preflight.", self, "dialogues", "evaluation_dialogues", "tokens_per_dialogue", low=1)


@dataclass
class OnFinishConfig:
    """The recipe that starts when the training ends (the `on_finish` group)."""

    recipe: str | None = None
    """evaluate: evaluate the final model, into the run directory's `evaluation`."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of that recipe. Write each as `on_finish.KEY=VALUE`, such as `on_finish.data=rolecs` and
    `on_finish.evaluation.base=false`. They are checked before the training starts."""

    def __post_init__(self):
        check_fields("on_finish.", self, "recipe", choices=("evaluate",))
        if self.overrides and not self.recipe:
            raise InputError(f"on_finish.overrides={self.overrides}: name the recipe too: on_finish=evaluate")


@dataclass
class ParameterConfig:
    """A setting that a sweep varies."""

    key: str = ""
    """Key or group of the recipe, such as `trainer.learning_rate` or `adapter`."""
    type: str = "float"
    """float, int: from `low` to `high`. categorical: one of `choices`."""
    low: float | None = None
    """Smallest value of a float or int."""
    high: float | None = None
    """Largest value of a float or int."""
    log: bool = False
    """Sample uniformly in the logarithm of the value."""
    step: float | None = None
    """Only sample `low` plus multiples of this step."""
    choices: list[Any] = field(default_factory=list)
    """Values of a categorical parameter: numbers, booleans, or text as it stands on the command line after `key=`."""

    def check(self, name: str) -> None:
        """Check the range or the choices.

        Args:
            name: place of the parameter, for the message.

        Raises:
            InputError: they are missing or contradict each other.
        """
        if not self.key:
            raise InputError(f"{name}.key is required: give {name}.key=...")
        check_fields(f"{name}.", self, "type", choices=("float", "int", "categorical"))
        if self.type == "categorical":
            if (self.low, self.high, self.step, self.log) != (None, None, None, False) or not self.choices:
                raise InputError(f"{name}: a categorical parameter has choices, and no low, high, step or log")
            check_scalars(f"{name}.choices", self.choices)
            return
        if self.low is None or self.high is None or not self.low < self.high or self.choices:
            raise InputError(f"{name}: type={self.type} needs low below high, and no choices")
        if self.log and (self.low <= 0 or self.step is not None):
            raise InputError(f"{name}: log=true needs low above 0 and no step")
        if self.step is not None and self.step <= 0:
            raise InputError(f"{name}.step={self.step}: must be above 0")
        if self.type == "int" and any(value % 1 for value in (self.low, self.high, self.step or 1)):
            raise InputError(f"{name}: type=int needs whole numbers for low, high and step")


@dataclass
class PrunerConfig:
    """When a trial ends early because of its metric so far."""

    kind: str = "none"
    """none: prune no trial. median: prune a trial that is worse than the median of earlier ones at the same step.
    asha: at steps that grow by `reduction_factor`, continue only the best part of the trials that came so far.
    hyperband: several of these with different first steps."""
    startup_trials: int = 5
    """median: number of trials that are never pruned."""
    first_step: int = 1
    """First optimizer step at which a trial may be pruned."""
    reduction_factor: int | None = None
    """asha, hyperband: one of so many trials continues. Defaults to 4 of asha and 3 of hyperband, as in Optuna."""

    def __post_init__(self):
        check_fields("sweep.pruner.", self, "kind", choices=("none", "median", "asha", "hyperband"))
        check_fields("sweep.pruner.", self, "startup_trials", "first_step", low=1)
        check_fields("sweep.pruner.", self, "reduction_factor", low=2)
        if self.reduction_factor is not None and self.kind not in ("asha", "hyperband"):
            raise InputError(f"sweep.pruner.reduction_factor={self.reduction_factor}: only asha and hyperband have one")


@dataclass
class SweepConfig:
    """Search space, trials and metric of a sweep (the `sweep` group)."""

    name: str = "sweep"
    """Name of the sweep."""
    directory: str | None = None
    """Directory of the study, the summary and the run directories `trial-N`; defaults to runs/sweeps/<name>. A sweep
    that it holds is resumed."""
    kind: str = "optuna"
    """optuna: sample `space` with Optuna's TPE sampler. grid: all combinations of the choices in `space`. list:
    `points`."""
    space: dict[str, ParameterConfig] = field(default_factory=dict)
    """Parameters of the search space, by name."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """list: the values of each trial by key or group of the recipe, written as in `ParameterConfig.choices`."""
    trials: int | None = None
    """Total number of trials, including failed ones; defaults to all points of a grid or list."""
    metric: str = "eval_loss"
    """A logged metric of the training. It prunes trials while they run; its final value ranks them."""
    direction: str = "minimize"
    """minimize or maximize the metric."""
    seed: int = 0
    """Seed of the sampler."""
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    parallel: int | None = None
    """Number of trials at the same time, or of SLURM jobs in the queue; defaults to as many as fit on the free GPUs,
    else 1."""
    poll: float = 5.0
    """Seconds between checks of the running trials."""
    budget_gpu_hours: float | None = None
    """GPU hours of all trials together; on CPUs, hours of their processes. No trial starts that would exceed it, by the
    median of ended ones; trials that run when it is used up save a checkpoint. A greater budget resumes them."""
    keep: str = "all"
    """all: each trial keeps its model and checkpoints. best: only the best `keep_number` trials do, once they end; the
    others keep configuration, history and metrics."""
    keep_number: int = 1
    """best: the number of trials."""
    warm_start: str | None = None
    """Directory of an earlier sweep: its complete trials teach the sampler. They are no trials of this sweep."""

    def __post_init__(self):
        check_fields("sweep.", self, "kind", choices=("optuna", "grid", "list"))
        check_fields("sweep.", self, "direction", choices=("minimize", "maximize"))
        check_fields("sweep.", self, "poll", low=0.1)
        check_fields("sweep.", self, "seed", low=0, high=2**31)
        check_fields("sweep.", self, "trials", "parallel", "keep_number", low=1)
        check_fields("sweep.", self, "budget_gpu_hours", low=0.0001)
        check_fields("sweep.", self, "keep", choices=("all", "best"))
        if self.warm_start is not None and self.kind != "optuna":
            raise InputError(f"sweep.warm_start={self.warm_start}: a {self.kind} samples nothing: leave it out")
        for name, parameter in self.space.items():
            parameter.check(f"sweep.space.{name}")
            if self.kind == "grid" and parameter.type != "categorical":
                raise InputError(
                    f"sweep.space.{name}.type={parameter.type}: a grid needs type=categorical with choices"
                )
        for number, point in enumerate(self.points):
            check_scalars(f"sweep.points, number {number}", point.values())
        wanted, other = ("points", "space") if self.kind == "list" else ("space", "points")
        if not getattr(self, wanted) or getattr(self, other):
            raise InputError(f"sweep.kind={self.kind}: give the values by sweep.{wanted}, and no sweep.{other}")
        if self.kind == "optuna" and self.trials is None:
            raise InputError("sweep.trials is required: give sweep.trials=...")
        if self.kind != "optuna" and (self.trials or 0) > len(self.grid()):
            raise InputError(f"sweep.trials={self.trials}: the {self.kind} has {len(self.grid())} points: lower it")

    @property
    def size(self) -> int:
        """Total number of trials."""
        return self.trials if self.trials is not None else len(self.grid())

    def grid(self) -> list[dict[str, Any]]:
        """The points of a grid or list in order, each with its values by parameter name (see `override_key`)."""
        if self.kind == "list":
            return self.points
        choices = (parameter.choices for parameter in self.space.values())
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)]

    def override_key(self, parameter: str) -> str:
        """The recipe's key or group of a parameter name."""
        return self.space[parameter].key if parameter in self.space else parameter


def check_scalars(name: str, values: Any) -> None:
    """Raise an InputError unless all `values` are numbers, booleans, text or null."""
    for value in values:
        if not isinstance(value, bool | int | float | str | None):
            raise InputError(f"{name}: {value}: write a list or mapping as text, such as '[1,2]'")
