"""Which packs make each optimizer step, and which process takes which part of a step.

Two decisions that do not touch. What a step holds follows from the number of packs, the packs per step, the seed and
the epoch, and from nothing else (`epoch_steps`). How many processes there are and how many packs one forward pass takes
only distribute it (`distribute`). A loss that is summed over the trained tokens of a step and divided by their number
is therefore the same however the step is distributed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Part:
    """Documents `first` to `last` (exclusive) of a pack, not counting a shared prefix: mostly all of them."""

    pack: int
    first: int
    last: int


def epoch_steps(packs: int, packs_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of each optimizer step of an epoch, in an order of its own for each seed and epoch.

    Args:
        packs: how many there are.
        packs_per_step: packs in a step; the last step has what is left.

    Returns:
        Pack indices by step; every pack exactly once.
    """
    order = numpy.random.default_rng([seed, epoch]).permutation(packs).tolist()
    return [order[start : start + packs_per_step] for start in range(0, packs, packs_per_step)]


def micro_batches(packs: int, processes: int, micro_batch_size: int) -> int:
    """Forward passes that each process makes in a step of `packs` packs."""
    return -(-packs // (processes * micro_batch_size))


def document_costs(lengths: Sequence[int], prefix: int, linear: float, attention: float) -> numpy.ndarray:
    """FLOPs of a pack's documents: `linear` for each token, `attention` for each pair of tokens that see each other.

    Args:
        lengths: of the documents in tokens, the shared prefix first where there is one.
        prefix: the prefix's length, 0 for none. Its own cost is left out: every part of a pack has it.

    Returns:
        float64 [documents], the prefix not counted.
    """
    tokens = numpy.asarray(lengths[1:] if prefix else lengths, dtype=numpy.float64)
    return linear * tokens + attention * (tokens**2 + 2 * prefix * tokens)


def distribute(
    step: Sequence[int], cost: Sequence[Sequence[float]], processes: int, micro_batch_size: int
) -> list[list[list[Part]]]:
    """Deal the packs of a step out to processes, so that all do about the same work in as many forward passes.

    Each process gets the same number of parts. Where the packs cannot be divided evenly (in the last step of an epoch),
    the costliest are cut in two between documents, one after the other, until the parts can. Parts then go, costliest
    first, to the process that has the least to do. Where there are not enough documents to cut, some processes get a
    part less; where that leaves a process without a part for one of its forward passes, that pass is empty.

    Args:
        step: pack indices.
        cost: by pack, the cost of each of its documents (see `document_costs`).
        processes: how many share the step.
        micro_batch_size: the most parts in a forward pass.

    Returns:
        By process, by forward pass, the parts: `micro_batches(...)` passes on each process.
    """
    parts = _parts(step, cost, processes)
    costs = [_cost(part, cost) for part in parts]
    # Each process gets `fewest` parts, and `spare` of them one more.
    fewest, spare = divmod(len(parts), processes)
    load = [0.0] * processes
    taken: list[list[Part]] = [[] for _ in range(processes)]
    for index in sorted(range(len(parts)), key=lambda index: -costs[index]):
        room = [rank for rank in range(processes) if len(taken[rank]) < fewest + (spare > 0)]
        rank = min(room, key=lambda rank: load[rank])
        load[rank] += costs[index]
        taken[rank].append(parts[index])
        if len(taken[rank]) > fewest:
            spare -= 1
    passes = micro_batches(len(step), processes, micro_batch_size)
    return [[mine[start::passes] for start in range(passes)] for mine in taken]


def _parts(step: Sequence[int], cost: Sequence[Sequence[float]], processes: int) -> list[Part]:
    """The packs of a step, cut until they can be dealt out evenly or no document is left to cut off."""
    parts = [Part(pack, 0, len(cost[pack])) for pack in step]
    while len(parts) % processes:
        whole = [index for index, part in enumerate(parts) if part.last - part.first > 1]
        if not whole:
            break
        index = max(whole, key=lambda index: _cost(parts[index], cost))
        part = parts[index]
        until = numpy.cumsum(cost[part.pack][part.first : part.last])
        middle = part.first + 1 + int(numpy.abs(until[:-1] - until[-1] / 2).argmin())
        parts[index : index + 1] = [Part(part.pack, part.first, middle), Part(part.pack, middle, part.last)]
    return parts


def _cost(part: Part, cost: Sequence[Sequence[float]]) -> float:
    return float(sum(cost[part.pack][part.first : part.last]))
