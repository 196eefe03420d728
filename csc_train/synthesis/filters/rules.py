"""Filter rules that keep or drop a conversation by its form, and the near-duplicate filter.

A rule takes utterances and returns a `FilterVerdict`; it never raises. Thresholds are the paper's, if it names them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from csc_train.data.dialogue import Dialogue, Speaker, has_surrogate
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.synthesis.config import CallConfig, DuplicatesConfig, RewriteConfig
from csc_train.synthesis.filters.privacy import find_private_data
from csc_train.synthesis.utterances import Utterance, merge_turns

OPENING_TURNS = 4
"""Turns of a dialogue's opening."""


@dataclass(frozen=True)
class FilterVerdict:
    """The decision of one rule about one conversation.

    Attributes:
        reason: a category that can be counted; empty if the conversation is kept.
        detail: facts about this conversation.
    """

    rule: str
    keep: bool
    reason: str = ""
    detail: str = ""


def check_call(utterances: Sequence[Utterance], config: CallConfig) -> list[FilterVerdict]:
    """The verdicts of the rules for recorded calls, in order, up to the first that drops the call.

    Turn counts of the two speakers are compared before merging, because merged turns alternate. The other rules see
    merged turns.
    """
    merged = merge_turns(utterances)
    return _until_dropped(
        lambda: _between("rounds", "rounds", len(merged) // 2, config.min_rounds, config.max_rounds),
        lambda: _turn_length(merged, config),
        lambda: _customer_turns(utterances, config),
        lambda: _customer_words(merged, config),
    )


def check_rewrite(utterances: Sequence[Utterance], config: RewriteConfig) -> list[FilterVerdict]:
    """The verdicts of the rules for rewritten calls, in order, up to the first that drops the call.

    Utterances that pass make a valid `Dialogue`.
    """
    return _until_dropped(
        lambda: _texts(utterances),
        lambda: _between("utterances", "utterances", len(utterances), config.min_utterances, config.max_utterances),
        lambda: _alternation(utterances),
        lambda: _one_strategy(utterances),
        lambda: _known_strategies(utterances),
        lambda: _required_strategies(utterances, config),
        lambda: check_private_data(utterances),
    )


def _until_dropped(*rules: Callable[[], FilterVerdict]) -> list[FilterVerdict]:
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


def _turn_length(merged: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    longest = max((len(each.text) for each in merged), default=0)
    if longest > config.max_characters:
        reason = f"a turn of more than {config.max_characters} characters"
        return FilterVerdict("turn length", False, reason, f"{longest} characters")
    return FilterVerdict("turn length", True)


def _customer_turns(utterances: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
    count = Counter(each.speaker for each in utterances if each.text.strip())
    customer, supporter = count[Speaker.CUSTOMER], count[Speaker.SUPPORTER]
    if customer > config.customer_share * supporter:
        return FilterVerdict("customer's turns", True)
    reason = f"the customer has at most {config.customer_share:g} of the supporter's turns"
    return FilterVerdict("customer's turns", False, reason, f"{customer} to {supporter}")


def _customer_words(merged: Sequence[Utterance], config: CallConfig) -> FilterVerdict:
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
        if has_surrogate(each.text + each.label):
            return FilterVerdict("texts", False, "a lone surrogate", f"turn {number}")
    return FilterVerdict("texts", True)


def _alternation(utterances: Sequence[Utterance]) -> FilterVerdict:
    for number, each in enumerate(utterances, start=1):
        if each.speaker is not (Speaker.SUPPORTER if number % 2 else Speaker.CUSTOMER):
            reason = "the supporter does not speak first" if number == 1 else "one speaker twice in a row"
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
    used = {_strategy(each) for each in utterances if each.speaker is Speaker.SUPPORTER}
    missing = [number for number in config.required_strategies if number not in used]
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
    """Drop a conversation with a phone, identity card or bank card number, or an e-mail address."""
    for number, each in enumerate(utterances, start=1):
        if found := find_private_data(each.text):
            # The private data themselves are not repeated: lists of dropped calls are shared more freely than calls.
            kind = found[0].kind
            reason = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
            return FilterVerdict("private data", False, reason, f"turn {number}")
    return FilterVerdict("private data", True)


class DuplicateFilter:
    """Drops a dialogue whose text, opening or scenario nearly repeats that of one it kept before.

    The result depends on the order of the dialogues, so check them in a fixed order.
    """

    def __init__(self, config: DuplicatesConfig, seed: int = 0):
        thresholds = {part: threshold for part, threshold in vars(config).items() if threshold is not None}
        self._indexes = {part: NearDuplicateIndex(threshold, seed) for part, threshold in thresholds.items()}
        self._kept: dict[str, list[str]] = {part: [] for part in thresholds}

    def check(self, dialogue: Dialogue, scenario: str = "") -> FilterVerdict:
        """The verdict about a dialogue; one that is kept is added to the index."""
        opening = "\n".join(turn.text for turn in dialogue.turns[:OPENING_TURNS])
        texts = {"scenario": scenario, "opening": opening, "dialogue": dialogue.text}
        hashed = {part: index.minhash(texts[part]) for part, index in self._indexes.items() if texts[part]}
        for part, text in hashed.items():
            for position, similarity in self._indexes[part].matches(text):
                what = "another" if part == "dialogue" else f"the {part} of another"
                detail = f"{similarity:.2f} like {self._kept[part][position]}"
                return FilterVerdict("near-duplicates", False, f"repeats {what}", detail)
        for part, text in hashed.items():
            self._indexes[part].add(text)
            self._kept[part].append(dialogue.id)
        return FilterVerdict("near-duplicates", True)
