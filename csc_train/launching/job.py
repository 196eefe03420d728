"""A job: a recipe's configuration, the machines to run it on and its run directory; checked, frozen and started."""

import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from csc_train.config.compose import RECORDED, compose, compose_recorded, to_container
from csc_train.config.explain import known_keys
from csc_train.config.paths import script_of
from csc_train.config.recipes.training import LaunchRecipe, PreflightRecipe
from csc_train.errors import InputError, suggestion
from csc_train.files import write_text
from csc_train.launching.launch_commands import local_command, node_command
from csc_train.launching.launchers.slurm import job_script, submit
from csc_train.launching.on_finish import on_finish_arguments
from csc_train.launching.preflight.checks import PreflightReport, preflight
from csc_train.launching.supervise import supervise
from csc_train.runs.config import RESOLVED_FILE, RunConfig
from csc_train.runs.directory import EXIT_STOPPED, RECORD_FILE, as_yaml, default_directory

LAUNCH_FILE = "launch.yaml"
"""In a run directory: how the run was launched last."""
SCRIPT_FILE = "job.sbatch"
"""In a run directory: the job that was submitted last."""


@dataclass(frozen=True)
class Job:
    """What launch/launch.py was asked for."""

    launch: LaunchRecipe
    config: Any
    """The recipe's, with its run directory named."""
    new: bool
    """Whether the run directory is yet to be made."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.directory)

    @property
    def local(self) -> bool:
        """Whether the job runs here and now."""
        return self.launch.cluster.scheduler == "local"

    def command(self) -> list[str]:
        """The command that starts the ranks of a local job, here."""
        return local_command(self.launch.cluster, sys.executable, self._script(), self._arguments())

    def script(self) -> str:
        """The sbatch script of a SLURM job."""
        cluster = self.launch.cluster
        command = node_command(cluster, cluster.slurm.python, self._script(), self._arguments())
        return job_script(cluster, self.directory.name, self.directory, command)

    def environment(self) -> dict[str, str]:
        """Variables of the ranks of a local job."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.launch.cluster.device == "cpu" else {}

    def _script(self) -> str:
        script, relative = script_of(self.launch.recipe), Path("recipes") / f"{self.launch.recipe}.py"
        return str(relative if relative.exists() and relative.samefile(script) else script)

    def _arguments(self) -> list[str]:
        return [f"run={self.directory}", "resume=true"]


def plan_job(arguments: list[str]) -> Job:
    """The job that the arguments of launch/launch.py ask for; checked, nothing written.

    Those that begin with a key of `LaunchRecipe` are the launcher's, the others the recipe's.

    Raises:
        InputError: an argument is wrong, or the job cannot run (see `check_job`).
    """
    own, others = split_arguments(arguments, LaunchRecipe)
    new = not any(text.startswith("run=") for text in others)
    earlier = [text.split("=", 1)[1] for text in others if text.startswith(("run=", "from="))]
    launch = _launched(Path(earlier[0]), own) if earlier else compose("launch", own)
    refuse_misspelt(others, launch)
    config = compose(launch.recipe, others)
    if new:
        if config.run.if_exists != "error":
            raise InputError(
                f"run.if_exists={config.run.if_exists}: a launch is a new run; continue one by run=DIR resume=true"
            )
        config.run = RunConfig(config.run.directory or default_directory(launch.recipe), "resume")
        directory = Path(config.run.directory)
        if held := [name for name in (RECORD_FILE, RESOLVED_FILE) if (directory / name).exists()]:
            raise InputError(
                f"{directory} holds a run ({held[0]}): choose another run.directory, "
                f"or go on by run={directory} resume=true"
            )
    job = Job(launch, config, new)
    check_job(job)
    return job


def split_arguments(arguments: list[str], schema: type[LaunchRecipe]) -> tuple[list[str], list[str]]:
    """The arguments that begin with a key of a launcher's schema, and the others, which are the recipe's.

    Raises:
        InputError: one is a flag.
    """
    if flags := [text for text in arguments if text.startswith("-")]:
        raise InputError(f"{flags[0]}: everything is key=value, as docs/launching.md shows")
    keys = {field.name for field in fields(schema)}
    own = [text for text in arguments if re.match(r"[+~]*([^.=]*)", text).group(1) in keys]
    return own, [text for text in arguments if text not in own]


def refuse_misspelt(others: list[str], launch: LaunchRecipe) -> None:
    """Raise an InputError where a key of the recipe's arguments is not its own, but nearly one of the launcher's."""
    known, own_keys = {*known_keys(launch.recipe), *RECORDED}, [field.name for field in fields(launch)]
    for key in (text.split("=")[0] for text in others):
        if key not in known and suggestion(key, own_keys):
            raise InputError(f"unknown key {key!r}.{suggestion(key, own_keys)}")


def _launched(directory: Path, own: list[str]) -> LaunchRecipe:
    """How a run was launched, with changes; its cluster may be chosen anew."""
    file = directory / LAUNCH_FILE
    if any(text.startswith("cluster=") for text in own):
        return compose("launch", own)
    if not file.is_file():
        raise InputError(f"{directory} holds no {LAUNCH_FILE}: say what to run it on by cluster=...")
    return compose_recorded("launch", file, own)


def check_job(job: Job) -> None:
    """What can be known before anything is started.

    Raises:
        InputError: the job would fail, and why.
    """
    cluster = job.launch.cluster
    job.config.trainer.accumulation(cluster.world_size)
    on_finish_arguments(job.config.on_finish, job.directory)
    if job.local and cluster.nodes > 1:
        raise InputError(f"cluster.nodes={cluster.nodes}: several nodes are started by cluster.scheduler=slurm")
    if not job.local:
        job.script()


def run_preflight(job: Job) -> PreflightReport:
    """What a preflight of the job finds."""
    chosen = {field.name: getattr(job.config, field.name) for field in fields(job.config)}
    recipe = PreflightRecipe(**chosen, cluster=job.launch.cluster, preflight=job.launch.preflight)
    return preflight(recipe, launching=not job.launch.dry_run)


def write_job(job: Job) -> None:
    """Record in the run directory what is run and how; the ranks read it there.

    Raises:
        InputError: it cannot be written.
    """
    if job.new:
        write_text(job.directory / RESOLVED_FILE, as_yaml(to_container(job.config)))
    write_text(job.directory / LAUNCH_FILE, as_yaml(to_container(job.launch)))
    if not job.local:
        write_text(job.directory / SCRIPT_FILE, job.script())


def describe_job(job: Job) -> str:
    """All that a launch would do, as text."""
    parts = [f"run directory: {job.directory}", "", as_yaml(to_container(job.config))]
    if job.local:
        variables = [f"{name}={shlex.quote(value)}" for name, value in job.environment().items()]
        parts.append(" ".join([*variables, shlex.join(job.command())]))
    else:
        parts.append(f"sbatch {job.directory / SCRIPT_FILE}, which is:\n\n{job.script()}")
    return "\n".join(parts)


def launch(arguments: list[str]) -> int:
    """What launch/launch.py does; returns its exit status: that of `supervise`, or 2 after an InputError."""
    try:
        job = plan_job(arguments)
        outcome = run_preflight(job)
        if job.launch.dry_run:
            outcome.show()
            print(describe_job(job))
            return 0
        if outcome.failed and not job.launch.preflight.force:
            outcome.show()
            names = ", ".join(check.name for check in outcome.failed)
            raise InputError(f"preflight: {names} failed (see above); preflight.force=true starts the job all the same")
        write_job(job)
        print(f"run directory: {job.directory}", flush=True)
        if job.local:
            status = supervise(job.directory, job.command(), job.environment())
            if status == EXIT_STOPPED:  # once more, below torchrun's report that its processes did not end with 0
                print(f"stopped; to resume: run={job.directory} resume=true")
            return status
        print(submit(job.directory / SCRIPT_FILE))
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
