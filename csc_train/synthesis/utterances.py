"""Utterances: the turns of a conversation before it is checked to be a dialogue, and their text in prompts."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from csc_train.data.dialogue import Dialogue, Speaker, Turn, join_speakers
from csc_train.data.strategies import parse_strategy
from csc_train.invisible import is_blank

PLACEHOLDERS = {
    "zh": ("姓名", "手机号码", "身份证号", "银行卡号", "邮箱", "地址", "订单号", "日期", "金额", "公司名称", "工号"),
    "en": (
        "name", "phone number", "ID number", "card number", "e-mail", "address", "order number", "date", "amount",
        "company name", "employee number",
    ),
}  # fmt: skip
"""The words in square brackets that stand for private data, by language."""
_BRACKETED = re.compile(r"\s*[（(【\[]([^（(【\[）)】\]]*)[）)】\]][。.!！]?\s*$")
_NOTICE = re.compile(
    "系统|提示|通话|挂断|挂机|结束|断开|会话|对话|录音|转接|评价|system|call|hang|hung|disconnect|ended", re.I
)


class Utterance(NamedTuple):
    """One utterance; `label` is its strategy as it was written, possibly unknown or empty."""

    speaker: Speaker
    text: str
    label: str = ""


def utterances_of(dialogue: Dialogue) -> list[Utterance]:
    """The utterances of a dialogue."""
    return [Utterance(turn.speaker, turn.text, turn.strategy.label if turn.strategy else "") for turn in dialogue.turns]


def turns_of(utterances: Sequence[Utterance]) -> tuple[Turn, ...]:
    """The turns of utterances that passed `filters.rules.check_rewrite`."""
    return tuple(
        Turn(each.speaker, each.text.strip(), parse_strategy(each.label) if each.speaker is Speaker.SUPPORTER else None)
        for each in utterances
    )


def as_text(utterances: Sequence[Utterance], language: str, labelled: str = "[{}]") -> str:
    """Utterances for a prompt: one line each, with the speaker and the label, if there is one, in its brackets."""
    lines = []
    for each in utterances:
        label = labelled.format(each.label) if each.label else ""
        # On one line, so that a text cannot imitate another speaker's turn.
        lines.append(f"{each.speaker.title(language)}{label}: {' '.join(each.text.split())}")
    return "\n".join(lines)


def merge_turns(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Join consecutive utterances of one speaker with a space; empty ones are removed."""
    said = (each for each in utterances if not is_blank(each.text))
    return [together[0]._replace(text=text) for together, text in join_speakers(said)]


def strip_boilerplate(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Remove system notices such as `（通话结束）` from the end.

    Removes last turns of nothing but brackets, and a bracketed notice at the end of the last turn. Placeholders for
    private data stay.
    """
    kept = list(utterances)
    while kept and (match := _BRACKETED.search(kept[-1].text)):
        content, before = match.group(1).strip(), kept[-1].text[: match.start()]
        if any(content in names for names in PLACEHOLDERS.values()) or (before and not _NOTICE.search(content)):
            break
        last = kept.pop()
        if not is_blank(before):
            kept.append(last._replace(text=before))
    return kept
