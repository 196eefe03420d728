"""The machines that a job runs on."""

from dataclasses import dataclass

from csc_train.errors import check_choice, check_range


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

    def __post_init__(self):
        check_range("topology.nodes", self.nodes, 1)
        check_range("topology.processes_per_node", self.processes_per_node, 1)
        check_choice("topology.device", self.device, ("cpu", "cuda"))
        check_choice("topology.scheduler", self.scheduler, ("local", "slurm"))
        check_choice("topology.launcher", self.launcher, ("torchrun", "accelerate"))

    @property
    def processes(self) -> int:
        """All processes of the job."""
        return self.nodes * self.processes_per_node
