"""How evenly a schedule spreads the work, and how fair a sample each of its steps is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from csc_train.packing.global_batches import PackCost, assign_to_ranks, global_batches


@dataclass(frozen=True)
class LoadBalance:
    """Account of a schedule over whole epochs, the last steps included."""

    imbalance: float
    """FLOPs of a step's costliest process over those of its mean process; mean over the steps. 1 is even."""
    efficiency: float
    """FLOPs of the packs, each prefix counted once, over processes x FLOPs of the costliest process; both summed over
    the steps. 1 minus the share of the time that processes wait or repeat a prefix."""
    length_spread: float
    """Standard deviation over the full steps of the mean length of a step's dialogues (each with its prefix), over the
    same of packs in a random order. 1 is as fair as random."""
    count_spread: float
    """The same of the number of a step's dialogues."""

    def __str__(self) -> str:
        return (
            f"slowest over mean process {self.imbalance:.4f}, efficiency {self.efficiency:.4f}; steps differ "
            f"{self.length_spread:.2f} times as much as random ones in mean dialogue length, {self.count_spread:.2f} "
            "times in number of dialogues"
        )


def measure_load_balance(
    packs: Sequence[PackCost],
    packs_per_step: int,
    seed: int,
    *,
    epochs: int,
    world_size: int,
    micro_batch_size: int,
    single_row: bool,
) -> LoadBalance:
    """Measure the first epochs of a schedule (see `schedule.epoch_steps` and `schedule.distribute`).

    The spreads are 1 where random steps do not differ.
    """
    full = len(packs) // packs_per_step
    ratios, useful, spent = [], 0.0, 0.0
    scheduled, random = [], []
    for epoch in range(epochs):
        order = numpy.random.default_rng([seed, epoch, 1]).permutation(len(packs))
        random += numpy.reshape(order[: full * packs_per_step], (full, packs_per_step)).tolist()
        steps = global_batches(packs, packs_per_step, seed, epoch)
        scheduled += steps[:full]
        for step in steps:
            shares = assign_to_ranks(step, packs, world_size, micro_batch_size, single_row=single_row)
            load = [sum(part.flops(packs) for parts in share for part in parts) for share in shares]
            ratios.append(max(load) * world_size / sum(load))
            useful += sum(packs[pack].total for pack in step)
            spent += max(load) * world_size
    spreads = map(_spread, _samples(packs, scheduled), _samples(packs, random))
    return LoadBalance(float(numpy.mean(ratios)), useful / spent, *spreads)


def _samples(packs: Sequence[PackCost], steps: list[list[int]]) -> tuple[list[float], list[int]]:
    """Mean length and number of the dialogues of each step."""
    lengths = [
        [pack.prefix_tokens + n for pack in (packs[index] for index in step) for n in pack.tokens] for step in steps
    ]
    return [sum(each) / len(each) for each in lengths], [len(each) for each in lengths]


def _spread(scheduled: list[float], random: list[float]) -> float:
    expected = numpy.std(random) if random else 0
    return float(numpy.std(scheduled) / expected) if expected else 1.0
