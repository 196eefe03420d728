"""Form global batches of packs (one per optimizer step), and assign slices of them to ranks.

The two decisions are independent. The packs of a global batch follow only from the packs' costs, the packs per step,
the seed and the epoch (`global_batches`). The world size and the micro batch size only distribute it
(`assign_to_ranks`), so a loss that is averaged over the trained tokens of a global batch does not depend on them.

A step takes as long as its slowest rank, so packs of equal cost should meet in a step. But packs of equal cost hold
dialogues of similar lengths, and a step should be a fair sample. Most packs are full, and their costs differ by less
than a percent: in random order they are nearly balanced. So only packs of unusual cost are grouped together.
"""

import heapq
from collections.abc import Sequence

import numpy

from csc_train.packing.pack_cost import PackCosts, PackSlice

GROUP = 8
"""Packs of similar cost that stand together in an epoch's order."""
WINDOW = 64 * GROUP
"""Packs of a random order that are grouped at a time, so that a pack meets others in each epoch."""
TOLERANCES = tuple(number / 2000 for number in range(40, -1, -1))
"""Relative differences from the median cost that count as equal, widest first: from 2 % down to nothing."""
BALANCED = 1.004
"""An order is balanced if the costliest pack of a group costs at most this times the mean pack, on average."""

Slots = list[list[PackSlice]]
"""The slots of one rank in a step: each holds one pack, a slice of one, or two slices that fit together."""


def global_batches(packs: PackCosts, packs_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of each optimizer step of an epoch, in an order that depends on seed and epoch.

    Packs in random order are cut into windows of `WINDOW`. A window is sorted by cost, where costs near the median
    count as equal and keep their random order, and cut into groups of `GROUP`, which are then shuffled. The widest of
    `TOLERANCES` whose groups are `BALANCED` is used. The first epoch begins with the step of most tokens, so that too
    little memory fails at once.

    Args:
        packs_per_step: packs in a step; the last step has the rest.

    Returns:
        Pack indices by step; every pack exactly once.
    """
    cost, rng = packs.totals, numpy.random.default_rng([seed, epoch])
    order, rest = numpy.split(rng.permutation(len(cost)), [len(cost) // GROUP * GROUP])
    windows = numpy.split(order, range(WINDOW, len(order), WINDOW))
    median = numpy.median(cost)
    for tolerance in TOLERANCES:
        key = numpy.where(abs(cost - median) <= tolerance * median, median, cost)
        grouped = [window[key[window].argsort(kind="stable")].reshape(-1, GROUP) for window in windows]
        costs = cost[numpy.concatenate(grouped)]
        if not len(order) or (costs.max(axis=1) / costs.mean(axis=1)).mean() <= BALANCED:
            break
    order = numpy.concatenate([*(rng.permutation(groups).ravel() for groups in grouped), rest]).tolist()
    steps = [order[start : start + packs_per_step] for start in range(0, len(order), packs_per_step)]
    if epoch == 0 and (full := len(packs) // packs_per_step):
        tokens = packs.prefix_tokens + packs.tokens.sums()
        steps.insert(0, steps.pop(int(numpy.argmax([tokens[step].sum() for step in steps[:full]]))))
    return steps


def num_micro_batches(packs: int, world_size: int, micro_batch_size: int) -> int:
    """Forward passes of each rank in a step of `packs` packs."""
    return -(-packs // (world_size * micro_batch_size))


def assign_to_ranks(
    step: Sequence[int], packs: PackCosts, world_size: int, micro_batch_size: int, *, single_row: bool
) -> list[list[list[PackSlice]]]:
    """Distribute the packs of a step over the ranks, so that all do similar work in equally many forward passes.

    If the packs divide evenly, they are assigned greedily, costliest first (longest processing time first). Otherwise,
    as in the last step of an epoch, they are laid end to end and cut between documents into one segment for each rank,
    so that the costliest segment costs as little as possible. Every rank has work while there are documents; with few
    documents, some of its forward passes are empty.

    Args:
        step: pack indices.
        packs: all packs.
        micro_batch_size: packs in a forward pass. A pass has that many slots, each for one pack or slice of a pack.
        single_row: whether a batch is one row (see `PackCollator`). Then the two ends of a segment may share a slot, if
            they are together no longer than a pack of the step.

    Returns:
        By rank, by forward pass, the slices: `num_micro_batches(...)` passes on each rank.
    """
    passes = num_micro_batches(len(step), world_size, micro_batch_size)
    if len(step) % world_size:
        shards = _split_across_ranks(step, packs, world_size, passes * micro_batch_size, single_row)
    else:
        shards = _greedy_assign(step, packs, world_size)
    return [[[part for slot in slots[start::passes] for part in slot] for start in range(passes)] for slots in shards]


def _greedy_assign(step: Sequence[int], packs: PackCosts, world_size: int) -> list[Slots]:
    """By rank, its slots with a whole pack each: the costliest pack goes to the rank with the least work."""
    load = [(0.0, rank) for rank in range(world_size)]  # a heap of the ranks that take more
    shards: list[Slots] = [[] for _ in load]
    costs = dict(zip(step, packs.totals[step].tolist(), strict=True))
    documents = dict(zip(step, packs.documents[step].tolist(), strict=True))
    for pack in sorted(step, key=lambda pack: -costs[pack]):
        done, rank = load[0]
        shards[rank].append([PackSlice(pack, 0, documents[pack])])
        if len(shards[rank]) < len(step) // world_size:
            heapq.heapreplace(load, (done + costs[pack], rank))
        else:
            heapq.heappop(load)
    return shards


def _split_across_ranks(
    step: Sequence[int], costs: PackCosts, world_size: int, num_slots: int, single_row: bool
) -> list[Slots]:
    """By rank, its slots: bisect the lowest limit on a segment's cost at which the segments hold all documents."""
    packs = {pack: costs[pack] for pack in step}
    documents = [PackSlice(pack, number, number + 1) for pack in step for number in range(len(packs[pack].tokens))]
    longest = max(PackSlice(pack, 0, len(packs[pack].tokens)).tokens(packs) for pack in step)

    def into_slots(parts: list[PackSlice]) -> Slots:
        if len(parts) > num_slots:
            return [[parts[0], parts[-1]], *([part] for part in parts[1:-1])]
        return [[part] for part in parts]

    def fits(parts: list[PackSlice]) -> bool:
        slots = into_slots(parts)
        return len(slots) <= num_slots and (
            len(slots) == len(parts) or (single_row and sum(part.tokens(packs) for part in slots[0]) <= longest)
        )

    def segments(limit: float) -> list[list[PackSlice]] | None:
        found, done = [], 0
        for ranks_after in reversed(range(world_size)):
            parts: list[PackSlice] = []
            load = 0.0
            while len(documents) - done > (ranks_after if parts else 0):
                new = documents[done]
                if parts and parts[-1].pack == new.pack:
                    more = [*parts[:-1], PackSlice(new.pack, parts[-1].start, new.stop)]
                    load += packs[new.pack].flops[new.start]
                else:
                    more = [*parts, new]
                    load += new.flops(packs)
                if parts and (load > limit or not fits(more)):
                    break
                parts, done = more, done + 1
            found.append(parts)
        return found if done == len(documents) else None

    # Without a limit, each rank takes at least as many packs (or ends of packs) as it has slots.
    best = segments(float("inf"))
    low, high = 0.0, sum(packs[pack].total for pack in step)
    for _ in range(40):
        limit = (low + high) / 2
        found = segments(limit)
        best, low, high = (found, low, limit) if found else (best, limit, high)
    return [into_slots(parts) for parts in best]
