"""Prompts: Jinja files of our own wording, one per task and language, in `prompts/`."""

from collections.abc import Sequence
from typing import Any

from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.synthesis.filters.privacy import PLACEHOLDERS
from csc_train.synthesis.filters.rules import Utterance
from csc_train.templates import render

_NAMES = {
    "zh": {speaker: speaker.value for speaker in Speaker},
    "en": {speaker: speaker.name.title() for speaker in Speaker},
}


def messages(task: str, language: str, **fields: Any) -> list[dict[str, str]]:
    """The chat messages of a task ("rewrite", ...) in a language ("zh", "en"), with what the prompt is about."""
    fields |= {"strategies": STRATEGIES, "placeholders": PLACEHOLDERS}
    text = render(__package__, f"prompts/{language}/{task}.jinja", **fields)
    return [{"role": "user", "content": text.strip()}]


def as_text(utterances: Sequence[Utterance], language: str) -> str:
    """Utterances as a prompt shows them: one line each, with the speaker and, where there is one, the strategy."""
    lines = []
    for each in utterances:
        label = f"[{each.label}]" if each.label else ""
        # One line, so that a text cannot pass for another speaker's turn.
        lines.append(f"{_NAMES[language][each.speaker]}{label}: {' '.join(each.text.split())}")
    return "\n".join(lines)
