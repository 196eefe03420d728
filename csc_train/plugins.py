"""Plugins: a user's Python files and modules that add model families, languages, metrics and so on."""

import dataclasses
import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from csc_train.errors import InputError, suggestion

logger = logging.getLogger(__name__)
_registrations: list[str] = []
_Fields = ParamSpec("_Fields")
_Entry = TypeVar("_Entry")


def takes_fields_of(schema: Callable[_Fields, Any]) -> Callable[[Callable[..., _Entry]], Callable[_Fields, _Entry]]:
    """Decorate a function whose `**fields` are those of a dataclass: editors and type checkers know them."""
    return lambda function: function


def note_registration(module: str) -> None:
    """Record that code of this module registered something. Each registry calls it, built-in entries included."""
    _registrations.append(module)


def check_entry(what: str, schema: type, fields: Mapping[str, Any]) -> None:
    """Check the fields of a new entry of a registry.

    Args:
        what: names the entry in messages.
        schema: the entry's dataclass.
        fields: those that the plugin gives, by name.

    Raises:
        InputError: a field is unknown, or missing without a default.
    """
    every = dataclasses.fields(schema)
    names = [field.name for field in every]
    for name in fields:
        if name not in names:
            raise InputError(f"{what}: unknown field {name!r}.{suggestion(name, names)}")
    required = [field.name for field in every if field.default is dataclasses.MISSING]
    if missing := [name for name in required if fields.get(name) is None]:
        raise InputError(f"{what}: the field {missing[0]!r} is missing; give {', '.join(missing)}")


def load_plugins(names: Iterable[str]) -> list[str]:
    """Import plugins, each once per process.

    Args:
        names: paths of Python files, or names of modules on PYTHONPATH.

    Returns:
        The names, with absolute paths.

    Raises:
        InputError: a plugin does not exist, cannot be imported, or registers nothing.
    """
    return [_load(name) for name in names]


def load_recorded_plugins(names: Iterable[str]) -> None:
    """Import the plugins of an earlier run. One that is gone is skipped with a note: it may not be needed."""
    for name in names:
        try:
            _load(name)
        except InputError as error:
            logger.info(f"note: skipped a plugin of the training: {error}")


def _load(name: str) -> str:
    path = Path(name).resolve() if name.endswith(".py") else None
    if path and not path.is_file():
        raise InputError(f"plugins={name}: no such file")
    module = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}" if path else name
    if module not in sys.modules:
        before = len(_registrations)
        try:
            _import_file(module, path) if path else importlib.import_module(module)
        except InputError as error:
            raise InputError(f"plugins={name}: {error}") from error
        except Exception as error:  # a user's code can raise anything
            raise InputError(f"plugins={name}: cannot be imported: {type(error).__name__}: {error}") from error
        if all(each.startswith("csc_train.") for each in _registrations[before:]):
            raise InputError(f"plugins={name}: registers nothing: follow a checklist of docs/extending.md")
    return str(path or name)


def _import_file(module: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(module, path)
    sys.modules[module] = importlib.util.module_from_spec(spec)  # so that its functions can be pickled
    try:
        spec.loader.exec_module(sys.modules[module])
    except BaseException:
        del sys.modules[module]
        raise
