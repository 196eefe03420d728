"""The system prompt, rendered from the strategy taxonomy."""

from functools import cache

from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.templates import render

OPENING = {"zh": "（客户接通了客服。）", "en": "(The customer is connected to support.)"}
"""The first user message, by language, for models whose chats must begin with the user."""


@cache
def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a `TemplateConfig.mode` and `language`, without outer white space.

    Source: `system_prompt.{zh,en}.jinja` beside this file.
    """
    values = {"mode": mode, "strategies": STRATEGIES, "stages": list(Stage)}
    return render(__package__, f"system_prompt.{language}.jinja", **values).strip()
