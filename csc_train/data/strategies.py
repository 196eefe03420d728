"""The taxonomy of the project: 12 support strategies and 5 stages of a customer support conversation.

Numbers, names, codes and stages are those of the paper (figure 2) and its data; the definitions are our own.
"""

import re
from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """A phase of the conversation, in its typical (not obligatory) order."""

    CONNECTING = ("Connecting", "欢迎和建立联系")
    IDENTIFYING = ("Identifying", "理解和识别问题")
    EXPLORING = ("Exploring", "寻求解决方案")
    RESOLVING = ("Resolving", "解决和确认")
    MAINTAINING = ("Maintaining", "结束和保持关系")

    def __init__(self, en: str, zh: str):
        self.en = en
        self.zh = zh


@dataclass(frozen=True)
class Strategy:
    """One support strategy. `stage` is None for the one strategy (Others) that may appear in any stage."""

    number: int
    zh: str
    en: str
    code: str
    stage: Stage | None
    definition_zh: str
    definition_en: str

    def name(self, language: str) -> str:
        """The name in `language` ("zh" or "en"), as between the brackets of a reply."""
        return {"zh": self.zh, "en": self.en}[language]

    def definition(self, language: str) -> str:
        """The definition in `language` ("zh" or "en")."""
        return {"zh": self.definition_zh, "en": self.definition_en}[language]

    @property
    def label(self) -> str:
        """The label as the published data writes it, such as `策略5 情感管理`."""
        return f"策略{self.number} {self.zh}"

    def __str__(self) -> str:
        return self.label


STRATEGIES: tuple[Strategy, ...] = (
    Strategy(
        1, "礼貌问候", "Greeting", "GT", Stage.CONNECTING,
        "开场时友好地打招呼，报出身份，并表示愿意帮忙。",
        "Open the talk with a friendly welcome, say who is speaking and offer help.",
    ),
    Strategy(
        2, "确认身份", "Identity Verification", "IV", Stage.CONNECTING,
        "问候之后，请客户提供安全核验所需的个人资料。",
        "Right after the greeting, ask for the personal details that a safety check needs.",
    ),
    Strategy(
        3, "重述或转述", "Restatement or Paraphrasing", "RP", Stage.IDENTIFYING,
        "用自己的话复述客户的问题来核对理解，不添加新内容。",
        "Say the customer's problem back in other words to check the understanding, adding nothing new.",
    ),
    Strategy(
        4, "细化问题", "Problem Refinement", "PR", Stage.IDENTIFYING,
        "针对缺少的细节提出一个具体的问题。",
        "Ask one concrete question about a detail that is still missing.",
    ),
    Strategy(
        5, "情感管理", "Emotional Management", "EM", Stage.IDENTIFYING,
        "客户明显不满、着急或担心时，先共情安抚，再谈别的。",
        "When the customer is clearly upset or worried, answer the feeling with empathy before anything else.",
    ),
    Strategy(
        6, "提供建议", "Providing Suggestions", "PS", Stage.EXPLORING,
        "提出客户可以采取的具体步骤或方案。",
        "Propose concrete steps that the customer can take.",
    ),
    Strategy(
        7, "信息传达", "Information Delivery", "ID", Stage.EXPLORING,
        "说明规则、政策、流程或事实。",
        "Explain a rule, a policy, a process or a fact.",
    ),
    Strategy(
        8, "解决实施", "Resolution Implementation", "RI", Stage.RESOLVING,
        "动手办理双方同意的方案，或说明办理进度。",
        "Carry out the agreed solution, or report how far it has come.",
    ),
    Strategy(
        9, "反馈请求", "Feedback Request", "FR", Stage.RESOLVING,
        "事情办妥之后，请客户评价结果或服务。",
        "Once the matter is settled, ask how the customer rates the result or the service.",
    ),
    Strategy(
        10, "关系延续", "Relationship Continuation", "RC", Stage.MAINTAINING,
        "引向今后的服务、产品或联系方式。",
        "Point to future service, products or ways to stay in touch.",
    ),
    Strategy(
        11, "感谢与告别", "Appreciation and Closure", "AC", Stage.MAINTAINING,
        "只表示感谢并道别。",
        "Thank the customer and say goodbye, nothing else.",
    ),
    Strategy(
        12, "其它", "Others", "OT", None,
        "以上各项都不适用时使用。",
        "Use it when none of the others fits.",
    ),
)  # fmt: skip

GREETING, CLOSURE, OTHERS = STRATEGIES[0], STRATEGIES[10], STRATEGIES[11]

_BY_NUMBER = {str(strategy.number): strategy for strategy in STRATEGIES}
_BY_NAME = {name: strategy for strategy in STRATEGIES for name in (strategy.zh, strategy.en, strategy.code)}
_NUMBERED = re.compile(r"策略([0-9]+)(?:(?:\s*[:：]\s*|\s+)(.+))?")


def parse_strategy(label: str) -> Strategy:
    """Parse the label of a strategy.

    Accepts, with outer white space ignored: `策略5 情感管理`, `策略5: 情感管理`, `策略5`, `5`, and the exact Chinese
    name, English name or code.

    Raises:
        ValueError: an unknown name, a number outside 1..12, a number that contradicts its name, or two strategies
            joined by `+`.
    """
    text = label.strip()
    if "+" in text or "＋" in text:
        raise ValueError(f"more than one strategy in {label!r}")
    if strategy := _BY_NUMBER.get(text) or _BY_NAME.get(text):
        return strategy
    if match := _NUMBERED.fullmatch(text):
        number, name = match.groups()
        strategy = _BY_NUMBER.get(number)
        if strategy and (name is None or _BY_NAME.get(name) is strategy):
            return strategy
    raise ValueError(f"unknown strategy {label!r}")
