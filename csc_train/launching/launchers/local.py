"""The local launcher: starts the ranks on this machine, under a supervisor process."""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError
from csc_train.launching import supervise
from csc_train.launching.gpus import free_gpus
from csc_train.launching.launch_commands import local_command
from csc_train.launching.launchers.base import Launcher, register_launcher
from csc_train.runs.distributed import set_parent_death_signal


@register_launcher("local")
class LocalLauncher(Launcher):
    """Starts a supervisor (see `supervise`) and below it torchrun, accelerate or the recipe."""

    attached = True
    process: subprocess.Popen

    @classmethod
    def slots(cls, cluster: ClusterConfig, parallel: int | None) -> list[dict[str, str]]:
        """`gpus_per_node` free GPUs for each job; as many jobs as fit if `parallel` is None. On a CPU one job.

        Raises:
            InputError: too few GPUs are free.
        """
        if cluster.device == "cpu":
            return super().slots(cluster, parallel)
        free, each, wanted = free_gpus(), cluster.gpus_per_node, parallel or 1
        groups = [free[first : first + each] for first in range(0, len(free) - each + 1, each)]
        if len(groups) < wanted:
            raise InputError(
                f"{wanted} jobs of cluster.gpus_per_node={each} need {wanted * each} GPUs; "
                f"{len(free)} are free on this machine"
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:parallel]]

    def check(self) -> None:
        """Refuse several nodes."""
        if self.job.cluster.nodes > 1:
            nodes = self.job.cluster.nodes
            raise InputError(f"cluster.nodes={nodes}: several nodes need cluster.scheduler=slurm|kubernetes|skypilot")

    def command(self) -> list[str]:
        """The command below the supervisor (see `launch_commands`)."""
        return local_command(self.job.cluster, sys.executable, [self.job.script, *self.job.arguments])

    def environment(self) -> dict[str, str]:
        """Extra environment variables of the ranks."""
        return self.job.environment | ({"CUDA_VISIBLE_DEVICES": ""} if self.job.cluster.device == "cpu" else {})

    def describe(self) -> str:
        """The command as one line of shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment().items()]
        return " ".join([*variables, shlex.join(self.command())])

    def start(self) -> None:
        """Start the supervisor in a new session, so that Ctrl-C in a terminal only reaches this process."""
        with ExitStack() as stack:
            output = self.job.output and stack.enter_context(open(self.job.output, "a", encoding="utf-8"))
            self.process = subprocess.Popen(
                [sys.executable, "-m", supervise.__name__, str(self.job.directory), *self.command()],
                env=os.environ | self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=set_parent_death_signal,
                pass_fds=self.job.inherited,
            )

    def poll(self) -> int | None:
        """The supervisor's exit status (see `supervise`), or None while it runs."""
        status = self.process.poll()
        return status if status is None or status >= 0 else 128 - status

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Send a signal to the supervisor, which forwards the first one and kills the ranks on the second."""
        self.process.send_signal(signum)
