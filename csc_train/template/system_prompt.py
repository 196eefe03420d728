"""The system prompt of a language, and whether dialogues are in it."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import LANGUAGES, Language, detect_language, get_language
from csc_train.template.config import TemplateConfig

logger = logging.getLogger(__name__)


def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a `TemplateConfig.mode` and `language`, without outer white space."""
    return _rendered(get_language(language), mode)


@cache
def _rendered(language: Language, mode: str) -> str:
    return language.render_system_prompt(mode)


def language_note(dialogues: Iterable[Dialogue], language: str) -> str | None:
    """A note if most dialogues are in another language than the system prompt, else None. Chats may be in any."""
    code, share = detect_language(dialogue.text for dialogue in dialogues if dialogue.kind == "csc")
    if code is None or code == language.partition("-")[0]:
        return None
    advice = f"choose template.language={code}" if code in LANGUAGES else "add theirs as docs/extending.md says,"
    return (
        f"note: {share:.0%} of the dialogues are in the language {code}, but template.language={language}: {advice} "
        "for a system prompt and labels in their language"
    )


def prompt_language(dialogues: Sequence[Dialogue], given: TemplateConfig | None) -> str:
    """The language of a prompt for dialogues: the given one, with a logged note if most are in another; else theirs.

    A language that is not known here counts as en, dialogues whose language cannot be told as zh.
    """
    if given is None:
        code, _ = detect_language(dialogue.text for dialogue in dialogues)
        return "zh" if code is None else code if code in LANGUAGES else "en"
    if note := language_note(dialogues, given.language):
        logger.info(note)
    return given.language
