"""The command that starts a recipe's processes on one node."""

from csc_train.config.cluster import ClusterConfig


def local_command(topology: ClusterConfig, python: str, script: str, arguments: list[str]) -> list[str]:
    """The command for a job that is this machine alone.

    Args:
        python: the Python to run.
        script: path of the recipe.
        arguments: the recipe's.
    """
    # Each finds a free port.
    meeting = {"torchrun": ["--standalone"], "accelerate": ["--num_machines=1", "--main_process_port=0"]}
    return [python, "-m", *_launcher(topology), *meeting[topology.launcher], script, *arguments]


def node_command(topology: ClusterConfig, python: str, script: str, arguments: list[str]) -> str:
    """The command for each node of a SLURM job, as a line of shell that reads `head`, `port` and SLURM_NODEID."""
    if topology.launcher == "accelerate":
        meeting = [
            f"--num_machines={topology.nodes}",
            "--machine_rank=$SLURM_NODEID",
            "--main_process_ip=$head",
            "--main_process_port=$port",
        ]
    else:
        meeting = [
            f"--nnodes={topology.nodes}",
            "--node_rank=$SLURM_NODEID",
            "--master_addr=$head",
            "--master_port=$port",
        ]
    return " ".join([python, "-m", *_launcher(topology), *meeting, script, *arguments])


def _launcher(topology: ClusterConfig) -> list[str]:
    if topology.launcher == "torchrun":
        return ["torch.distributed.run", f"--nproc_per_node={topology.processes_per_node}"]
    several = ["--multi_gpu"] if topology.processes > 1 else []  # its name for several processes, on a CPU as well
    # Precision and compilation are the recipe's; unsaid, accelerate would take them from the user's own file.
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    return ["accelerate.commands.launch", *several, *plain, f"--num_processes={topology.processes}"]
