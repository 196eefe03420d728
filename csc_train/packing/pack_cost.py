"""The cost of packs and pack slices, in FLOPs and tokens, which balances the load of the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from csc_train.packing.ragged import Ragged, offsets_of


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


class PackCosts(Sequence[PackCost]):
    """The costs of many packs in flat arrays; each is a `PackCost` when it is read.

    Attributes:
        tokens: by pack, by document.
        documents: int64 [packs]; the number of documents.
        flops: float64 [documents]; of all packs.
        prefix_tokens: int64 [packs].
        prefix_flops: float64 [packs].
        totals: float64 [packs]; `PackCost.total`.
    """

    def __init__(self, tokens: Ragged, flops: numpy.ndarray, prefix_tokens: Any, prefix_flops: Any):
        self.tokens, self.documents, self.flops = tokens, tokens.lengths, flops
        self.prefix_tokens, self.prefix_flops = numpy.asarray(prefix_tokens), numpy.asarray(prefix_flops, float)
        self.totals = self.prefix_flops + Ragged(flops, tokens.offsets).sums()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> PackCost:
        pack = range(len(self))[index]
        start, stop = self.tokens.offsets[pack : pack + 2]
        prefix = int(self.prefix_tokens[pack]), float(self.prefix_flops[pack])
        return PackCost(tuple(self.tokens[pack]), tuple(self.flops[start:stop].tolist()), *prefix)


PackLookup = Sequence[PackCost] | Mapping[int, PackCost]
"""The costs of packs, by pack."""


@dataclass(frozen=True, slots=True)
class PackSlice:
    """Documents `start` to `stop` (exclusive) of a pack, behind its shared prefix; mostly all of them."""

    pack: int
    start: int
    stop: int

    def flops(self, packs: PackLookup) -> float:
        """FLOPs, with those of the prefix."""
        pack = packs[self.pack]
        return pack.prefix_flops + sum(pack.flops[self.start : self.stop])

    def tokens(self, packs: PackLookup) -> int:
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
        tuple(_flops(n, prefix_length, flops_per_token, flops_per_pair) for n in tokens),
        prefix_length,
        _flops(prefix_length, 0, flops_per_token, flops_per_pair),
    )


def pack_costs(
    document_lengths: Ragged, prefix_lengths: Sequence[int], flops_per_token: float, flops_per_pair: float
) -> PackCosts:
    """`pack_cost` of many packs."""
    prefixes, first = numpy.asarray(prefix_lengths), document_lengths.offsets[:-1]
    shared = prefixes > 0
    lengths = numpy.delete(document_lengths.values, first[shared])
    tokens = Ragged(lengths, document_lengths.offsets - offsets_of(shared))
    behind = prefixes.repeat(tokens.lengths)
    return PackCosts(
        tokens,
        _flops(lengths.astype(float), behind, flops_per_token, flops_per_pair),
        prefixes,
        _flops(prefixes.astype(float), 0, flops_per_token, flops_per_pair),
    )


def _flops(n: Any, prefix: Any, per_token: float, per_pair: float) -> Any:
    return per_token * n + per_pair * (n**2 + 2 * prefix * n)
