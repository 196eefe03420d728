"""The five criteria by which replies are judged, by a model and by people alike. The wording is ours; `evaluation/config.py` lists their names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Criterion:
    """One criterion: its name and what makes a reply good by it, in Chinese and English."""

    zh: str
    en: str
    definition_zh: str
    definition_en: str

    def name(self, language: str) -> str:
        """The name in `language` ("zh" or "en")."""
        return {"zh": self.zh, "en": self.en}[language]

    def definition(self, language: str) -> str:
        """What makes a reply good, in `language` ("zh" or "en")."""
        return {"zh": self.definition_zh, "en": self.definition_en}[language]


CRITERIA: dict[str, Criterion] = {
    "strategy": Criterion(
        "策略", "Strategy",
        "选对了此刻该做的事，并且真的做到了。",
        "chose what is right to do at this moment, and really did it.",
    ),
    "helpfulness": Criterion(
        "帮助", "Helpfulness",
        "让客户的问题向解决推进，具体、可执行。",
        "moves the customer's problem towards a solution, concretely.",
    ),
    "empathy": Criterion(
        "共情", "Empathy",
        "看到并回应客户的情绪，语气尊重。",
        "sees the customer's feelings and answers them, respectfully.",
    ),
    "wording": Criterion(
        "表达", "Wording",
        "自然、简洁，像真人客服，不重复、不啰嗦。",
        "natural and short, as a person would write; no repetition, no padding.",
    ),
    "faithfulness": Criterion(
        "忠实", "Faithfulness",
        "只用上文已有的事实，不编造订单、金额或规定。",
        "uses only facts from the conversation; invents no order, amount or rule.",
    ),
}  # fmt: skip
"""By the name that answers give them."""
