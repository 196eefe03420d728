"""Which packs make each optimizer step, and which process takes which part of a step.

Two decisions that do not touch. What a step holds follows from the packs' costs, the packs per step, the seed and the
epoch, and from nothing else (`global_batches`). How many processes there are and how many packs one forward pass takes
only distribute it (`assign_to_ranks`). A loss that is summed over the trained tokens of a step and divided by their number
is therefore the same however the step is distributed.

A step takes as long as its slowest process, so packs that cost the same should meet in a step. But packs that cost the
same hold dialogues of like lengths, and a step should be a fair sample. Most packs are full and cost within a percent
of each other: a random order of these is nearly balanced, and only as many of the others as need be are kept together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

GROUP = 8
"""Packs of about the same cost that stand together in an epoch's order."""
WINDOW = 64 * GROUP
"""Packs of a random order among which those groups are formed, so that a pack meets others in each epoch."""
TOLERANCES = tuple(number / 2000 for number in range(40, -1, -1))
"""How far from the median's a pack's cost may be, as a share of it, to count as equal: from 2 % down to nothing."""
BALANCED = 1.004
"""Mean over the groups of the costliest pack over the mean pack from which on an order counts as balanced."""


@dataclass(frozen=True)
class PackCost:
    """What the schedule knows of a pack. A shared prefix stands apart: each part of the pack repeats it."""

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
    """Documents `first` to `last` (exclusive) of a pack, not counting a shared prefix: mostly all of them."""

    pack: int
    first: int
    last: int

    def flops(self, packs: Sequence[PackCost]) -> float:
        """What the part costs, with the prefix that it repeats."""
        pack = packs[self.pack]
        return pack.prefix_flops + sum(pack.flops[self.first : self.last])

    def tokens(self, packs: Sequence[PackCost]) -> int:
        """The part's length, with the prefix that it repeats."""
        pack = packs[self.pack]
        return pack.prefix_tokens + sum(pack.tokens[self.first : self.last])


def pack_cost(
    document_lengths: Sequence[int], prefix_length: int, flops_per_token: float, flops_per_pair: float
) -> PackCost:
    """FLOPs of a pack: `flops_per_token` for each token, `flops_per_pair` for each pair of tokens that see each other.

    A document of n tokens has n² pairs, and one behind a prefix of p tokens n² + 2 p n: each of its tokens sees the
    prefix as well, twice in a square of pairs, of which causal attention takes half.

    Args:
        document_lengths: of the documents in tokens, the shared prefix first where there is one.
        prefix_length: the prefix's length, 0 for none.
    """
    tokens = tuple(map(int, document_lengths[1:] if prefix_length else document_lengths))
    return PackCost(
        tokens,
        tuple(flops_per_token * n + flops_per_pair * (n**2 + 2 * prefix_length * n) for n in tokens),
        prefix_length,
        flops_per_token * prefix_length + flops_per_pair * prefix_length**2,
    )


def global_batches(packs: Sequence[PackCost], packs_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of each optimizer step of an epoch, in an order of its own for each seed and epoch.

    Each `WINDOW` packs of a random order are sorted by cost, where packs that cost about the median count as equal and
    stay in their random order, and cut into groups of `GROUP`: odd packs get their like for company, the other groups
    are random. Then the groups of the window are shuffled. Of `TOLERANCES` the widest is taken by which the groups are
    `BALANCED`.

    Args:
        packs_per_step: packs in a step; the last step has what is left.

    Returns:
        Pack indices by step; every pack exactly once.
    """
    cost = numpy.array([pack.total for pack in packs])
    for tolerance in TOLERANCES:
        groups, rest = _cost_buckets(cost, tolerance, numpy.random.default_rng([seed, epoch]))
        if not len(groups) or (cost[groups].max(axis=1) / cost[groups].mean(axis=1)).mean() <= BALANCED:
            break
    order = [*groups.ravel().tolist(), *rest.tolist()]
    return [order[start : start + packs_per_step] for start in range(0, len(order), packs_per_step)]


def _cost_buckets(
    cost: numpy.ndarray, tolerance: float, rng: numpy.random.Generator
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Packs by group [groups, GROUP], and random ones that fill no group."""
    median = numpy.median(cost)
    key = numpy.where(abs(cost - median) <= tolerance * median, median, cost)
    order, rest = numpy.split(rng.permutation(len(cost)), [len(cost) // GROUP * GROUP])
    windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
    windows = [window[key[window].argsort(kind="stable")].reshape(-1, GROUP) for window in windows]
    return numpy.concatenate([order[:0].reshape(-1, GROUP), *map(rng.permutation, windows)]), rest


def num_micro_batches(packs: int, world_size: int, micro_batch_size: int) -> int:
    """Forward passes that each process makes in a step of `packs` packs."""
    return -(-packs // (world_size * micro_batch_size))


def assign_to_ranks(
    step: Sequence[int], packs: Sequence[PackCost], world_size: int, micro_batch_size: int, *, single_row: bool
) -> list[list[list[PackSlice]]]:
    """Deal the packs of a step out to processes, so that all do about the same work in as many forward passes.

    Where the packs can be divided evenly, they go, costliest first, to the process that has the least to do. Elsewhere
    (in the last step of an epoch) they are laid end to end and cut between documents into a stretch for each process,
    so that the costliest stretch costs as little as it can. Every process has work while there are documents; with
    few of them, some of its forward passes may be empty.

    Args:
        step: pack indices.
        packs: all packs.
        world_size: how many share the step.
        micro_batch_size: packs in a forward pass. A pass has that many places, each for one pack or part of a pack.
        single_row: a batch is one row (see `PackCollator`), so that the two ends of a stretch may share a place where they
            are no longer than a pack of the step.

    Returns:
        By process, by forward pass, the parts: `num_micro_batches(...)` passes on each process.
    """
    passes = num_micro_batches(len(step), world_size, micro_batch_size)
    if len(step) % world_size:
        shares = _split_across_ranks(step, packs, world_size, passes * micro_batch_size, single_row)
    else:
        shares = _greedy_assign(step, packs, world_size)
    return [[[part for place in share[start::passes] for part in place] for start in range(passes)] for share in shares]


def _greedy_assign(step: Sequence[int], packs: Sequence[PackCost], world_size: int) -> list[list[list[PackSlice]]]:
    """By process, its places, each with a whole pack; the costliest first."""
    load = [0.0] * world_size
    shares: list[list[list[PackSlice]]] = [[] for _ in range(world_size)]
    for pack in sorted(step, key=lambda pack: -packs[pack].total):
        open_to = [rank for rank in range(world_size) if len(shares[rank]) < len(step) // world_size]
        rank = min(open_to, key=lambda rank: load[rank])
        load[rank] += packs[pack].total
        shares[rank].append([PackSlice(pack, 0, len(packs[pack].tokens))])
    return shares


def _split_across_ranks(
    step: Sequence[int], packs: Sequence[PackCost], world_size: int, places: int, single_row: bool
) -> list[list[list[PackSlice]]]:
    """By process, its places: the stretches of the lowest limit on their cost that takes in all documents."""
    documents = [PackSlice(pack, number, number + 1) for pack in step for number in range(len(packs[pack].tokens))]
    longest = max(PackSlice(pack, 0, len(packs[pack].tokens)).tokens(packs) for pack in step)

    def placed(parts: list[PackSlice]) -> list[list[PackSlice]]:
        ends = [parts[0], parts[-1]] if len(parts) > places else []
        return [ends, *([part] for part in parts[1:-1])] if ends else [[part] for part in parts]

    def fits(parts: list[PackSlice]) -> bool:
        shared = placed(parts)
        return len(shared) <= places and (
            len(shared) == len(parts) or (single_row and sum(part.tokens(packs) for part in shared[0]) <= longest)
        )

    def stretches(limit: float) -> list[list[PackSlice]] | None:
        found, done = [], 0
        for others in reversed(range(world_size)):
            parts: list[PackSlice] = []
            load = 0.0
            while len(documents) - done > (others if parts else 0):
                new = documents[done]
                if parts and parts[-1].pack == new.pack:
                    more = [*parts[:-1], PackSlice(new.pack, parts[-1].first, new.last)]
                    load += packs[new.pack].flops[new.first]
                else:
                    more = [*parts, new]
                    load += new.flops(packs)
                if parts and (load > limit or not fits(more)):
                    break
                parts, done = more, done + 1
            found.append(parts)
        return found if done == len(documents) else None

    # Without a limit each process takes at least as many packs as it has places, or ends of such.
    best = stretches(float("inf"))
    low, high = 0.0, sum(packs[pack].total for pack in step)
    for _ in range(40):
        limit = (low + high) / 2
        found = stretches(limit)
        best, low, high = (found, low, limit) if found else (best, limit, high)
    return [placed(parts) for parts in best]
