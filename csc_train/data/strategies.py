"""The taxonomy of the project: 12 support strategies and 5 stages of a customer support conversation.

Numbers, names, codes and stages are those of the paper (figure 2) and its data; the definitions are our own.
"""

import re
from dataclasses import dataclass
from enum import Enum

from csc_train.invisible import strip_invisible
from csc_train.templates import read_yaml


class Stage(Enum):
    """A phase of the conversation, in its typical (not obligatory) order."""

    CONNECTING = ("Connecting", "欢迎和建立联系")
    IDENTIFYING = ("Identifying", "理解和识别问题")
    EXPLORING = ("Exploring", "寻求解决方案")
    RESOLVING = ("Resolving", "解决和确认")
    MAINTAINING = ("Maintaining", "结束和保持关系")

    def __init__(self, en: str, zh: str):
        self.en = en
        self.zh = zh


@dataclass(frozen=True)
class BilingualTerm:
    """A term with its name and definition in Chinese and English."""

    zh: str
    en: str
    definition_zh: str
    definition_en: str

    def name(self, language: str) -> str:
        """The name in `language` ("zh" or "en"); of a strategy, the one between the brackets of a reply."""
        return {"zh": self.zh, "en": self.en}[language]

    def definition(self, language: str) -> str:
        """The definition in `language` ("zh" or "en")."""
        return {"zh": self.definition_zh, "en": self.definition_en}[language]


@dataclass(frozen=True)
class Strategy(BilingualTerm):
    """One support strategy. `stage` is None for the one strategy (Others) that may appear in any stage."""

    number: int
    code: str
    stage: Stage | None

    @property
    def label(self) -> str:
        """The label as the published data writes it, such as `策略5 情感管理`."""
        return f"策略{self.number} {self.zh}"

    def __str__(self) -> str:
        return self.label


STRATEGIES = tuple(
    Strategy(**row | {"stage": row["stage"] and Stage[row["stage"]]})
    for row in read_yaml("csc_train.data", "strategies.yaml")
)
"""The 12 strategies in the order of their numbers, from `strategies.yaml`."""

GREETING, CLOSURE, OTHERS = STRATEGIES[0], STRATEGIES[10], STRATEGIES[11]

_BY_NUMBER = {str(strategy.number): strategy for strategy in STRATEGIES}
_BY_NAME = {name: strategy for strategy in STRATEGIES for name in (strategy.zh, strategy.en, strategy.code)}
_NUMBERED = re.compile(r"策略([0-9]+)(?:(?:\s*[:：]\s*|\s+)(.+))?")


def parse_strategy(label: str) -> Strategy:
    """Parse the label of a strategy.

    Accepts, with outer invisible characters ignored: `策略5 情感管理`, `策略5: 情感管理`, `策略5`, `5`, and the exact
    Chinese name, English name or code.

    Raises:
        ValueError: an unknown name, a number outside 1..12, a number that contradicts its name, or two strategies
            joined by `+`.
    """
    text = strip_invisible(label)
    if "+" in text or "＋" in text:
        raise ValueError(f"more than one strategy in {label!r}")
    if strategy := _BY_NUMBER.get(text) or _BY_NAME.get(text):
        return strategy
    if match := _NUMBERED.fullmatch(text):
        number, name = match.groups()
        strategy = _BY_NUMBER.get(number)
        if strategy and (name is None or _BY_NAME.get(name) is strategy):
            return strategy
    raise ValueError(f"unknown strategy {label!r}")
