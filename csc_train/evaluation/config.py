"""What a user may choose about an evaluation."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range
from csc_train.evaluation.predictions import CONTEXTS


@dataclass
class EvaluationConfig:
    """How replies are generated and scored."""

    contexts: list[str] = field(default_factory=lambda: list(CONTEXTS))
    base: bool = True
    """Evaluate the model that training started from as well."""
    batch_size: int = 32
    """Prompts generated from at a time."""
    max_new_tokens: int = 256
    """The longest reply, strategy included."""
    dtype: str = "auto"
    """auto: as the checkpoint is stored. Or bf16, fp32."""

    def __post_init__(self):
        if not self.contexts:
            raise InputError(f"evaluation.contexts=[]: give one or more of {', '.join(CONTEXTS)}")
        for context in self.contexts:
            check_choice("evaluation.contexts", context, CONTEXTS)
        check_range("evaluation.batch_size", self.batch_size, 1)
        check_range("evaluation.max_new_tokens", self.max_new_tokens, 1)
        check_choice("evaluation.dtype", self.dtype, ("auto", "bf16", "fp32"))
