"""Find texts that were read in the wrong encoding (mojibake), replacement characters and hidden characters."""

import contextlib
import unicodedata
from typing import NamedTuple

import regex

from csc_train.invisible import find_hidden

MAX_DETAIL = 24
"""Most characters of a text in `TextFault.detail`."""
_HIGH_BYTES = bytes(range(128, 256))
_LATIN = regex.compile(f"[{_HIGH_BYTES.decode('latin-1')}{_HIGH_BYTES.decode('cp1252', 'ignore')}]{{2,}}")
"""What UTF-8 becomes if it is read as Latin-1 or Windows-1252."""
_WIDE, _PART = regex.compile(r"[^\x00-\x7f]{3,}"), regex.compile(r"[^\x00-\x7f，。？！、：；]{3,}")
"""What it becomes if it is read as GBK: a whole run, or one beside right text."""
_REPLACED = regex.compile("\ufffd+|(?:锟斤拷?|烫烫烫|屯屯屯)+")
"""Characters that stand for lost ones, and what they become if they are read as GBK."""
_CHINESE = regex.compile(r"[\u2e80-\uffef]{2}")
_PLAUSIBLE = regex.compile(r"[\p{L}\p{N}\p{P}\p{S}\s]+")


class TextFault(NamedTuple):
    """A fault of a text: its kind, and the characters, with the text that they probably were."""

    kind: str
    detail: str


def find_text_faults(text: str) -> list[TextFault]:
    """The faults of a text, each once.

    Mojibake is a run of characters that, written in Windows-1252 or GB18030, reads as valid UTF-8. For GB18030 one of
    its characters must be rare (not in GB2312) and the result Chinese, because common characters may do so by chance.
    """
    faults = [TextFault("replacement character", _cut(found)) for found in _REPLACED.findall(text)]

    def restored(match: regex.Match) -> str:
        """What a run was; notes the fault."""
        run = match.group()
        if found := (_from_latin if match.re is _LATIN else _from_gbk)(run):
            faults.append(TextFault("mojibake", f"{_cut(run)} ({_cut(found)})"))
        return found or run

    rest = text
    for pattern in (_LATIN, _WIDE, _PART):
        rest = pattern.sub(restored, rest)  # the bytes of mojibake may be control characters
    hidden = (unicodedata.name(each, f"U+{ord(each):04X}").lower() for each in find_hidden(rest))
    return list(dict.fromkeys([*faults, *(TextFault("invisible character", name) for name in hidden)]))


def _from_latin(run: str) -> str:
    data = b"".join(_cp1252_or_latin(character) for character in run)
    # Two characters may be a capital and a quotation mark; the mojibake of é, ü and ° begins with one of these.
    return _decoded(data) if len(run) > 2 or run[0] in "ÂÃ" else ""


def _cp1252_or_latin(character: str) -> bytes:
    with contextlib.suppress(UnicodeEncodeError):
        return character.encode("cp1252")
    return character.encode("latin-1")


def _from_gbk(run: str) -> str:
    restored = _decoded(run.encode("gb18030", "ignore"))
    return restored if _CHINESE.search(restored) and not _is_gb2312(run) else ""


def _is_gb2312(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        return bool(text.encode("gb2312"))
    return False


def _decoded(data: bytes) -> str:
    """The text of UTF-8 bytes, of which the last character may be cut; empty if they are none."""
    for end in range(len(data), len(data) - 3, -1):
        with contextlib.suppress(UnicodeDecodeError):
            text = data[:end].decode()
            return text if _PLAUSIBLE.fullmatch(text) else ""
    return ""


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}…"
