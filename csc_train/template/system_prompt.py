"""The system prompt of a language, and whether dialogues are in it."""

import itertools
from collections.abc import Iterable
from functools import cache

import regex

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import Language, get_language

LANGUAGE_SAMPLE = 200
"""Dialogues whose language is compared with that of the prompt."""


def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a `TemplateConfig.mode` and `language`, without outer white space."""
    return _rendered(get_language(language), mode)


@cache
def _rendered(language: Language, mode: str) -> str:
    return language.render_system_prompt(mode)


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
