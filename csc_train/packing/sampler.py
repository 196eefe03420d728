"""Packs to the batches of one process, in the order that the schedule gives."""

from collections.abc import Callable, Iterator, Sequence

import torch

from csc_train.packing.dataset import PackedDataset
from csc_train.packing.global_batches import PackCost, PackSlice, assign_to_ranks, global_batches, num_micro_batches
from csc_train.packing.load_balance import LoadBalance, measure_load_balance


class PackBatchSampler:
    """A batch sampler: the parts that one process takes, a list for each forward pass.

    An epoch has the same number of them on every process, and whatever the epoch.
    """

    def __init__(
        self,
        packs: Sequence[PackCost],
        packs_per_step: int,
        seed: int,
        *,
        world_size: int,
        rank: int,
        micro_batch_size: int,
        single_row: bool,
    ):
        """See `schedule.epoch_steps` and `schedule.distribute`."""
        self.packs = packs
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.micro_batch_size = micro_batch_size
        self.single_row = single_row
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[PackSlice | None]]:
        for step in global_batches(self.packs, self.packs_per_step, self.seed, self.epoch):
            shares = assign_to_ranks(
                step, self.packs, self.world_size, self.micro_batch_size, single_row=self.single_row
            )
            for parts in shares[self.rank]:
                yield parts or [None]

    def balance(self) -> LoadBalance:
        """How evenly the first epoch spreads its work over the processes, and how fair its steps are."""
        return measure_load_balance(
            self.packs,
            self.packs_per_step,
            self.seed,
            epochs=1,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            single_row=self.single_row,
        )

    def __len__(self) -> int:
        steps, rest = divmod(len(self.packs), self.packs_per_step)
        full = num_micro_batches(self.packs_per_step, self.world_size, self.micro_batch_size)
        return steps * full + num_micro_batches(rest, self.world_size, self.micro_batch_size)


class PackDataLoader(torch.utils.data.DataLoader):
    """A loader whose `set_epoch` reaches its batch sampler, which is how the Trainer says what epoch it is."""

    def __init__(self, packs: PackedDataset, batches: PackBatchSampler, collate: Callable, **options):
        super().__init__(packs, batch_sampler=batches, collate_fn=collate, **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.batch_sampler.set_epoch(epoch)
