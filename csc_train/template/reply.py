"""Reply text, as a model writes it, to (strategy, response), and back."""

import re
from dataclasses import dataclass

from csc_train.data.strategies import Strategy, parse_strategy

_LABELLED = re.compile(r"\[([^\[\]]*)\](.*)", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A supporter's reply. `strategy` is None where the text names none that is known."""

    strategy: Strategy | None
    response: str


def format_reply(reply: Reply, language: str) -> str:
    """The message content: `[情感管理]回复`, or the bare response when there is no strategy.

    There is no space after the bracket: it would fuse with the first bytes of the response.
    """
    return (f"[{reply.strategy.name(language)}]" if reply.strategy else "") + reply.response


def parse_reply(text: str) -> Reply:
    """The inverse of `format_reply`, for text that a model wrote.

    A text that does not start with one known strategy in square brackets is all response: a placeholder such as
    `[手机号码]` at its head stays where it is.
    """
    text = text.strip()
    if match := _LABELLED.fullmatch(text):
        label, response = match.groups()
        try:
            return Reply(parse_strategy(label), response.strip())
        except ValueError:
            pass
    return Reply(None, text)


def read_reply(text: str, mode: str) -> Reply:
    """The reply that a model's text holds: no strategy is looked for in modes `given` and `reply_only`."""
    return parse_reply(text) if mode == "joint" else Reply(None, text.strip())
