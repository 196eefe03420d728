"""Read files that the packages contain: Jinja templates, tables in YAML and other texts."""

import posixpath
import re
import sys
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import yaml

_ONE_TAG_PER_LINE = (".html.jinja", ".md.jinja", ".sbatch.jinja", ".txt.jinja", ".yaml.jinja")


class ExactDumper(yaml.SafeDumper):
    """Writes YAML from which every text is read back equal, also with line breaks of Unicode.

    Attributes:
        multi_line: the style of a text of several lines; None is PyYAML's choice.
    """

    multi_line: str | None = None

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A text in double quotes if PyYAML would otherwise write a break of Unicode that it reads as another one."""
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else self.multi_line if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


ExactDumper.add_representer(str, ExactDumper.represent_str)


class _Environment(jinja2.Environment):
    def join_path(self, template: str, parent: str) -> str:
        """The path of an included template, relative to the template that includes it."""
        return posixpath.normpath(posixpath.join(posixpath.dirname(parent), template))


def _to_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    options = {"sort_keys": False, "width": sys.maxsize}
    return yaml.safe_dump([value], default_flow_style=True, **options)[1:-2]


@cache
def _environment(package: str, html: bool, trim: bool) -> jinja2.Environment:
    environment = _Environment(
        loader=jinja2.PackageLoader(package, "."),
        undefined=jinja2.StrictUndefined,
        autoescape=html,
        trim_blocks=trim,
        lstrip_blocks=trim,
        keep_trailing_newline=trim,
        auto_reload=False,
    )
    # The default policy sorts the keys and writes NaN and Infinity, which no browser reads.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["toyaml"] = _to_yaml
    return environment


def load_template(package: str | None, name: str) -> jinja2.Template:
    """A Jinja template of a package; a variable without a value is an error.

    HTML templates (`*.html.jinja`) escape their values. In templates of files (`*.html.jinja`, `*.md.jinja`,
    `*.sbatch.jinja`, `*.txt.jinja`, `*.yaml.jinja`), a line that holds only a tag leaves no blank line. `include` takes
    paths relative to the including file.

    Args:
        package: the Python package that stores the file, such as `__package__`.
        name: path of the file below the package.
    """
    return _environment(package, name.endswith(".html.jinja"), name.endswith(_ONE_TAG_PER_LINE)).get_template(name)


def render(package: str | None, name: str, **values: Any) -> str:
    """The text of a Jinja template of a package, filled with `values`. See `load_template`."""
    return load_template(package, name).render(**values)


def render_source(source: str, **values: Any) -> str:
    """The text of a Jinja source, filled with `values`; it may include the templates of no package."""
    return _environment("csc_train", False, False).from_string(source).render(**values)


def read_text(package: str | None, name: str) -> str:
    """The text of a UTF-8 file that is stored in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def read_yaml(package: str | None, name: str) -> Any:
    """The content of a YAML file that is stored in a package, lists as tuples."""

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: frozen(inner) for key, inner in value.items()}
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return frozen(yaml.safe_load(read_text(package, name)))
