"""The command that starts a recipe's processes on one node."""

from csc_train.config.cluster import ClusterConfig


def local_command(cluster: ClusterConfig, python: str, script: str, arguments: list[str]) -> list[str]:
    """The command for a job that is this machine alone.

    Args:
        python: the Python to run.
        script: path of the recipe.
        arguments: the recipe's.
    """
    # Each finds a free port.
    meeting = {"torchrun": ["--standalone"], "accelerate": ["--num_machines=1", "--main_process_port=0"]}
    return [python, "-m", *_launcher(cluster), *meeting[cluster.launcher], script, *arguments]


def node_command(cluster: ClusterConfig, python: str, script: str, arguments: list[str]) -> str:
    """The command for each node of a SLURM job, as a line of shell that reads `head`, `port` and SLURM_NODEID."""
    if cluster.launcher == "accelerate":
        meeting = [
            f"--num_machines={cluster.nodes}",
            "--machine_rank=$SLURM_NODEID",
            "--main_process_ip=$head",
            "--main_process_port=$port",
        ]
    else:
        meeting = [
            f"--nnodes={cluster.nodes}",
            "--node_rank=$SLURM_NODEID",
            "--master_addr=$head",
            "--master_port=$port",
        ]
    return " ".join([python, "-m", *_launcher(cluster), *meeting, script, *arguments])


def _launcher(cluster: ClusterConfig) -> list[str]:
    if cluster.launcher == "torchrun":
        return ["torch.distributed.run", f"--nproc_per_node={cluster.gpus_per_node}"]
    several = ["--multi_gpu"] if cluster.world_size > 1 else []  # its name for several processes, on a CPU as well
    # Precision and compilation are the recipe's; unsaid, accelerate would take them from the user's own file.
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    return ["accelerate.commands.launch", *several, *plain, f"--num_processes={cluster.world_size}"]
