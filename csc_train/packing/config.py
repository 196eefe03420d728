"""Settings of packing and of the loss weights."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_fields

PACKING_STRATEGIES = ("shared_prefix", "best_fit", "off")
OVERFLOW_POLICIES = ("drop", "truncate", "error")
WEIGHTINGS = ["tokens", "turns", "inverse_frequency", "by_strategy"]
"""Names of the loss weightings; `loss_weights.loss_weighting` adds others."""


@dataclass
class PackingConfig:
    """How dialogues are packed into sequences."""

    strategy: str = "shared_prefix"
    """shared_prefix: several dialogues per pack, with one copy of their system prompt. best_fit: several dialogues per
    pack, each with a system prompt. off: one dialogue per row, padded."""
    max_length: int = 8192
    """The longest pack, and the longest dialogue, in tokens."""
    overflow: str = "truncate"
    """A dialogue longer than max_length: drop it; truncate it (remove whole leading turns, keep the system prompt); or
    stop with an error."""

    def __post_init__(self):
        check_fields("packing.", self, "strategy", choices=PACKING_STRATEGIES)
        check_fields("packing.", self, "overflow", choices=OVERFLOW_POLICIES)
        check_fields("packing.", self, "max_length", low=1, high=10**7)


@dataclass
class LossConfig:
    """The weight of each trained token in the loss."""

    weighting: str = "tokens"
    """tokens: all trained tokens weigh the same. turns: all supporter turns weigh the same. inverse_frequency: turns of
    rare strategies weigh more. by_strategy: turns weigh as `strategy_factors` says. Or the name of one that a
    plugin registers."""
    max_factor: float = 5.0
    """The largest factor of a strategy under inverse_frequency."""
    strategy_factors: dict[str, float] = field(default_factory=dict)
    """Factors under by_strategy, by the strategy's name, code or number; each defaults to 1. 0: context only."""
    strategy_weight: float = 1.0
    """Weight of the tokens of `[strategy]`; multiplied by the factor of the turn."""
    reply_weight: float = 1.0
    """Weight of the tokens of the reply and its end-of-turn token; multiplied by the factor of the turn."""

    def __post_init__(self):
        check_fields("loss.", self, "weighting", choices=WEIGHTINGS)
        check_fields("loss.", self, "max_factor", low=1)
        check_fields("loss.", self, "strategy_factors", "strategy_weight", "reply_weight", low=0)
        if self.strategy_factors and self.weighting != "by_strategy":
            raise InputError(f"loss.strategy_factors is set, but loss.weighting={self.weighting}: set loss=by_strategy")
        if not (self.strategy_weight or self.reply_weight):
            raise InputError("loss.strategy_weight and loss.reply_weight are both 0: nothing would be trained")
