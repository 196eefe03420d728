"""What a user may choose about packing."""

from dataclasses import dataclass

from csc_train.errors import check_choice, check_range

STRATEGIES = ("shared_prefix", "best_fit", "off")
LENGTH_POLICIES = ("drop", "trim", "raise")


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
        check_choice("packing.strategy", self.strategy, STRATEGIES)
        check_choice("packing.too_long", self.too_long, LENGTH_POLICIES)
        check_range("packing.max_length", self.max_length, 1)
