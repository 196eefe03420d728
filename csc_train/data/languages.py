"""The languages of dialogues: labels of the strategies, system prompt, speakers, and which metrics suit them."""

import dataclasses
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from csc_train.data.config import LANGUAGE_CODES
from csc_train.errors import InputError, check_choice
from csc_train.plugins import check_entry, note_registration, takes_fields_of
from csc_train.templates import read_text, read_yaml, render_source

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

logger = logging.getLogger(__name__)

NUM_STRATEGIES = 12
STAGE_NAMES = ("CONNECTING", "IDENTIFYING", "EXPLORING", "RESOLVING", "MAINTAINING")
"""The stages of a conversation, in their typical order; `strategies.Stage` has them as an enumeration."""
DETECTED = 200
"""Texts of which `detect_language` looks at most."""


@dataclass(frozen=True, eq=False)
class Language:
    """A language that dialogues, labels and prompts may have."""

    code: str
    """ISO 639-1, such as en: the value of `template.language`, and the `lang` of HTML pages."""
    strategies: Mapping[int, tuple[str, str]]
    """Name and definition of each strategy, by its number 1 to 12. The name stands in the brackets of a reply."""
    stages: Mapping[str, str]
    """Name of each stage, by its name in `STAGE_NAMES`."""
    supporter: str
    customer: str
    opening: str
    """The first user message, for a chat that must begin with the user where the supporter speaks first."""
    system_prompt: str
    """Jinja source, filled with the `TemplateConfig.mode`, `strategies` (each with number, name and definition) and
    `stages` (names)."""
    profiles: tuple[str, ...] = ("en",)
    """The default of `metrics.profiles`."""
    spaced_words: bool = True
    """Whether white space separates words. If not, words are those of jieba, and shared text is found by characters."""
    texts: str = "en"
    """The language, zh or en, of the texts that the package has in these two only, such as a judge's prompts."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each strategy, by its name."""
        return {name: number for number, (name, _) in self.strategies.items()}

    def render_system_prompt(self, mode: str) -> str:
        """The system prompt of a `TemplateConfig.mode`, without outer white space."""
        terms = [{"number": number, "name": n, "definition": text} for number, (n, text) in self.strategies.items()]
        stages = [self.stages[name] for name in STAGE_NAMES]
        return render_source(self.system_prompt, mode=mode, strategies=terms, stages=stages).strip()


def _built_in(code: str) -> Language:
    facts = read_yaml(__package__, f"language.{code}.yaml")
    return Language(code=code, system_prompt=read_text(__package__, f"system_prompt.{code}.jinja"), **facts)


LANGUAGES = {code: _built_in(code) for code in ("zh", "en")}
"""The known languages by code; `register_language` adds one."""


def get_language(code: str) -> Language:
    """The language of a code.

    Raises:
        InputError: it is not known; the message names the nearest one.
    """
    if code not in LANGUAGES:
        check_choice("language", code, LANGUAGES)
    return LANGUAGES[code]


@takes_fields_of(Language)
def register_language(**fields: Any) -> Language:
    """Add a language.

    Args:
        fields: those of `Language`.

    Raises:
        InputError: a field is unknown, missing or incomplete, or the code or the name of a strategy is taken.
    """
    check_entry("language", Language, fields)
    language = Language(**fields)
    place = f"language {language.code}"
    if language.code in LANGUAGES:
        raise InputError(f"{place}: the code is taken; taken are {', '.join(LANGUAGES)}: choose another")
    check_choice(f"{place}: texts", language.texts, ("zh", "en"))
    numbers = range(1, NUM_STRATEGIES + 1)
    for field, wanted in (("strategies", numbers), ("stages", STAGE_NAMES)):
        if set(getattr(language, field)) != set(wanted):
            raise InputError(f"{place}: {field}: give one entry for each of {', '.join(map(str, wanted))}")
    for number, (name, _) in language.strategies.items():
        if not re.fullmatch(r"[^\W\d]([^\[\]+＋]*[^\[\]+＋\s])?", name):
            raise InputError(f"{place}: the name {name!r} of strategy {number}: begin with a letter; no brackets, no +")
        others = {each.numbers.get(name, number) for each in (language, *LANGUAGES.values())}
        if others != {number}:
            raise InputError(f"{place}: the name {name!r} of strategy {number} is that of another one: choose another")
    try:
        language.render_system_prompt("joint")
    except jinja2.TemplateError as error:
        raise InputError(f"{place}: system_prompt: {type(error).__name__}: {error}") from error
    # In the order of their numbers, as prompts list them.
    ordered = {number: language.strategies[number] for number in numbers}
    LANGUAGES[language.code] = dataclasses.replace(language, strategies=ordered)
    if language.code not in LANGUAGE_CODES:
        LANGUAGE_CODES.append(language.code)
    note_registration("a plugin")  # built-in languages are in the table from the start
    return LANGUAGES[language.code]


def detect_language(texts: Iterable[str]) -> tuple[str | None, float]:
    """The code of the language that most of the first `DETECTED` texts are in, and their share; it may be unknown here.

    None, with the share of such texts, if most are too short or too mixed to tell.
    """
    texts = [*itertools.islice(texts, DETECTED)]
    if texts and all(map(_is_chinese, texts)):
        return "zh", 1.0
    try:
        identifier = _identifier()
    except OSError as error:  # it unpacks its model in the temporary directory, which may be full
        logger.info(f"note: the language of the dialogues was not detected ({error})")
        return None, 0.0
    found = Counter(identifier.classify(text)[0] for text in texts)
    (code, count), *_ = found.most_common(1) or [("und", 0)]
    return (None if code == "und" else code), count / max(found.total(), 1)


def _is_chinese(text: str) -> bool:
    """Whether its writing tells that a text is Chinese, without the model, which takes most of a second to read."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum("一" <= each <= "鿿" for each in letters) > len(letters) and not re.search("[ぁ-ヿ가-힣]", text)


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.8)
    identifier.set_languages(set(identifier.labels) - {"wuu", "yue"})  # their writing is hard to tell from zh
    return identifier
