"""Find a chat template by its file: one of `chat_templates/*.jinja` beside this module, or a user's own."""

from importlib import resources
from pathlib import Path

from csc_train.errors import InputError, suggestion
from csc_train.files import os_errors
from csc_train.templates import read_text


def chat_template_names() -> list[str]:
    """The names of the chat templates of the package."""
    files = resources.files(__package__).joinpath("chat_templates").iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def load_chat_template(name: str) -> str:
    """The Jinja source of a chat template.

    Args:
        name: one of `chat_template_names()`, or the path of a .jinja file.

    Raises:
        InputError: there is no such template, or the file cannot be read.
    """
    known = chat_template_names()
    if name in known:
        return read_text(__package__, f"chat_templates/{name}.jinja")
    if name.endswith(".jinja"):
        with os_errors(f"model.chat_template={name}", "cannot read"):
            return Path(name).read_text(encoding="utf-8")
    raise InputError(
        f"model.chat_template={name}: choose one of {', '.join(known)}, or the path of a .jinja file."
        f"{suggestion(name, known)}"
    )
