"""Rows of ordinary chats: `{"messages": [{"role", "content"}]}` with the roles system, user and assistant.

Other columns are as in a dialogue file. A chat has no strategies; its own system prompt, if any, is its first message.
"""

from collections import Counter
from typing import Any

from csc_train.data.dialogue import ROLES, Dialogue, Turn
from csc_train.data.readers import ValidationIssue, check_row, check_text

SPEAKERS = {role: speaker for speaker, role in ROLES.items()}


def check_chat(record: Any, seen: Counter[str], merge: bool = True) -> tuple[Dialogue | None, list[ValidationIssue]]:
    """Turn a row into a chat, or list its issues; arguments as `readers.check_row`."""
    return check_row(record, seen, merge, "chat", _read_turns)


def _read_turns(messages: list[Any], issues: list[ValidationIssue]) -> tuple[list[Turn], str]:
    turns, system = [], ""
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(message, dict):
            issues.append(ValidationIssue(number, "turn", "not an object", type(message).__name__))
        elif role == "system" and number == 1:
            system = check_text(number, "content", message.get("content"), issues)
        elif role in SPEAKERS:
            turns.append(Turn(SPEAKERS[role], check_text(number, "content", message.get("content"), issues)))
        else:
            kind = "only the first message may have it" if role == "system" else "unknown role"
            issues.append(ValidationIssue(number, "role", kind, repr(role)))
    return turns, system
