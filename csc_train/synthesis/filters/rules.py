"""Filter rules that keep or drop a conversation by its form, and the near-duplicate filter.

A rule takes utterances and returns a `FilterVerdict`; it never raises. Thresholds are the paper's, if it names them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from csc_train.data.dialogue import Dialogue, Speaker, has_surrogate
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.invisible import is_blank
from csc_train.synthesis.config import CallFilterConfig, DuplicatesConfig, RewriteFilterConfig
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


Fault = tuple[str, str]
"""(reason, detail) of a rule that drops a conversation."""


def check_call(utterances: Sequence[Utterance], config: CallFilterConfig) -> list[FilterVerdict]:
    """The verdicts of the rules for recorded calls, in order, up to the first that drops the call.

    Turn counts of the two speakers are compared before merging, because merged turns alternate. The other rules see
    merged turns.
    """
    merged = merge_turns(utterances)
    rules = {
        "rounds": lambda: _count_fault("rounds", len(merged) // 2, config.min_rounds, config.max_rounds),
        "turn length": lambda: _turn_length_fault(merged, config),
        "customer's turns": lambda: _customer_turns_fault(utterances, config),
        "customer's words": lambda: _customer_words_fault(merged, config),
    }
    return _until_dropped(rules)


def check_rewrite(utterances: Sequence[Utterance], config: RewriteFilterConfig) -> list[FilterVerdict]:
    """The verdicts of the rules for rewritten calls, in order, up to the first that drops the call.

    Utterances that pass make a valid `Dialogue`.
    """
    low, high = config.min_utterances, config.max_utterances
    rules = {
        "texts": lambda: _first_fault(utterances, _text_fault),
        "utterances": lambda: _count_fault("utterances", len(utterances), low, high),
        "alternation": lambda: _first_fault(utterances, _alternation_fault),
        "one strategy": lambda: _first_fault(utterances, _several_strategies_fault),
        "known strategies": lambda: _first_fault(utterances, _unknown_strategy_fault),
        "required strategies": lambda: _missing_strategy_fault(utterances, config),
        "private data": lambda: _first_fault(utterances, _private_data_fault),
    }
    return _until_dropped(rules)


def check_private_data(utterances: Sequence[Utterance]) -> FilterVerdict:
    """Drop a conversation with a phone, identity card or bank card number, or an e-mail address."""
    return _until_dropped({"private data": lambda: _first_fault(utterances, _private_data_fault)})[0]


def _until_dropped(rules: Mapping[str, Callable[[], Fault | None]]) -> list[FilterVerdict]:
    verdicts = []
    for name, find_fault in rules.items():
        fault = find_fault()
        verdicts.append(FilterVerdict(name, fault is None, *(fault or ())))
        if fault:
            break
    return verdicts


def _count_fault(unit: str, count: int, low: int, high: int) -> Fault | None:
    if low <= count <= high:
        return None
    return f"fewer than {low} {unit}" if count < low else f"more than {high} {unit}", f"{count} {unit}"


def _turn_length_fault(merged: Sequence[Utterance], config: CallFilterConfig) -> Fault | None:
    longest = max((len(each.text) for each in merged), default=0)
    if longest <= config.max_characters:
        return None
    return f"a turn of more than {config.max_characters} characters", f"{longest} characters"


def _customer_turns_fault(utterances: Sequence[Utterance], config: CallFilterConfig) -> Fault | None:
    count = Counter(each.speaker for each in utterances if not is_blank(each.text))
    customer, supporter = count[Speaker.CUSTOMER], count[Speaker.SUPPORTER]
    if customer > config.customer_share * supporter:
        return None
    reason = f"the customer has at most {config.customer_share:g} of the supporter's turns"
    return reason, f"{customer} to {supporter}"


def _customer_words_fault(merged: Sequence[Utterance], config: CallFilterConfig) -> Fault | None:
    lengths = [len(each.text) for each in merged if each.speaker is Speaker.CUSTOMER]
    long = sum(length > config.short_characters for length in lengths)
    if lengths and long / len(lengths) >= config.long_share:
        return None
    characters = f"{config.short_characters} characters"
    reason = f"under {config.long_share:.0%} of the customer's turns are longer than {characters}"
    return reason, f"{long} of {len(lengths)}"


def _first_fault(utterances: Sequence[Utterance], find_fault: Callable[[int, Utterance], Fault | None]) -> Fault | None:
    """The fault of the first utterance that has one; `find_fault` gets its number, from 1, and the utterance."""
    return next(filter(None, itertools.starmap(find_fault, enumerate(utterances, start=1))), None)


def _text_fault(number: int, each: Utterance) -> Fault | None:
    if is_blank(each.text):
        return "an empty text", f"turn {number}"
    return ("a lone surrogate", f"turn {number}") if has_surrogate(each.text + each.label) else None


def _alternation_fault(number: int, each: Utterance) -> Fault | None:
    if each.speaker is (Speaker.SUPPORTER if number % 2 else Speaker.CUSTOMER):
        return None
    return "the supporter does not speak first" if number == 1 else "one speaker twice in a row", f"turn {number}"


def _several_strategies_fault(number: int, each: Utterance) -> Fault | None:
    if each.speaker is Speaker.SUPPORTER and ("+" in each.label or "＋" in each.label):
        return "a turn with two strategies", f"turn {number}: {each.label}"
    return None


def _unknown_strategy_fault(number: int, each: Utterance) -> Fault | None:
    if each.speaker is Speaker.SUPPORTER and _strategy_number(each) is None:
        return "an unknown strategy", f"turn {number}: {each.label!r}"
    return None


def _missing_strategy_fault(utterances: Sequence[Utterance], config: RewriteFilterConfig) -> Fault | None:
    used = {_strategy_number(each) for each in utterances if each.speaker is Speaker.SUPPORTER}
    missing = [number for number in config.required_strategies if number not in used]
    if not missing:
        return None
    return f"without {STRATEGIES[missing[0] - 1].label}", f"missing: {', '.join(map(str, missing))}"


def _strategy_number(utterance: Utterance) -> int | None:
    try:
        return parse_strategy(utterance.label).number
    except ValueError:
        return None


def _private_data_fault(number: int, each: Utterance) -> Fault | None:
    if found := find_private_data(each.text):
        # The private data themselves are not repeated: lists of dropped calls are shared more freely than calls.
        kind = found[0].kind
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}", f"turn {number}"
    return None


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
