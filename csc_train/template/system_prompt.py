"""The system prompt, built from the taxonomy."""

from functools import cache
from importlib import resources

import jinja2

from csc_train.data.strategies import STRATEGIES, Stage

OPENING = {"zh": "（客户接通了客服。）", "en": "(The customer is connected to support.)"}
"""What a model hears before the supporter's greeting, by language, where its chats must begin with the user."""

_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)


@cache
def system_prompt(mode: str, language: str) -> str:
    """The system prompt of a template mode ("joint", "given", "reply_only") in a language ("zh", "en").

    It has no outer white space. Source: `system_prompt.{zh,en}.jinja` beside this file.
    """
    text = resources.files(__package__).joinpath(f"system_prompt.{language}.jinja").read_text(encoding="utf-8")
    return _ENVIRONMENT.from_string(text).render(mode=mode, strategies=STRATEGIES, stages=list(Stage)).strip()
