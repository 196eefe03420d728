"""Jobs that a program submits; Kubernetes and SkyPilot take their configuration along to machines of their own."""

import json
import posixpath
import re
import shlex
import subprocess
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import yaml

from csc_train.errors import InputError
from csc_train.files import digest, write_text
from csc_train.launching import supervise
from csc_train.launching.launch_commands import node_command
from csc_train.launching.launchers.base import Launcher
from csc_train.runs.claim import is_claimed
from csc_train.runs.directory import EXIT_STOPPED, read_run_record
from csc_train.templates import ExactDumper, render


class SubmittedLauncher(Launcher):
    """Writes a job to a file and submits it by a program; the job outlives this process."""

    @property
    def path(self) -> Path:
        """Where the job is written."""
        return self.job.directory / str(self.file)

    @abstractmethod
    def text(self) -> str:
        """The job, as it is written."""

    @abstractmethod
    def submission(self) -> list[str]:
        """The command that submits `path`."""

    def describe(self) -> str:
        """The command and the job that it submits."""
        return f"{shlex.join(self.submission())}, which is:\n\n{self.text()}"

    def submit(self) -> str:
        """Write the job and submit it; returns what the program prints.

        Raises:
            InputError: the program refuses it.
        """
        write_text(self.path, self.text())
        return self.call(*self.submission()[1:])

    def call(self, *arguments: str) -> str:
        """The output of the scheduler's program.

        Raises:
            InputError: the program fails; its own message.
        """
        done = subprocess.run([str(self.tool), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{self.tool} {' '.join(arguments[:2])}: {' '.join(done.stderr.split()) or done.stdout}")
        return done.stdout

    def poll(self) -> int | None:
        """0 if the run is finished or the job succeeded, 1 if it failed or is gone; None while it waits or runs.

        A job counts as running while the scheduler does not answer, or a process works in its directory.
        """
        if read_run_record(self.job.directory).get("finished"):
            return 0
        try:
            ended = self.ended(str(self.job_id))
        except InputError:
            return None
        return None if ended and is_claimed(self.job.directory) else ended

    @abstractmethod
    def ended(self, job_id: str) -> int | None:
        """What the scheduler says: 0 if the job succeeded, 1 if it failed or is unknown, None while it waits or runs.

        Raises:
            InputError: the scheduler does not answer.
        """


class ManifestLauncher(SubmittedLauncher):
    """Submits a job as YAML to nodes that need not share a file system with this machine.

    The job brings the frozen configuration along (see `supervise`), and a mounted volume holds the run directory.
    """

    shares_files = False
    home: ClassVar[str] = ""
    """Where a job starts, if `working_directory` does not say so."""

    @property
    def options(self) -> Any:
        """The cluster's section for this scheduler, such as `cluster.kubernetes`."""
        return getattr(self.job.cluster, self.job.cluster.scheduler)

    @property
    def name(self) -> str:
        """The job's name, of letters, digits and dashes: the same for each start of a run."""
        words = re.sub(r"[^a-z0-9]+", "-", self.job.directory.name.lower()).strip("-")[:40]
        return "-".join(filter(None, ("csc", words, digest(self.place)[:6])))

    @property
    def root(self) -> str:
        """The directory on the nodes at which relative paths begin."""
        return self.options.working_directory or self.home

    @property
    def place(self) -> str:
        """The run directory on the nodes."""
        return posixpath.normpath(posixpath.join(self.root, self.job.directory.as_posix()))

    @property
    def mounts(self) -> dict[str, str]:
        """The whole path on the nodes by volume."""
        return {name: posixpath.normpath(posixpath.join(self.root, path)) for name, path in self.options.mounts.items()}

    def check(self) -> None:
        """Refuse a run directory that no volume keeps."""
        if not any(f"{self.place}/".startswith(f"{path}/") for path in self.mounts.values()):
            section = f"cluster.{self.job.cluster.scheduler}.mounts"
            raise InputError(f"{self.place} is on no volume, so the run would be lost: name one there in {section}")

    def environment(self) -> dict[str, str]:
        """Environment variables of the nodes, the configuration among them."""
        values = self.options.env | {supervise.CONFIG_VARIABLE: self.job.config}
        return values | ({"CUDA_VISIBLE_DEVICES": ""} if self.job.cluster.device == "cpu" else {})

    def command(self, rank: str, head: str) -> list[str]:
        """The command of each node.

        Args:
            rank: the node's number, as the shell or the scheduler expands it.
            head: host name of the first node, likewise.
        """
        recipe = [posixpath.join("recipes", Path(self.job.script).name), *self.job.arguments]
        words = [self.options.python, str(self.job.directory), *recipe]
        python, directory, *recipe = map(self.quote, words)
        ranks = node_command(self.job.cluster, python, recipe, rank, head, str(self.job.cluster.port))
        return [python, "-m", supervise.__name__, directory, *ranks]

    @staticmethod
    @abstractmethod
    def quote(word: str) -> str:
        """A word of `command` in which nothing is expanded."""

    @abstractmethod
    def manifest(self) -> list[dict[str, Any]]:
        """The documents to submit."""

    def fill(self, template: str, **values: Any) -> list[dict[str, Any]]:
        """The documents of a template in this package, filled with `values` and what each template needs."""
        values |= {"job": self.name, "cluster": self.job.cluster, "options": self.options}
        return list(yaml.safe_load_all(render(__package__, template, exit_stopped=EXIT_STOPPED, **values)))

    def text(self) -> str:
        """The documents as YAML."""
        return yaml.dump_all(self.manifest(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)

    def ask(self, *arguments: str) -> Any:
        """The JSON that the scheduler's program prints; None if it prints nothing.

        Raises:
            InputError: as `call`, or it prints something else.
        """
        answer = self.call(*arguments).strip()
        try:
            return json.loads(answer or "null")
        except ValueError as error:
            raise InputError(f"{self.tool} {' '.join(arguments[:2])}: expected JSON, got {answer[:80]!r}") from error


class _Dumper(ExactDumper):
    """Quotes all that some reader of YAML takes for a number or a boolean; texts of several lines are blocks."""

    multi_line = "|"

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("csc:number", re.compile(r"(?s)[-+.\d].*|[yYnN]$"), list("-+.0123456789yYnN"))
