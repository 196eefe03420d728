"""The SkyPilot launcher: a managed job on machines of a cloud, submitted and watched by sky."""

import os
import shlex
import signal
from typing import Any

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError
from csc_train.launching.launchers.base import register_launcher
from csc_train.launching.launchers.submitted import ManifestLauncher


@register_launcher("skypilot")
class SkyPilotLauncher(ManifestLauncher):
    """Submits a managed job: SkyPilot starts it again on other machines if one is lost, and it resumes."""

    tool = "sky"
    file = "task.yaml"
    home = "~/sky_workdir"

    @classmethod
    def check_tool(cls, cluster: ClusterConfig) -> None:
        """Refuse secrets that are not set here, too, since `sky` reads them here."""
        super().check_tool(cluster)
        if absent := [name for name in cluster.skypilot.secrets if name not in os.environ]:
            raise InputError(f"cluster.skypilot.secrets: {absent[0]} is not set on this machine: export it")

    def check(self) -> None:
        """Refuse GPUs without a name."""
        if self.job.cluster.device == "cuda" and not self.options.accelerator:
            raise InputError("cluster.skypilot.accelerator is required: give SkyPilot's name of the GPU, such as H100")
        super().check()

    @staticmethod
    def quote(word: str) -> str:
        """The job is a script of bash."""
        return shlex.quote(word)

    def manifest(self) -> list[dict[str, Any]]:
        """The task."""
        buckets = {path: name for name, path in self.mounts.items() if "://" in name}
        return self.fill(
            "skypilot.yaml.jinja",
            quote=self.quote,
            command=self.command("$SKYPILOT_NODE_RANK", "$head"),
            environment=self.environment(),
            buckets={path: {"source": name, "mode": self.options.mount_mode} for path, name in buckets.items()},
            volumes={path: name for name, path in self.mounts.items() if path not in buckets},
        )

    def submission(self) -> list[str]:
        """`sky jobs launch` of the task."""
        secrets = [word for name in self.options.secrets for word in ("--secret", name)]
        return ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(self.path)]

    def start(self) -> None:
        """Submit the job.

        Raises:
            InputError: sky refuses the task.
        """
        self.submit()
        numbers = [each["job_id"] for each in self._queue() if each["job_name"] == self.name]
        if not numbers:
            raise InputError(f"sky jobs launch {self.path}: sky jobs queue shows no job {self.name}")
        self.job_id = str(max(numbers))

    def ended(self, job_id: str) -> int | None:
        """By the status in the queue."""
        states = {str(each["job_id"]): each["status"] for each in self._queue()}
        if states.get(job_id) == "SUCCEEDED":
            return 0
        return 1 if states.get(job_id, "FAILED").startswith(("FAILED", "CANCELLED")) else None

    def _queue(self) -> list[dict[str, Any]]:
        """The rows of `sky jobs queue`, with `job_id`, `job_name` and `status`."""
        return self.ask("jobs", "queue", "--all", "--output", "json") or []

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Cancel the job, after the upload of what it has written to buckets."""
        self.call("jobs", "cancel", "--yes", "--graceful", str(self.job_id))
