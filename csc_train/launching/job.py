"""Launch a recipe: compose its configuration, check it, save it in the run directory and start it."""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from csc_train.config.cli import join_config_dir, run_command
from csc_train.config.compose import RECORDED, compose, compose_recorded, path_of, to_container
from csc_train.config.explain import known_keys
from csc_train.config.paths import script_of
from csc_train.config.recipes.training import LaunchRecipe, PreflightRecipe
from csc_train.errors import InputError, suggestion
from csc_train.files import write_text
from csc_train.launching.launchers.base import JobSpec, Launcher
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.on_finish import on_finish_arguments
from csc_train.launching.preflight.checks import run_preflight
from csc_train.launching.supervise import FORWARDED, signal_handler
from csc_train.overrides import argument, parse_override, resume_hint
from csc_train.runs.claim import CLAIM_VARIABLE, Claim, claim, claim_new
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import EXIT_STOPPED, RECORD_FILE, as_yaml, default_directory, refuse_other_files

LAUNCH_FILE = "launch.yaml"
"""The last launch configuration, in the run directory."""
TRAINING = "sft"
"""The recipe that a preflight can plan."""


@dataclass(frozen=True)
class Job:
    """A checked launch.

    Attributes:
        launch: configuration of the launch.
        config: configuration of the recipe, with its run directory.
        new: whether the run directory does not exist yet.
        default: whether the run directory has a default name, which gets a number if it is taken.
        mode: how the recipe takes the run: `resume=true`, or `score_only=true` for an evaluation.
        changes: settings of a recorded run that the command line changes; its `resolved.yaml` does not hold them.
    """

    launch: LaunchRecipe
    config: Any
    new: bool
    default: bool = False
    mode: str = "resume=true"
    changes: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.directory)

    def launcher(self, **options: Any) -> Launcher:
        """The launcher of this job.

        Args:
            options: `environment`, `output` and `inherited` of `JobSpec`.
        """
        short, path = Path("recipes") / f"{self.launch.recipe}.py", script_of(self.launch.recipe)
        script = str(short if short.exists() and short.samefile(path) else path)
        arguments = (argument("run", self.directory), self.mode, *self.changes)
        cluster, fewest = self.launch.cluster, self._fewest_nodes
        nodes = tuple(each for each in self._node_counts() if fewest <= each <= cluster.nodes)
        options |= {"config": as_yaml(to_container(self.config)), "nodes": nodes}
        return launcher_class(cluster)(JobSpec(cluster, self.directory, script, arguments, **options))

    def check(self) -> None:
        """Check what is known before a preflight.

        Raises:
            InputError: the job would fail, and why.
        """
        if self.launch.recipe == TRAINING:
            self._check_batch(self.launch.cluster.nodes)
            self._check_batch(self._fewest_nodes)
            on_finish_arguments(self.config.on_finish, self.directory)
        if self.launch.recipe == "compare" and (size := self.launch.cluster.world_size) > 1:
            raise InputError(f"cluster: {size} processes for recipe=compare: give cluster=cpu1")
        self.launcher().check()

    @property
    def _fewest_nodes(self) -> int:
        return self.launch.cluster.slurm.nodes_min or self.launch.cluster.nodes

    def _node_counts(self) -> list[int]:
        """The numbers of nodes among which the batch can be divided."""
        cluster = self.launch.cluster
        if self.launch.recipe != TRAINING:
            return list(range(1, cluster.nodes + 1))
        trainer = self.config.trainer
        shares, rest = divmod(trainer.packs_per_step, trainer.micro_batch_size * cluster.gpus_per_node)
        return [nodes for nodes in range(1, shares + 1) if not rest and shares % nodes == 0]

    def _check_batch(self, nodes: int) -> None:
        """Name the nearest node counts if the batch cannot be divided among so many nodes."""
        cluster, counts = self.launch.cluster, self._node_counts()
        try:
            self.config.trainer.accumulation(cluster.world_size * nodes // cluster.nodes)
        except InputError as error:
            near = [*[n for n in counts if n < nodes][-1:], *[n for n in counts if n > nodes][:1]]
            if nodes == 1 or not near:
                raise
            key = "cluster.nodes" if nodes == cluster.nodes else "cluster.slurm.nodes_min"
            raise InputError(f"{key}={nodes}: {error}: give {key}={' or '.join(map(str, near))}") from error

    def preflight(self) -> None:
        """Run the preflight of a training. Its report is printed on failure and in a dry run.

        Raises:
            InputError: a check failed, unless `preflight.force=true` or in a dry run.
        """
        if self.launch.recipe != TRAINING:
            return
        chosen = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        cluster = replace(self.launch.cluster, nodes=self._fewest_nodes)  # which have the least memory together
        recipe = PreflightRecipe(**chosen, cluster=cluster, preflight=self.launch.preflight)
        report = run_preflight(recipe, launching=not self.launch.dry_run)
        refused = report.failed and not self.launch.preflight.force and not self.launch.dry_run
        if refused or self.launch.dry_run:
            report.show()
        if refused:
            names = ", ".join(check.name for check in report.failed)
            raise InputError(
                f"preflight: {names} failed (see above): fix the causes, or launch with preflight.force=true"
            )

    def claim(self) -> Claim:
        """Claim the run directory, for this process and the ranks that it starts.

        Raises:
            InputError: another process works there, or it cannot be written.
        """
        if self.new and not self.default:
            _refuse_taken(self.directory)  # again: the checks took a while
        claimed = (claim_new if self.default else claim)(self.directory, f"launch of {self.launch.recipe}")
        self.config.run.directory = str(claimed.directory)
        return claimed

    def write(self) -> None:
        """Save the configurations in the run directory, where the ranks read them.

        Raises:
            InputError: the directory cannot be written.
        """
        write_text(self.directory / LAUNCH_FILE, as_yaml(to_container(self.launch)))
        if self.new:  # last: with it the run can be resumed, without it the same command starts it
            write_text(self.directory / RESOLVED_FILE, as_yaml(to_container(self.config)))

    @contextlib.contextmanager
    def kept_if_started(self, created: Iterable[Path]) -> Iterator[None]:
        """Put the files of the run directory back as they are now if the job is refused meanwhile.

        Args:
            created: the directories to remove then, if they hold nothing (see `Claim.created`).
        """
        before = {path: path.read_text(encoding="utf-8") for path in self._own_files()}
        try:
            yield
        except InputError:
            for path in self._own_files():
                path.unlink() if path not in before else write_text(path, before[path])
            with contextlib.suppress(OSError):
                for directory in created:
                    directory.rmdir()
            raise

    def _own_files(self) -> list[Path]:
        names = (LAUNCH_FILE, RESOLVED_FILE, launcher_class(self.launch.cluster).file)
        return [path for name in names if name and (path := self.directory / name).is_file()]

    def describe(self) -> str:
        """The run directory, the configuration, and the command or job script, as text."""
        parts = [f"run directory: {self.directory}", "", as_yaml(to_container(self.config))]
        return "\n".join([*parts, self.launcher().describe()])


def plan_job(arguments: list[str]) -> Job:
    """Compose and check the job of a launch command line; nothing is written.

    Args:
        arguments: those that begin with a key of `LaunchRecipe` configure the launch, the others the recipe.

    Raises:
        InputError: an argument is wrong, or the job cannot run (see `Job.check`).
    """
    own, others = split_arguments(arguments, LaunchRecipe)
    default, new = False, not any(text.startswith("run=") for text in others)
    earlier = [path_of(parse_override(text, str)) for text in others if text.startswith(("run=", "from="))]
    launch = _earlier_launch(earlier[0], own) if earlier else compose("launch", own)
    refuse_misspelt(others, launch)
    config = compose(launch.recipe, others)
    if new:
        if config.run.if_exists != "error":
            raise InputError(
                f"run.if_exists={config.run.if_exists}: a launch is a new run; resume one by run=DIR resume=true"
            )
        if not (default := config.run.directory is None):
            _refuse_taken(Path(config.run.directory))
        config.run = replace(
            config.run, directory=config.run.directory or default_directory(launch.recipe), if_exists="resume"
        )
    changes = () if new else tuple(text for text in others if text.split("=")[0] not in RECORDED)
    job = Job(launch, config, new, default, changes=changes)
    job.check()
    return job


def _refuse_taken(directory: Path) -> None:
    if held := [name for name in (RECORD_FILE, RESOLVED_FILE) if (directory / name).exists()]:
        raise InputError(
            f"{directory} holds a run ({held[0]}): choose another run.directory, or resume by {resume_hint(directory)}"
        )
    refuse_other_files(directory, f"no {RECORD_FILE}")


def split_arguments(arguments: list[str], schema: type[LaunchRecipe]) -> tuple[list[str], list[str]]:
    """The arguments that begin with a key of `schema`, and those of the recipe; --config-dir is in both.

    Raises:
        InputError: an argument is a flag.
    """
    arguments = join_config_dir(arguments)
    folders = [text for text in arguments if text.startswith("--config-dir=")]
    if flags := [text for text in arguments if text.startswith("-") and text not in folders]:
        raise InputError(f"{flags[0]}: flags are not supported: use key=value (see docs/launching.md)")
    keys = {field.name for field in fields(schema)}
    own = [text for text in arguments if re.split("[.=]", text.lstrip("+~"))[0] in keys]
    return own + folders, [text for text in arguments if text not in own]


def refuse_misspelt(others: list[str], launch: LaunchRecipe) -> None:
    """Raise an InputError if an unknown recipe key resembles a key of the launch configuration."""
    known, own_keys = {*known_keys(launch.recipe), *RECORDED}, [field.name for field in fields(launch)]
    for key in (text.split("=")[0] for text in others):
        if key not in known and suggestion(key, own_keys):
            raise InputError(f"unknown key {key!r}.{suggestion(key, own_keys)}")


def _earlier_launch(directory: Path, own: list[str]) -> LaunchRecipe:
    """The recorded launch configuration of a run, with changes; `cluster=` replaces it."""
    if any(text.startswith("cluster=") for text in own):
        return compose("launch", own)
    file = directory / LAUNCH_FILE
    if not file.is_file():
        raise InputError(f"{directory} holds no {LAUNCH_FILE}: name the machines by cluster=...")
    return compose_recorded("launch", file, own)


def launch(arguments: list[str]) -> int:
    """Run launch/launch.py.

    Returns:
        The exit status: of the job if the launcher is attached (see `supervise`), 0 after a submission or a dry run, 2
        after an InputError.
    """
    return run_command("launch", arguments, _launch)


def _launch(arguments: list[str]) -> int:
    job = plan_job(arguments)
    job.preflight()
    if job.launch.dry_run:
        print(job.describe())
        return 0
    launcher_class(job.launch.cluster).check_tool(job.launch.cluster)
    with job.claim() as claimed:
        with job.kept_if_started(claimed.created):
            job.write()
            print(f"run directory: {job.directory}", flush=True)
            launcher = job.launcher(environment={CLAIM_VARIABLE: claimed.token}, inherited=(claimed.descriptor,))
            if not launcher.attached:
                claimed.release()  # the job may start at once, on another machine
            launcher.start()
        if not launcher.attached:
            print(f"Submitted batch job {launcher.job_id}")
            return 0
        with signal_handler(lambda signum, frame: launcher.stop(signum), FORWARDED):
            while (status := launcher.poll()) is None:
                time.sleep(0.1)
    if status == EXIT_STOPPED:  # repeated below torchrun's own report of the stopped processes
        print(f"stopped; to resume: {resume_hint(job.directory)}")
    return status
