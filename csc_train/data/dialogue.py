"""The types of a customer support dialogue: speaker, turn, dialogue."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from csc_train.data.languages import LANGUAGES, get_language
from csc_train.data.strategies import Strategy
from csc_train.files import digest

SURROGATE = "lone surrogate, which UTF-8 cannot hold"


class Speaker(Enum):
    """The speaker of a turn; the value is its name in the published data."""

    SUPPORTER = "客服"
    CUSTOMER = "客户"

    @classmethod
    def parse(cls, name: Any) -> "Speaker":
        """The speaker called `name`: `supporter` or `customer`, or the name in any language.

        Raises:
            ValueError: any other value.
        """
        for speaker in cls:
            if name in (speaker.value, speaker.name.lower()):
                return speaker
        for speaker in cls:
            if name in map(speaker.title, LANGUAGES):
                return speaker
        raise ValueError(name)

    def title(self, language: str) -> str:
        """The speaker's name in a language."""
        return getattr(get_language(language), self.name.lower())


ROLES = {Speaker.SUPPORTER: "assistant", Speaker.CUSTOMER: "user"}
"""The roles of chat messages, by speaker."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. `text` has no outer white space; `strategy` is set on supporter turns and None otherwise.

    `accepted` holds all admissible strategies of a supporter turn for which the data name several, its own first: those
    of its column `accepted`, and those of the turns that it was joined from. Else it is empty.
    """

    speaker: Speaker
    text: str
    strategy: Strategy | None = None
    accepted: tuple[Strategy, ...] = ()


def join_speakers(turns: Iterable[Any]) -> Iterator[tuple[list[Any], str]]:
    """The turns of one speaker until the other speaks, and their texts joined with a space."""
    for _, group in itertools.groupby(turns, key=lambda turn: turn.speaker):
        together = list(group)
        yield together, " ".join(each.text.strip() for each in together)


@dataclass(frozen=True)
class Dialogue:
    """A conversation of strictly alternating turns, at least one by the supporter; either speaker may open it.

    Attributes:
        id: the dialogue's name in every output.
        source: the data set that it belongs to.
        extra: all other columns of its row.
        kind: "csc", customer support with strategies, or "chat", an ordinary chat, whose turns have none.
        system: the system prompt of a chat; empty for none.
    """

    id: str
    turns: tuple[Turn, ...]
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    kind: str = "csc"
    system: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of speakers, strategies and texts: equal for equal conversations, whatever their ids and accept
        sets. For a chat also of kind and system prompt."""
        turns = [[t.speaker.value, t.strategy.number if t.strategy else 0, t.text] for t in self.turns]
        return digest(turns if self.kind == "csc" else [self.kind, self.system, turns])

    @cached_property
    def supporter_turns(self) -> list[int]:
        """Indices into `turns` of the supporter's turns."""
        return [index for index, turn in enumerate(self.turns) if turn.speaker is Speaker.SUPPORTER]

    @property
    def text(self) -> str:
        """The texts of all turns, one line per turn."""
        return "\n".join(turn.text for turn in self.turns)

    def row(self) -> dict[str, Any]:
        """The row of a dialogue file, or of a file of chats, that reads back as this dialogue."""
        if self.kind == "chat":
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages += [{"role": ROLES[turn.speaker], "content": turn.text} for turn in self.turns]
            return {"id": self.id, "messages": messages, "source": self.source, **self.extra}
        turns = [
            {"speaker": t.speaker.value, "strategy": t.strategy.label if t.strategy else "", "text": t.text}
            | ({"accepted": [each.label for each in t.accepted]} if t.accepted else {})
            for t in self.turns
        ]
        return {"id": self.id, "dialogue": turns, "source": self.source, **self.extra}


def data_digest(dialogues: Iterable[Dialogue]) -> str:
    """SHA-256 (hex) over the dialogues' ids and contents, in order; accept sets are not in it, for no training and no
    prediction depends on them."""
    return digest([[dialogue.id, dialogue.fingerprint] for dialogue in dialogues])


def accept_sets_digest(dialogues: Iterable[Dialogue]) -> str | None:
    """SHA-256 (hex) over the accept sets, on which the metrics of an evaluation depend; None if no turn has several
    strategies."""
    sets = [
        [dialogue.id, index, sorted(each.number for each in turn.accepted)]
        for dialogue in dialogues
        for index, turn in enumerate(dialogue.turns)
        if len(turn.accepted) > 1
    ]
    return digest(sets) if sets else None


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
