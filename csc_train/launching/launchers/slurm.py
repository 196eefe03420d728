"""A job for SLURM: its script, and handing it in."""

import re
import shutil
import subprocess
from pathlib import Path

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError
from csc_train.templates import render


def job_script(cluster: ClusterConfig, name: str, directory: Path, command: str) -> str:
    """The sbatch script that runs `command` on every node of a cluster.

    Args:
        name: of the job.
        directory: the run's; its path must mean the same on all nodes.
        command: see `commands.node_command`.

    Raises:
        InputError: a path in it needs quoting, which it would lose on its way through srun.
    """
    for text in (str(directory), command):
        if odd := re.search(r"[^\w./=:,$@% +-]", text):
            raise InputError(f"{odd.string}: {odd.group()!r} has a meaning in a job script; choose plainer paths")
    values = {"cluster": cluster, "slurm": cluster.slurm, "name": name, "directory": directory, "command": command}
    return render(__package__, "slurm.sbatch.jinja", **values)


def submit(script: Path) -> str:
    """Hand a job script to sbatch, and return what it says.

    Raises:
        InputError: there is no sbatch here, or it refuses the job; says why.
    """
    if shutil.which("sbatch") is None:
        raise InputError(f"there is no sbatch on this machine: submit {script} where there is one")
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"sbatch {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def queued(number: str) -> bool:
    """Whether a job waits or runs; also where SLURM cannot be asked just now.

    Args:
        number: the job's.
    """
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%T", f"--jobs={number}"], capture_output=True, text=True, check=False
    )
    return bool(done.stdout.strip()) if done.returncode == 0 else "Invalid job id" not in done.stderr


def cancel(number: str) -> None:
    """End a job; its ranks save a state of training if the cluster leaves them the time."""
    subprocess.run(["scancel", number], capture_output=True, check=False)
