"""Prompts: Jinja files of our own wording, one per task and language, in `prompts/`."""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.synthesis.filters.privacy import PLACEHOLDERS
from csc_train.synthesis.filters.rules import Utterance

_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
_NAMES = {
    "zh": {speaker: speaker.value for speaker in Speaker},
    "en": {speaker: speaker.name.title() for speaker in Speaker},
}


def messages(task: str, language: str, **fields: Any) -> list[dict[str, str]]:
    """The chat messages of a task ("rewrite", ...) in a language ("zh", "en"), with what the prompt is about."""
    text = _template(task, language).render(strategies=STRATEGIES, placeholders=PLACEHOLDERS, **fields)
    return [{"role": "user", "content": text.strip()}]


def as_text(utterances: Sequence[Utterance], language: str) -> str:
    """Utterances as a prompt shows them: one line each, with the speaker and, where there is one, the strategy."""
    lines = []
    for each in utterances:
        label = f"[{each.label}]" if each.label else ""
        # One line, so that a text cannot pass for another speaker's turn.
        lines.append(f"{_NAMES[language][each.speaker]}{label}: {' '.join(each.text.split())}")
    return "\n".join(lines)


@cache
def _template(task: str, language: str) -> jinja2.Template:
    file = resources.files(__package__).joinpath("prompts", language, f"{task}.jinja")
    return _ENVIRONMENT.from_string(file.read_text(encoding="utf-8"))
