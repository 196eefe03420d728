"""Explain settings: the `--help` of each recipe, docs/settings.md, and errors that name the nearest known key.

python -m csc_train.config.explain > docs/settings.md
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from csc_train.config.paths import CONF, script_of
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.errors import suggestion

MISSING = "???"
FOOTER = """Earlier runs:
  run=DIR resume=true   resume the run in DIR
  from=DIR key=value    start a new run with the settings of the run in DIR, and some others
Flags:
  --cfg job             print the composed configuration, run nothing
  --config-dir DIR      look for choices of groups in DIR as well"""


@dataclass(frozen=True)
class Setting:
    """A field of a schema."""

    key: str
    """Dotted key, such as `trainer.learning_rate`; `<name>` stands for any key of a mapping."""
    type: str
    default: str
    """As YAML; `required` if there is none."""
    allowed: str
    """The choices or the range; empty if any value of the type is allowed."""
    doc: str
    schema: builtins.type | None
    """Of a section: the dataclass of its fields."""


def settings_of(schema: type, prefix: str = "") -> Iterator[Setting]:
    """The fields of a schema, in order, not those of its sections."""
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        doc, annotation, allowed = _field_source(schema, item.name)
        section = _section(types[item.name])
        inner, default = (section[0], "") if section else (None, _default_text(item))
        doc = doc or (inspect.getdoc(inner) or "").split("\n\n")[0].replace("\n", " ") if inner else doc
        yield Setting(prefix + item.name, annotation, default, allowed, doc, inner)


def all_settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """The fields of a schema and of its sections, in order."""
    types = typing.get_type_hints(schema)
    for setting in settings_of(schema, prefix):
        yield setting
        if section := _section(types[setting.key.removeprefix(prefix)]):
            inner, key = section
            yield from all_settings(inner, f"{setting.key}{key}.")


def _section(annotation: Any) -> tuple[type, str] | None:
    """The schema in a field's type, and the key between them; None if the field is a plain value."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation, ""
    arguments = [found for each in typing.get_args(annotation) if (found := _section(each))]
    if not arguments:
        return None
    return arguments[0][0], ".<name>" if typing.get_origin(annotation) is dict else arguments[0][1]


def _default_text(item: dataclasses.Field) -> str:
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if value is dataclasses.MISSING or value == MISSING:
        return "required"
    if isinstance(value, float):
        return repr(value)  # YAML writes 1e-05 as a text
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).splitlines()[0]


def _field_source(schema: type, name: str) -> tuple[str, str, str]:
    """Docstring, type and allowed values of a field, from the source of the class that defines it."""
    for owner in schema.__mro__:
        if name in vars(owner).get("__annotations__", ()):
            docs, annotations, allowed = _class_source(owner)
            return docs.get(name, ""), annotations[name], allowed.get(name, "")
    raise KeyError(name)


@functools.cache
def _class_source(schema: type) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Docstrings, types and allowed values of a class's own fields, by name."""
    module = inspect.getmodule(schema)
    tree = ast.parse(inspect.getsource(module))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == schema.__name__)
    docs, annotations = {}, {}
    for node, following in itertools.pairwise([*body.body, None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotations[node.target.id] = ast.unparse(node.annotation)
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs, annotations, dict(_checks(body, vars(module), list(annotations)))


def _checks(body: ast.ClassDef, names: dict[str, Any], fields: list[str]) -> Iterator[tuple[str, str]]:
    """(field, allowed values) of the calls of `check_fields` in the methods of a schema.

    Args:
        names: the names of the module, to evaluate the limits with.
        fields: all fields, for `*vars(self)`.
    """
    for call in ast.walk(body):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "check_fields":
            with contextlib.suppress(NameError):  # limits that depend on other fields
                limits = {part.arg: eval(ast.unparse(part.value), dict(names)) for part in call.keywords}
                text = ", ".join(limits["choices"]) if "choices" in limits else _range_text(**limits)
                for part in call.args[2:]:
                    yield from ((name, text) for name in (fields if isinstance(part, ast.Starred) else [part.value]))


def _range_text(low: float, high: float = float("inf")) -> str:
    return f"at least {low}" if high == float("inf") else f"{low} to {high}"


def groups_of(recipe: str) -> dict[str, str | None]:
    """The groups that a recipe's root configuration chooses from, each with its default choice."""
    groups = {}
    for entry in yaml.safe_load((CONF / f"{recipe}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            groups |= entry
        elif entry in SCHEMAS:  # extends another recipe's root
            groups |= groups_of(entry)
    return groups


def help_text(recipe: str) -> str:
    """The `--help` of a recipe: purpose, groups, every setting with type, default and allowed values."""
    lines = [ast.get_docstring(ast.parse(script_of(recipe).read_text(encoding="utf-8"))), ""]
    lines += [f"usage: csc-train {recipe} [group=choice ...] [key=value ...]", ""]
    if groups := groups_of(recipe):
        lines.append("Groups, with their choices in conf/ (a choice sets defaults of its section):")
        for group, default in groups.items():
            choices = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
            lines += _wrapped(f"{group}: {choices}" + (f" (default: {default})" if default else ""), 2)
        lines.append("")
    lines.append("Settings:")
    for setting in all_settings(schema_of(recipe)):
        indent = 2 + 2 * setting.key.count(".")
        if setting.schema:
            lines += _wrapped(f"{setting.key}: {setting.doc}", indent)
            continue
        lines.append(" " * indent + f"{setting.key}: {setting.type} = {setting.default}")
        allowed = f" Allowed: {setting.allowed}." if setting.allowed else ""
        lines += _wrapped((setting.doc + allowed).strip(), indent + 4)
    return "\n".join([*lines, "", FOOTER])


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 118, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
    )


def settings_page() -> str:
    """docs/settings.md: the settings of each recipe, and each section once."""
    parts = [
        "# Settings\n\nThe settings of every recipe, as `csc-train RECIPE --help` explains them. A choice of a group\n"
        "in `conf/` replaces defaults of its section; `--cfg job` prints the result.\n\n`--config-dir DIR` "
        "adds the choices in a folder of your own, such as `DIR/trainer/slow.yaml` for `trainer=slow`.\n"
        "A file there must not have the name of one in `conf/`.\n\nThis page is generated: "
        "`python -m csc_train.config.explain > docs/settings.md`.\n"
    ]
    used: dict[type, tuple[str, list[str]]] = {}
    for recipe in SCHEMAS:
        settings = list(all_settings(schema_of(recipe)))
        sections = {setting.key: setting.schema for setting in settings if setting.schema}
        for key, schema in sections.items():
            used.setdefault(schema, (key, []))[1].append(recipe)
        own = [setting for setting in settings if "." not in setting.key]
        links = [f"[`{s.key}`](#{_anchor(used[s.schema][0], s.schema)})" for s in own if s.schema]
        parts.append(f"## csc-train {recipe}\n")
        if links:
            parts.append(f"Sections: {', '.join(links)}.\n")
        if plain := [setting for setting in own if not setting.schema]:
            parts.append(_table(plain))
    for schema, (key, recipes) in used.items():
        plain = [setting for setting in settings_of(schema, f"{key}.") if not setting.schema]
        parts.append(f"## {_title(key, schema)}\n\nOf {', '.join(dict.fromkeys(recipes))}.\n")
        if plain:
            parts.append(_table(plain))
    return "\n".join(parts)


def _title(key: str, schema: type) -> str:
    return f"{key} ({schema.__name__})"


def _anchor(key: str, schema: type) -> str:
    return re.sub(r"[^\w -]", "", _title(key, schema)).lower().replace(" ", "-")


def _table(settings: Iterable[Setting]) -> str:
    rows = [("key", "type", "default", "allowed", "meaning"), ("---",) * 5]
    for each in settings:
        rows.append((f"`{each.key}`", f"`{each.type}`", f"`{each.default}`", each.allowed, each.doc))
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def known_keys(recipe: str) -> Iterator[str]:
    """Every key of a recipe's schema with its path, and the groups of conf/."""
    yield from (setting.key for setting in all_settings(schema_of(recipe)))
    yield from (path.name for path in CONF.iterdir() if path.is_dir())


def explain_error(error: Exception, recipe: str, groups: list[str], options: Callable[[str], list[str]]) -> str:
    """One line for an error of Hydra or OmegaConf: the wrong key or choice, and the nearest known one.

    Args:
        groups: the names of all groups.
        options: gives the choices of a group.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(part) for part in chain)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        known = options(group)
        return f"{group}={option}: not in conf/{group}.{suggestion(option, known)} Known: {', '.join(known)}"
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text):
        full = re.search(r"full_key: (\S+)", text)
        key = match.group(1) if "." in match.group(1) or not full else full.group(1)
        if "not in" in text:
            return f"unknown key {key!r} for recipe {recipe}.{suggestion(key, [*known_keys(recipe), *groups])}"
    # OmegaConf names a value of a mapping by its last key only; the override has the whole key.
    full = re.search(r"Error merging override [+]*([^=\s]+)=", text) or re.search(r"full_key: (\S+)", text)
    reasons = [line for line in str(chain[-1]).strip().splitlines() if "raised while composing config" not in line]
    place = re.search(r"In '([^']+)': \w+ raised while composing config", text)
    source = f"conf/{place.group(1)}.yaml: " if place else ""
    return source + (f"{full.group(1)}: {reasons[0]}" if full else reasons[0])


if __name__ == "__main__":
    print(settings_page(), end="")
