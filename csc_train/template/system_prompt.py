"""The system prompt, built from the taxonomy."""

from functools import cache

from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.templates import render

OPENING = {"zh": "（客户接通了客服。）", "en": "(The customer is connected to support.)"}
"""What a model hears before the supporter's greeting, by language, where its chats must begin with the user."""


@cache
def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a template mode ("joint", "given", "reply_only") in a language ("zh", "en").

    It has no outer white space. Source: `system_prompt.{zh,en}.jinja` beside this file.
    """
    values = {"mode": mode, "strategies": STRATEGIES, "stages": list(Stage)}
    return render(__package__, f"system_prompt.{language}.jinja", **values).strip()
