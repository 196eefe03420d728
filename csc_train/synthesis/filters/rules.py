"""Rules that keep or drop a conversation, and what they say about it.

A rule looks at utterances, whatever they are, and answers with a `FilterVerdict`; it never raises. Thresholds are those of
the paper where it has them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError, check_range
from csc_train.synthesis.filters.privacy import PLACEHOLDERS, private_data

OPENING = 4
"""Turns that are a dialogue's opening."""


@dataclass(frozen=True)
class FilterVerdict:
    """What a rule says about a conversation.

    `reason` is the same for all that are dropped alike, so that it can be counted; `detail` is about this one.
    """

    rule: str
    keep: bool
    reason: str = ""
    detail: str = ""


class Utterance(NamedTuple):
    """What somebody said, before it is known to be a turn of a dialogue; `label` is the strategy as it was written."""

    speaker: Speaker
    text: str
    label: str = ""


@dataclass
class CallConfig:
    """Which recorded calls are kept."""

    min_rounds: int = 3
    """Least number of rounds: a turn of each speaker, one answering the other."""
    max_rounds: int = 30
    """Most rounds."""
    max_characters: int = 500
    """Longest turn."""
    customer_share: float = 0.5
    """The customer has more turns than this share of the supporter's."""
    short_characters: int = 3
    """A customer's turn of up to so many characters is short."""
    long_share: float = 0.7
    """At least this share of the customer's turns is not short."""

    def __post_init__(self):
        check_range("call.min_rounds", self.min_rounds, 1)
        check_range("call.max_rounds", self.max_rounds, self.min_rounds)
        check_range("call.max_characters", self.max_characters, 1)
        check_range("call.customer_share", self.customer_share, 0)
        check_range("call.short_characters", self.short_characters, 0)
        check_range("call.long_share", self.long_share, 0, 1)


@dataclass
class RewriteConfig:
    """Which rewritten calls are kept."""

    min_utterances: int = 10
    """Fewest utterances."""
    max_utterances: int = 50
    """Most utterances."""
    required_strategies: list[int] = field(default_factory=lambda: [1, 2, 11])
    """Numbers of the strategies that occur at least once."""

    def __post_init__(self):
        check_range("rewrite.min_utterances", self.min_utterances, 1)
        check_range("rewrite.max_utterances", self.max_utterances, self.min_utterances)
        for number in self.required_strategies:
            check_range("rewrite.required_strategies", number, 1, len(STRATEGIES))


@dataclass
class DuplicatesConfig:
    """From which Jaccard similarity of character 5-grams on a dialogue repeats an earlier one; null does not look."""

    dialogue: float | None = 0.8
    """Of all turns."""
    opening: float | None = 0.9
    """Of the first two turns of each speaker."""
    scenario: float | None = 0.8
    """Of the scenarios, where dialogues have one."""

    def __post_init__(self):
        for name, threshold in vars(self).items():
            if threshold is not None and not 0 < threshold <= 1:
                raise InputError(f"duplicates.{name}={threshold}: must be above 0 and at most 1, or null")


def utterances_of(dialogue: Dialogue) -> list[Utterance]:
    """A dialogue's turns as rules look at them."""
    return [Utterance(turn.speaker, turn.text, turn.strategy.label if turn.strategy else "") for turn in dialogue.turns]


def turns_of(utterances: Sequence[Utterance]) -> tuple[Turn, ...]:
    """The turns that utterances are once every rule of `check_rewrite` keeps them."""
    return tuple(
        Turn(each.speaker, each.text.strip(), parse_strategy(each.label) if each.speaker is Speaker.SUPPORTER else None)
        for each in utterances
    )


def merge_turns(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Consecutive utterances of one speaker made one, parted by a space; empty ones are left out."""
    merged: list[Utterance] = []
    for each in utterances:
        if not (text := each.text.strip()):
            continue
        if merged and merged[-1].speaker is each.speaker:
            merged[-1] = merged[-1]._replace(text=f"{merged[-1].text} {text}")
        else:
            merged.append(each._replace(text=text))
    return merged


def check_call(utterances: Sequence[Utterance], config: CallConfig) -> list[FilterVerdict]:
    """What the rules say about a recorded call, in their order, up to the first that drops it.

    The turns of the two speakers are compared as they were recorded: merged, they alternate, and no call of three
    rounds could have half as many of the customer's. The other rules see merged turns.
    """
    merged = merge_turns(utterances)
    return _first_drop(
        lambda: _rounds(merged, config),
        lambda: _longest(merged, config),
        lambda: _customer_share(utterances, config),
        lambda: _long_share(merged, config),
    )


def check_rewrite(utterances: Sequence[Utterance], config: RewriteConfig) -> list[FilterVerdict]:
    """What the rules say about a rewritten call, in their order, up to the first that drops it.

    What they keep makes a `Dialogue`.
    """
    return _first_drop(
        lambda: _texts(utterances),
        lambda: _utterances(utterances, config),
        lambda: _alternation(utterances),
        lambda: _one_strategy(utterances),
        lambda: _known_strategies(utterances),
        lambda: _required_strategies(utterances, config),
        lambda: check_private_data(utterances),
    )


def _first_drop(*rules: Callable[[], FilterVerdict]) -> list[FilterVerdict]:
    verdicts = []
    for rule in rules:
        verdicts.append(rule())
        if not verdicts[-1].keep:
            break
    return verdicts


def _between(rule: str, unit: str, count: int, low: int, high: int) -> FilterVerdict:
    if count < low:
        return FilterVerdict(rule, False, f"fewer than {low} {unit}", f"{count} {unit}")
    if count > high:
        return FilterVerdict(rule, False, f"more than {high} {unit}", f"{count} {unit}")
    return FilterVerdict(rule, True)


def _rounds(merged: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    return _between("rounds", "rounds", len(merged) // 2, config.min_rounds, config.max_rounds)


def _longest(merged: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    longest = max((len(each.text) for each in merged), default=0)
    if longest > config.max_characters:
        reason = f"a turn of more than {config.max_characters} characters"
        return FilterVerdict("turn length", False, reason, f"{longest} characters")
    return FilterVerdict("turn length", True)


def _customer_share(utterances: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    count = Counter(each.speaker for each in utterances if each.text.strip())
    customer, supporter = count[Speaker.CUSTOMER], count[Speaker.SUPPORTER]
    if customer > config.customer_share * supporter:
        return FilterVerdict("customer's turns", True)
    reason = f"the customer has at most {config.customer_share:g} of the supporter's turns"
    return FilterVerdict("customer's turns", False, reason, f"{customer} to {supporter}")


def _long_share(merged: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    own = [each.text for each in merged if each.speaker is Speaker.CUSTOMER]
    long = sum(len(text) > config.short_characters for text in own)
    if own and long / len(own) >= config.long_share:
        return FilterVerdict("customer's words", True)
    reason = (
        f"under {config.long_share:.0%} of the customer's turns are longer than {config.short_characters} characters"
    )
    return FilterVerdict("customer's words", False, reason, f"{long} of {len(own)}")


def _texts(utterances: Sequence[Utterance]) -> FilterVerdict:
    for number, each in enumerate(utterances, start=1):
        if not each.text.strip():
            return FilterVerdict("texts", False, "an empty text", f"turn {number}")
        # What JSON can write and a file in UTF-8 cannot hold.
        if any("\ud800" <= character <= "\udfff" for character in each.text + each.label):
            return FilterVerdict("texts", False, "half a character", f"turn {number}")
    return FilterVerdict("texts", True)


def _utterances(utterances: Sequence[Utterance], config: RewriteConfig) -> FilterVerdict:
    return _between("utterances", "utterances", len(utterances), config.min_utterances, config.max_utterances)


def _alternation(utterances: Sequence[Utterance]) -> FilterVerdict:
    for number, each in enumerate(utterances, start=1):
        if each.speaker is not (Speaker.SUPPORTER if number % 2 else Speaker.CUSTOMER):
            reason = "the supporter does not speak first" if number == 1 else "one speaker twice running"
            return FilterVerdict("alternation", False, reason, f"turn {number}")
    return FilterVerdict("alternation", True)


def _one_strategy(utterances: Sequence[Utterance]) -> FilterVerdict:
    for number, each in enumerate(utterances, start=1):
        if each.speaker is Speaker.SUPPORTER and ("+" in each.label or "＋" in each.label):
            return FilterVerdict("one strategy", False, "a turn with two strategies", f"turn {number}: {each.label}")
    return FilterVerdict("one strategy", True)


def _known_strategies(utterances: Sequence[Utterance]) -> FilterVerdict:
    for number, each in enumerate(utterances, start=1):
        if each.speaker is Speaker.SUPPORTER and _strategy(each) is None:
            return FilterVerdict("known strategies", False, "an unknown strategy", f"turn {number}: {each.label!r}")
    return FilterVerdict("known strategies", True)


def _required_strategies(utterances: Sequence[Utterance], config: RewriteConfig) -> FilterVerdict:
    there = {_strategy(each) for each in utterances if each.speaker is Speaker.SUPPORTER}
    missing = [number for number in config.required_strategies if number not in there]
    if missing:
        reason = f"without {STRATEGIES[missing[0] - 1].label}"
        return FilterVerdict("required strategies", False, reason, f"missing: {', '.join(map(str, missing))}")
    return FilterVerdict("required strategies", True)


def _strategy(utterance: Utterance) -> int | None:
    try:
        return parse_strategy(utterance.label).number
    except ValueError:
        return None


def check_private_data(utterances: Sequence[Utterance]) -> FilterVerdict:
    """Whether no text holds a phone number, an identity card number, a bank card number or an e-mail address."""
    for number, each in enumerate(utterances, start=1):
        if found := private_data(each.text):
            # What was found is not repeated: a list of what was dropped is passed on more freely than the calls.
            return FilterVerdict("private data", False, f"{_article(found[0].kind)} {found[0].kind}", f"turn {number}")
    return FilterVerdict("private data", True)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


_BRACKETED = re.compile(r"\s*[（(【\[]([^（(【\[）)】\]]*)[）)】\]][。.!！]?\s*$")
_NOTICE = re.compile(
    "系统|提示|通话|挂断|挂机|结束|断开|会话|对话|录音|转接|评价|system|call|hang|hung|disconnect|ended", re.I
)


def strip_boilerplate(utterances: Sequence[Utterance]) -> list[Utterance]:
    """The utterances without the system's notices at their end, such as `（通话结束）`.

    A last turn that is nothing but brackets goes, and a bracketed notice at the end of the last turn; placeholders for
    private data stay.
    """
    kept = list(utterances)
    while kept and (match := _BRACKETED.search(kept[-1].text)):
        content, before = match.group(1).strip(), kept[-1].text[: match.start()]
        if content in PLACEHOLDERS or (before and not _NOTICE.search(content)):
            break
        kept.pop()
        if before.strip():
            kept.append(utterances[len(kept)]._replace(text=before))
    return kept


_PARTS = {"dialogue": "", "opening": "the opening of ", "scenario": "the scenario of "}


class DuplicateFilter:
    """Drops a dialogue whose text, opening or scenario nearly repeats that of one it has kept before.

    Which one of two is kept depends on their order, so ask in an order that is always the same.
    """

    def __init__(self, config: DuplicatesConfig, seed: int = 0):
        looked_at = {part: threshold for part, threshold in vars(config).items() if threshold is not None}
        self._seen = {part: NearDuplicateIndex(threshold, seed) for part, threshold in looked_at.items()}
        self._kept: dict[str, list[str]] = {part: [] for part in looked_at}

    def check(self, dialogue: Dialogue, scenario: str = "") -> FilterVerdict:
        """Whether a dialogue repeats none of those before; it is remembered if so."""
        opening = "\n".join(turn.text for turn in dialogue.turns[:OPENING])
        texts = {"scenario": scenario, "opening": opening, "dialogue": dialogue.text}
        signed = {part: seen.minhash(texts[part]) for part, seen in self._seen.items() if texts[part]}
        for part, text in signed.items():
            for place, similarity in self._seen[part].matches(text):
                detail = f"{similarity:.2f} like {self._kept[part][place]}"
                return FilterVerdict("near-duplicates", False, f"repeats {_PARTS[part]}another", detail)
        for part, text in signed.items():
            self._seen[part].add(text)
            self._kept[part].append(dialogue.id)
        return FilterVerdict("near-duplicates", True)
