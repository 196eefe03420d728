"""Each step holds what the seed says, however many processes share it, and they share it fairly."""

import random
from itertools import chain

import numpy
import pytest

from csc_train.packing.best_fit import best_fit_decreasing
from csc_train.packing.config import LossConfig
from csc_train.packing.loader import PackLoader, RankBatches
from csc_train.packing.loss_weights import LossWeights
from csc_train.packing.packed_dataset import Member, Packs
from csc_train.packing.schedule import Part, distribute, document_costs, epoch_steps, micro_batches
from csc_train.template.dialogue_template import Example

CUTS = [(processes, micro) for processes in (1, 2, 3, 8) for micro in (1, 2, 3, 8) if 24 % (processes * micro) == 0]
PACKS_PER_STEP = 24


def costs_of(lengths):
    """Per pack, per document, in about the proportions of a 7B model."""
    return [document_costs(pack, 0, 14e9, 2e5).tolist() for pack in lengths]


def random_packs(packs, seed, most=9):
    """The document lengths of each pack."""
    rng = random.Random(seed)
    return [[rng.randint(5, 900) for _ in range(rng.randint(1, most))] for _ in range(packs)]


def sampler(cost, processes, rank, micro, seed=3, packs_per_step=PACKS_PER_STEP):
    return RankBatches(cost, packs_per_step, seed, processes=processes, rank=rank, micro_batch_size=micro)


def documents(parts):
    return [(part.pack, document) for part in parts if part for document in range(part.first, part.last)]


# What a step holds


@pytest.mark.parametrize("packs", [1, 23, 24, 25, 100])
def test_every_pack_is_in_one_step_of_an_epoch_and_only_the_last_is_short(packs):
    steps = epoch_steps(packs, PACKS_PER_STEP, seed=3, epoch=1)
    assert sorted(chain(*steps)) == list(range(packs))
    assert [len(step) for step in steps[:-1]] == [PACKS_PER_STEP] * ((packs - 1) // PACKS_PER_STEP)
    assert 1 <= len(steps[-1]) <= PACKS_PER_STEP


def test_the_order_follows_from_seed_and_epoch():
    orders = [epoch_steps(50, 4, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(orders.count(order) == 1 for order in orders)
    assert orders == [epoch_steps(50, 4, seed, epoch) for seed in range(3) for epoch in range(3)]
    # As it was when this was written: a run that is resumed elsewhere must find it so.
    assert epoch_steps(7, 3, seed=0, epoch=1) == [[1, 3, 6], [0, 4, 2], [5]]


# How a step is distributed


@pytest.mark.parametrize("most", [1, 9], ids=["a-document-a-pack", "several"])
@pytest.mark.parametrize("packs", [1, 5, 24, 48, 49, 50, 59, 71])
def test_processes_and_micro_batches_only_distribute_the_steps(packs, most):
    lengths = random_packs(packs, seed=packs, most=most)
    cost = costs_of(lengths)
    every = [(pack, document) for pack in range(packs) for document in range(len(lengths[pack]))]
    for epoch in (0, 1):
        expected = [
            sorted((pack, document) for pack in step for document in range(len(lengths[pack])))
            for step in epoch_steps(packs, PACKS_PER_STEP, 3, epoch)
        ]
        assert sorted(chain(*expected)) == every
        for processes, micro in CUTS:
            accumulation = PACKS_PER_STEP // (processes * micro)
            ranks = []
            for rank in range(processes):
                batches = sampler(cost, processes, rank, micro)
                batches.set_epoch(epoch)
                ranks.append(list(batches))
                assert len(ranks[-1]) == len(batches)
                assert all(1 <= len(parts) <= micro for parts in ranks[-1])
            # As the Trainer cuts: so many batches a step, and what is left in the last.
            steps = [
                [parts for rank in ranks for batch in rank[start : start + accumulation] for parts in batch]
                for start in range(0, len(ranks[0]), accumulation)
            ]
            assert [sorted(documents(step)) for step in steps] == expected
            # Nobody is without work while there are documents to give.
            left = len(expected[-1])
            passes = micro_batches(len({pack for pack, _ in expected[-1]}), processes, micro)
            idle = sum(part is None for step in steps for part in step)
            assert idle == max(0, processes * passes - left)


def test_packs_are_cut_between_documents_where_they_cannot_be_divided():
    cost = [[4.0, 3.0, 3.0], [1.0, 1.0], [2.0]]
    assert distribute([0, 1, 2], cost, 1, 4) == [[[Part(0, 0, 3), Part(1, 0, 2), Part(2, 0, 1)]]]
    # The costliest is cut where the halves are nearest: 4 and 3 + 3.
    assert distribute([0, 1, 2], cost, 2, 2) == [
        [[Part(0, 1, 3), Part(2, 0, 1)]],
        [[Part(0, 0, 1), Part(1, 0, 2)]],
    ]
    assert distribute([1], cost, 2, 1) == [[[Part(1, 0, 1)]], [[Part(1, 1, 2)]]]
    assert distribute([2], cost, 2, 1) == [[[Part(2, 0, 1)]], [[]]]


@pytest.mark.parametrize(
    ("capacity", "packs_per_step", "processes"), [(8192, 8, 2), (8192, 64, 2), (8192, 64, 8), (4096, 64, 8)]
)
def test_processes_do_equal_work(capacity, packs_per_step, processes):
    rng = random.Random(0)
    lengths = [min(capacity, int(rng.lognormvariate(7.1, 0.4))) for _ in range(6000)]
    packs = [[lengths[index] for index in pack] for pack in best_fit_decreasing(lengths, capacity)]
    cost = costs_of(packs)

    def imbalance(shares):
        """The costliest process of a step over the mean: 1 where all do the same work."""
        load = [
            sum(sum(cost[part.pack][part.first : part.last]) for parts in share for part in parts) for share in shares
        ]
        return max(load) * len(load) / sum(load)

    def mean(distribution):
        steps = epoch_steps(len(packs), packs_per_step, seed=0, epoch=0)[:-1]
        return sum(imbalance(distribution(step)) for step in steps) / len(steps)

    balanced = mean(lambda step: distribute(step, cost, processes, 1))
    whole = [Part(pack, 0, len(documents)) for pack, documents in enumerate(packs)]
    dealt = mean(lambda step: [[[whole[pack] for pack in step[rank::processes]]] for rank in range(processes)])
    assert 1 <= balanced <= 1.005
    assert balanced - 1 < 0.5 * (dealt - 1)


# Batches


def packs_of(prefix: int, *lengths: int, packs: int = 1) -> Packs:
    """Packs of one-turn dialogues that are trained but for their first token; ids count up in each dialogue."""
    examples = [
        Example(
            numpy.arange(100 * number, 100 * number + prefix + length, dtype=numpy.int32),
            numpy.array([0] * (prefix + 1) + [2] * (length - 1), dtype=numpy.uint8),
            numpy.array([prefix, prefix + length], dtype=numpy.int32),
            numpy.array([1], dtype=numpy.uint8),
        )
        for number, length in enumerate(lengths * packs)
    ]
    members = numpy.arange(len(examples)).reshape(packs, -1)
    weigh = LossWeights(LossConfig(), numpy.zeros(13, numpy.int64))
    return Packs(
        examples, [[Member(number, 0) for number in pack] for pack in members.tolist()], [prefix] * packs, weigh
    )


def plain(row: dict) -> dict:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def test_a_part_is_the_documents_it_names():
    packs = packs_of(0, 3, 4, 2)
    assert plain(packs[0]) == {
        "input_ids": [0, 1, 2, 100, 101, 102, 103, 200, 201],
        "weights": [0, 1, 1, 0, 1, 1, 1, 0, 1],
        "lengths": [3, 4, 2],
        "prefix": 0,
    }
    assert plain(packs[Part(0, 0, 3)]) == plain(packs[0])
    assert plain(packs[Part(0, 1, 2)]) == {
        "input_ids": [100, 101, 102, 103], "weights": [0, 1, 1, 1], "lengths": [4], "prefix": 0
    }  # fmt: skip
    assert packs[Part(0, 1, 3)]["lengths"].tolist() == [4, 2]
    assert plain(packs[None]) == {"input_ids": [0], "weights": [0], "lengths": [1], "prefix": 0, "empty": True}


def test_a_loader_takes_the_order_of_the_epoch_it_is_set_to():
    batches = sampler([[1.0]] * 50, 1, 0, 4, packs_per_step=4)
    loader = PackLoader(packs_of(0, 2, packs=50), batches, lambda rows: [row["input_ids"][0] // 100 for row in rows])
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        taken = list(loader)
        assert [sorted(batch) for batch in taken] == [sorted(step) for step in epoch_steps(50, 4, 3, epoch)]
        assert len(taken) == len(loader)


def test_a_part_of_a_pack_takes_the_shared_prefix_along():
    packs = packs_of(3, 3, 2, 1)
    assert plain(packs[Part(0, 1, 3)]) == {
        "input_ids": [100, 101, 102, 103, 104, 203],
        "weights": [0, 0, 0, 0, 1, 0],
        "lengths": [3, 2, 1],
        "prefix": 3,
    }
    assert packs[Part(0, 0, 3)]["lengths"].tolist() == [3, 3, 2, 1]


def test_the_cost_of_a_document_after_a_prefix():
    assert document_costs([3, 4, 2], 0, 10, 1).tolist() == [39, 56, 24]
    # Each token of a body sees the prefix as well: twice in a square of pairs, of which causal attention takes half.
    assert document_costs([3, 4, 2], 3, 10, 1).tolist() == [40 + 16 + 24, 20 + 4 + 12]
