"""What a user may choose about packing."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range

PACKING_STRATEGIES = ("shared_prefix", "best_fit", "off")
OVERFLOW_POLICIES = ("drop", "trim", "raise")
WEIGHTINGS = ("tokens", "turns", "inverse_frequency", "table")


@dataclass
class PackingConfig:
    """How dialogues share the rows of a batch."""

    strategy: str = "shared_prefix"
    """shared_prefix: several dialogues a row, kept apart, that share one copy of their system prompt. best_fit: several
    dialogues a row, each with its own. off: one dialogue a row, padded."""
    max_length: int = 8192
    """Tokens in a pack, and the most that one dialogue may have."""
    too_long: str = "trim"
    """A dialogue over max_length is dropped, trimmed (whole leading turns go, the system prompt stays), or the run
    stops (raise)."""

    def __post_init__(self):
        check_choice("packing.strategy", self.strategy, PACKING_STRATEGIES)
        check_choice("packing.too_long", self.too_long, OVERFLOW_POLICIES)
        check_range("packing.max_length", self.max_length, 1)


@dataclass
class LossConfig:
    """How much each trained token counts (see `loss_weights.LossWeights`)."""

    weighting: str = "tokens"
    """tokens: every trained token the same. turns: every supporter turn the same, long or short. inverse_frequency:
    turns of rare strategies more. table: as `table` says."""
    cap: float = 5.0
    """Under inverse_frequency, the most that a strategy's turns are raised by."""
    table: dict[str, float] = field(default_factory=dict)
    """Under table, a factor by strategy (its name in either language, or its number); 1 where none is given, and 0 for
    context only."""
    strategy: float = 1.0
    """Weight of the tokens of `[strategy]`, beside the factor of its turn."""
    reply: float = 1.0
    """Weight of the tokens of the reply, its end-of-turn token included, beside the factor of its turn."""

    def __post_init__(self):
        check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        check_range("loss.cap", self.cap, 1)
        for name, factor in self.table.items():
            check_range(f"loss.table.{name}", factor, 0)
        check_range("loss.strategy", self.strategy, 0)
        check_range("loss.reply", self.reply, 0)
        if self.table and self.weighting != "table":
            raise InputError(f"loss.table is given, but loss.weighting is {self.weighting}: choose loss=by_strategy")
        if not (self.strategy or self.reply):
            raise InputError("loss.strategy and loss.reply are both 0: nothing would be trained")
