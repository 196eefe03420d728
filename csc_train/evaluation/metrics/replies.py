"""Length, variety, new numbers and placeholders of replies; the turns with the lowest scores."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Set
from decimal import Decimal

import numpy

from csc_train.data.dialogue import Speaker
from csc_train.data.languages import LANGUAGES
from csc_train.data.segmentation import word_end_offsets
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.lexical import characters, rouge_l_char_scores
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable
from csc_train.inference.predictions import Prediction
from csc_train.stats import Statistic, mean, ratio

_BINS = 30
_CHARACTERS = "〇零一二两三四五六七八九"
_JOINED = r"\d+(?:[.:]\d+)*:\d+(?:[.:]\d+)*|\d+(?:\.\d+){2,}"  # 12:30, 5.0.1
_ARABIC = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?"
_CHINESE = rf"[{_CHARACTERS}]+(?:点[{_CHARACTERS}]+(?![{_CHARACTERS}十百千]))?"
_DIGITS = rf"(?:{_ARABIC}|{_CHINESE})"
# At most ten units: a reply that repeats a unit endlessly is no number.
_NUMERAL = re.compile(rf"{_JOINED}|(?=[\d{_CHARACTERS}十])(?:{_DIGITS}?[十百千万亿]){{,10}}{_DIGITS}?")
_AMOUNT = re.compile("元|块钱|块|角钱|角|分钱|美元|%|折")
_TO_DIGITS = str.maketrans(_CHARACTERS + "点", "001223456789.", ",")
_PLACEHOLDER = re.compile(r"[\[［]\s*([^\W\d_][\w\s/／'’-]{0,29})[\]］](?!\(https?:)")
"""Words in square brackets; no sentence, number, Markdown link or bracket around another."""
_LABEL = re.compile(r"\A\s*\[[^\[\]]*\]")
_NO_PLACEHOLDER = "no reference reply has a placeholder"
_SIZES = {"亿": 10**8, "万": 10**4, "千": 1000, "百": 100, "十": 10}


def numbers(text: str, words: bool = True) -> set[str]:
    """The numbers of a text in digits: numbers in digits of any width and in Chinese numerals.

    `1,200元`, `１２００．００`, `一千二百元` and `1千2` are all 1200, `3.5万元` is 35000, `百分之二十` is 20.
    Digits joined by colons, such as `12:30`, are one number.

    Args:
        words: whether to count Chinese numerals that are no amount, as in `三天` and in words such as `一下`. An amount
            stands before a unit of money, `%` or `折`, or after `百分之`.
    """
    # A full-width comma separates clauses; normalized, it would look like a thousands separator.
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
    # The unit must not begin another word, as in 一折腾 and 一角落.
    return unit is not None and unit.end() in word_end_offsets(text)


def _in_digits(numeral: str) -> str:
    """A numeral in digits, without thousands separators and trailing zeros of a fraction."""
    digits = numeral.translate(_TO_DIGITS)
    if _SIZES.keys() & set(numeral):
        digits = f"{_value(numeral):f}"
    return digits.rstrip("0").rstrip(".") if re.fullmatch(r"\d+\.\d+", digits) else digits


def _value(numeral: str) -> Decimal:
    """The value of a numeral such as 三万五千, 3.5万 or 一千五, with its last unit, 百, implied."""
    for unit, size in _SIZES.items():
        before, found, after = numeral.rpartition(unit)
        if found:
            rest = Decimal(size) / 10 if len(after) == 1 else 1
            return (_value(before) if before else 1) * Decimal(size) + (rest * _value(after) if after else 0)
    return Decimal(numeral.translate(_TO_DIGITS))


def _lengths(table: PredictionTable) -> numpy.ndarray:
    """int [turns, 2]: characters of the reply and of the reference reply, without white space."""
    return numpy.array([[len(characters(text)) for text in pair] for pair in table.pairs], int).reshape(-1, 2)


@metric(name="length", unit="characters", direction="none", profiles=["reply"], compare=False)
def reply_length(table: PredictionTable) -> numpy.ndarray:
    """Mean over turns, without white space."""
    return _lengths(table)[:, 0]


@metric(name="new numbers", unit="turns", direction="lower", profiles=["reply"], compare=False)
def new_numbers(table: PredictionTable) -> numpy.ndarray:
    """Replies with a number in digits, or an amount in Chinese numerals, that is not in their context.

    The context is what the system was given: the gold turns, or in generated context the gold customer turns and its
    own replies.
    """
    known, find = _contexts(table, numbers), table.cache.of(numbers)
    return numpy.array([100 * bool(find(each.response, words=False) - said) for each, said in known], float)


def _contexts(table: PredictionTable, find: Callable[[str], Set[str]]) -> Iterator[tuple[Prediction, Set[str]]]:
    """Each prediction, and what `find` finds in the turns that the system was given."""
    seen: dict[str, tuple[int, Set[str]]] = {}
    find = table.cache.of(find)
    for each in table.predictions:
        start, known = seen.get(each.dialogue_id, (0, frozenset()))
        for turn in table.dialogues[each.dialogue_id].turns[start : each.turn]:
            if turn.speaker is Speaker.CUSTOMER or each.context == "reference":
                known = known | find(turn.text)
        yield each, known
        seen[each.dialogue_id] = (each.turn, known | find(each.response) if each.context == "generated" else known)


def placeholders(text: str) -> frozenset[str]:
    """The kinds of placeholder in a text: the words in square brackets, of any width, that stand for private data.

    A kind is its words in small letters, without white space, `_`, `-` and a number at the end: `[Phone_Number 2]` and
    `[phone number]` are one kind, `[手机号]` and `[手机号码]` are two. At most 30 characters that begin with a letter
    count. Of nested brackets the inner ones count. `【】`, the names of strategies, sentences, numbers and Markdown
    links are ordinary text.
    """
    kinds = {_kind(words) for words in _PLACEHOLDER.findall(text)}
    return frozenset(kinds and kinds - {_kind(name) for language in LANGUAGES.values() for name in language.numbers})


def _kind(words: str) -> str:
    return re.sub(r"[\s_-]|\d+\s*$", "", unicodedata.normalize("NFKC", words).casefold())


def _placeholder_pairs(table: PredictionTable) -> list[tuple[frozenset[str], frozenset[str]]]:
    """The kinds of placeholder of (reply, reference reply) of each turn. A bracket in the place of an unparsed strategy
    is none."""
    find = table.cache.of(placeholders)
    return [
        (find(_LABEL.sub("", reply) if unparsed else reply), find(gold))
        for each, (reply, gold) in zip(table.predictions, table.pairs, strict=True)
        for unparsed in [each.predicts_strategy and each.strategy is None]
    ]


@metric(name="placeholders kept", unit="placeholders", direction="higher", profiles=["reply"])
def placeholders_kept(table: PredictionTable) -> Metric:
    """Of the kinds of placeholder in reference replies, those that the reply has as well."""
    pairs = _placeholder_pairs(table)
    terms = numpy.array([(100 * len(own & gold), len(gold)) for own, gold in pairs], float)
    return Metric(Statistic(terms.reshape(-1, 2), ratio), reason=_NO_PLACEHOLDER)


@metric(name="placeholders invented", unit="turns", direction="lower", profiles=["reply"])
def placeholders_invented(table: PredictionTable) -> Metric:
    """Replies with a kind of placeholder that neither their context nor the reference reply has."""
    if table.dialogues is None:
        return Metric(None, reason=table.NO_DIALOGUES)
    pairs, known = _placeholder_pairs(table), _contexts(table, placeholders)
    return Metric(mean([100 * bool(own - gold - said) for (own, gold), (_, said) in zip(pairs, known, strict=True)]))


@metric(name="placeholders filled", unit="turns", direction="lower", profiles=["reply"])
def placeholders_filled(table: PredictionTable) -> Metric:
    """Of the turns whose reference has a placeholder: the reply lacks one and has a number that nobody said."""
    if table.dialogues is None:
        return Metric(None, reason=table.NO_DIALOGUES)
    pairs = _placeholder_pairs(table)
    made_up = [
        numbers(_PLACEHOLDER.sub("", each.response), words=False) - said - numbers(each.reference_response)
        for each, said in _contexts(table, numbers)
    ]
    filled = [100 * bool(gold - own and new) for (own, gold), new in zip(pairs, made_up, strict=True)]
    return Metric(mean(filled, numpy.array([bool(gold) for _, gold in pairs], bool)), reason=_NO_PLACEHOLDER)


def _distinct(table: PredictionTable, order: int) -> Metric:
    """No interval: a resample repeats dialogues, so it has fewer different n-grams. It falls with the number of
    replies, so only compare it on the same turns."""
    grams = [tuple(words[start : start + order]) for words, _ in table.words for start in range(len(words) - order + 1)]
    share = 100 * len(set(grams)) / len(grams) if grams else None
    signature = f"different {order}-grams over all {order}-grams of all replies, {table.segmenter}"
    return Metric(share, signature, f"no reply has {order} words", unit=table.word_unit)


@metric(name="distinct-1", unit="words", direction="none", profiles=["reply"], compare=False)
def distinct_1(table: PredictionTable) -> Metric:
    """Different words over all words of all replies."""
    return _distinct(table, 1)


@metric(name="distinct-2", unit="words", direction="none", profiles=["reply"], compare=False)
def distinct_2(table: PredictionTable) -> Metric:
    """Different bigrams over all bigrams of all replies."""
    return _distinct(table, 2)


def length_histogram(table: PredictionTable) -> dict[str, list[int]]:
    """The lengths of the system's and the reference's replies as a histogram.

    Returns:
        `from`: the shortest length of each bin, in characters; bins are equally wide, and the last is open and holds
        the longest hundredth. `system` and `reference`: replies in each bin.
    """
    lengths = _lengths(table)
    longest = int(numpy.quantile(lengths, 0.99)) if len(lengths) else 0
    width = longest // _BINS + 1
    bins = longest // width + 1
    counts = [numpy.bincount(numpy.minimum(column // width, bins - 1), minlength=bins).tolist() for column in lengths.T]
    return {"from": [width * number for number in range(bins)], "system": counts[0], "reference": counts[1]}


def lowest_scoring(table: PredictionTable, count: int = 30) -> list[dict[str, str | int | float]]:
    """The turns with the lowest character ROUGE-L, at most one per dialogue, the lowest first.

    Among equal turns, those with a wrong strategy come first, then those with a longer reference.

    Returns:
        For each its `dialogue_id`, `turn` and `R-L char`.
    """
    lengths, scores = _lengths(table)[:, 1], rouge_l_char_scores(table)
    order = sorted(range(len(table)), key=lambda index: (scores[index], table.correct[index], -lengths[index]))
    first = {table.dialogue[index]: index for index in reversed(order)}
    return [
        {"dialogue_id": each.dialogue_id, "turn": each.turn, "R-L char": float(scores[index])}
        for index in sorted(first.values(), key=order.index)[:count]
        for each in [table.predictions[index]]
    ]
