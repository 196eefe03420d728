"""The SLURM launcher: writes a job script, submits it with sbatch and watches it with squeue."""

import re
import signal
import subprocess
from pathlib import Path

from csc_train.errors import InputError
from csc_train.files import write_text
from csc_train.launching.launch_commands import node_command
from csc_train.launching.launchers.base import Launcher, register_launcher
from csc_train.runs.claim import is_claimed
from csc_train.runs.directory import read_run_record
from csc_train.templates import render


@register_launcher("slurm")
class SlurmLauncher(Launcher):
    """Submits a job script that runs a supervisor on each node; the job outlives this process."""

    tool = "sbatch"
    file = "job.sbatch"

    @property
    def script_path(self) -> Path:
        """Where the job script is written."""
        return self.job.directory / str(self.file)

    def script(self) -> str:
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
        self.script()

    def describe(self) -> str:
        """The sbatch command and the job script."""
        return f"sbatch {self.script_path}, which is:\n\n{self.script()}"

    def start(self) -> None:
        """Write the job script and submit it.

        Raises:
            InputError: sbatch refuses the job.
        """
        write_text(self.script_path, self.script())
        done = subprocess.run(["sbatch", str(self.script_path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"sbatch {self.script_path}: {' '.join(done.stderr.split())}")
        if not (number := re.search(r"\d+", done.stdout)):
            raise InputError(f"sbatch {self.script_path}: expected a job number, got {done.stdout.strip()!r}")
        self.job_id = number.group()

    def poll(self) -> int | None:
        """0 if the run is finished, 1 if the job left the queue before; None while it waits or runs.

        A job counts as running while SLURM does not answer, or a process works in its directory.
        """
        if read_run_record(self.job.directory).get("finished"):
            return 0
        query = ["squeue", "--noheader", "--format=%T", f"--jobs={self.job_id}"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        gone = not done.stdout.strip() if done.returncode == 0 else "Invalid job id" in done.stderr
        return 1 if gone and not is_claimed(self.job.directory) else None

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Cancel the job; its ranks save a checkpoint if SLURM leaves them the time."""
        subprocess.run(["scancel", str(self.job_id)], capture_output=True, check=False)
