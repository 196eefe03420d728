"""What replies are like by themselves: their length, their variety, and numbers that nobody had mentioned."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

import numpy

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.segmentation import word_end_offsets
from csc_train.evaluation.metrics import lexical
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.table import PredictionTable
from csc_train.stats import mean

_BINS = 30
_CHARACTERS = "〇零一二两三四五六七八九"
_JOINED = r"\d+(?:[.:]\d+)*:\d+(?:[.:]\d+)*|\d+(?:\.\d+){2,}"  # 12:30, 5.0.1
_ARABIC = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?"
_CHINESE = rf"[{_CHARACTERS}]+(?:点[{_CHARACTERS}]+(?![{_CHARACTERS}十百千]))?"
_DIGITS = rf"(?:{_ARABIC}|{_CHINESE})"
# No number has more units than ten; a reply that repeats one without end is no number.
_NUMERAL = re.compile(rf"{_JOINED}|(?=[\d{_CHARACTERS}十])(?:{_DIGITS}?[十百千万亿]){{,10}}{_DIGITS}?")
_AMOUNT = re.compile("元|块钱|块|角钱|角|分钱|美元|%|折")
_TO_DIGITS = str.maketrans(_CHARACTERS + "点", "001223456789.", ",")
_SIZES = {"亿": 10**8, "万": 10**4, "千": 1000, "百": 100, "十": 10}


def numbers(text: str, words: bool = True) -> set[str]:
    """The numbers in a text, of digits of any width and of Chinese numerals, in digits.

    `1,200元`, `１２００．００`, `一千二百元` and `1千2` are all 1200, `3.5万元` is 35000, `百分之二十` is 20; of digits
    joined by colons, such as `12:30`, it is the whole that counts.

    Args:
        words: whether Chinese numerals count that are no amount, as in `三天`. Many are mere words, as in `一下`. An
            amount stands before a unit of money, `%` or `折`, or after `百分之`.
    """
    # A full-width comma parts clauses; normalized, it would pass for a separator of thousands.
    text = unicodedata.normalize("NFKC", text.replace("，", "、"))
    return {
        _in_digits(match.group())
        for match in _NUMERAL.finditer(text)
        if words or re.search(r"\d", match.group()) or _is_amount(text, *match.span())
    }


def _is_amount(text: str, start: int, end: int) -> bool:
    if text.endswith("百分之", 0, start):
        return True
    unit = _AMOUNT.match(text, end)
    # Not where the unit is the beginning of another word, as in 一折腾 and 一角落.
    return unit is not None and unit.end() in word_end_offsets(text)


def _in_digits(numeral: str) -> str:
    """A numeral in digits, without separators of thousands, and without zeros that end a fraction."""
    digits = numeral.translate(_TO_DIGITS)
    if _SIZES.keys() & set(numeral):
        digits = f"{_value(numeral):f}"
    return digits.rstrip("0").rstrip(".") if re.fullmatch(r"\d+\.\d+", digits) else digits


def _value(numeral: str) -> Decimal:
    """The value of a numeral such as 三万五千, 3.5万 or 一千五, whose last unit, 百, goes without saying."""
    for unit, size in _SIZES.items():
        before, found, after = numeral.rpartition(unit)
        if found:
            rest = Decimal(size) / 10 if len(after) == 1 else 1
            return (_value(before) if before else 1) * Decimal(size) + (rest * _value(after) if after else 0)
    return Decimal(numeral.translate(_TO_DIGITS))


def new_numbers(turns: PredictionTable, dialogues: Mapping[str, Dialogue]) -> tuple[numpy.ndarray, numpy.ndarray]:
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
        system[index] = bool(numbers(each.response, words=False) - heard)
        reference[index] = bool(numbers(each.reference_response, words=False) - gold)
        if each.context == "generated":
            heard |= numbers(each.response)
        said[each.dialogue_id] = (each.turn, heard, gold)
    return system, reference


def _lengths(turns: PredictionTable) -> numpy.ndarray:
    """int [turns, 2]: characters of the system's and of the reference's reply, white space left out."""
    return numpy.array([[len(lexical.characters(text)) for text in pair] for pair in turns.pairs], int).reshape(-1, 2)


def length_histogram(turns: PredictionTable) -> dict[str, list[int]]:
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


def lowest_scoring(turns: PredictionTable, count: int = 30) -> list[dict[str, str | int | float]]:
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


def replies(turns: PredictionTable, dialogues: Mapping[str, Dialogue]) -> dict[str, tuple[Metric, Metric]]:
    """Length and numbers that are new, of the system's replies and of the reference's."""
    meanings = {
        "length": ("characters", "mean over turns, white space left out"),
        "new numbers": (
            "turns",
            "replies with a number in digits, or an amount in Chinese numerals, that is not in their context",
        ),
    }
    values = {"length": _lengths(turns).T, "new numbers": [100 * flags for flags in new_numbers(turns, dialogues)]}
    return {
        name: (Metric(mean(values[name][0]), *meaning), Metric(mean(values[name][1]), *meaning))
        for name, meaning in meanings.items()
    }


def distinct(turns: PredictionTable, order: int) -> tuple[MetricResult, MetricResult]:
    """Distinct-n of the system's replies and of the reference's: different n-grams over all n-grams, in percent.

    It has no interval: a resample holds dialogues twice, and so fewer different n-grams. It falls with the number of
    replies, so compare it on the same turns only.
    """
    signature = f"different {order}-grams over all {order}-grams of all replies, jieba words"
    return tuple(_distinct([pair[side] for pair in turns.words], order, signature) for side in (0, 1))


def _distinct(texts: Sequence[Sequence[str]], order: int, signature: str) -> MetricResult:
    grams = [tuple(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)]
    if not grams:
        return MetricResult(None, "jieba words", signature, f"no reply has {order} words")
    return MetricResult(100 * len(set(grams)) / len(grams), "jieba words", signature)
