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
from collections.abc import Callable, Iterator
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
Texts: no quotes but the shell's; quote null, ${...} and items of a list that hold a comma
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
    prefix: str
    """Of a section: what its fields' keys begin with."""


def settings_of(schema: type, prefix: str = "") -> Iterator[Setting]:
    """The fields of a schema, in order, not those of its sections."""
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        doc, annotation, allowed = _field_source(schema, item.name)
        section = _section(types[item.name])
        inner, middle = section or (None, "")
        default = "" if section else _default_text(item)
        doc = doc or (inspect.getdoc(inner) or "").split("\n\n")[0].replace("\n", " ") if inner else doc
        key = prefix + item.name
        yield Setting(key, annotation, default, allowed, doc, inner, f"{key}{middle}.")


def all_settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """The fields of a schema and of its sections, in order."""
    for setting in settings_of(schema, prefix):
        yield setting
        if setting.schema:
            yield from all_settings(setting.schema, setting.prefix)


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
                limits = {str(part.arg): eval(ast.unparse(part.value), dict(names)) for part in call.keywords}
                text = ", ".join(limits["choices"]) if "choices" in limits else _range_text(**limits)
                for part in call.args[2:]:
                    checked = fields if isinstance(part, ast.Starred) else [ast.literal_eval(part)]
                    yield from ((field, text) for field in checked)


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
    from csc_train.templates import render  # only the help needs jinja

    def wrapped(text: str, indent: int) -> str:
        return textwrap.fill(
            text, 118, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
        )

    return render(
        __package__,
        "help.txt.jinja",
        recipe=recipe,
        purpose=ast.get_docstring(ast.parse(script_of(recipe).read_text(encoding="utf-8"))),
        groups=groups_of(recipe),
        choices=lambda group: ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml"))),
        settings=all_settings(schema_of(recipe)),
        wrapped=wrapped,
    )


def settings_page() -> str:
    """docs/settings.md: the settings of each recipe, and each section once."""
    from csc_train.templates import render

    settings = {recipe: list(all_settings(schema_of(recipe))) for recipe in SCHEMAS}
    sections: dict[type, dict[str, Any]] = {}
    for recipe, every in settings.items():
        for each in filter(lambda setting: setting.schema, every):
            title = f"{each.key} ({each.schema.__name__})"
            anchor = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
            own = list(settings_of(each.schema, f"{each.key}."))
            section = {"title": title, "anchor": anchor, "settings": own, "recipes": []}
            sections.setdefault(each.schema, section)["recipes"].append(recipe)
    recipes = {recipe: [each for each in every if "." not in each.key] for recipe, every in settings.items()}
    return render(__package__, "settings.md.jinja", recipes=recipes, sections=sections)


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
        group, _, option = match.group(1).partition("/")
        known = options(group)
        advice = f". For another model: model=own model.path={option}" * (group == "model")
        return f"{group}={option}: not in conf/{group}.{suggestion(option, known)} Known: {', '.join(known)}{advice}"
    if match := re.search(r"You must specify '([^']+)'", text):
        group = match.group(1)
        return f"{group} is required: choose one by {group}={'|'.join(options(group))}"
    # OmegaConf names a value of a mapping or a list by its last key only; the override has the whole key.
    full = re.search(r"Error merging override [+]*([^=\s]+)=", text) or re.search(r"full_key: (\S+)", text)
    reasons = [line for line in str(chain[-1]).strip().splitlines() if "raised while composing config" not in line]
    place = re.search(r"In '([^']+)': \w+ raised while composing config", text)
    source = f"conf/{place.group(1)}.yaml: " if place else ""
    items = {
        each.schema.__name__: each
        for each in all_settings(schema_of(recipe))
        if each.schema and each.type.startswith("list[")
    }
    item = re.search(r"full_key: (\w+)\n\s*reference_type=(\w+)", text)
    if item and (owner := items.get(item[2])):
        key, known = owner.prefix + item[1], [each.key for each in settings_of(owner.schema, owner.prefix)]
        unknown = f"unknown key {key!r} for recipe {recipe}.{suggestion(key, known)}"
        return source + (f"{key}: {reasons[0]}" if key in known else unknown)
    if (item := re.search(r"not a subclass of (\w+)[^\n]*\n\s*full_key: (\S+)", text)) and item[1] in items:
        first = dataclasses.fields(items[item[1]].schema)[0].name
        return f"{source}{item[2]}: must be a mapping, such as {{{first}: ...}}"
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text):
        full = re.search(r"full_key: (\S+)", text)
        key = match.group(1) if "." in match.group(1) or not full else full.group(1)
        if "not in" in text and key in known_keys(recipe):  # a mapping
            return f"{key}: entries are added one by one: +{key}.name=value"
        if "not in" in text:
            return f"unknown key {key!r} for recipe {recipe}.{suggestion(key, [*known_keys(recipe), *groups])}"
    return source + (f"{full.group(1)}: {reasons[0]}" if full else reasons[0])


if __name__ == "__main__":
    print(settings_page(), end="")
