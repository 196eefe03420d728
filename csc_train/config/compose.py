"""Compose a recipe's configuration with Hydra from conf/, the user's own folder and the command line, and check it."""

import dataclasses
import functools
import itertools
import os
import re
import typing
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from csc_train.config.cluster import OnFinishConfig
from csc_train.config.explain import explain_error
from csc_train.config.paths import CONF
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.errors import InputError
from csc_train.overrides import Override, argument, escape, parse_override, quote, type_at, unescape
from csc_train.plugins import load_plugins
from csc_train.runs.config import RESOLVED_FILE, may_change
from csc_train.runs.directory import flatten_keys, read_config

RECORDED = ("run", "resume", "from")
"""Keys that ask for the recorded configuration of an earlier run (see `compose`)."""
POSITIONAL = {
    "compare": ("a", "b"),
    "judge": ("a", "b"),
    "human_eval": ("action", "inputs*"),
    "compare_runs": ("folders*",),
}
"""Keys of a recipe's leading bare words; a key with a star takes all words that follow."""
ALIASES = {("convert", "from"): "format"}
"""Keys of a recipe's command line that no field can have, since Python reserves the word."""
CONFIG_DIR = "--config-dir"
LARGEST = 10**12
"""Of the numbers in a configuration; the fields of a section have limits of their own."""


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
    search = ConfigSearch.of(recipe, arguments)
    recorded = {override.key: override for override in search.overrides if override.key in RECORDED}
    values = [override.argument for override in search.overrides if override.key not in recorded]
    score_only = any((override.key, override.value) == ("score_only", True) for override in search.overrides)
    if score_only and recorded.keys() == {"run"}:
        directory = path_of(recorded["run"])
        return compose_recorded(recipe, directory / RESOLVED_FILE, [*values, argument("run.directory", directory)])
    if score_only:
        raise InputError("score_only=true: name the run whose predictions to score, by run=DIR")
    if "run" in recorded or "resume" in recorded:
        directory = _resumed_directory(recorded, values)
        config = compose_recorded(recipe, directory / RESOLVED_FILE, values)
        config.run = replace(config.run, directory=str(directory), if_exists="resume")
        return config
    if "from" in recorded:
        new_run = ["run.directory=null", "run.if_exists=error"]
        return compose_recorded(recipe, path_of(recorded["from"]) / RESOLVED_FILE, new_run + values)
    chosen = {override.key for override in search.overrides}
    optional = (item.name for item in dataclasses.fields(schema_of(recipe)) if item.default is None)
    search.check_absent(set(optional) - chosen)
    return _typed(recipe, CONF, recipe, search)


def compose_recorded(recipe: str, file: Path, values: list[str]) -> Any:
    """The complete configuration in a file, such as a run directory's `resolved.yaml`, with other `values`.

    Raises:
        InputError: there is no such file, it is not `recipe`'s, or an error of `compose`.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} holds no {file.name}: give the directory of a run")
    search = ConfigSearch.of(recipe, values)
    for override in search.overrides:
        if search.options(override.key):
            raise InputError(
                f"{override.argument}: {file.parent} has a complete configuration; change single values only"
            )
    search.check_absent({key for key, value in read_config(file).items() if value is None})
    return _typed(recipe, file.parent.resolve(), file.stem, search)


@dataclass(frozen=True)
class ConfigSearch:
    """The folders in which groups are looked up, and the overrides of the same command line."""

    folders: Sequence[Path]
    overrides: list[Override]

    @classmethod
    def of(cls, recipe: str, arguments: list[str]) -> "ConfigSearch":
        """Read a recipe's arguments: `--config-dir=DIR`, leading bare words and overrides.

        Raises:
            InputError: there is no such folder, or it holds a file with the name of a file in conf/, which Hydra would
                ignore; or an override cannot be read, or leaves a group without a choice.
        """
        flags = [text for text in arguments if text.startswith(f"{CONFIG_DIR}=")]
        folders = [Path(text.split("=", 1)[1]).expanduser().absolute() for text in flags]
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{CONFIG_DIR}={folder}: no such folder")
            for path in sorted(folder.rglob("*.yaml")):
                name = path.relative_to(folder)
                if (CONF / name).exists():
                    raise InputError(f"{path}: conf/{name} has the same name; rename yours")
        schema, found = schema_of(recipe), cls((CONF, *folders), [])
        for text in _join_nested(_name_positional(recipe, [text for text in arguments if text not in flags])):
            key, equals, value = text.partition("=")
            text = f"{ALIASES.get((recipe, key), key)}{equals}{value}"
            names = text.partition("=")[0].lstrip("+").split(".")
            for end in range(1, len(names)):
                if typing.get_origin(type_at(schema, names[:end])) is list and not names[end].isdecimal():
                    owner = ".".join(names[:end])
                    raise InputError(
                        f"{text}: {owner} is a list: write {owner}=[{{{names[end]}: ...}}], all its entries"
                    )
            is_text = names in (["run"], ["from"]) or found.options("/".join(names))
            override = parse_override(text, str | None if is_text else type_at(schema, names))
            if override.value is None and "=" in text and not text.startswith("~") and found.options(override.key):
                options = ", ".join(found.options(override.key))
                raise InputError(f"{text}: choose one of {options}, or leave it out")
            found.overrides.append(override)
        return found

    def check_absent(self, absent: Container[str]) -> None:
        """Raise an InputError if an override changes a value of a section that is absent."""
        for override in self.overrides:
            section, dot, _ = override.key.lstrip("+").partition(".")
            if dot and section in absent:
                choices = "|".join(self.options(section))
                raise InputError(f"{override.key}: there is no {section} to change: choose one by {section}={choices}")

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


def compose_untyped(recipe: str, folder: Path, root: str, search: ConfigSearch) -> DictConfig:
    """Hydra's composition of the file `root` of a folder, with its own section `hydra`.

    Raises:
        InputError: a file is no YAML, such as one with a key twice.
    """
    register_schemas(recipe)
    _register_hydra()
    GlobalHydra.instance().clear()
    overrides = [override.argument for override in search.overrides]
    if own := search.folders[1:]:
        overrides.append(f"hydra.searchpath={quote([f'file://{path}' for path in own])}")
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose(root, overrides, return_hydra_config=True)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        raise InputError(f"{mark.name}, line {mark.line + 1}: {error.problem}: mend the YAML") from error


def _typed(recipe: str, folder: Path, root: str, search: ConfigSearch) -> Any:
    """As `compose_untyped`, as an instance of the recipe's schema."""
    try:
        composed = compose_untyped(recipe, folder, root, search)
        with open_dict(composed):
            chosen = composed.pop("hydra").runtime.choices
        # Hydra lets `+group.nope=1` through; merging into the bare schema does not.
        plain = OmegaConf.create(_expand_home(OmegaConf.to_container(composed)))
        if plain.get("plugins"):  # before the values are checked: they may name what a plugin registers
            plain.plugins = load_plugins(plain.plugins)
        typed = OmegaConf.unsafe_merge(OmegaConf.structured(schema_of(recipe)), plain)
        missing = sorted(OmegaConf.missing_keys(typed)) or list(_unfilled(typed, chosen, search))
        if missing:
            raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
        return _checked(typed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain_error(error, recipe, search.groups(), search.options)) from error


def to_container(config: Any) -> dict[str, Any]:
    """A configuration as plain values."""
    return dataclasses.asdict(config)


def from_container(schema: type, values: dict[str, Any]) -> Any:
    """An instance of a schema from plain values, such as a section of a checkpoint's manifest.

    Raises:
        InputError: an unknown key, a wrong type or a value out of range.
    """
    try:
        return _checked(OmegaConf.unsafe_merge(OmegaConf.structured(schema), escape(values)))
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {error.msg}".splitlines()[0]) from error


def _checked(typed: DictConfig) -> Any:
    """The object of a typed configuration, every value checked."""
    checked = OmegaConf.to_object(typed)
    for key, value in flatten_keys(OmegaConf.to_container(typed)).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not abs(each) <= LARGEST:  # NaN is not, either
                raise InputError(f"{key}={each}: must be a number between {-LARGEST} and {LARGEST}")
    return checked


@functools.cache
def register_schemas(recipe: str) -> None:
    """Let the root configuration of a recipe, and those that it extends, find their schemas."""
    names = {path: name for name, path in SCHEMAS.items()}
    for schema in schema_of(recipe).__mro__:
        if name := names.get(f"{schema.__module__}:{schema.__qualname__}"):
            ConfigStore.instance().store(name=f"{name}_schema", node=schema)


@functools.cache
def _register_hydra() -> None:
    """Hydra's own section without its launchers, loggers and help, which take a third of a composition's time."""
    ConfigStore.instance().store(group="hydra", name="config", node=HydraConf(defaults=["_self_"]))


def path_of(override: Override) -> Path:
    """The path that an override such as `run=DIR` names."""
    return Path(_expand_home(unescape(str(override.value))))


def _resumed_directory(recorded: dict[str, Override], values: list[str]) -> Path:
    """DIR of `run=DIR resume=true`."""
    if "run" not in recorded:
        raise InputError(f"{recorded['resume'].argument}: name the run to resume, by run=DIR")
    if "resume" not in recorded or recorded["resume"].value is not True:
        given = recorded["run"].argument
        raise InputError(f"{given}: add resume=true to resume the run, or start a new run by from=DIR")
    others = [text for text in values if not may_change(text.split("=")[0])]
    if others := [*others, *(recorded[key].argument for key in recorded if key == "from")]:
        raise InputError(f"{others[0]}: a run resumes with its own values; start a new run with others by from=DIR")
    return path_of(recorded["run"])


def _name_positional(recipe: str, arguments: list[str]) -> list[str]:
    """The arguments, with keys in front of leading bare words; a path may hold `=`."""
    keys = {item.name for item in dataclasses.fields(schema_of(recipe))}

    def is_bare(text: str) -> bool:
        return "=" not in text or (re.split("[.=]", text)[0] not in keys and Path(text).exists())

    bare = list(itertools.takewhile(is_bare, arguments))
    named, taken = [], 0
    for key in POSITIONAL.get(recipe, ())[: len(bare)]:
        words = bare[taken:] if key.endswith("*") else bare[taken : taken + 1]
        named.append(f"{key.removesuffix('*')}={quote(words if key.endswith('*') else words[0])}")
        taken += len(words)
    return named + arguments[taken:]


def _join_nested(arguments: list[str]) -> list[str]:
    """The arguments, with every `on_finish.KEY=VALUE` as an item `KEY=VALUE` of `on_finish.overrides`."""
    own = {f"on_finish.{item.name}" for item in dataclasses.fields(OnFinishConfig)}
    nested = [text for text in arguments if text.startswith("on_finish.") and text.split("=")[0] not in own]
    if not nested:
        return arguments
    given = [text for text in arguments if text.startswith("on_finish.overrides=")]
    items = [item for text in given for item in parse_override(text, list[str]).value or []]
    joined = quote([*items, *(text.removeprefix("on_finish.") for text in nested)])
    return [text for text in arguments if text not in nested + given] + [f"on_finish.overrides={joined}"]


def _expand_home(value: Any) -> Any:
    """A value, or those in it, with `~` at the start of a path as the home directory."""
    if isinstance(value, dict):
        return {key: _expand_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_expand_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _unfilled(config: DictConfig, chosen: dict[str, str | None], search: ConfigSearch) -> Iterator[str]:
    """Keys that a chosen file marks `???` and that are not set: the merge keeps the schema's null or `[]` there."""
    for group, option in chosen.items():
        file = search.file(group, option)
        if group in config and file and MISSING in file.read_text(encoding="utf-8"):  # YAML takes its time
            values = flatten_keys(OmegaConf.to_container(OmegaConf.load(file)), f"{group}.")
            marked = (key for key, value in values.items() if value == MISSING)
            yield from (key for key in marked if OmegaConf.select(config, key) in (None, []))
