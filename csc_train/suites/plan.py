"""A suite as a plan: its steps in the order of their needs, their jobs, and the content that each is known by.

The name of a step's run directory holds a hash of its settings, of the files that they name, and of the steps that it
needs. So a step whose inputs did not change finds its finished run, and one whose inputs changed starts a new run.
"""

import dataclasses
import graphlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from csc_train.checkpoints.content import FileHashes, hash_files, sha256
from csc_train.checkpoints.locate import MODEL_FILES, MODEL_FOLDER
from csc_train.config.cluster import ClusterConfig
from csc_train.config.compose import CONFIG_DIR, compose, to_container
from csc_train.config.recipes.evaluation import EvaluateRecipe
from csc_train.config.recipes.training import LaunchRecipe, ReproduceRecipe
from csc_train.config.suite import STEP_RECIPES, StepConfig, SuiteConfig
from csc_train.errors import InputError, suggestion
from csc_train.files import digest, read_json
from csc_train.hub_access import is_pinned
from csc_train.launching.job import Job, split_arguments
from csc_train.overrides import argument
from csc_train.runs.comparison import RESULTS_FILE
from csc_train.runs.config import may_change
from csc_train.runs.directory import read_run_record

LOCAL = ClusterConfig("local", gpus_per_node=1, process_launcher="none")
"""Where steps with `placement=local` run."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
"""The name of a step in an override."""


@dataclass(frozen=True)
class Step:
    """A step of a suite.

    Attributes:
        needs: names of the steps that it reads.
        job: its launch, with its run directory. Where only the metrics of an evaluation have changed, it scores the
            finished run again.
        missing: why it cannot run on this machine, such as an API key that is not set; None if it can.
    """

    name: str
    config: StepConfig
    needs: tuple[str, ...]
    job: Job
    missing: str | None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.job.directory

    @property
    def placement(self) -> str:
        """Where it runs."""
        return _placement(self.config)

    @property
    def finished(self) -> bool:
        """Whether its run has finished, with these metrics."""
        return _finished(self.directory) and not _other_metrics(self.directory, self.job.config)


@dataclass(frozen=True)
class SuitePlan:
    """A suite command line.

    Attributes:
        steps: by name; each comes after those that it needs.
    """

    launch: ReproduceRecipe
    steps: dict[str, Step]

    @property
    def config(self) -> SuiteConfig:
        """The steps and rows as they are configured."""
        return self.launch.suite

    @property
    def directory(self) -> Path:
        """The suite's directory."""
        return suite_directory(self.config)

    def all_needs(self, name: str) -> list[Step]:
        """A step and all that it needs, directly or not; those that run first come first."""
        wanted = {name}
        for each in reversed(self.steps.values()):
            wanted |= set(each.needs) if each.name in wanted else set()
        return [step for step in self.steps.values() if step.name in wanted]


def suite_directory(config: SuiteConfig) -> Path:
    """The directory of a suite."""
    return Path(config.directory or f"runs/suites/{config.name}")


def plan_suite(arguments: list[str]) -> SuitePlan:
    """Compose and check a suite; nothing is written.

    Args:
        arguments: of `ReproduceRecipe`; `RECIPE.KEY=VALUE` goes to all steps of a recipe.

    Raises:
        InputError: an argument is wrong, or a recipe refuses the overrides of a step; names the step.
    """
    own, others = split_arguments(arguments, ReproduceRecipe)
    launch = compose("reproduce", own)
    folders = [text for text in others if text.startswith(f"{CONFIG_DIR}=")]
    given = {recipe: [*folders, *launch.suite.overrides.get(recipe, ())] for recipe in STEP_RECIPES}
    for text in (each for each in others if each not in folders):
        recipe, dot, override = text.partition(".")
        if recipe not in given or not dot:
            near = suggestion(text.split("=")[0], [field.name for field in fields(launch)])
            raise InputError(f"{text}: no key of a suite; write RECIPE.KEY=VALUE for its steps.{near}")
        given[recipe].append(override)
    configs = launch.suite.steps | _gains(launch.suite)
    needs = {name: _needs(f"suite.steps.{name}", step, configs) for name, step in configs.items()}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise InputError(f"suite.steps: a circle of needs: {' -> '.join(reversed(error.args[1]))}") from error
    steps: dict[str, Step] = {}
    for name in order:
        steps[name] = _step(launch, name, configs[name], needs[name], given[configs[name].recipe], steps)
    return SuitePlan(launch, steps)


def gain_name(row: str) -> str:
    """The name of the step that compares a row with the one that it is against."""
    return f"{row}.gain"  # no step of the user's has a dot in its name


def _gains(config: SuiteConfig) -> dict[str, StepConfig]:
    """The comparisons of rows with those that they are against."""
    found = {}
    for name, row in config.rows.items():
        if row.against is not None:
            sides = {"a": row, "b": config.rows[row.against]}
            overrides = [f"{side}={{{each.step}}}" for side, each in sides.items()]
            overrides += [argument(f"system_{side}", each.system) for side, each in sides.items() if each.system]
            found[gain_name(name)] = StepConfig("compare", overrides, "local")
    return found


def _needs(place: str, step: StepConfig, known: dict[str, StepConfig]) -> tuple[str, ...]:
    names = dict.fromkeys(name for text in step.overrides for name in _PLACEHOLDER.findall(text))
    for name in names:
        if name not in known:
            raise InputError(f"{place}: {{{name}}}: no such step.{suggestion(name, known)}")
    return tuple(names)


def _step(
    launch: ReproduceRecipe,
    name: str,
    config: StepConfig,
    needs: tuple[str, ...],
    common: list[str],
    steps: dict[str, Step],
) -> Step:
    directory = suite_directory(launch.suite)
    overrides = [
        _PLACEHOLDER.sub(lambda found: str(steps[found.group(1)].directory), text) for text in config.overrides
    ]
    try:
        # Of two values of a key the last counts; Hydra refuses a group that is chosen twice.
        last = {text if text.startswith(CONFIG_DIR) else text.partition("=")[0]: text for text in [*common, *overrides]}
        composed = compose(config.recipe, list(last.values()))
        run = directory / f"{name}-{_content(config.recipe, composed, directory)}"
        composed.run = replace(composed.run, directory=str(run), if_exists="resume")
        again = _finished(run) and _other_metrics(run, composed)
        cluster = LOCAL if again else _cluster(launch.cluster, config)
        mode = "score_only=true" if again else Job.mode
        job = Job(LaunchRecipe(config.recipe, cluster, launch.preflight), composed, new=True, mode=mode)
        job.check()
    except InputError as error:
        raise InputError(f"suite.steps.{name}: {error}") from error
    return Step(name, config, needs, job, _missing(composed))


def _finished(directory: Path) -> bool:
    return bool(read_run_record(directory).get("finished"))


def _other_metrics(directory: Path, config: Any) -> bool:
    """Whether an evaluation was scored with other metrics. It took models of the hub at commits."""
    results = directory / RESULTS_FILE
    if not isinstance(config, EvaluateRecipe) or not results.is_file():
        return False
    scored, asked = read_json(results).get("provenance", {}).get("metrics") or {}, to_container(config)["metrics"]
    return scored.keys() != asked.keys() or any(
        value != asked[name] and not is_pinned(str(value), str(asked[name])) for name, value in scored.items()
    )


def _placement(step: StepConfig) -> str:
    return "local" if step.recipe == "compare" else step.placement


def _cluster(cluster: ClusterConfig, step: StepConfig) -> ClusterConfig:
    """The machines of a step."""
    if _placement(step) == "local":
        return LOCAL
    nodes = 1 if step.placement == "node" else step.nodes or cluster.nodes
    launcher = "none" if step.placement == "node" else cluster.process_launcher
    nodes, fewest = min(nodes, cluster.nodes), cluster.slurm.nodes_min
    slurm = replace(cluster.slurm, nodes_min=fewest if fewest and fewest < nodes else None)
    return replace(cluster, nodes=nodes, process_launcher=launcher, slurm=slurm)


def _missing(config: Any) -> str | None:
    llm = getattr(config, "llm", None)
    if llm is not None and llm.api_key_env and not os.environ.get(llm.api_key_env):
        return f"llm.api_key_env={llm.api_key_env}: this environment variable is not set"
    return None


def _content(recipe: str, config: Any, directory: Path) -> str:
    """The first 12 digits of the hash of what decides the results of a step.

    Values that equal the schema's defaults do not count: a later version may add settings. Nor do the metrics of an
    evaluation, by which a finished run is scored again.
    """
    ignored = ("zero.", "metrics.") if recipe == "evaluate" else ("zero.",)
    values = {key: value for key, value in _chosen(config) if not may_change(key) and not key.startswith(ignored)}
    sample = values.get("data.sample_dialogues") is not None  # the settings say what the file will hold
    files = {}
    for key, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            named = isinstance(text, str) and (key.endswith("path") or "/" in text or "." in text)
            path = Path(text) if named else None
            if path and path.exists() and not path.is_relative_to(directory) and not (sample and key[:5] == "data."):
                files[text] = sha256(path) if path.is_file() else _hash_folder(key, path)
    prefix = f"{directory}{os.sep}"  # it may be moved
    values = {key: value.replace(prefix, "") if isinstance(value, str) else value for key, value in values.items()}
    return digest([recipe, values, files])[:12]


def _hash_folder(key: str, path: Path) -> FileHashes:
    """Hashes of the files of a folder that count: all data, or those of a model."""
    model = path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path
    return hash_files(path) if key.startswith("data.") else hash_files(model, MODEL_FILES)


def _chosen(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of the settings that differ from the schema's defaults."""
    for field in fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            if field.default is None:
                yield key, True
            yield from _chosen(value, f"{key}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for number, each in enumerate(value):
                yield from _chosen(each, f"{key}[{number}].")
        else:
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            if value != default:
                yield key, value
