"""What replies are like by themselves: their length, their variety, and numbers that nobody had mentioned."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

import numpy

from csc_train.dialogue import Dialogue, Speaker
from csc_train.evaluation import lexical
from csc_train.evaluation.figure import Figure, Score
from csc_train.evaluation.turns import Turns
from csc_train.evaluation.uncertainty import mean

_BINS = 30
_DIGITS = re.compile(r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.:]\d+)*)([万亿]*)")
_CHINESE_AMOUNT = re.compile(
    r"([〇零一二两三四五六七八九十][〇零一二两三四五六七八九十百千万亿]*)(?=元|块钱|角|分钱|美元|%|折)"
)
_VALUES = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}


def numbers(text: str) -> set[str]:
    """The numbers in a text: of digits of any width, and of Chinese numerals before a unit of money, `%` or `折`.

    `1,200元`, `１２００．００` and `一千二百元` are all 1200, `3.5万元` is 35000; of digits joined by colons, such as
    `12:30`, it is the whole that counts.
    """
    # A full-width comma parts clauses; normalized, it would pass for a separator of thousands.
    text = unicodedata.normalize("NFKC", text.replace("，", "、"))
    found = {_plain(*match.groups()) for match in _DIGITS.finditer(text)}
    return found | {str(_chinese_number(match.group(1))) for match in _CHINESE_AMOUNT.finditer(text)}


def _plain(digits: str, myriads: str) -> str:
    """A number without separators of thousands, without zeros that end a fraction, and times 万 and 亿 behind it."""
    digits = digits.replace(",", "")
    if myriads and re.fullmatch(r"\d+(?:\.\d+)?", digits):
        digits = f"{Decimal(digits) * math.prod(map(_MYRIADS.__getitem__, myriads)):f}"
    return digits.rstrip("0").rstrip(".") if re.fullmatch(r"\d+\.\d+", digits) else digits


def _chinese_number(numeral: str) -> int:
    """The value of a Chinese numeral, such as 三万五千; 二〇二五, without units, is read digit by digit."""
    if not set(numeral) & (_UNITS.keys() | _MYRIADS.keys()):
        return int("".join(str(_VALUES[character]) for character in numeral))
    total = section = digit = 0
    for character in numeral:
        if character in _VALUES:
            digit = _VALUES[character]
        elif character in _UNITS:
            section, digit = section + (digit or 1) * _UNITS[character], 0
        else:
            total, section, digit = (total + section + digit) * _MYRIADS[character], 0, 0
    return total + section + digit


def new_numbers(turns: Turns, dialogues: Mapping[str, Dialogue]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Two bool [turns]: whether the system's, and the reference's, reply has a number that was not said before.

    What was said before is what each was given: the gold turns, or, for a system in generated context, the customer's
    gold turns and its own replies.
    """
    system, reference = numpy.zeros(len(turns), bool), numpy.zeros(len(turns), bool)
    said: dict[str, tuple[int, set[str], set[str]]] = {}
    for index, each in enumerate(turns.predictions):
        start, heard, gold = said.get(each.dialogue_id, (0, set(), set()))
        for turn in dialogues[each.dialogue_id].turns[start : each.turn]:
            gold |= (mentioned := numbers(turn.text))
            if turn.speaker is Speaker.CUSTOMER or each.context == "reference":
                heard |= mentioned
        own = numbers(each.response)
        system[index] = bool(own - heard)
        reference[index] = bool(numbers(each.reference_response) - gold)
        if each.context == "generated":
            heard |= own
        said[each.dialogue_id] = (each.turn, heard, gold)
    return system, reference


def _lengths(turns: Turns) -> numpy.ndarray:
    """int [turns, 2]: characters of the system's and of the reference's reply, white space left out."""
    return numpy.array([[len(lexical.characters(text)) for text in pair] for pair in turns.pairs], int).reshape(-1, 2)


def length_histogram(turns: Turns) -> dict[str, list[int]]:
    """How many replies are how long, of the system and of the reference.

    Returns:
        `from`: the shortest length in characters that each bin counts, equally wide bins; the last is open, and holds
        the longest hundredth. `system` and `reference`: replies in each bin.
    """
    lengths = _lengths(turns)
    longest = int(numpy.quantile(lengths, 0.99)) if len(lengths) else 0
    width = longest // _BINS + 1
    bins = longest // width + 1
    counts = [numpy.bincount(numpy.minimum(column // width, bins - 1), minlength=bins).tolist() for column in lengths.T]
    return {"from": [width * number for number in range(bins)], "system": counts[0], "reference": counts[1]}


def worst(turns: Turns, count: int = 30) -> list[dict[str, str | int | float]]:
    """The turns whose replies are least like the reference's, one a dialogue, the worst first.

    By character ROUGE-L; of equal ones, a wrong strategy comes first, then the longer reference.

    Returns:
        For each its `dialogue_id`, `turn` and `R-L char`.
    """
    lengths = _lengths(turns)[:, 1]
    order = sorted(range(len(turns)), key=lambda index: (turns.rouge[index], turns.correct[index], -lengths[index]))
    first = {turns.dialogue[index]: index for index in reversed(order)}
    return [
        {"dialogue_id": each.dialogue_id, "turn": each.turn, "R-L char": float(turns.rouge[index])}
        for index in sorted(first.values(), key=order.index)[:count]
        for each in [turns.predictions[index]]
    ]


def replies(turns: Turns, dialogues: Mapping[str, Dialogue]) -> dict[str, tuple[Figure, Figure]]:
    """Length and numbers that are new, of the system's replies and of the reference's."""
    meanings = {
        "length": ("characters", "mean over turns, white space left out"),
        "new numbers": ("turns", "replies with a number or an amount of money that is not in their context"),
    }
    values = {"length": _lengths(turns).T, "new numbers": [100 * flags for flags in new_numbers(turns, dialogues)]}
    return {
        name: (Figure(mean(values[name][0]), *meaning), Figure(mean(values[name][1]), *meaning))
        for name, meaning in meanings.items()
    }


def distinct(turns: Turns, order: int) -> tuple[Score, Score]:
    """Distinct-n of the system's replies and of the reference's: different n-grams over all n-grams, in percent.

    It has no interval: a resample holds dialogues twice, and so fewer different n-grams. It falls with the number of
    replies, so compare it on the same turns only.
    """
    signature = f"different {order}-grams over all {order}-grams of all replies, jieba words"
    return tuple(_distinct([pair[side] for pair in turns.words], order, signature) for side in (0, 1))


def _distinct(texts: Sequence[Sequence[str]], order: int, signature: str) -> Score:
    grams = [tuple(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)]
    if not grams:
        return Score(None, "jieba words", signature, f"no reply has {order} words")
    return Score(100 * len(set(grams)) / len(grams), "jieba words", signature)
