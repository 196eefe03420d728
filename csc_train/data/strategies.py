"""The taxonomy of the project: 12 support strategies and 5 stages of a customer support conversation.

Numbers, codes and stages are those of the paper (figure 2) and its data; `languages` has names and definitions.
"""

import functools
import re
from dataclasses import dataclass
from enum import Enum

from csc_train.data.languages import LANGUAGES, get_language
from csc_train.errors import suggestion
from csc_train.invisible import strip_invisible
from csc_train.templates import read_yaml


class Stage(Enum):
    """A phase of the conversation, in its typical (not obligatory) order."""

    CONNECTING = 1
    IDENTIFYING = 2
    EXPLORING = 3
    RESOLVING = 4
    MAINTAINING = 5

    def title(self, language: str) -> str:
        """Its name in a language."""
        return get_language(language).stages[self.name]


@dataclass(frozen=True)
class Strategy:
    """One support strategy. `stage` is None for the one strategy (Others) that may appear in any stage."""

    number: int
    code: str
    stage: Stage | None

    def name(self, language: str) -> str:
        """The name in a language, which stands between the brackets of a reply."""
        return get_language(language).strategies[self.number][0]

    def definition(self, language: str) -> str:
        """The definition in a language."""
        return get_language(language).strategies[self.number][1]

    @property
    def zh(self) -> str:
        """The Chinese name, which published data have."""
        return self.name("zh")

    @property
    def en(self) -> str:
        """The English name."""
        return self.name("en")

    @property
    def label(self) -> str:
        """The label as the published data writes it, such as `策略5 情感管理`."""
        return self.numbered("zh")

    def numbered(self, language: str) -> str:
        """Number and name: `策略5 情感管理`, `5 Emotional Management`."""
        return f"{'策略' if language == 'zh' else ''}{self.number} {self.name(language)}"

    def __str__(self) -> str:
        return self.label


STRATEGIES = tuple(
    Strategy(**row | {"stage": row["stage"] and Stage[row["stage"]]})
    for row in read_yaml("csc_train.data", "strategies.yaml")
)
"""The 12 strategies in the order of their numbers, from `strategies.yaml`."""

GREETING, CLOSURE, OTHERS = STRATEGIES[0], STRATEGIES[10], STRATEGIES[11]

_BY_NUMBER = {str(strategy.number): strategy for strategy in STRATEGIES}
_BY_CODE = {strategy.code: strategy for strategy in STRATEGIES}
_NUMBERED = re.compile(r"策略([0-9]+)(?:(?:\s*[:：]\s*|\s+)(.+))?")


@functools.lru_cache(maxsize=1000)
def parse_strategy(label: str) -> Strategy:
    """Parse the label of a strategy.

    Accepts, with outer invisible characters ignored: `策略5 情感管理`, `策略5: 情感管理`, `策略5`, `5`, the code, and
    the exact name in any language.

    Raises:
        ValueError: an unknown name, a number outside 1..12, a number that contradicts its name, or two strategies
            joined by `+`.
    """
    text = strip_invisible(label)
    if "+" in text or "＋" in text:
        raise ValueError(f"more than one strategy in {label!r}")
    if strategy := _BY_NUMBER.get(text) or _named(text):
        return strategy
    if match := _NUMBERED.fullmatch(text):
        number, name = match.groups()
        strategy = _BY_NUMBER.get(number)
        if strategy and (name is None or _named(name) is strategy):
            return strategy
    raise ValueError(f"unknown strategy {label!r}")


def _named(text: str) -> Strategy | None:
    """The strategy of this code, or of this name in any language."""
    for language in LANGUAGES.values():
        if number := language.numbers.get(text):
            return STRATEGIES[number - 1]
    return _BY_CODE.get(text)


@functools.lru_cache(maxsize=1000)
def nearest_label(label: str) -> str:
    """The nearest name or label of a strategy, as `errors.suggestion`."""
    names = [each.name(language) for language in LANGUAGES for each in STRATEGIES]
    return suggestion(label, [*names, *(each.label for each in STRATEGIES)])
