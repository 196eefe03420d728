"""Overrides, the arguments `key=value` of a command line: quote a value, and read one by Hydra's grammar."""

import dataclasses
import functools
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from csc_train.errors import InputError

_PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)$)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)
"""A text that Hydra reads as itself wherever it stands."""
_ITEM = re.compile(r""" *((?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,])+)""", re.DOTALL)
"""An item of a list; a comma in quotes separates nothing."""
_UNREADABLE = object()


def quote(value: Any) -> str:
    """A value as it stands after `key=`, also in a list: Hydra reads the same value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN.fullmatch(value) else _in_quotes(escape(value))


def escape(value: Any) -> Any:
    """A value in whose texts OmegaConf finds no interpolation `${...}`; it reads the value itself."""
    if isinstance(value, dict):
        return {key: escape(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [escape(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def unescape(text: str) -> str:
    """The text that `escape` made another of."""
    return re.sub(r"(\\*)\1\\\$\{", r"\1${", text)


def _in_quotes(text: str) -> str:
    """A text in double quotes, which a shell's single quotes can hold. Its interpolations stay."""
    return QuotedString(text, Quote.double).with_quotes()


def argument(key: str, value: Any) -> str:
    """An override as an argument of a command. A text or path is that of a text field: in quotes only if it has to."""
    text = str(value) if isinstance(value, Path) else value
    taken = isinstance(text, str) and "${" not in text and parse_override(f"{key}={text}", str).value == text
    return f"{key}={text if taken else quote(text)}"


def hint(values: Mapping[str, Any]) -> str:
    """Overrides as they can be pasted into a shell, such as `from=runs/demo` (see `argument`)."""
    return shlex.join(argument(key, value) for key, value in values.items())


def resume_hint(directory: Any, needs: str = "") -> str:
    """The overrides that resume the run in a directory, and others that it needs, for a shell."""
    return f"{hint({'run': directory, 'resume': True})} {needs}".rstrip()


@dataclass(frozen=True)
class Override:
    """An override.

    Attributes:
        key: with Hydra's prefix, if any.
        value: null without one (`~key`).
        argument: what Hydra reads as this key and value.
    """

    key: str
    value: Any
    argument: str


def parse_override(given: str, annotation: Any = Any) -> Override:
    """Read an override by Hydra's grammar; where a text is due, what that does not read as one is taken as it is.

    So `data.train.path=a(1),b.jsonl` and `model.revision=82e4718` are texts without quotes. A list of texts may be
    written without brackets if it has one item.

    Args:
        annotation: the type of the key's field; Any if it is unknown.

    Raises:
        InputError: there is no key, or a list, mapping or quoted text is broken.
    """
    key, equals, text = given.partition("=")
    if not key or (not equals and not key.startswith("~")) or _hydra_value("0", key) != 0:
        raise InputError(f"{given}: not of the form key=value")
    if not equals:
        return Override(key, None, given)
    options = _options(annotation)
    value = _hydra_value(text)
    if list[str] in options and not (value is None or _are_texts(value)):
        items = _ITEM.findall(text[1:-1]) if re.fullmatch(r"\[.*\]", text, re.DOTALL) else [text]
        read = ((item, _hydra_value(item)) for item in items)
        value = [value if isinstance(value, str) else item for item, value in read]
        return Override(key, value, f"{key}=[{','.join(map(_in_quotes, value))}]")
    structure = isinstance(value, list | dict) and not {str, types.NoneType}.issuperset(options)
    if str in options and not (value is None or type(value) in options or structure):
        value = text
    elif value is _UNREADABLE:
        if text[:1] in tuple("[{'\""):
            raise InputError(f"{given}: broken list, mapping or quotes")
        value = text
    else:
        return Override(key, value, given)
    return Override(key, value, f"{key}={_in_quotes(text)}")


def type_at(annotation: Any, names: Sequence[str]) -> Any:
    """The type of the field that a dotted key names below a type; Any if there is none."""
    if not names:
        return annotation
    for option in _options(annotation):
        if dataclasses.is_dataclass(option) and names[0] in (types := typing.get_type_hints(option)):
            return type_at(types[names[0]], names[1:])
        if typing.get_origin(option) is dict:
            return type_at(typing.get_args(option)[1], names[1:])
    return Any


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; another type by itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _hydra_value(text: str, key: str = "key") -> Any:
    """What Hydra reads as the value of `key=text`; `_UNREADABLE` if it reads none, or several of a sweep."""
    try:
        parsed = _parser().parse_override(f"{key}={text}")
    except HydraException:
        return _UNREADABLE
    return _UNREADABLE if parsed.is_sweep_override() else parsed.value()


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_parser = functools.cache(OverridesParser.create)
