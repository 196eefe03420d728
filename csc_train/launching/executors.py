"""The trials of a sweep as jobs: on the free GPUs of this machine, or in SLURM's queue."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError, suggestion
from csc_train.files import read_json
from csc_train.launching import supervise
from csc_train.launching.job import SCRIPT_FILE, Job
from csc_train.launching.launchers.slurm import cancel, queued, submit
from csc_train.launching.preflight.checks import probe_gpus
from csc_train.runs.comparison import HISTORY_FILE, METRICS_FILE, last_metrics
from csc_train.runs.directory import RECORD_FILE
from csc_train.runs.distributed import set_parent_death_signal

OUTPUT = "output.log"
"""In a run directory: what the trial's processes printed."""
MAX_USED_FRACTION = 0.05
"""The share of a GPU's memory that may be in use for it to count as free, as in a preflight."""
ERROR_PATTERNS = (
    r"^error: (.+)$",
    r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception): .+)$",
    r"(Signal \d+ \(\w+\) received by PID \d+)",
    r"(\S.*)",
)
"""What a failed run printed last of the first of these is why: a recipe's own line, an exception, what torchrun says of
a rank that was killed, anything."""


class FailedTrialError(Exception):
    """A trial came to no result; the message says why."""


class NoSuchMetricError(InputError):
    """A trial came to its end and never logged what the sweep judges by."""


class LocalTrial:
    """A process group of its own on this machine, which ends when this process does."""

    def __init__(self, job: Job, variables: dict[str, str], lock: int):
        """Start it.

        Args:
            job: frozen in its directory.
            variables: of the environment, that place it.
            lock: a file descriptor that it holds open as long as it runs.
        """
        self.variables = variables
        with open(job.directory / OUTPUT, "a", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", supervise.__name__, str(job.directory), *job.command()],
                env=os.environ | job.environment() | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal reaches the sweep alone
                preexec_fn=set_parent_death_signal,
                pass_fds=(lock,),
            )

    def ended(self) -> bool:
        """Whether all its processes have ended."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """Tell it to save a state of training and end; once more, and it is killed."""
        self.process.terminate()


class LocalExecutor:
    """Places for trials on this machine.

    Attributes:
        count: how many trials run at a time.
    """

    def __init__(self, cluster: ClusterConfig, parallel: int | None, lock: int):
        """Find the places.

        Args:
            parallel: how many trials at a time; as many as fit on the free GPUs where not given, or one on a CPU.
            lock: see `LocalTrial`.

        Raises:
            InputError: fewer GPUs are free than the trials need.
        """
        self._lock = lock
        if cluster.device == "cpu":
            self._free: list[dict[str, str]] = [{}] * (parallel or 1)
        else:
            gpus, each = free_gpus(), cluster.gpus_per_node
            groups = [gpus[first : first + each] for first in range(0, len(gpus) - each + 1, each)]
            if len(groups) < (parallel or 1):
                raise InputError(
                    f"{parallel or 1} trials of cluster.gpus_per_node={each} need {(parallel or 1) * each} GPUs; "
                    f"{len(gpus)} are free on this machine"
                )
            self._free = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:parallel]]
        self.count = len(self._free)

    @property
    def first(self) -> dict[str, str]:
        """Variables of the place that is free next."""
        return self._free[0]

    def start(self, job: Job, attributes: dict[str, Any]) -> LocalTrial:
        """Start a frozen job on a free place, of which there must be one; `attributes` are left as they are."""
        return LocalTrial(job, self._free.pop(0), self._lock)

    def release(self, trial: LocalTrial) -> None:
        """Take back the place of a trial that has ended."""
        self._free.append(trial.variables)


class SlurmTrial:
    """A job in SLURM's queue; it goes on when this process ends."""

    def __init__(self, directory: Path, number: str):
        """Watch a job that was submitted.

        Args:
            directory: the run's.
            number: the job's.
        """
        self.directory, self.number = directory, number

    def ended(self) -> bool:
        """Whether its run is finished, or the job is gone from the queue."""
        return _record(self.directory).get("finished") is not None or not queued(self.number)

    def stop(self) -> None:
        """Cancel the job."""
        cancel(self.number)


class SlurmExecutor:
    """Places for trials in SLURM's queue.

    Attributes:
        count: how many trials wait or run at a time.
    """

    def __init__(self, parallel: int | None):
        """As many as `parallel`, or one."""
        self.count = parallel or 1
        self.first: dict[str, str] = {}

    def start(self, job: Job, attributes: dict[str, Any]) -> SlurmTrial:
        """Submit a frozen job, or watch on where it was submitted; its number is kept in `attributes`.

        Raises:
            InputError: it cannot be submitted.
        """
        if "job" not in attributes:
            answer = submit(job.directory / SCRIPT_FILE)
            if not (number := re.search(r"\d+", answer)):
                raise InputError(f"sbatch {job.directory / SCRIPT_FILE}: {answer!r} names no job")
            attributes["job"] = number.group()
        return SlurmTrial(job.directory, attributes["job"])

    def release(self, trial: SlurmTrial) -> None:
        """Nothing: the queue is not ours to hand out."""


def free_gpus() -> list[str]:
    """The numbers of the GPUs that this process sees and nobody uses, as CUDA_VISIBLE_DEVICES takes them."""
    gpus = probe_gpus() or []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.isdigit()]
    names = visible or [str(number) for number in range(len(gpus))]
    return [name for name, gpu in zip(names, gpus, strict=False) if gpu.used <= MAX_USED_FRACTION * gpu.memory]


class MetricTail:
    """The values of one figure in the history of a run, as they come."""

    def __init__(self, directory: Path, name: str):
        """Follow a run.

        Args:
            directory: the run's.
            name: of the figure.
        """
        self.path, self.name, self._read = directory / HISTORY_FILE, name, 0

    def new(self) -> list[tuple[int, float]]:
        """(optimizer step, value) of the lines that are new; all of them again where the history was cut."""
        if not self.path.is_file():
            return []
        if self.path.stat().st_size < self._read:
            self._read = 0
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        lines = [json.loads(line) for line in whole.splitlines()]
        return [(line["step"], line[self.name]) for line in lines if self.name in line]


def trial_result(directory: Path, metric: str) -> float:
    """What a trial that has ended is judged by.

    Raises:
        FailedTrialError: it did not come to its end, or to no number.
        NoSuchMetricError: it came to its end, and logged no such figure.
    """
    if not _record(directory).get("finished"):
        raise FailedTrialError(why_failed(directory))
    logged = last_metrics(read_json(directory / METRICS_FILE))
    if metric not in logged:
        raise NoSuchMetricError(
            f"sweep.metric={metric}: {directory} logged no such metric.{suggestion(metric, logged)} "
            f"See its {METRICS_FILE}"
        )
    if not isinstance(logged[metric], int | float) or not math.isfinite(logged[metric]):
        raise FailedTrialError(f"{metric} is {logged[metric]}")
    return float(logged[metric])


def why_failed(directory: Path) -> str:
    """In one line, why a run ended before its end: what it recorded of it, else the last that it printed."""
    record = _record(directory)
    if record.get("status") == "stopped":
        return "stopped from outside before its end"
    outputs = [directory / OUTPUT, *sorted(directory.glob("slurm-*.out"))]
    text = "\n".join(path.read_text("utf-8", "replace") for path in outputs if path.is_file())
    found = (matches[-1] for pattern in ERROR_PATTERNS if (matches := re.findall(pattern, text, re.MULTILINE)))
    reason = record.get("error") or next(found, "ended without a word; it may have been killed")
    return f"out of memory: {reason}" if re.search(r"out of memory|OutOfMemory|can't allocate", reason) else reason


def _record(directory: Path) -> dict[str, Any]:
    return read_json(directory / RECORD_FILE) if (directory / RECORD_FILE).is_file() else {}
