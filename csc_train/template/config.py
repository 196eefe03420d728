"""What a user may choose about the template."""

from dataclasses import dataclass

from csc_train.errors import check_choice

CHAT_TEMPLATES = ("qwen2_5", "qwen3", "llama3_1")
"""The `.jinja` chat templates beside this file; the model decides which one fits."""
MODES = ("joint", "given", "reply_only")
LANGUAGES = ("zh", "en")


@dataclass
class TemplateConfig:
    """How a supporter turn is presented to the model, and what of it is trained."""

    mode: str = "joint"
    """joint: predict the strategy, then the reply. given: the strategy is handed in, the reply trained.
    reply_only: no strategies anywhere (the ablation)."""
    language: str = "zh"
    """Language of the system prompt and of the strategy labels: zh or en."""

    def __post_init__(self):
        check_choice("template.mode", self.mode, MODES)
        check_choice("template.language", self.language, LANGUAGES)
