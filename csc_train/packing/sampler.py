"""The batch sampler and data loader of packed data, and how evenly they spread the work over the ranks."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import numpy
import torch

from csc_train.packing.dataset import PackedDataset
from csc_train.packing.global_batches import assign_to_ranks, global_batches, num_micro_batches
from csc_train.packing.pack_cost import PackCosts, PackSlice


@dataclass(frozen=True)
class LoadBalance:
    """Load balance over whole epochs, their last steps included."""

    imbalance: float
    """FLOPs of a step's costliest rank over those of its mean rank; mean over the steps. 1 is even."""
    efficiency: float
    """FLOPs of the packs, each prefix counted once, over world size x FLOPs of the costliest rank; both summed over the
    steps. 1 minus the share of the time in which ranks wait or repeat a prefix."""
    length_spread: float
    """Standard deviation over the full steps of the mean length of a step's dialogues (each with its prefix), over the
    same of packs in random order. 1 is as fair as random."""
    count_spread: float
    """The same of the number of a step's dialogues."""

    def __str__(self) -> str:
        return (
            f"slowest over mean rank {self.imbalance:.4f}, efficiency {self.efficiency:.4f}; steps differ "
            f"{self.length_spread:.2f} times as much as random ones in mean dialogue length, {self.count_spread:.2f} "
            "times in number of dialogues"
        )


@dataclass
class PackBatchSampler:
    """Yields the micro batches of one rank as lists of pack slices, or `[None]` for an empty forward pass.

    Every rank has the same number of them, in every epoch. The fields are the arguments of
    `global_batches.global_batches` and `global_batches.assign_to_ranks`.
    """

    packs: PackCosts
    packs_per_step: int
    seed: int
    _: KW_ONLY
    world_size: int
    rank: int
    micro_batch_size: int
    single_row: bool
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def assigned(self, epoch: int) -> Iterator[tuple[list[int], list[list[list[PackSlice]]]]]:
        """The packs of each step of an epoch, and their slices by rank and forward pass."""
        for step in global_batches(self.packs, self.packs_per_step, self.seed, epoch):
            yield (
                step,
                assign_to_ranks(step, self.packs, self.world_size, self.micro_batch_size, single_row=self.single_row),
            )

    def __iter__(self) -> Iterator[list[PackSlice | None]]:
        for _, ranks in self.assigned(self.epoch):
            for parts in ranks[self.rank]:
                yield [*parts] or [None]

    def __len__(self) -> int:
        steps, rest = divmod(len(self.packs), self.packs_per_step)
        full = num_micro_batches(self.packs_per_step, self.world_size, self.micro_batch_size)
        return steps * full + num_micro_batches(rest, self.world_size, self.micro_batch_size)

    def load_balance(self, epochs: int = 1) -> LoadBalance:
        """Measure the load balance of the first epochs; the spreads are 1 if random steps do not differ."""
        full = len(self.packs) // self.packs_per_step
        ratios, useful, spent = [], 0.0, 0.0
        scheduled, random = [], []
        for epoch in range(epochs):
            order = numpy.random.default_rng([self.seed, epoch, 1]).permutation(len(self.packs))
            random += [*order[: full * self.packs_per_step].reshape(full, self.packs_per_step)]
            for number, (step, ranks) in enumerate(self.assigned(epoch)):
                if len(step) % self.world_size:
                    load = [sum(part.flops(self.packs) for parts in passes for part in parts) for passes in ranks]
                else:  # whole packs
                    taken = [[part.pack for parts in passes for part in parts] for passes in ranks]
                    load = self.packs.totals[taken].sum(axis=1)
                ratios.append(max(load) * self.world_size / sum(load))
                useful += float(self.packs.totals[step].sum())
                spent += max(load) * self.world_size
                scheduled += [step] * (number < full)
        spreads = map(_spread, self._means_and_counts(scheduled), self._means_and_counts(random))
        return LoadBalance(float(numpy.mean(ratios)), float(useful / spent), *spreads)

    def _means_and_counts(self, steps: list) -> tuple[list[float], list[int]]:
        """Mean length and number of the dialogues of each step."""
        tokens = self.packs.tokens.sums() + self.packs.prefix_tokens * self.packs.documents
        counts = [int(self.packs.documents[step].sum()) for step in steps]
        return [float(tokens[step].sum() / count) for step, count in zip(steps, counts, strict=True)], counts


def _spread(scheduled: list[float], random: list[float]) -> float:
    expected = numpy.std(random) if random else 0
    return float(numpy.std(scheduled) / expected) if expected else 1.0


class PackDataLoader(torch.utils.data.DataLoader):
    """A data loader whose `set_epoch`, which the Trainer calls, reaches its batch sampler."""

    def __init__(self, packs: PackedDataset, batches: PackBatchSampler, collate: Callable, **options):
        self.batches = batches
        super().__init__(packs, batch_sampler=batches, collate_fn=collate, **options)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.batches.set_epoch(epoch)
