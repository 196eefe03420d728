"""Packs to the batches of one process, in the order that the schedule gives."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import torch

from csc_train.packing.schedule import Part, distribute, epoch_steps, micro_batches


class PackParts(torch.utils.data.Dataset):
    """Rows of a packed data set by `Part`; by None, a row of a single token that is not trained."""

    def __init__(self, packs: datasets.Dataset):
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, part: Part | None) -> dict[str, Any]:
        if part is None:
            token = self.packs[0]["input_ids"][:1]
            return {"input_ids": token, "weights": [0.0], "lengths": [1], "prefix": 0, "empty": True}
        row = self.packs[part.pack]
        prefix = row["prefix"]
        shared = 1 if prefix else 0  # the prefix is the first document, and goes into every part
        lengths = row["lengths"][shared + part.first : shared + part.last]
        start = sum(row["lengths"][: shared + part.first])
        tokens = slice(start, start + sum(lengths))
        return {
            "input_ids": row["input_ids"][:prefix] + row["input_ids"][tokens],
            "weights": row["weights"][:prefix] + row["weights"][tokens],
            "lengths": row["lengths"][:shared] + lengths,
            "prefix": prefix,
        }


class RankBatches:
    """A batch sampler: the parts that one process takes, a list for each forward pass.

    An epoch has the same number of them on every process, and whatever the epoch.
    """

    def __init__(
        self,
        cost: Sequence[Sequence[float]],
        packs_per_step: int,
        seed: int,
        *,
        processes: int,
        rank: int,
        micro_batch_size: int,
    ):
        """See `schedule.epoch_steps` and `schedule.distribute`."""
        self.cost = cost
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.processes = processes
        self.rank = rank
        self.micro_batch_size = micro_batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Part | None]]:
        for step in epoch_steps(len(self.cost), self.packs_per_step, self.seed, self.epoch):
            for parts in distribute(step, self.cost, self.processes, self.micro_batch_size)[self.rank]:
                yield parts or [None]

    def __len__(self) -> int:
        steps, rest = divmod(len(self.cost), self.packs_per_step)
        full = micro_batches(self.packs_per_step, self.processes, self.micro_batch_size)
        return steps * full + micro_batches(rest, self.processes, self.micro_batch_size)


class PackLoader(torch.utils.data.DataLoader):
    """A loader whose `set_epoch` reaches its batch sampler, which is how the Trainer says what epoch it is."""

    def __init__(self, packs: datasets.Dataset, batches: RankBatches, collate: Callable, **options):
        super().__init__(PackParts(packs), batch_sampler=batches, collate_fn=collate, **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.batch_sampler.set_epoch(epoch)
