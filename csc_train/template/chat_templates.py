"""Find a chat template: the tokenizer's own, one of `chat_templates/*.jinja` beside this module, or a user's file."""

import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError, suggestion
from csc_train.files import os_errors
from csc_train.models.families import get_family
from csc_train.templates import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
AUTO = "auto"
"""The value of `model.chat_template` that takes the tokenizer's own chat template."""
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{%- endmacro -%}"
)
"""Stands before a chat template that writes the date of the day, so that training and serving see the same prompt."""


def chat_template_names() -> list[str]:
    """The names of the chat templates of the package."""
    files = resources.files(__package__).joinpath("chat_templates").iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def chat_template_name(name: str, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> str:
    """The chat template that `model.chat_template` means.

    Args:
        name: `auto`, a name or the path of a .jinja file.
        model_type: the model family, whose template `auto` means if the tokenizer has none.
    """
    return get_family(model_type).chat_template if name == AUTO and not tokenizer.chat_template else name


def recorded_name(name: str, finished: bool) -> str:
    """Where to find the template that a manifest names: a final model has a copy of any that is not the package's."""
    return AUTO if finished and name not in chat_template_names() else name


def load_chat_template(name: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
    """The Jinja source of a chat template.

    Args:
        name: `auto`, one of `chat_template_names()`, or the path of a .jinja file.
        tokenizer: has the template that `auto` means.

    Raises:
        InputError: there is no such template, or the file cannot be read.
    """
    known = chat_template_names()
    if name in known:
        return read_text(__package__, f"chat_templates/{name}.jinja")
    if name == AUTO and tokenizer is not None:
        own: Any = tokenizer.chat_template  # may be several by name
        source = own.get("default") if isinstance(own, dict) else own
        if source is None:
            raise InputError(
                f"model.chat_template=auto: {tokenizer.name_or_path}: the tokenizer has no chat template of its own: "
                f"choose {', '.join(known)}, or the path of a .jinja file"
            )
    elif name.endswith(".jinja"):
        with os_errors(f"model.chat_template={name}", "cannot read"):
            source = Path(name).read_text(encoding="utf-8")
    else:
        raise InputError(
            f"model.chat_template={name}: choose auto, {', '.join(known)}, or the path of a .jinja file."
            f"{suggestion(name, [AUTO, *known])}"
        )
    if "strftime_now" in source and not source.startswith(FIXED_DATE):
        logger.info("note: the chat template writes the date of the day: 26 Jul 2024 stands in its place")
        source = FIXED_DATE + source
    return source
