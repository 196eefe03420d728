"""What a user may choose about the machines that a job runs on, and about what is checked before it starts."""

import re
from dataclasses import dataclass, field

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
            raise InputError(f"topology.slurm.time={self.time}: write hours as 24:00:00, days as 2-00:00:00")
        check_range("topology.slurm.cpus", self.cpus or 1, 1)
        check_range("topology.slurm.save_before", self.save_before, 0, 65535)
        for key in ("options", "srun_options"):
            for option in getattr(self, key):
                if not option.startswith("-"):
                    raise InputError(f"topology.slurm.{key}: {option} is no option; options start with -")


@dataclass
class TopologyConfig:
    """The machines that a job runs on (the `topology` group); one process for each GPU."""

    name: str = "cpu2"
    nodes: int = 1
    processes_per_node: int = 2
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
        check_range("topology.nodes", self.nodes, 1)
        check_range("topology.processes_per_node", self.processes_per_node, 1)
        check_choice("topology.device", self.device, ("cpu", "cuda"))
        check_choice("topology.scheduler", self.scheduler, ("local", "slurm"))
        check_choice("topology.launcher", self.launcher, ("torchrun", "accelerate"))
        check_range("topology.port", self.port, 1024, 64535)

    @property
    def processes(self) -> int:
        """All processes of the job."""
        return self.nodes * self.processes_per_node


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
class ThenConfig:
    """What is started when a training has ended."""

    recipe: str | None = None
    """evaluate: the evaluation of its checkpoint, into the run directory's `evaluation`."""
    overrides: list[str] = field(default_factory=list)
    """Settings of that recipe, each in quotes: `then.overrides=['data=rolecs','evaluation.base=false']`. Checked before
    the training starts."""

    def __post_init__(self):
        check_choice("then.recipe", self.recipe or "evaluate", ("evaluate",))
        if self.overrides and not self.recipe:
            raise InputError(f"then.overrides={self.overrides}: say of which recipe, by then=evaluate")
