"""The launcher interface and the registry of launchers by `cluster.scheduler`."""

import abc
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError, suggestion
from csc_train.plugins import note_registration


@dataclass(frozen=True)
class JobSpec:
    """A recipe's processes on the machines of a cluster.

    Attributes:
        directory: the run directory, which holds the configuration that the ranks read.
        script: path of the recipe.
        arguments: command line of the recipe.
        environment: extra environment variables.
        output: the file that receives what the job prints; the terminal if None. Only for attached launchers.
        inherited: file descriptors that an attached job keeps open while it runs, such as a lock.
        config: the recipe's frozen configuration, for machines that cannot read it in the run directory.
        nodes: the numbers of nodes on which the job may run, ascending; only `cluster.nodes` if empty.
    """

    cluster: ClusterConfig
    directory: Path
    script: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    output: Path | None = None
    inherited: tuple[int, ...] = ()
    config: str = ""
    nodes: tuple[int, ...] = ()


class Launcher(abc.ABC):
    """Starts, watches and stops one job; an instance per job.

    Attributes:
        attached: whether the job ends with the process that started it. A detached job outlives it.
        shares_files: whether the job finds the files of this machine by the same paths.
        tool: the program that submits the job; None if there is none.
        file: name of the last submitted job in the run directory; None if there is none.
        job_id: the scheduler's number or name of a detached job, set by `start`. Set it to watch a job that was started
            earlier.
    """

    attached: ClassVar[bool] = False
    shares_files: ClassVar[bool] = True
    tool: ClassVar[str | None] = None
    file: ClassVar[str | None] = None

    def __init__(self, job: JobSpec):
        """Prepare a launch; nothing is started or written.

        Args:
            job: what to start.
        """
        self.job = job
        self.job_id: str | None = None

    @classmethod
    def slots(cls, cluster: ClusterConfig, parallel: int | None) -> list[dict[str, str]]:
        """Environment variables of each job that may run at the same time, such as its GPUs.

        Args:
            parallel: number of slots; the launcher chooses if None.

        Raises:
            InputError: the machine has too few resources, or as `check_tool`.
        """
        cls.check_tool(cluster)
        return [{}] * (parallel or 1)

    @classmethod
    def check_tool(cls, cluster: ClusterConfig) -> None:
        """Raise an InputError if this machine lacks what submits the job; a dry run does not need it."""
        if cls.tool and shutil.which(cls.tool) is None:
            raise InputError(
                f"cluster.scheduler={cluster.scheduler}: there is no {cls.tool} on this machine: launch where there is "
                "one; dry_run=true prints the job"
            )

    @abc.abstractmethod
    def check(self) -> None:
        """Raise an InputError if the job cannot be started on this kind of machine."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The command or job script that `start` would run, for `dry_run=true`."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start or submit the job.

        Raises:
            InputError: the job cannot be submitted.
        """

    @abc.abstractmethod
    def poll(self) -> int | None:
        """The exit status of a job that has ended, or None while it waits or runs."""

    @abc.abstractmethod
    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Ask the job to save a checkpoint and end; a second call kills an attached job.

        Args:
            signum: the signal that an attached job receives.
        """


LAUNCHERS: dict[str, type[Launcher]] = {}
"""Launcher classes by the value of `cluster.scheduler`."""


def register_launcher(name: str) -> Callable[[type[Launcher]], type[Launcher]]:
    """Class decorator: make a launcher available as `cluster.scheduler=<name>`.

    Raises:
        InputError: the name is taken, the class is no `Launcher`, or it lacks a method.
    """

    def register(launcher: type[Launcher]) -> type[Launcher]:
        place = f"launcher {name!r} ({launcher.__module__}.{launcher.__qualname__})"
        if name in LAUNCHERS:
            raise InputError(f"{place}: the name is taken by {LAUNCHERS[name].__qualname__}: choose another")
        if not issubclass(launcher, Launcher):
            raise InputError(f"{place}: not a launcher: derive it from {Launcher.__module__}.Launcher")
        if missing := sorted(launcher.__abstractmethods__):
            nearest = suggestion(missing[0], [key for key in vars(launcher) if not key.startswith("_")])
            raise InputError(f"{place}: method {missing[0]!r} is missing: define it.{nearest}")
        LAUNCHERS[name] = launcher
        note_registration(launcher.__module__)
        return launcher

    return register
