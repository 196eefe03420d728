"""Format a reply as text, `[strategy]response`, and parse the text that a model generated."""

import contextlib
from dataclasses import dataclass

import regex

from csc_train.data.strategies import Strategy, parse_strategy
from csc_train.invisible import INVISIBLE, is_blank
from csc_train.thoughts import without_thoughts

_LABELLED = regex.compile(rf"[{INVISIBLE}]*\[([^\[\]]*)\](.*)", regex.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A supporter's reply; `strategy` is None if the text names no known one."""

    strategy: Strategy | None
    response: str


def format_reply(reply: Reply, language: str) -> str:
    """The message content: `[情感管理]回复`, or only the response without a strategy.

    No space follows the bracket: it would merge with the first bytes of the response.
    """
    return (f"[{reply.strategy.name(language)}]" if reply.strategy else "") + reply.response


def parse_reply(text: str, mode: str = "joint") -> Reply:
    """Split text that a model generated into strategy and response: the inverse of `format_reply`.

    Only mode `joint` has a strategy to parse. A text that does not start with one known strategy in square brackets is
    all response: a placeholder such as `[手机号码]` at its start stays. A response that shows nothing is empty, and
    thoughts are no part of it.
    """
    strategy, response = None, (text := without_thoughts(text))
    if mode == "joint" and (match := _LABELLED.fullmatch(text)):
        with contextlib.suppress(ValueError):
            strategy, response = parse_strategy(match[1]), match[2]
    return Reply(strategy, "" if is_blank(response) else response.strip())
