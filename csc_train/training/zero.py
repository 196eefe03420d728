"""What a user may choose about sharding the states of training over processes."""

from dataclasses import dataclass

from csc_train.errors import InputError, check_choice

STAGES = ("off", "0", "1", "2", "3", "from_launcher")
OFFLOADS = ("none", "optimizer", "all")


@dataclass
class ZeroConfig:
    """How DeepSpeed shards what the processes hold (the `zero` group)."""

    stage: str = "off"
    """off: DDP, without DeepSpeed. 0 to 3: what is sharded. from_launcher: accelerate brings its own configuration."""
    offload: str = "none"
    """What is kept in the host's memory: none, the optimizer's states, or all (the weights besides)."""

    def __post_init__(self):
        check_choice("zero.stage", self.stage, STAGES)
        check_choice("zero.offload", self.offload, OFFLOADS)


def check_supported(adapter: str, zero: ZeroConfig) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: names the pair and says why.
    """
    if zero.offload != "none" and zero.stage in ("off", "0"):
        raise InputError(
            f"zero.offload={zero.offload} with zero.stage={zero.stage}: nothing is sharded to be offloaded"
        )
    if zero.offload == "all" and zero.stage != "3":
        raise InputError(f"zero.offload=all with zero.stage={zero.stage}: only stage 3 shards the weights")
