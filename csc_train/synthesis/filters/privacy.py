"""Detection of private data in text: phone, identity card and bank card numbers, and e-mail addresses.

Digits may be full-width, Chinese numerals (幺三八...), and separated by single spaces or hyphens. Amounts, and numbers
that are called an order number or the like, are not private.
"""

import datetime
import re
from collections.abc import Iterator
from typing import NamedTuple

_WIDE = str.maketrans("０１２３４５６７８９－＋．＠Ｘ", "0123456789-+.@X")
_SPOKEN = re.compile("[〇零一二三四五六七八九幺]{7,}")
"""Fewer numerals in a row are ordinary words, such as 一五 of 一五一十."""
_NUMERALS = str.maketrans("〇零一二三四五六七八九幺", "001234567891")

_CALLED = re.compile(r"(?:单|流水|交易|参考|序列|机身|合同|券|编)号(?:码)?(?:是|为)?\s*[:：#]?\s*$")
"""Text right before a number that is not private."""
_AMOUNT = re.compile(r"\s*(?:元|块|万|亿|美元|积分|分|[.]\d)")
"""Text right after an amount."""

_PATTERNS = {
    "e-mail address": re.compile(r"(?<![\w.+-])\w[\w.+-]*@[a-z\d-]+(?:[.][a-z\d-]+)*[.][a-z]{2,}", re.ASCII | re.I),
    "identity card number": re.compile(r"(?<!\d)\d{6}[ -]?\d{4}[ -]?\d{4}[ -]?\d{3}[\dXx](?![\dA-Za-z])"),
    "bank card number": re.compile(r"(?<!\d)\d{4}(?:[ -]?\d{4}){2,3}[ -]?\d{1,4}(?!\d)"),
    "phone number": re.compile(
        r"(?<!\d)(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)"
        r"|(?<!\d)0(?:10|2\d|[3-9]\d\d)[ -]?[2-8]\d{2,3}[ -]?\d{4}(?!\d)"
    ),
}
"""Pattern of each kind of private data."""


class PrivateData(NamedTuple):
    """Private data in a text, at the characters `start` up to `end`."""

    kind: str
    start: int
    end: int


def find_private_data(text: str) -> list[PrivateData]:
    """The private data in a text, in order and without overlaps."""
    text = text.translate(_WIDE)
    text = _SPOKEN.sub(lambda run: run.group().translate(_NUMERALS), text)
    found = sorted(_found(text), key=lambda each: each.start)
    return [each for place, each in enumerate(found) if not any(each.start < other.end for other in found[:place])]


def _found(text: str) -> Iterator[PrivateData]:
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            number = re.sub("[ -]", "", match.group())
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
