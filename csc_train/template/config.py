"""Settings of the prompt and of tokenization."""

from dataclasses import dataclass

from csc_train.data.config import LANGUAGE_CODES
from csc_train.errors import check_fields

MODES = ("joint", "given", "reply_only")


@dataclass
class TemplateConfig:
    """How the prompt presents a supporter turn, and which part of the turn is trained."""

    mode: str = "joint"
    """joint: predict the strategy, then the reply. given: the strategy is part of the prompt, and the reply is trained.
    reply_only: no strategies (the ablation)."""
    language: str = "zh"
    """Language of the system prompt and of the strategy labels: zh, en, or one that a plugin registers."""

    def __post_init__(self):
        check_fields("template.", self, "mode", choices=MODES)
        check_fields("template.", self, "language", choices=LANGUAGE_CODES)


@dataclass
class TokenizationConfig:
    """How dialogues are tokenized before training (see `tokenized_cache.tokenize`)."""

    cache_dir: str = "runs/tokenized"
    """Directory of the cache; it may be deleted. Each entry is named by a hash of dialogues, tokenizer and template."""
    num_workers: int | None = None
    """Threads that tokenize. Defaults to the number of cores, at most 6: more are hardly faster."""

    def __post_init__(self):
        check_fields("tokenization.", self, "num_workers", low=1)
