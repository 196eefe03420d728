"""Prompts of single-answer tasks (rewriting, checks), from `prompts/<language>/<task>.jinja`."""

from typing import Any

from csc_train.data.strategies import STRATEGIES
from csc_train.synthesis.utterances import PLACEHOLDERS
from csc_train.templates import render


def task_messages(task: str, language: str, **values: Any) -> list[dict[str, str]]:
    """The chat messages of a task ("rewrite", ...) in a language ("zh", "en"); `values` fill the template."""
    values |= {"strategies": STRATEGIES, "placeholders": PLACEHOLDERS[language]}
    text = render(__package__, f"prompts/{language}/{task}.jinja", **values)
    return [{"role": "user", "content": text.strip()}]
