"""The SLURM launcher: writes a job script, submits it with sbatch and watches it with squeue."""

import re
import signal
import subprocess

from csc_train.errors import InputError
from csc_train.launching.launch_commands import node_command
from csc_train.launching.launchers.base import register_launcher
from csc_train.launching.launchers.submitted import SubmittedLauncher
from csc_train.templates import render


@register_launcher("slurm")
class SlurmLauncher(SubmittedLauncher):
    """Submits a job script that runs a supervisor on each node."""

    tool = "sbatch"
    file = "job.sbatch"

    def text(self) -> str:
        """The job script. The run directory must have the same path on all nodes.

        Raises:
            InputError: a path needs shell quoting, which srun would lose.
        """
        cluster, directory = self.job.cluster, self.job.directory
        recipe, counts = [self.job.script, *self.job.arguments], self.job.nodes[::-1] if self.job.nodes[1:] else ()
        places = ("$SLURM_NODEID", "$head", "$port", "$nodes" if counts else "")
        command = " ".join(node_command(cluster, cluster.slurm.python, recipe, *places))
        for text, spaces in ((str(directory), ""), (command, " ")):
            if odd := re.search(rf"[^\w./=:,$@%+{spaces}-]", text):
                raise InputError(f"{odd.string}: a job script cannot hold {odd.group()!r}: choose a path without it")
        values = {"cluster": cluster, "slurm": cluster.slurm, "directory": directory, "command": command}
        values |= {"counts": counts}
        return render("csc_train.launching.launchers", "slurm.sbatch.jinja", **values)

    def check(self) -> None:
        """Refuse paths that need quoting."""
        self.text()

    def submission(self) -> list[str]:
        """`sbatch` of the job script."""
        return ["sbatch", str(self.path)]

    def start(self) -> None:
        """Submit the job.

        Raises:
            InputError: sbatch refuses it.
        """
        answer = self.submit()
        if not (number := re.search(r"\d+", answer)):
            raise InputError(f"sbatch {self.path}: expected a job number, got {answer.strip()!r}")
        self.job_id = number.group()

    def ended(self, job_id: str) -> int | None:
        """By the queue, which does not say how a job ended that has left it."""
        query = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        gone = not done.stdout.strip() if done.returncode == 0 else "Invalid job id" in done.stderr
        return 1 if gone else None

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Cancel the job; its ranks save a checkpoint if SLURM leaves them the time."""
        subprocess.run(["scancel", str(self.job_id)], capture_output=True, check=False)
