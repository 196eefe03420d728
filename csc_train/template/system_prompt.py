"""The system prompt, rendered from the strategy taxonomy."""

import itertools
from collections.abc import Iterable
from functools import cache

import regex

from csc_train.data.dialogue import Dialogue
from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.templates import render

OPENING = {"zh": "（客户接通了客服。）", "en": "(The customer is connected to support.)"}
"""The first user message, by language, for models whose chats must begin with the user."""
LANGUAGE_SAMPLE = 200
"""Dialogues whose language is compared with that of the prompt."""


@cache
def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a `TemplateConfig.mode` and `language`, without outer white space.

    Source: `system_prompt.{zh,en}.jinja` beside this file.
    """
    values = {"mode": mode, "strategies": STRATEGIES, "stages": list(Stage)}
    return render(__package__, f"system_prompt.{language}.jinja", **values).strip()


def language_note(dialogues: Iterable[Dialogue], language: str) -> str | None:
    """A note if the first dialogues are not in the language of the system prompt, else None.

    Dialogues are Chinese if four of five letters are Chinese, English if one of five is; others are in both.
    """
    text = "".join(dialogue.text for dialogue in itertools.islice(dialogues, LANGUAGE_SAMPLE))
    letters = len(regex.findall(r"\p{L}", text))
    share = len(regex.findall(r"\p{Han}", text)) / letters if letters else 0.5
    theirs = "zh" if share > 0.8 else "en" if share < 0.2 else language
    if theirs == language:
        return None
    return (
        f"note: {share:.0%} of the letters in the training dialogues are Chinese, but template.language={language}: "
        f"choose template.language={theirs} for a system prompt and labels in their language"
    )
