"""Settings of the schedulers that a job is submitted to: SLURM, Kubernetes, SkyPilot."""

import re
from dataclasses import dataclass, field
from typing import Any

from csc_train.errors import InputError, check_fields

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""A name of Kubernetes by RFC 1123: lower-case letters, digits and dashes."""
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
"""Such names with dots between them."""
QUANTITY = r"(?=.*[1-9])(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[munkMGTPE]|[eE][+-]?\d+)?"
"""An amount of CPU or memory above zero, as Kubernetes writes it."""
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
"""The name of an environment variable."""
SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|KEY)$", re.IGNORECASE)
"""Names of environment variables whose values are most likely secret."""


@dataclass
class SlurmConfig:
    """How a job is submitted to SLURM. Unset values default to those of the SLURM installation."""

    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    time: str | None = None
    """Time limit of the job, such as `24:00:00` or `2-00:00:00`."""
    cpus: int | None = None
    """CPU cores per node; defaults to the whole node with all its memory."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, such as `--qos=high`."""
    srun_options: list[str] = field(default_factory=list)
    """More options of srun, such as `--container-image=...`."""
    prologue: list[str] = field(default_factory=list)
    """Lines of shell at the start of the job: modules, an environment to activate, NCCL variables."""
    python: str = "python"
    """Python interpreter on the nodes, after the prologue."""
    requeue: bool = True
    """Queue the job again after its time limit or a node failure; it resumes from the last checkpoint."""
    save_before: int = 300
    """Seconds before the time limit at which the job saves a checkpoint and ends."""
    nodes_min: int | None = None
    """The fewest nodes on which the job starts or is queued again, such as after a node failure; defaults to
    `cluster.nodes`. Of the nodes that SLURM gives, as many work as divide the packs of a step."""

    def __post_init__(self):
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise InputError(f"cluster.slurm.time={self.time}: write hours as 24:00:00, days as 2-00:00:00")
        check_fields("cluster.slurm.", self, "cpus", "nodes_min", low=1)
        check_fields("cluster.slurm.", self, "save_before", low=0, high=65535)
        for key in ("options", "srun_options"):
            for option in getattr(self, key):
                if not option.startswith("-"):
                    raise InputError(f"cluster.slurm.{key}: {option} is no option; options start with -")


@dataclass
class TolerationConfig:
    """A taint that the pods of a job tolerate."""

    key: str | None = None
    """Key of the taint; null tolerates all taints, with operator Exists."""
    operator: str = "Exists"
    """Exists: any value. Equal: `value`."""
    value: str | None = None
    """Value of the taint."""
    effect: str | None = None
    """NoSchedule, PreferNoSchedule or NoExecute; null tolerates all."""

    def __post_init__(self):
        place = "cluster.kubernetes.tolerations."
        check_fields(place, self, "operator", choices=("Exists", "Equal"))
        check_fields(place, self, "effect", choices=("NoSchedule", "PreferNoSchedule", "NoExecute"))
        if (self.value is None) != (self.operator == "Exists") or (self.key is None and self.operator == "Equal"):
            raise InputError(f"{place}operator={self.operator}: Exists takes no value; Equal needs key and value")


@dataclass
class KubernetesConfig:
    """How a job is submitted to Kubernetes, as an Indexed Job with one pod for each node."""

    image: str | None = None
    """Container image with this project and its packages."""
    image_pull_policy: str = "IfNotPresent"
    """When a node pulls the image: IfNotPresent, Always or Never."""
    image_pull_secrets: list[str] = field(default_factory=list)
    """Names of the Secrets that the image is pulled with."""
    namespace: str = "default"
    """Namespace of the job."""
    mounts: dict[str, str] = field(default_factory=dict)
    """Path in the pods by PersistentVolumeClaim. One holds the run directory, and all pods can write to it."""
    working_directory: str = "/opt/csc_train"
    """Directory in the image with `recipes/`. Relative paths, such as `runs/first`, begin there."""
    service_account: str | None = None
    """Service account of the pods."""
    fs_group: int | None = None
    """Group that owns the volumes, for an image whose user is not root."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may run the job."""
    tolerations: list[TolerationConfig] = field(default_factory=list)
    """Taints that the pods tolerate."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPUs among a node's resources; a pod takes `cluster.gpus_per_node`."""
    resources: dict[str, str] = field(default_factory=dict)
    """Further resources of a pod, requested and limited, such as cpu, memory or rdma/ib."""
    shm_size: str | None = "16Gi"
    """Size of /dev/shm, through which the ranks of a node communicate; it counts as memory of the pod."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variables from Secrets: each `NAME/KEY`, such as hub/token, never the value."""
    prologue: list[str] = field(default_factory=list)
    """Lines of bash before the job."""
    python: str = "python"
    """Python interpreter in the image, after the prologue."""
    grace: int = 300
    """Seconds from the signal to end until a pod is killed: time to save a checkpoint."""
    retries: int = 10
    """Number of failures that restart all pods, which resume from the last checkpoint. Evictions do not count."""

    def __post_init__(self):
        place = "cluster.kubernetes."
        check_fields(place, self, "image_pull_policy", choices=("IfNotPresent", "Always", "Never"))
        check_fields(place, self, "grace", "retries", "fs_group", low=0, high=2**31 - 1)
        check_texts(place, self, "namespace", LABEL, "must be lower-case letters, digits and dashes")
        for name in ("service_account", "image_pull_secrets"):
            check_texts(place, self, name, SUBDOMAIN, "must be lower-case letters, digits, dashes and dots")
        for name in ("resources", "shm_size"):
            check_texts(place, self, name, QUANTITY, "must be a quantity above 0, such as 500m, 8, 512Mi or 64Gi")
        check_mounts(place, self.mounts, SUBDOMAIN)
        check_texts(place, self, "working_directory", "/.*", "must be an absolute path")
        check_environment(place, [*self.env, *self.secrets], self.env)
        for name, source in self.secrets.items():
            if not re.fullmatch(rf"{SUBDOMAIN}/[\w.-]+", source, re.ASCII):  # the value may be the secret itself
                raise InputError(f"{place}secrets.{name}: give the Secret's name and key as NAME/KEY, never its value")


@dataclass
class SkyPilotConfig:
    """How a job is submitted to SkyPilot, as a managed job that recovers from the loss of its machines."""

    infra: str | None = None
    """Where to run, such as aws, gcp/us-central1 or k8s/my-context; SkyPilot chooses if null."""
    accelerator: str | None = None
    """SkyPilot's name of the GPU, such as H100; each node has `cluster.gpus_per_node`."""
    use_spot: bool = True
    """Take spot machines; after a preemption the job resumes on others."""
    cpus: str | None = None
    """CPU cores of a node, such as 32, or 32+ for at least as many."""
    memory: str | None = None
    """GB of memory of a node, such as 256, or 256+ for at least as many."""
    disk_size: int | None = None
    """Size of a node's disk, in GB."""
    image_id: str | None = None
    """Image of the machines, such as `docker:NAME:TAG`."""
    workdir: str | None = "."
    """Directory of this machine that is copied to each node: the project."""
    working_directory: str | None = None
    """Directory on the nodes with `recipes/`; defaults to the copy of `workdir`. Relative paths begin there."""
    mounts: dict[str, str] = field(default_factory=dict)
    """Path on the nodes by bucket, such as `s3://my-runs`, or by SkyPilot volume. One holds the run directory."""
    mount_mode: str = "MOUNT_CACHED"
    """How buckets are mounted: MOUNT_CACHED, or MOUNT, which writes through and supports no changes of a file."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    secrets: list[str] = field(default_factory=list)
    """Names of secret environment variables; `sky` reads their values where the job is submitted."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that prepare a machine once, such as the installation of the packages."""
    prologue: list[str] = field(default_factory=list)
    """Lines of bash before the job."""
    python: str = "python"
    """Python interpreter on the nodes, after the prologue."""
    retries: int = 3
    """Number of failures of the job after which it is restarted and resumes. Preemptions do not count."""

    def __post_init__(self):
        place = "cluster.skypilot."
        check_fields(place, self, "mount_mode", choices=("MOUNT_CACHED", "MOUNT"))
        check_fields(place, self, "retries", low=0, high=2**31 - 1)
        check_fields(place, self, "disk_size", low=1)
        check_texts(place, self, "accelerator", r"[\w.-]+", "must be a name, such as H100; gpus_per_node counts them")
        for name in ("cpus", "memory"):
            check_texts(place, self, name, r"\d+(\.\d+)?\+?", "must be a number, such as 32, or 32+")
        check_texts(place, self, "working_directory", "/.*", "must be an absolute path")
        check_mounts(place, self.mounts, rf"[a-z0-9]+://\S+|{SUBDOMAIN}")
        check_environment(place, [*self.env, *self.secrets], self.env)


def check_texts(place: str, config: Any, name: str, pattern: str, what: str) -> None:
    """Check a text, or each of a list or mapping, against a pattern; null passes.

    Args:
        place: place of the section; messages begin with it and the field's name.
        what: what the text must be, for the message.

    Raises:
        InputError: a text differs.
    """
    value = getattr(config, name)
    entries = value.items() if isinstance(value, dict) else [("", each) for each in value or ()]
    entries = [("", value)] if isinstance(value, str) else entries
    for key, text in entries:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise InputError(f"{place}{name}{key and '.'}{key}={text}: {what}")


def check_mounts(place: str, mounts: dict[str, str], pattern: str) -> None:
    """Check mounts: the name of each by a pattern, and its path.

    Raises:
        InputError: one is wrong, or two have the same path.
    """
    for name, path in mounts.items():
        if not re.fullmatch(pattern, name, re.ASCII):
            raise InputError(f"{place}mounts: {name}: no name of a volume: use lower-case letters, digits and dashes")
        if path.strip("/.") != (path.lstrip("/") or None) or list(mounts.values()).count(path) > 1:
            raise InputError(f"{place}mounts.{name}={path}: must be a path of its own, without a final slash")


def check_environment(place: str, names: list[str], env: dict[str, str]) -> None:
    """Check the names of environment variables; a variable of `env` must not look like a secret.

    Raises:
        InputError: a name is wrong or occurs twice, or the variable belongs to `secrets`; the message has no value.
    """
    for name in names:
        if not re.fullmatch(VARIABLE, name, re.ASCII) or names.count(name) > 1:
            raise InputError(f"{place}env, secrets: each environment variable once, of letters, digits and _")
    if secret := [name for name in env if SECRET_VARIABLE.search(name)]:
        raise InputError(f"{place}env.{secret[0]}: looks like a secret: name it in {place}secrets, without its value")
