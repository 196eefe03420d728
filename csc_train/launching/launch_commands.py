"""Commands that start a recipe's processes on one node: by torchrun, by accelerate, or as one process."""

from csc_train.config.cluster import ClusterConfig


def local_command(cluster: ClusterConfig, python: str, recipe: list[str]) -> list[str]:
    """The command of a job on one machine, whose own name need not resolve; a free port is chosen when it runs.

    Args:
        python: the Python interpreter.
        recipe: path of the recipe, then its arguments.
    """
    if cluster.process_launcher == "none":
        return [python, *recipe]
    accelerate = ["--num_machines=1", "--main_process_port=0"]
    rendezvous = accelerate if cluster.process_launcher == "accelerate" else ["--standalone", "--local_addr=localhost"]
    return [python, "-m", *_process_launcher(cluster), *rendezvous, *recipe]


def node_command(
    cluster: ClusterConfig, python: str, recipe: list[str], rank: str, head: str, port: str, nodes: str = ""
) -> list[str]:
    """The command of each node of a job.

    Args:
        rank: the node's number, or what a shell expands to it.
        head: host name of the first node, likewise.
        port: port of the rendezvous there, likewise.
        nodes: number of nodes, likewise; defaults to `cluster.nodes`.
    """
    if cluster.process_launcher == "none":
        return [python, *recipe]
    names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
    if cluster.process_launcher == "torchrun":
        names = ("nnodes", "node_rank", "master_addr", "master_port")
    values = (nodes or cluster.nodes, rank, head, port)
    rendezvous = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
    return [python, "-m", *_process_launcher(cluster), *rendezvous, *recipe]


def starts_ranks(command: list[str]) -> bool:
    """Whether the recipe runs in children of the process of such a command, as under torchrun and accelerate."""
    return command[1:2] == ["-m"]


def _process_launcher(cluster: ClusterConfig) -> list[str]:
    if cluster.process_launcher == "torchrun":
        return ["torch.distributed.run", f"--nproc_per_node={cluster.gpus_per_node}"]
    several = ["--multi_gpu"] if cluster.world_size > 1 else []  # accelerate's flag for several processes, CPU included
    # The recipe sets precision and compilation; without these flags accelerate reads them from the user's own file.
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    return ["accelerate.commands.launch", *several, *plain, f"--num_processes={cluster.world_size}"]
