"""Characters that show nothing: white space, control characters, and what Unicode ignores by default (zero width)."""

import functools

import regex

INVISIBLE = r"\s\p{Z}\p{Cc}\p{Default_Ignorable_Code_Point}\u2800"
"""Inside the brackets of a set of the library `regex`; U+2800 is the braille pattern without dots."""
_BLANK = regex.compile(f"[{INVISIBLE}]*")
_OUTER = regex.compile(rf"\A[{INVISIBLE}]+|[{INVISIBLE}]+\Z")

_HIDDEN = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\p{Cc}\u2800--\t\n\r\ufe0e\ufe0f\u200c\u200d\U000e0020-\U000e007f]"
    r"|(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}\p{M}\p{Script=Arabic}])[\u200c\u200d]",
    regex.V1,
)
"""Joiners and selectors are no fault inside an emoji, and a joiner is none inside Arabic and Indic words."""


def find_hidden(text: str) -> list[str]:
    """The characters of a text that nobody sees and that change its tokens: zero width, directions, controls."""
    return _HIDDEN.findall(text)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or all its characters are invisible."""
    return not text or (_is_invisible(text[0]) and _BLANK.fullmatch(text) is not None)


@functools.lru_cache(maxsize=4096)
def _is_invisible(character: str) -> bool:
    return _BLANK.fullmatch(character) is not None


def strip_invisible(text: str) -> str:
    """A label without invisible characters at its ends. In other texts some have a meaning, such as behind an emoji."""
    return _OUTER.sub("", text)
