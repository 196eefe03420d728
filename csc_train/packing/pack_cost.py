"""The cost of packs and pack slices, in FLOPs and tokens, which balances the load of the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackCost:
    """Tokens and FLOPs of a pack. A shared prefix is counted apart, since every slice of the pack repeats it."""

    tokens: tuple[int, ...]
    """By document."""
    flops: tuple[float, ...]
    """By document."""
    prefix_tokens: int = 0
    prefix_flops: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of the whole pack."""
        return self.prefix_flops + sum(self.flops)


@dataclass(frozen=True)
class PackSlice:
    """Documents `start` to `stop` (exclusive) of a pack, behind its shared prefix; mostly all of them."""

    pack: int
    start: int
    stop: int

    def flops(self, packs: Sequence[PackCost]) -> float:
        """FLOPs, with those of the prefix."""
        pack = packs[self.pack]
        return pack.prefix_flops + sum(pack.flops[self.start : self.stop])

    def tokens(self, packs: Sequence[PackCost]) -> int:
        """Length in tokens, with that of the prefix."""
        pack = packs[self.pack]
        return pack.prefix_tokens + sum(pack.tokens[self.start : self.stop])


def pack_cost(
    document_lengths: Sequence[int], prefix_length: int, flops_per_token: float, flops_per_pair: float
) -> PackCost:
    """The cost of a pack from the FLOPs for each token, and for each pair of tokens that see each other.

    A document of n tokens has n² pairs, and one behind a prefix of p tokens n² + 2 p n: each of its tokens sees the
    whole prefix, while of the n² pairs causal attention computes half.

    Args:
        document_lengths: in tokens; a shared prefix comes first.
        prefix_length: the length of the shared prefix; 0 for none.
    """
    tokens = tuple(map(int, document_lengths[1:] if prefix_length else document_lengths))
    return PackCost(
        tokens,
        tuple(flops_per_token * n + flops_per_pair * (n**2 + 2 * prefix_length * n) for n in tokens),
        prefix_length,
        flops_per_token * prefix_length + flops_per_pair * prefix_length**2,
    )
