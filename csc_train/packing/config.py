"""What a user may choose about packing."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range

PACKING_STRATEGIES = ("shared_prefix", "best_fit", "off")
OVERFLOW_POLICIES = ("drop", "truncate", "error")
WEIGHTINGS = ("tokens", "turns", "inverse_frequency", "by_strategy")


@dataclass
class PackingConfig:
    """How dialogues share the rows of a batch."""

    strategy: str = "shared_prefix"
    """shared_prefix: several dialogues a row, kept apart, that share one copy of their system prompt. best_fit: several
    dialogues a row, each with its own. off: one dialogue a row, padded."""
    max_length: int = 8192
    """Tokens in a pack, and the most that one dialogue may have."""
    overflow: str = "truncate"
    """A dialogue over max_length is dropped, truncated (whole leading turns go, the system prompt stays), or the run
    stops (raise)."""

    def __post_init__(self):
        check_choice("packing.strategy", self.strategy, PACKING_STRATEGIES)
        check_choice("packing.overflow", self.overflow, OVERFLOW_POLICIES)
        check_range("packing.max_length", self.max_length, 1)


@dataclass
class LossConfig:
    """How much each trained token counts (see `loss_weights.LossWeights`)."""

    weighting: str = "tokens"
    """tokens: every trained token the same. turns: every supporter turn the same, long or short. inverse_frequency:
    turns of rare strategies more. by_strategy: as `strategy_factors` says."""
    max_factor: float = 5.0
    """Under inverse_frequency, the most that a strategy's turns are raised by."""
    strategy_factors: dict[str, float] = field(default_factory=dict)
    """Under by_strategy, a factor by strategy (its name in either language, or its number); 1 where none is given, and 0 for
    context only."""
    strategy_weight: float = 1.0
    """Weight of the tokens of `[strategy]`, beside the factor of its turn."""
    reply_weight: float = 1.0
    """Weight of the tokens of the reply, its end-of-turn token included, beside the factor of its turn."""

    def __post_init__(self):
        check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        check_range("loss.max_factor", self.max_factor, 1)
        for name, factor in self.strategy_factors.items():
            check_range(f"loss.strategy_factors.{name}", factor, 0)
        check_range("loss.strategy_weight", self.strategy_weight, 0)
        check_range("loss.reply_weight", self.reply_weight, 0)
        if self.strategy_factors and self.weighting != "by_strategy":
            raise InputError(
                f"loss.strategy_factors is given, but loss.weighting is {self.weighting}: choose loss=by_strategy"
            )
        if not (self.strategy_weight or self.reply_weight):
            raise InputError("loss.strategy_weight and loss.reply_weight are both 0: nothing would be trained")
