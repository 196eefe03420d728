"""Detection of private data in text: phone, identity card and bank card numbers, and e-mail addresses.

Digits may be full-width, Chinese numerals (幺三八...), and separated by spaces, zero-width characters, dots, dashes or
brackets. Amounts, and numbers that are called an order number or the like, are not private.
"""

import datetime
import re
from collections.abc import Iterator
from typing import NamedTuple

import regex

_WIDE = str.maketrans("０１２３４５６７８９－＋．＠Ｘ", "0123456789-+.@X")
_ZERO_WIDTH = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cc}--\s]", regex.V1)
_SEPARATOR = r"[\s\p{Z}\p{Pd}\p{Ps}\p{Pe}.·•﹒_]{0,4}"
"""What may stand between two digits of a number."""
_NUMERAL = "[〇零一二三四五六七八九幺]"
_SPOKEN = regex.compile(f"{_NUMERAL}(?:{_SEPARATOR}{_NUMERAL}){{6,}}")
"""Fewer numerals in a row are ordinary words, such as 一五 of 一五一十."""
_NUMERALS = str.maketrans("〇零一二三四五六七八九幺", "001234567891")

_CALLED = re.compile(r"(?:单|流水|交易|参考|序列|机身|合同|券|编)号(?:码)?(?:是|为)?\s*[:：#]?\s*[(（]?$")
"""Text right before a number that is not private."""
_AMOUNT = re.compile(r"\s*(?:元|块|万|亿|美元|积分|分|[.]\d)")
"""Text right after an amount."""
_DATE_OR_ADDRESS = re.compile(
    r"(?<!\d)(?<!\d[.])(?:(?:19|20)\d\d([-./])(?:0?[1-9]|1[0-2])\1(?:[12]\d|3[01]|0?[1-9])"
    r"|(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)[.]){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d))(?!\d|[.]\d)"
)
"""Dates and IPv4 addresses: no digits of a phone number, although only separators stand between theirs."""


def _number(*digits: str, before: str = "", after: str = r"(?!\d)") -> regex.Pattern:
    """The pattern of a number, from those of its digits, each pair of which may be separated."""
    return regex.compile(rf"(?<!\d){before}{_SEPARATOR.join(digits)}{after}")


_EMAIL = regex.compile(r"(?<![\w.+-])\w[\w.+-]*@[a-z\d-]+(?:[.][a-z\d-]+)*[.][a-z]{2,}", regex.ASCII | regex.I)
_DIGIT = r"\d"
_AREAS = (("1", "0"), ("2", _DIGIT), ("[3-9]", _DIGIT, _DIGIT))
_PATTERNS = (
    ("e-mail address", _EMAIL),
    ("identity card number", _number(*[_DIGIT] * 17, r"[\dXx]", after=r"(?![\dA-Za-z])")),
    *(("bank card number", _number(*[_DIGIT] * length)) for length in range(19, 12, -1)),
    ("phone number", _number("1", "[3-9]", *[_DIGIT] * 9, before=rf"(?:(?:\+|00)?86{_SEPARATOR})?")),
    *(("phone number", _number("0", *area, "[2-8]", *[_DIGIT] * rest)) for area in _AREAS for rest in (7, 6)),
)
"""Kinds of private data and their patterns."""


class PrivateData(NamedTuple):
    """Private data in a text, at the characters `start` up to `end`."""

    kind: str
    start: int
    end: int


def find_private_data(text: str) -> list[PrivateData]:
    """The private data in a text, in order and without overlaps."""
    places = [place for place, character in enumerate(text) if not _ZERO_WIDTH.match(character)]
    seen = "".join(text[place] for place in places).translate(_WIDE)
    seen = _SPOKEN.sub(lambda run: run.group().translate(_NUMERALS), seen)
    found: list[PrivateData] = []
    for each in sorted(_found(seen), key=lambda each: each.start):
        if not found or each.start >= found[-1].end:
            found.append(each)
    return [PrivateData(kind, places[start], places[end - 1] + 1) for kind, start, end in found]


def _found(text: str) -> Iterator[PrivateData]:
    undated = _DATE_OR_ADDRESS.sub(lambda match: "/" * len(match.group()), text)
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(undated if kind == "phone number" else text, overlapped=True):
            number = regex.sub(_SEPARATOR, "", match.group())
            if kind != "e-mail address" and (
                _CALLED.search(text, 0, match.start()) or _AMOUNT.match(text, match.end())
            ):
                continue
            if kind in _CHECKS and not _CHECKS[kind](number):
                continue
            yield PrivateData(kind, *match.span())


def is_identity_card_number(number: str) -> bool:
    """Whether 18 characters have the date of birth and the check digit of an identity card number (GB 11643-1999)."""
    if not re.fullmatch(r"[1-9][0-9]{16}[0-9Xx]", number):
        return False
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    weighted = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(number[:17]))
    return 1900 <= born.year < 2100 and "10X98765432"[weighted % 11] == number[17].upper()


def is_bank_card_number(number: str) -> bool:
    """Whether 13 to 19 digits have an issuer's first digits and the Luhn check digit of a payment card."""
    if not re.fullmatch(r"(?:[34569]|2[2-7])[0-9]{12,18}", number):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(number))]
    return sum(digit - 9 if digit > 9 else digit for digit in doubled) % 10 == 0


_CHECKS = {"identity card number": is_identity_card_number, "bank card number": is_bank_card_number}
