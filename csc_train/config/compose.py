"""Compose a recipe's configuration with Hydra from conf/, the user's own folder and the command line, and check it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from csc_train.config.explain import explain_error
from csc_train.config.paths import CONF
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.errors import InputError
from csc_train.plugins import load_plugins
from csc_train.runs.config import RESOLVED_FILE, RunConfig, may_change
from csc_train.runs.directory import flatten_keys

RECORDED = ("run", "resume", "from")
"""Keys that ask for the recorded configuration of an earlier run (see `compose`)."""
POSITIONAL = {
    "compare": ("a", "b"),
    "judge": ("a", "b"),
    "human_eval": ("action", "inputs*"),
    "compare_runs": ("folders*",),
}
"""Keys of a recipe's leading bare words; a key with a star takes all words that follow."""
CONFIG_DIR = "--config-dir"


def compose(recipe: str, arguments: list[str]) -> Any:
    """The configuration of a recipe as an instance of its schema, every value checked.

    Args:
        recipe: a key of `SCHEMAS`; `conf/<recipe>.yaml` is its root.
        arguments: Hydra overrides, such as `trainer.epochs=1` or `model=qwen2_5_7b`, and `--config-dir=DIR`, a folder
            of the user's own groups. Three forms use the recorded configuration of a run:

            - `from=DIR` starts a new run with it; the other overrides change single values.
            - `run=DIR resume=true` resumes the run; some values may change (see `runs.config.may_change`).
            - `run=DIR score_only=true` is for evaluations; the other overrides change single values.

    Raises:
        InputError: an unknown key or group option (with the nearest known one), a wrong type, a value out of range,
            or a required value that is missing.
    """
    search = ConfigSearch.of(arguments)
    overrides = _name_positional(recipe, search.overrides)
    _check_overrides(overrides, search)
    recorded = {key: text for text in overrides if (key := text.split("=")[0]) in RECORDED}
    values = [text for text in overrides if text not in recorded.values()]
    score_only = recipe == "evaluate" and "score_only=true" in map(str.lower, values)
    if score_only and recorded.keys() == {"run"}:
        directory = recorded["run"].split("=", 1)[1]
        return compose_recorded(recipe, Path(directory) / RESOLVED_FILE, [*values, f"run.directory={directory}"])
    if score_only:
        raise InputError("score_only=true: name the run whose predictions to score, by run=DIR")
    if "run" in recorded or "resume" in recorded:
        directory = _resumed_directory(recorded, values)
        config = compose_recorded(recipe, directory / RESOLVED_FILE, values)
        config.run = RunConfig(str(directory), "resume")
        return config
    if "from" in recorded:
        new_run = ["run.directory=null", "run.if_exists=error"]
        return compose_recorded(recipe, Path(recorded["from"].split("=", 1)[1]) / RESOLVED_FILE, new_run + values)
    if recipe == "evaluate":
        _check_data_group(overrides)
    return _typed(recipe, CONF, recipe, overrides, search)


def compose_recorded(recipe: str, file: Path, values: list[str]) -> Any:
    """The complete configuration in a file, such as a run directory's `resolved.yaml`, with other `values`.

    Raises:
        InputError: there is no such file, it is not `recipe`'s, or an error of `compose`.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} holds no {file.name}: give the directory of a run")
    search = ConfigSearch.of(values)
    for text in search.overrides:
        if search.options(text.split("=")[0]):
            raise InputError(f"{text}: {file.parent} has a complete configuration; change single values only")
    return _typed(recipe, file.parent.resolve(), file.stem, search.overrides, search)


@dataclass(frozen=True)
class ConfigSearch:
    """The folders in which groups are looked up, and the overrides of the same command line."""

    folders: Sequence[Path]
    overrides: list[str]

    @classmethod
    def of(cls, arguments: list[str]) -> "ConfigSearch":
        """Take `--config-dir=DIR` out of the arguments.

        Raises:
            InputError: there is no such folder, or it holds a file with the name of a file in conf/, which Hydra would
                ignore.
        """
        flags = [text for text in arguments if text.startswith(f"{CONFIG_DIR}=")]
        folders = [Path(text.split("=", 1)[1]).absolute() for text in flags]
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{CONFIG_DIR}={folder}: no such folder")
            for path in sorted(folder.rglob("*.yaml")):
                name = path.relative_to(folder)
                if (CONF / name).exists():
                    raise InputError(f"{path}: conf/{name} has the same name; rename yours")
        return cls((CONF, *folders), [text for text in arguments if text not in flags])

    def options(self, group: str) -> list[str]:
        """The choices of a group."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def file(self, group: str, option: str | None) -> Path | None:
        """The file of a choice; None if there is none."""
        paths = (folder / group / f"{option}.yaml" for folder in self.folders)
        return next(filter(Path.is_file, paths), None)

    def groups(self) -> list[str]:
        """The names of all groups."""
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})


def compose_untyped(recipe: str, folder: Path, root: str, overrides: list[str], search: ConfigSearch) -> DictConfig:
    """Hydra's composition of the file `root` of a folder, with its own section `hydra`."""
    register_schemas(recipe)
    GlobalHydra.instance().clear()
    if own := search.folders[1:]:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(_quoted(f'file://{path}') for path in own)}]"]
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(root, overrides, return_hydra_config=True)


def _typed(recipe: str, folder: Path, root: str, overrides: list[str], search: ConfigSearch) -> Any:
    """As `compose_untyped`, as an instance of the recipe's schema."""
    try:
        composed = compose_untyped(recipe, folder, root, overrides, search)
        with open_dict(composed):
            chosen = composed.pop("hydra").runtime.choices
        # Hydra lets `+group.nope=1` through; merging into the bare schema does not.
        plain = OmegaConf.create(OmegaConf.to_container(composed))
        if plain.get("plugins"):  # before the values are checked: they may name what a plugin registers
            plain.plugins = load_plugins(plain.plugins)
        typed = OmegaConf.merge(OmegaConf.structured(schema_of(recipe)), plain)
        missing = sorted(OmegaConf.missing_keys(typed)) or list(_unfilled(typed, chosen, search))
        if missing:
            raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
        return OmegaConf.to_object(typed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain_error(error, recipe, search.groups(), search.options)) from error


def to_container(config: Any) -> dict[str, Any]:
    """A configuration as plain values."""
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    return values


def from_container(schema: type, values: dict[str, Any]) -> Any:
    """An instance of a schema from plain values, such as a section of a checkpoint's manifest."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def register_schemas(recipe: str) -> None:
    """Let the root configuration of a recipe, and those that it extends, find their schemas."""
    names = {path: name for name, path in SCHEMAS.items()}
    for schema in schema_of(recipe).__mro__:
        if name := names.get(f"{schema.__module__}:{schema.__qualname__}"):
            ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def _resumed_directory(recorded: dict[str, str], values: list[str]) -> Path:
    """DIR of `run=DIR resume=true`."""
    if "run" not in recorded:
        raise InputError(f"{recorded['resume']}: name the run to resume, by run=DIR")
    if recorded.get("resume", "").lower() != "resume=true":
        raise InputError(f"{recorded['run']}: add resume=true to resume the run, or start a new run by from=DIR")
    others = [text for text in values if not may_change(text.split("=")[0])]
    if others := [*others, *filter(None, [recorded.get("from")])]:
        raise InputError(f"{others[0]}: a run resumes with its own values; start a new run with others by from=DIR")
    return Path(recorded["run"].split("=", 1)[1])


def _name_positional(recipe: str, overrides: list[str]) -> list[str]:
    """The overrides, with keys in front of leading bare words."""
    bare = list(itertools.takewhile(lambda text: "=" not in text, overrides))
    named, taken = [], 0
    for key in POSITIONAL.get(recipe, ())[: len(bare)]:
        rest = bare[taken:]
        words = rest if key.endswith("*") else rest[:1]
        value = f"[{','.join(map(_quoted, words))}]" if key.endswith("*") else words[0]
        named.append(f"{key.removesuffix('*')}={value}")
        taken += len(words)
    return named + overrides[taken:]


def _quoted(text: str) -> str:
    """A text in quotes, so that Hydra reads any character in it."""
    return "'" + text.replace("'", "\\'") + "'"


def _check_overrides(overrides: list[str], search: ConfigSearch) -> None:
    """Refuse overrides that Hydra's own error would not name."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise InputError(f"{text}: not of the form key=value ({str(error).splitlines()[0]})") from error
        options = search.options(override.key_or_group)
        if override.value() is None and not override.is_delete() and options:
            raise InputError(f"{text}: choose one of {', '.join(options)}, or leave it out")


def _check_data_group(overrides: list[str]) -> None:
    """Refuse `data.x=` without a chosen group: the checkpoint's data cannot be changed."""
    keys = [text.split("=")[0] for text in overrides]
    changed = [key for key in keys if key.startswith("data.")]
    if changed and "data" not in keys:
        raise InputError(f"{changed[0]}: choose a group of conf/data with it, such as data=files")


def _unfilled(config: DictConfig, chosen: dict[str, str | None], search: ConfigSearch) -> Iterator[str]:
    """Keys that a chosen file marks `???` and that are not set: the merge keeps the schema's null there."""
    for group, option in chosen.items():
        file = search.file(group, option)
        if group in config and file:
            values = flatten_keys(OmegaConf.to_container(OmegaConf.load(file)), f"{group}.")
            marked = (key for key, value in values.items() if value == MISSING)
            yield from (key for key in marked if OmegaConf.select(config, key) is None)
