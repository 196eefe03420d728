"""Each step holds what the seed says, however many processes share it, and they share it fairly."""

import itertools
import random
from dataclasses import astuple
from itertools import chain
from pathlib import Path

import numpy
import pytest
from conftest import sampled

from csc_train.data.strategies import STRATEGIES
from csc_train.files import digest
from csc_train.packing.bin_packing import subset_sum_packing
from csc_train.packing.config import LossConfig
from csc_train.packing.dataset import PackedDataset, PackedItem
from csc_train.packing.global_batches import assign_to_ranks, global_batches, num_micro_batches
from csc_train.packing.loss_weights import LossWeights
from csc_train.packing.pack_cost import PackCost, PackCosts, PackSlice, pack_cost, pack_costs
from csc_train.packing.ragged import Ragged
from csc_train.packing.sampler import LoadBalance, PackBatchSampler, PackDataLoader
from csc_train.packing.token_groups import TURN_BUCKETS
from csc_train.template.dialogue_template import TokenizedDialogue

CUTS = [(processes, micro) for processes in (1, 2, 3, 8) for micro in (1, 2, 3, 8) if 24 % (processes * micro) == 0]
PACKS_PER_STEP = 24
# Qwen2.5-7B: 28 layers of width 3584 with 28 heads and 4 key-value heads of 128, 18944 within, 152064 ids. A forward
# pass takes 2 FLOPs for each weight, and 2 for each pair of tokens, layer, head and dimension (`forward_flops`).
LINEAR = 2 * (28 * (2 * 3584 * 3584 + 2 * 3584 * 4 * 128 + 3 * 3584 * 18944) + 3584 * 152064)
ATTENTION = 2 * 28 * 28 * 128


def cost_of(*documents: int, prefix: int = 0) -> PackCost:
    return pack_cost([prefix, *documents] if prefix else documents, prefix, LINEAR, ATTENTION)


def costs_of(packs: list[PackCost]) -> PackCosts:
    flops = numpy.array([each for pack in packs for each in pack.flops], float)
    prefixes = [[pack.prefix_tokens for pack in packs], [pack.prefix_flops for pack in packs]]
    return PackCosts(Ragged.of([pack.tokens for pack in packs]), flops, *prefixes)


def random_packs(packs: int, seed: int, most: int = 9) -> PackCosts:
    """Packs of up to `most` documents; every other one shares a prefix."""
    rng = random.Random(seed)
    return costs_of([
        cost_of(*(rng.randint(5, 900) for _ in range(rng.randint(1, most))), prefix=index % 2 * 100)
        for index in range(packs)
    ])  # fmt: skip


def sampler(packs, processes, rank, micro, seed=3, packs_per_step=PACKS_PER_STEP, single_row=True):
    return PackBatchSampler(
        packs, packs_per_step, seed, world_size=processes, rank=rank, micro_batch_size=micro, single_row=single_row
    )


def documents(parts):
    return [(part.pack, document) for part in parts if part for document in range(part.start, part.stop)]


def rolecs_like_packs(prefix: int, max_length: int) -> PackCosts:
    """The packs of a real distribution of dialogue lengths."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "rolecs_like_lengths.txt"
    bodies = [int(line) - prefix for line in path.read_text().split()]
    packs = subset_sum_packing(bodies, max_length - prefix)
    return costs_of([cost_of(*(bodies[body] for body in pack), prefix=prefix) for pack in packs])


# What a step holds


@pytest.mark.parametrize("number", [1, 7, 8, 23, 24, 25, 100, 1100])
def test_every_pack_is_in_one_step_of_an_epoch_and_only_the_last_is_short(number):
    steps = global_batches(random_packs(number, seed=1), PACKS_PER_STEP, seed=3, epoch=1)
    assert sorted(chain(*steps)) == list(range(number))
    assert [len(step) for step in steps[:-1]] == [PACKS_PER_STEP] * ((number - 1) // PACKS_PER_STEP)
    assert 1 <= len(steps[-1]) <= PACKS_PER_STEP


def test_the_order_follows_from_seed_and_epoch():
    packs = random_packs(50, seed=1)
    orders = [global_batches(packs, 4, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(orders.count(order) == 1 for order in orders)
    assert orders == [global_batches(packs, 4, seed, epoch) for seed in range(3) for epoch in range(3)]
    # As it was when this was written: a run that is resumed elsewhere must find it so.
    assert global_batches(costs_of([*packs][:7]), 3, seed=0, epoch=1) == [[1, 3, 6], [0, 4, 2], [5]]
    assert global_batches(costs_of([cost_of(100 * length) for length in range(1, 19)]), 4, seed=0, epoch=1) == [
        [0, 1, 3, 4],
        [6, 7, 8, 9],
        [10, 11, 12, 13],
        [14, 15, 16, 17],
        [2, 5],
    ]


@pytest.mark.parametrize(
    ("epoch", "order", "ranks"),
    [(0, "51cc9e2a4f1704b4", "b99c16f180551123"), (1, "619b363595cc2791", "ddf5cc7b198e3ae2")],
)
def test_the_order_of_many_packs_is_as_it_was_when_each_was_an_object(epoch, order, ranks):
    """Digests by commit 3a04b29; without them, a run that was begun by it would resume with other steps."""
    packs = rolecs_like_packs(568, 4096)
    steps = global_batches(packs, PACKS_PER_STEP, 3, epoch)
    assert digest(steps)[:16] == order
    taken = [assign_to_ranks(step, packs, 8, 1, single_row=True) for step in (*steps[:5], steps[-1])]
    parts = [[[[astuple(part) for part in passes] for passes in rank] for rank in step] for step in taken]
    assert digest(parts)[:16] == ranks
    assert digest(steps[::-1])[:16] != order


def test_the_first_step_of_a_training_has_the_most_tokens():
    packs = random_packs(43, seed=1)
    tokens = [pack.prefix_tokens + sum(pack.tokens) for pack in packs]
    for seed in range(5):
        steps = global_batches(packs, 4, seed, epoch=0)
        totals = [sum(tokens[pack] for pack in step) for step in steps]
        assert totals[0] == max(totals[:-1]) and len(steps[-1]) == 3
        assert sorted(itertools.chain(*steps)) == list(range(43))
    assert any(
        sum(tokens[pack] for pack in steps[0]) < max(sum(tokens[pack] for pack in step) for step in steps[:-1])
        for steps in (global_batches(packs, 4, seed, epoch=1) for seed in range(5))
    )


def test_packs_of_unusual_cost_are_grouped_and_all_others_stay_in_random_order():
    half_empty, longer = set(range(8)), {8, 9}
    costs = [cost_of(500 if index in half_empty else 1001 if index in longer else 1000) for index in range(64)]
    packs = costs_of(costs)
    orders = [global_batches(packs, 8, seed=0, epoch=epoch) for epoch in range(8)]
    assert all(half_empty in map(set, order) for order in orders)
    assert len({list(map(set, order)).index(half_empty) for order in orders}) > 2
    assert any(not any(longer <= set(step) for step in order) for order in orders)


@pytest.mark.slow
@pytest.mark.parametrize("packs_per_step", [8, 64])
@pytest.mark.parametrize(
    ("prefix", "max_length", "spread"), [(0, 8192, 1.2), (0, 4096, 1.6), (568, 8192, 1.2), (568, 4096, 1.2)]
)
def test_the_goals_for_equal_work_are_met_on_real_lengths(prefix, max_length, spread, packs_per_step):
    """Of whole epochs, their last steps included, on eight processes; and steps are about as fair as random ones."""
    packs = rolecs_like_packs(prefix, max_length)
    balance = sampler(packs, 8, 0, 1, seed=0, packs_per_step=packs_per_step).load_balance(epochs=3)
    assert 1 <= balance.imbalance <= 1.005
    assert 0.995 <= balance.efficiency < 1
    assert 0.8 < balance.length_spread <= spread
    assert 0.8 < balance.count_spread <= spread


def test_load_balance_by_hand():
    packs = costs_of([PackCost((5, 5), (4.0, 4.0), 2, 1.0)] * 3)
    # A full step of two packs on two processes; then one pack, cut in two, whose prefix is run twice.
    balance = sampler(packs, 2, 0, 1, seed=0, packs_per_step=2).load_balance(epochs=2)
    assert balance == LoadBalance(1.0, 27 / (2 * 9 + 2 * 5), 1.0, 1.0)
    # All on one process: nobody waits, and nothing is repeated.
    assert sampler(packs, 1, 0, 2, seed=0, packs_per_step=2).load_balance(epochs=2).efficiency == 1
    # Two documents cannot keep three processes busy.
    packs = costs_of([PackCost((5, 5), (6.0, 3.0))])
    balance = sampler(packs, 3, 0, 1, seed=0, packs_per_step=3).load_balance()
    assert balance == LoadBalance(2.0, 0.5, 1.0, 1.0)


def test_steps_that_are_sorted_by_length_would_be_seen():
    rng = random.Random(5)
    packs = costs_of([cost_of(*[rng.randint(100, 2000)] * 4) for _ in range(800)])
    balance = sampler(packs, 8, 0, 1, seed=0, packs_per_step=8).load_balance()
    # Packs so unlike can only be balanced by meeting their like.
    assert balance.length_spread > 2
    assert balance.imbalance < 1.03


# How a step is distributed


@pytest.mark.parametrize("single_row", [True, False])
@pytest.mark.parametrize("most", [1, 9], ids=["a-document-a-pack", "several"])
@pytest.mark.parametrize("number", sampled([5, 24, 48, 49, 1, 50, 59, 71], 4))
def test_processes_and_micro_batches_only_distribute_the_steps(number, most, single_row):
    packs = random_packs(number, seed=number, most=most)
    for epoch in (0, 1):
        steps = global_batches(packs, PACKS_PER_STEP, 3, epoch)
        expected = [[(pack, one) for pack in step for one in range(len(packs[pack].tokens))] for step in steps]
        assert sorted(chain(*expected)) == [(i, one) for i, pack in enumerate(packs) for one in range(len(pack.tokens))]
        for processes, micro in CUTS:
            accumulation = PACKS_PER_STEP // (processes * micro)
            ranks = []
            for rank in range(processes):
                batches = sampler(packs, processes, rank, micro, single_row=single_row)
                batches.set_epoch(epoch)
                ranks.append(list(batches))
                assert len(ranks[-1]) == len(batches)
            # As the Trainer cuts: so many batches a step, and what is left in the last.
            taken = [
                [rank[start : start + accumulation] for rank in ranks]
                for start in range(0, len(ranks[0]), accumulation)
            ]
            assert [sorted(documents(chain(*chain(*step)))) for step in taken] == [sorted(step) for step in expected]
            for step, whole in zip(taken, steps, strict=True):
                check_room(step, [packs[pack] for pack in whole], packs, micro, single_row)
            working = sum(any(documents(parts) for parts in rank) for rank in taken[-1])
            assert working == min(processes, len(expected[-1]))


def check_room(step, whole, packs, micro, single_row):
    """No forward pass holds more than `micro` of the longest packs of the step, or more than that many rows."""
    longest = max(pack.prefix_tokens + sum(pack.tokens) for pack in whole)
    for parts in chain(*step):
        parts = [part for part in parts if part]
        assert len(parts) <= micro + single_row * micro
        assert sum(part.tokens(packs) for part in parts) <= micro * longest


@pytest.mark.parametrize("single_row", [True, False])
def test_an_epoch_interrupted_after_any_step_resumes_under_another_world_size(single_row):
    packs = random_packs(53, seed=2)
    for epoch in (0, 1, 2):
        steps = global_batches(packs, 4, 3, epoch)
        for processes, micro in ((4, 1), (2, 1), (2, 2), (1, 4)):
            ranks = [
                sampler(packs, processes, rank, micro, packs_per_step=4, single_row=single_row)
                for rank in range(processes)
            ]
            for batches in ranks:
                batches.set_epoch(epoch)
            ranks = [list(batches) for batches in ranks]
            for done in range(len(steps)):
                rest = [batches[done * 4 // (processes * micro) :] for batches in ranks]
                assert sorted(documents(chain(*chain(*rest)))) == sorted(
                    (pack, one) for step in steps[done:] for pack in step for one in range(len(packs[pack].tokens))
                )


def test_packs_that_can_be_divided_evenly_stay_whole():
    packs = costs_of([PackCost((1,), (cost,)) for cost in (9.0, 4.0, 5.0, 8.0)])
    assert assign_to_ranks([0, 1, 2, 3], packs, 1, 4, single_row=True) == [
        [[PackSlice(pack, 0, 1) for pack in (0, 3, 2, 1)]]
    ]
    assert assign_to_ranks([0, 1, 2, 3], packs, 2, 1, single_row=True) == [
        [[PackSlice(0, 0, 1)], [PackSlice(1, 0, 1)]], [[PackSlice(3, 0, 1)], [PackSlice(2, 0, 1)]],
    ]  # fmt: skip


def test_packs_that_cannot_are_cut_between_documents():
    packs = costs_of([PackCost((4, 3, 3), (4.0, 3.0, 3.0)), PackCost((1, 1), (1.0, 1.0)), PackCost((2,), (2.0,))])
    # 14 in all, best cut into 7 and 7: the second process takes the end of one pack and two others, in two places.
    assert assign_to_ranks([0, 1, 2], packs, 2, 2, single_row=True) == [
        [[PackSlice(0, 0, 2)]],
        [[PackSlice(0, 2, 3), PackSlice(2, 0, 1), PackSlice(1, 0, 2)]],
    ]
    # Not in one row, three parts do not fit two places, so the first process takes a whole pack.
    assert assign_to_ranks([0, 1, 2], packs, 2, 2, single_row=False) == [
        [[PackSlice(0, 0, 3)]],
        [[PackSlice(1, 0, 2), PackSlice(2, 0, 1)]],
    ]
    assert assign_to_ranks([1], packs, 2, 1, single_row=True) == [[[PackSlice(1, 0, 1)]], [[PackSlice(1, 1, 2)]]]
    assert assign_to_ranks([2], packs, 2, 1, single_row=True) == [[[PackSlice(2, 0, 1)]], [[]]]
    # Each part runs its prefix: two thirds of a pack are not half the work of four thirds.
    packs = costs_of([PackCost((1, 1, 1), (1.0, 1.0, 1.0), 5, 5.0)])
    assert [share[0][0].flops(packs) for share in assign_to_ranks([0], packs, 2, 1, single_row=True)] == [7, 6]


def segment_cost(segment, packs, places, single_row, longest):
    """FLOPs of consecutive (pack, document) pairs as parts of packs; infinite where they have not places enough."""
    runs = [[*run] for _, run in itertools.groupby(segment, lambda document: document[0])]
    parts = [PackSlice(run[0][0], run[0][1], run[-1][1] + 1) for run in runs]
    fits = len(parts) <= places or (
        single_row and len(parts) == places + 1 and parts[0].tokens(packs) + parts[-1].tokens(packs) <= longest
    )
    return sum(part.flops(packs) for part in parts) if fits else float("inf")


@pytest.mark.parametrize("single_row", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_no_other_split_of_the_documents_has_a_cheaper_costliest_rank(seed, single_row):
    packs = random_packs(3, seed, most=3)
    for number, processes in ((1, 2), (2, 3), (3, 2), (3, 4)):
        line = [(pack, one) for pack in range(number) for one in range(len(packs[pack].tokens))]
        places = num_micro_batches(number, processes, 1)
        longest = max(pack.prefix_tokens + sum(pack.tokens) for pack in [*packs][:number])
        cheapest = min(
            max(
                segment_cost(line[start:end], packs, places, single_row, longest)
                for start, end in itertools.pairwise((0, *cuts, len(line)))
            )
            for cuts in itertools.combinations_with_replacement(range(len(line) + 1), processes - 1)
        )
        shares = assign_to_ranks([*range(number)], packs, processes, 1, single_row=single_row)
        assert max(sum(part.flops(packs) for parts in share for part in parts) for share in shares) == cheapest


# Batches


def packs_of(prefix: int, *lengths: int, packs: int = 1) -> PackedDataset:
    """Packs of one-turn dialogues that are trained but for their first token; ids count up in each dialogue."""
    examples = [
        TokenizedDialogue(
            numpy.arange(100 * number, 100 * number + prefix + length, dtype=numpy.int32),
            numpy.array([0] * (prefix + 1) + [2] * (length - 1), dtype=numpy.uint8),
            numpy.array([prefix, prefix + length], dtype=numpy.int32),
            numpy.array([1], dtype=numpy.uint8),
        )
        for number, length in enumerate(lengths * packs)
    ]
    members = numpy.arange(len(examples)).reshape(packs, -1)
    loss_weights = LossWeights(LossConfig(), numpy.zeros(13, numpy.int64))
    return PackedDataset(
        examples,
        [[PackedItem(number, 0, len(examples[number].input_ids)) for number in pack] for pack in members.tolist()],
        [prefix] * packs,
        loss_weights,
    )


def plain(row: dict) -> dict:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


GROUP = 1 + (len(STRATEGIES) + 2) * len(TURN_BUCKETS)
"""The token group of a reply by strategy 1 in the first turns."""


def test_a_slice_is_the_documents_it_names():
    packs = packs_of(0, 3, 4, 2)
    assert plain(packs[0]) == {
        "input_ids": [0, 1, 2, 100, 101, 102, 103, 200, 201],
        "loss_weights": [0, 1, 1, 0, 1, 1, 1, 0, 1],
        "token_groups": [0, GROUP, GROUP, 0, GROUP, GROUP, GROUP, 0, GROUP],
        "document_lengths": [3, 4, 2],
        "prefix_length": 0,
    }
    assert plain(packs[PackSlice(0, 0, 3)]) == plain(packs[0])
    assert plain(packs[PackSlice(0, 1, 2)]) == {
        "input_ids": [100, 101, 102, 103],
        "loss_weights": [0, 1, 1, 1],
        "token_groups": [0, GROUP, GROUP, GROUP],
        "document_lengths": [4],
        "prefix_length": 0,
    }
    assert packs[PackSlice(0, 1, 3)]["document_lengths"].tolist() == [4, 2]
    assert plain(packs[None]) == {
        "input_ids": [0],
        "loss_weights": [0],
        "token_groups": [0],
        "document_lengths": [1],
        "prefix_length": 0,
        "empty": True,
    }


def test_a_loader_takes_the_order_of_the_epoch_it_is_set_to():
    costs = random_packs(50, seed=1)
    batches = sampler(costs, 1, 0, 4, packs_per_step=4)
    loader = PackDataLoader(
        packs_of(0, 2, packs=50), batches, lambda rows: [row["input_ids"][0] // 100 for row in rows]
    )
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        taken = list(loader)
        assert [sorted(batch) for batch in taken] == [sorted(step) for step in global_batches(costs, 4, 3, epoch)]
        assert len(taken) == len(loader)


def test_a_slice_of_a_pack_includes_the_shared_prefix():
    packs = packs_of(3, 3, 2, 1)
    assert plain(packs[PackSlice(0, 1, 3)]) == {
        "input_ids": [100, 101, 102, 103, 104, 203],
        "loss_weights": [0, 0, 0, 0, 1, 0],
        "token_groups": [0, 0, 0, 0, GROUP, 0],
        "document_lengths": [3, 2, 1],
        "prefix_length": 3,
    }
    assert packs[PackSlice(0, 0, 3)]["document_lengths"].tolist() == [3, 3, 2, 1]


def test_the_cost_of_a_pack():
    assert pack_cost([3, 4, 2], 0, 10, 1) == PackCost((3, 4, 2), (39, 56, 24), 0, 0)
    # Each token of a body sees the prefix as well: twice in a square of pairs, of which causal attention takes half.
    shared = pack_cost([3, 4, 2], 3, 10, 1)
    assert shared == PackCost((4, 2), (40 + 16 + 24, 20 + 4 + 12), 3, 39)
    assert shared.total == 39 + 80 + 36
    # The prefix and a body behind it are the square of one document.
    assert pack_cost([3, 4], 3, 10, 1).total == pack_cost([7], 0, 10, 1).total
    assert PackSlice(0, 1, 2).flops([shared]) == 39 + 36
    assert PackSlice(0, 1, 2).tokens([shared]) == 5
    rows = [[3, 4, 2], [5, 5], [3, 4, 2]]
    many = pack_costs(Ragged.of(rows), [3, 0, 0], 10, 1)
    assert [*many] == [shared, pack_cost([5, 5], 0, 10, 1), pack_cost([3, 4, 2], 0, 10, 1)]
    assert many.totals.tolist() == [each.total for each in many]
    assert (many[0].flops, many[-1].tokens) == (shared.flops, (3, 4, 2))
