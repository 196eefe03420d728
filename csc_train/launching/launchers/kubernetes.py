"""The Kubernetes launcher: an Indexed Job with one pod for each node, submitted and watched by kubectl."""

import signal
from typing import Any

from csc_train.errors import InputError
from csc_train.launching.launchers.base import register_launcher
from csc_train.launching.launchers.submitted import ManifestLauncher

LABEL = "csc-train/job"
"""Label of a job's pods, by which its Service finds them."""
EXIT_REFUSED = 2
"""Exit status of a recipe that refuses its input, and would again."""


@register_launcher("kubernetes")
class KubernetesLauncher(ManifestLauncher):
    """Submits an Indexed Job and a headless Service, which gives the first pod a name for the rendezvous.

    The Job replaces a pod that fails or is lost. The other pods fail too, since they lose a peer, and are replaced;
    together they resume from the last checkpoint.
    """

    tool = "kubectl"
    file = "job.yaml"

    def check(self) -> None:
        """Refuse a job without an image."""
        if not self.options.image:
            raise InputError("cluster.kubernetes.image is required: give the image that holds this project")
        super().check()

    @staticmethod
    def quote(word: str) -> str:
        """Kubernetes expands `$(NAME)` in words and values, and reads `$$` as `$`."""
        return word.replace("$", "$$")

    def manifest(self) -> list[dict[str, Any]]:
        """The Service and the Job."""
        cluster, options = self.job.cluster, self.options
        command = self.command("$(JOB_COMPLETION_INDEX)", f"{self.name}-0.{self.name}")
        if options.prologue:
            script = "\n".join([*options.prologue, 'exec "$@"'])
            command = ["bash", "-c", self.quote(script), "bash", *command]
        gpus = {options.gpu_resource: str(cluster.gpus_per_node)} if cluster.device == "cuda" else {}
        return self.fill(
            "kubernetes.yaml.jinja",
            label=LABEL,
            command=command,
            environment={name: self.quote(value) for name, value in self.environment().items()},
            resources=options.resources | gpus,
            mounts=self.mounts.values(),
            tolerations=[
                {key: value for key, value in vars(each).items() if value is not None} for each in options.tolerations
            ],
            exit_refused=EXIT_REFUSED,
        )

    def submission(self) -> list[str]:
        """`kubectl apply` of the manifests."""
        return ["kubectl", "apply", "--filename", str(self.path)]

    def start(self) -> None:
        """Submit the job; what is left of an earlier one of this run is deleted.

        Raises:
            InputError: the earlier one still runs, or kubectl refuses the manifests.
        """
        if (conditions := self._conditions(self.name)) is not None:
            if not conditions & {"Complete", "Failed"}:
                raise InputError(f"job {self.name} of {self.job.directory} still runs: wait for its end, or delete it")
            self._delete(self.name)
        self.submit()
        self.job_id = self.name

    def ended(self, job_id: str) -> int | None:
        """By the conditions of the Job: Complete or Failed."""
        conditions = self._conditions(job_id)
        if conditions is None or "Failed" in conditions:
            return 1
        return 0 if "Complete" in conditions else None

    def _conditions(self, name: str) -> set[str] | None:
        """The conditions that are true of a Job; None if there is no such Job."""
        place = ["--namespace", self.options.namespace]
        job = self.ask("get", "job", name, *place, "--ignore-not-found", "--output", "json")
        conditions = job and job.get("status", {}).get("conditions", [])
        return job and {each["type"] for each in conditions if each["status"] == "True"}

    def _delete(self, name: str, *options: str) -> None:
        self.call("delete", "job,service", name, "--namespace", self.options.namespace, "--ignore-not-found", *options)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Delete the Job; its pods have `cluster.kubernetes.grace` seconds to save a checkpoint."""
        self._delete(str(self.job_id), "--wait=false")
