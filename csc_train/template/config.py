"""What a user may choose about the template and about encoding with it."""

from dataclasses import dataclass

from csc_train.errors import check_choice, check_range

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


@dataclass
class TokenizationConfig:
    """How dialogues are encoded ahead of training (see `prepared.prepare`)."""

    cache_dir: str = "runs/tokenized"
    """Where encoded dialogues are kept, each set in a directory named by a hash of all that decides it. Nothing else
    goes there, and it may be deleted."""
    num_workers: int | None = None
    """How many processes encode; 1 is this one alone. As many as the machine has cores where not given, fewer where
    starting them would take longer than the work."""

    def __post_init__(self):
        if self.num_workers is not None:
            check_range("tokenization.num_workers", self.num_workers, 1)
