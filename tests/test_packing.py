"""Best-fit and subset-sum packing, truncation of long dialogues, rows of packs, and batches."""

import itertools
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import random_dialogue, small_tokenizer

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.mixture import Mixture
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.packing import bin_packing
from csc_train.packing.bin_packing import best_fit_decreasing, subset_sum_packing
from csc_train.packing.collator import IGNORE_INDEX, PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackingReport, pack_dialogues
from csc_train.packing.truncation import drop_leading_turns, num_turns_to_truncate
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue, TokenType

PAD = 99


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))


def example(prefix: int, *turns: int, first_id: int = 0) -> TokenizedDialogue:
    """Turns of the given lengths after a prefix; the ids count up from `first_id`, so that each token is known by its
    id. Supporter turns, the first included, are trained but for their first token."""
    turn_offsets = numpy.cumsum([prefix, *turns]).astype(numpy.int32)
    token_types = numpy.full(turn_offsets[-1], TokenType.CONTEXT, dtype=numpy.uint8)
    for start, end in list(itertools.pairwise(turn_offsets))[::2]:
        token_types[start + 1 : end] = TokenType.REPLY
    strategies = numpy.array([index % 2 == 0 for index in range(len(turns))], dtype=numpy.uint8)
    return TokenizedDialogue(
        numpy.arange(first_id, first_id + turn_offsets[-1], dtype=numpy.int32), token_types, turn_offsets, strategies
    )


def same(one: TokenizedDialogue, other: TokenizedDialogue) -> bool:
    return all(
        numpy.array_equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "token_types", "turn_offsets", "strategies")
    )


# Best-fit decreasing


@pytest.mark.parametrize(
    ("lengths", "capacity", "packs"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        # First fit would put the 2 beside the 7, where it leaves a gap; it fits the other pack exactly.
        ([7, 4, 4, 2], 10, [[0], [1, 2, 3]]),
        ([2, 5, 4, 7, 1, 3, 8], 10, [[6, 0], [3, 5], [1, 2, 4]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([6, 6, 6], 10, [[0], [1], [2]]),
        ([1, 1, 1, 1], 3, [[0, 1, 2], [3]]),
    ],
)
def test_best_fit_decreasing_known_answers(lengths, capacity, packs):
    assert best_fit_decreasing(lengths, capacity) == packs


def scan(lengths: list[int], capacity: int, choose) -> list[list[int]]:
    """Longest first into the pack that `choose` takes among (room, index) of the packs with room enough."""
    packs, rooms = [], []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            _, index = choose(fitting)
        else:
            index = len(packs)
            packs.append([])
            rooms.append(capacity)
        packs[index].append(item)
        rooms[index] -= lengths[item]
    return packs


def random_lengths(seed: int) -> tuple[list[int], int]:
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 1000, 8192])
    longest = max(1, int(capacity * rng.choice([0.1, 0.3, 0.6, 1])))
    return [rng.randint(1, longest) for _ in range(rng.randint(1, 120))], capacity


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_decreasing_packs_each_item_once_and_as_tightly_as_a_search_of_all_packs(seed):
    lengths, capacity = random_lengths(seed)
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(packs)
    totals = sorted(sum(lengths[item] for item in pack) for pack in packs)
    assert totals[-1] <= capacity
    # Among packs with equal room any may be taken: the totals come out the same, the items in them need not.
    assert totals == sorted(sum(lengths[item] for item in pack) for pack in scan(lengths, capacity, min))
    assert len(packs) >= -(-sum(lengths) // capacity)
    # Best fit can lose to first fit on lists made for it; on lists like these it does not.
    assert len(packs) <= len(scan(lengths, capacity, lambda fitting: min(fitting, key=lambda pair: pair[1])))
    assert best_fit_decreasing(lengths, capacity) == packs


def test_best_fit_decreasing_wastes_little_on_many_dialogues():
    rng = random.Random(0)
    lengths = [rng.randint(100, 2000) for _ in range(20_000)]
    packs = best_fit_decreasing(lengths, 8192)
    assert sum(lengths) / (len(packs) * 8192) > 0.999


@pytest.mark.parametrize("bad", [0, -1, 11])
def test_a_length_outside_the_capacity_is_refused(bad):
    with pytest.raises(ValueError, match=rf"item 1 has length {bad}; a pack takes 1 to 10"):
        best_fit_decreasing([3, bad, 4], 10)


# Tight packing


def check_packs(packs: list[list[int]], lengths: list[int], capacity: int) -> None:
    """Every item once, no pack empty or over the capacity, and no more packs than best fit makes."""
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(1 <= sum(lengths[item] for item in pack) <= capacity for pack in packs)
    assert len(packs) <= len(best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize("seed", range(60))
def test_subset_sum_packing_packs_each_item_once_and_never_in_more_packs_than_best_fit(seed):
    lengths, capacity = random_lengths(seed)
    packs = subset_sum_packing(lengths, capacity)
    check_packs(packs, lengths, capacity)
    assert subset_sum_packing(lengths, capacity) == packs
    assert subset_sum_packing(numpy.array(lengths), capacity) == packs


@pytest.mark.parametrize("seed", range(200))
def test_subset_sum_packing_holds_on_lists_with_few_lengths(seed):
    """Equal lengths meet in one pack here, so that it matters how many items of a length are left."""
    rng = random.Random(seed)
    capacity = rng.randint(2, 40)
    kinds = [rng.randint(1, capacity) for _ in range(rng.randint(1, 6))]
    lengths = [rng.choice(kinds) for _ in range(rng.randint(1, 60))]
    check_packs(subset_sum_packing(lengths, capacity), lengths, capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity", "totals"),
    [
        ([], 10, []),
        ([1], 1, [1]),
        ([1, 1, 1], 1, [1, 1, 1]),
        ([4], 10, [4]),
        ([10, 10, 10], 10, [10, 10, 10]),
        ([6, 6, 6], 10, [6, 6, 6]),
        ([5, 5, 5], 10, [5, 10]),
        ([3] * 7, 9, [3, 9, 9]),
        ([1] * 10, 3, [1, 3, 3, 3]),
        # Best fit takes three packs: it puts 4 and 3 in one, which nothing that is left fills up.
        ([4, 3, 3, 2, 2, 2], 8, [8, 8]),
        # The search alone takes seven packs, best fit six.
        ([11, 10, 8, 5, 5, 4, 4, 4, 4, 3, 3, 3], 11, [10, 10, 11, 11, 11, 11]),
        # Pairs and triples must be of items that are there: one 5 is not two.
        ([8, 5, 2], 10, [7, 8]),
    ],
)
def test_subset_sum_packing_known_answers(lengths, capacity, totals):
    packs = subset_sum_packing(lengths, capacity)
    check_packs(packs, lengths, capacity)
    assert sorted(sum(lengths[item] for item in pack) for pack in packs) == totals


def many_lengths(seed: int) -> tuple[list[int], int]:
    """Random lengths; RoleCS-like ones; or a few lengths, so that it matters how many items of each are left."""
    rng = random.Random(seed)
    if seed == 0:
        return rng.choices([length - 568 for length in dialogue_lengths("rolecs_like")], k=3000), 8192 - 568
    if seed % 4 == 1:
        return random_lengths(seed)
    capacity = rng.choice([12, 40, 500])
    kinds = [rng.randint(1, capacity) for _ in range(rng.randint(1, 6))]
    return rng.choices(kinds, k=rng.randint(1, 400)), capacity


def item_by_item(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing without counts: of the packs with the least room that is enough, the last touched one."""
    packs, touched = [], []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rooms = {pack: capacity - sum(lengths[each] for each in packs[pack]) for pack in touched}
        fitting = [room for room in rooms.values() if room >= lengths[item]]
        if fitting:
            pack = [pack for pack in touched if rooms[pack] == min(fitting)][-1]
            touched.remove(pack)
            packs[pack].append(item)
        else:
            pack = len(packs)
            packs.append([item])
        touched.append(pack)
    return packs


@pytest.mark.parametrize("seed", range(1, 40))
def test_counts_of_lengths_are_packed_as_items_were_one_by_one(seed):
    lengths, capacity = many_lengths(seed)
    lengths = lengths[:150]
    assert best_fit_decreasing(lengths, capacity) == item_by_item(lengths, capacity)


PACKS_BEFORE = "edc82957c85cec7bbf0d774b2f4478f5e0b4c17c1f8c95a4eb3083f9013bfb26"
"""Of `subset_sum_packing` by the commit before it counted lengths (3a04b29), for `many_lengths`."""


@pytest.mark.slow
def test_counts_of_lengths_make_the_packs_of_the_search_by_items(monkeypatch):
    def packs() -> str:
        return digest([[*subset_sum_packing(*many_lengths(seed))] for seed in range(120)])

    assert packs() == PACKS_BEFORE
    note_shortage = bin_packing._LengthPool.note_shortage

    def careless(pool, length: int) -> None:
        subsets = pool.subsets.copy()
        note_shortage(pool, length)
        pool.subsets.update(subsets)

    monkeypatch.setattr(bin_packing._LengthPool, "note_shortage", careless)
    with pytest.raises(ValueError, match="shape mismatch"):  # packs hold items that there are not
        packs()


@pytest.mark.parametrize("bad", [0, -1, 11])
def test_subset_sum_packing_refuses_a_length_outside_the_capacity(bad):
    with pytest.raises(ValueError, match=rf"item 1 has length {bad}; a pack takes 1 to 10"):
        subset_sum_packing([3, bad, 4], 10)


def dialogue_lengths(source: str) -> list[int]:
    """Lengths like those of RoleCS with a system prompt of 568 tokens, measured or drawn."""
    if source == "rolecs_like":
        path = Path(__file__).resolve().parents[1] / "benchmarks" / "rolecs_like_lengths.txt"
        return [int(line) for line in path.read_text().split()]
    rng = random.Random(11)
    return [568 + min(2500, max(60, round(rng.lognormvariate(6.58, 0.28)))) for _ in range(11_000)]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rolecs_like", "drawn"])
@pytest.mark.parametrize(
    ("prefix", "max_length", "utilization"), [(0, 8192, 0.99), (0, 4096, 0.965), (568, 8192, 0.995), (568, 4096, 0.985)]
)
def test_subset_sum_packing_leaves_little_room_among_many_dialogues(source, prefix, max_length, utilization):
    """With a prefix: it stands once in each pack, and the packer sees what follows it in each dialogue."""
    lengths = [length - prefix for length in dialogue_lengths(source)]
    start = time.process_time()
    packs = subset_sum_packing(lengths, max_length - prefix)
    seconds = time.process_time() - start
    check_packs(packs, lengths, max_length - prefix)
    assert (sum(lengths) + len(packs) * prefix) / (len(packs) * max_length) >= utilization
    assert len(packs) < len(best_fit_decreasing(lengths, max_length - prefix))
    assert subset_sum_packing(lengths, max_length - prefix) == packs
    assert seconds < 1


@pytest.mark.parametrize(("prefix", "max_length"), [(0, 8192), (568, 8192), (568, 4096)])
def test_packs_of_many_short_dialogues_are_alike(prefix, max_length):
    """Their mean lengths differ less than where long dialogues meet long ones."""

    def spread(packs: list[list[int]]) -> float:
        return float(numpy.std([numpy.mean([lengths[item] for item in pack]) for pack in packs]))

    lengths = [length - prefix for length in dialogue_lengths("rolecs_like")]
    capacity = max_length - prefix
    assert spread(subset_sum_packing(lengths, capacity)) < 0.6 * spread(best_fit_decreasing(lengths, capacity))


def test_the_lengths_of_the_benchmark_are_those_that_the_goals_were_set_on():
    lengths = dialogue_lengths("rolecs_like")
    assert len(lengths) == 11_232
    assert sum(lengths) == 14_830_301
    assert -(-sum(lengths) // 8192) == 1811
    assert len(best_fit_decreasing(lengths, 8192)) == 1869


# Dialogues that are too long


def fit(examples: list[TokenizedDialogue], **config) -> list[int | None]:
    return [num_turns_to_truncate(one, PackingConfig(**config), number) for number, one in enumerate(examples, start=1)]


def test_a_dialogue_that_just_fits_is_unchanged():
    one = example(4, 3, 2, 5)
    assert fit([one], max_length=14, overflow="error") == [0]
    assert drop_leading_turns(one, 0) is one


def test_overflow_drop_leaves_out_too_long_dialogues():
    long, short = example(4, 3, 2, 6), example(4, 3)
    assert fit([long, short, long], max_length=14, overflow="drop") == [None, 0, None]


def test_overflow_error_names_the_dialogue_and_its_length():
    with pytest.raises(InputError, match=r"^dialogue 2 has 15 tokens, more than packing\.max_length=14; "):
        fit([example(4, 3), example(4, 3, 2, 6)], max_length=14, overflow="error")


@pytest.mark.parametrize(
    ("max_length", "first"),
    [(21, 1), (19, 1), (18, 3), (12, 3)],  # 4 + 3 + (2 + 5 + (2 + 6)): 19 without the first turn, 12 without three
)
def test_overflow_truncate_removes_the_fewest_whole_leading_turns(max_length, first):
    whole = example(4, 3, 2, 5, 2, 6)
    assert fit([whole], max_length=max_length, overflow="truncate") == [first]
    kept = drop_leading_turns(whole, first)
    expected = {
        1: ([*range(4), *range(7, 22)], [4, 6, 11, 13, 19], [*range(7, 11), *range(14, 19)], [0, 1, 0, 1]),
        3: ([*range(4), *range(14, 22)], [4, 6, 12], [*range(7, 12)], [0, 1]),
    }[first]
    assert kept.input_ids.tolist() == expected[0]
    assert kept.turn_offsets.tolist() == expected[1]
    assert numpy.flatnonzero(kept.trained).tolist() == expected[2]
    assert kept.strategies.tolist() == expected[3]
    assert kept.input_ids.dtype == numpy.int32
    assert kept.token_types.dtype == numpy.uint8


@pytest.mark.parametrize(
    "one",
    [
        example(4, 9),  # a greeting alone: no customer turn to start from
        example(4, 3, 2, 9),  # the last exchange alone is too long
        example(4, 9, 2),  # what is left holds a customer turn only, so nothing trained
    ],
    ids=["greeting", "exchange", "customer-last"],
)
def test_overflow_truncate_drops_what_cannot_be_truncated(one):
    assert fit([one], max_length=12, overflow="truncate") == [None]


def test_a_truncated_dialogue_is_the_encoding_of_its_last_turns(template):
    rng = random.Random(5)
    prefix = len(template.prefix_ids)
    cuts = set()
    for _ in range(12):
        dialogue = random_dialogue(rng)
        whole = template.encode(dialogue)
        rest = {
            first: template.encode(Dialogue("rest", dialogue.turns[first:]))
            for first in range(len(dialogue.turns))
            if dialogue.turns[first].speaker is Speaker.CUSTOMER
        }
        for max_length in range(prefix + 1, len(whole.input_ids), 7):
            fitting = [first for first, part in rest.items() if len(part.input_ids) <= max_length]
            first = num_turns_to_truncate(whole, PackingConfig(max_length=max_length), 1)
            if fitting and rest[min(fitting)].trained.any():
                assert first == min(fitting)
                truncated = drop_leading_turns(whole, first)
                assert same(truncated, rest[first])
                assert truncated.input_ids[:prefix].tolist() == template.prefix_ids
                cuts.add(min(fitting))
            else:
                assert first is None
    assert {1, 2, 3, 4, 5} <= cuts  # of dialogues that either speaker opens


def test_a_truncated_chat_starts_with_a_customer_turn(template):
    """Its supporter turns have no strategy either."""
    turns = tuple(Turn((Speaker.CUSTOMER, Speaker.SUPPORTER)[index % 2], "ab" * 9) for index in range(8))
    whole = template.encode(Dialogue("chat", turns, kind="chat"))
    lengths = range(int(whole.turn_offsets[0]) + 1, len(whole.input_ids))
    found = {num_turns_to_truncate(whole, PackingConfig(max_length=length), 1) for length in lengths}
    assert found == {2, 4, 6, None}


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
@pytest.mark.parametrize("room", [0, -1])
def test_max_length_without_room_beside_the_system_prompt_is_refused(template, policy, room):
    one = template.encode(random_dialogue(random.Random(0)))
    prefix = len(template.prefix_ids)
    expected = rf"^packing\.max_length={prefix + room} leaves no room beside the system prompt, which takes {prefix} "
    with pytest.raises(InputError, match=expected) as caught:
        fit([one], max_length=prefix + room, overflow=policy)
    assert "\n" not in str(caught.value)


# Rows of packs


def documents(packs) -> list[tuple[list[int], list[float]]]:
    """The (ids, weights) of each document of a packed data set, in order."""
    found = []
    for row in packs:
        assert sum(row["document_lengths"]) == len(row["input_ids"]) == len(row["loss_weights"])
        ends = numpy.cumsum(row["document_lengths"]).tolist()
        for start, end in itertools.pairwise([0, *ends]):
            found.append((row["input_ids"][start:end].tolist(), row["loss_weights"][start:end].tolist()))
    return found


def test_rows_are_the_concatenated_documents_of_each_pack():
    # Lengths 7, 9, 12 and 3 in packs of 12: 3 and 9, 7, 12 alone.
    examples = [example(4, 3), example(4, 3, 2, first_id=100), example(4, 3, 2, 3, first_id=200), example(1, 2)]
    packs, report = pack_dialogues(examples, PackingConfig("best_fit", max_length=12))
    assert packs.document_lengths == [[3, 9], [7], [12]]
    assert [row["input_ids"].tolist() for row in packs] == [
        [0, 1, 2, *range(100, 109)],
        list(range(7)),
        list(range(200, 212)),
    ]
    assert [row["loss_weights"].tolist() for row in packs] == [
        [0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert [packs[0][name].dtype for name in ("input_ids", "loss_weights", "document_lengths")] == [
        "int32",
        "float32",
        "int32",
    ]
    assert report == PackingReport(
        dialogues=4,
        truncated=0,
        dropped=0,
        packs=3,
        tokens=31,
        separate_tokens=31,
        trained_tokens=9,
        utilization=31 / 36,
        strategies={"礼貌问候": 1.0},
    )


def test_the_report_counts_what_was_truncated_and_dropped():
    examples = [example(4, 3, 2, 5), example(4, 9), example(4, 3)]
    packs, report = pack_dialogues(examples, PackingConfig("best_fit", max_length=12))
    assert report == PackingReport(
        dialogues=3,
        truncated=1,
        dropped=1,
        packs=2,
        tokens=18,
        separate_tokens=18,
        trained_tokens=6,
        utilization=18 / 24,
        strategies={"礼貌问候": 1.0},
    )
    assert packs.document_lengths == [[7], [11]]
    assert str(report) == (
        "2 dialogues (1 truncated, 1 dropped) in 2 packs, 18 tokens (1.000 of the unpacked), 6 trained (33.3%), "
        "utilization 0.7500; share of the loss by strategy: 礼貌问候 100.0%"
    )


@pytest.mark.parametrize("strategy", ["best_fit", "off"])
def test_every_dialogue_is_in_the_packs_exactly_once(template, strategy):
    rng = random.Random(6)
    examples = [template.encode(random_dialogue(rng)) for _ in range(50)]
    packs, report = pack_dialogues(examples, PackingConfig(strategy=strategy, max_length=1200))
    found = documents(packs)
    expected = [(one.input_ids.tolist(), one.trained.astype(float).tolist()) for one in examples]
    if strategy == "off":
        assert found == expected
        assert len(packs) == 50
    else:
        assert sorted(found) == sorted(expected)
        assert len(packs) < 25
        assert max(len(row["input_ids"]) for row in packs) <= 1200
    assert report == PackingReport(
        dialogues=50,
        truncated=0,
        dropped=0,
        packs=len(packs),
        tokens=sum(len(ids) for ids, _ in expected),
        separate_tokens=sum(len(ids) for ids, _ in expected),
        trained_tokens=sum(int(sum(weights)) for _, weights in expected),
        utilization=sum(len(ids) for ids, _ in expected) / (len(packs) * 1200),
        strategies=report.strategies,
    )


@pytest.mark.parametrize(
    ("strategy", "max_length", "packs"),
    [
        ("shared_prefix", 64, "2a15e377e8ad69c1"),
        ("shared_prefix", 40, "81806bfb4b1f6cdb"),
        ("best_fit", 64, "e094fdfe5f5fcd94"),
        ("off", 64, "e7105a85b30fb60f"),
    ],
)
def test_groups_of_prefixes_and_a_mix_are_packed_as_before_lengths_were_counted(strategy, max_length, packs):
    """Two prefixes that fill packs and one that does not; a source that is seen twice and one that is seen by half."""
    rng = random.Random(1)
    examples = [
        replace(
            example(6, *(rng.randint(2, 7) for _ in range(rng.randint(1, 9))), first_id=(number % 50 % 3) * 1000),
            id=str(number),
        )
        for number in range(200)
    ]
    examples.append(replace(example(6, 9, 4, first_id=5000), id="200"))
    members = {each.id: (int(each.id) % 2, rng.random()) for each in examples}
    mix = Mixture(["often", "seldom"], None, [2.0, 0.5], "dialogues", members)
    found, report = pack_dialogues(examples, PackingConfig(strategy, max_length), mixture=mix)
    assert Counter(item.dialogue for pack in found.pack_items for item in pack).most_common(1)[0][1] == 2
    assert report.tokens == sum(map(sum, found.document_lengths))
    assert report.utilization == report.tokens / (len(found) * max_length)
    made = [[*map(list, found.pack_items)], found.prefix_lengths, [*found.document_lengths], str(report)]
    assert digest(made)[:16] == packs  # by commit 3a04b29


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(InputError, match=r"^none of the 2 dialogues fits packing\.max_length=12: raise it$"):
        pack_dialogues([example(4, 9), example(4, 10)], PackingConfig("best_fit", max_length=12))


# Batches

PACKS = [
    {
        "input_ids": [10, 11, 12, 20, 21],
        "loss_weights": [0.0, 0, 1, 0, 1],
        "document_lengths": [3, 2],
        "prefix_length": 0,
    },
    {"input_ids": [30, 31], "loss_weights": [0.0, 1], "document_lengths": [2], "prefix_length": 0},
]
NO = IGNORE_INDEX


@pytest.mark.parametrize(
    ("collator", "batch"),
    [
        (
            PackCollator("varlen", PAD),
            {
                "input_ids": [[10, 11, 12, 20, 21, 30, 31]],
                "labels": [[NO, NO, 12, NO, 21, NO, 31]],
                "loss_weights": [[0, 0, 1, 0, 1, 0, 1]],
                "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
                "trained_index": [1, 3, 5],
            },
        ),
        (
            PackCollator("position_ids", PAD),
            {
                "input_ids": [[10, 11, 12, 20, 21], [30, 31, PAD, PAD, PAD]],
                "labels": [[NO, NO, 12, NO, 21], [NO, 31, NO, NO, NO]],
                "loss_weights": [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]],
                "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
                "trained_index": [1, 3, 5],
            },
        ),
    ],
    ids=["one-row", "row-per-pack"],
)
def test_a_packed_batch(collator, batch):
    made = collator(PACKS)
    made.pop("varlen_metadata", None)
    assert {name: values.tolist() for name, values in made.items()} == batch
    assert {name: values.dtype for name, values in made.items() if values.dtype != torch.int64} == {
        "loss_weights": torch.float32
    }


def test_an_unpacked_batch_has_a_mask_and_a_row_for_each_document():
    packs = [
        {"input_ids": [10, 11, PAD], "loss_weights": [0.0, 1, 0], "document_lengths": [3], "prefix_length": 0},
        PACKS[1],
    ]
    made = PackCollator("padded", PAD)(packs)
    assert {name: values.tolist() for name, values in made.items()} == {
        "input_ids": [[10, 11, PAD], [30, 31, PAD]],
        "labels": [[NO, 11, NO], [NO, 31, NO]],
        "loss_weights": [[0, 1, 0], [0, 1, 0]],
        # A padding token that is a document's own is seen.
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "trained_index": [0, 3],
    }
    assert {name: values.dtype for name, values in made.items() if values.dtype != torch.int64} == {
        "loss_weights": torch.float32
    }


def test_a_row_of_a_packed_data_set_collates_to_its_own_ids(template):
    rng = random.Random(7)
    examples = [template.encode(random_dialogue(rng)) for _ in range(6)]
    packs, _ = pack_dialogues(examples, PackingConfig("best_fit", max_length=1500))
    batch = PackCollator("varlen", PAD)([packs[index] for index in range(len(packs))])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    pieces = {
        (tuple(ids.tolist()), tuple(labels.tolist()))
        for ids, labels in zip(
            batch["input_ids"][0].tensor_split(starts[1:]), batch["labels"][0].tensor_split(starts[1:]), strict=True
        )
    }
    assert pieces == {
        (tuple(one.input_ids.tolist()), tuple(numpy.where(one.trained, one.input_ids, IGNORE_INDEX).tolist()))
        for one in examples
    }


@pytest.mark.parametrize("layout", ["padded", "position_ids", "varlen", "dense_mask"])
def test_a_batch_without_a_trained_token_is_an_error(layout):
    collator = PackCollator(layout, PAD)
    untrained = {"input_ids": [1, 2], "loss_weights": [0.0, 0], "document_lengths": [2], "prefix_length": 0}
    with pytest.raises(ValueError, match="no trained token"):
        collator([untrained, untrained])
    assert (collator([untrained, PACKS[1]])["labels"] != IGNORE_INDEX).sum() == 1


@pytest.mark.parametrize(
    "pack",
    [
        {"input_ids": [1, 2], "loss_weights": [1.0, 1], "document_lengths": [2], "prefix_length": 0},
        {"input_ids": [1, 2, 3, 4], "loss_weights": [0.0, 1, 1, 1], "document_lengths": [2, 2], "prefix_length": 0},
    ],
    ids=["first-document", "second-document"],
)
def test_a_weight_on_the_first_token_of_a_document_is_an_error(pack):
    """What precedes it in the row belongs to another document, and predicts it."""
    with pytest.raises(ValueError, match="first token of a document"):
        PackCollator("varlen", PAD)([pack])


def test_no_template_puts_a_weight_on_a_first_token(template):
    one = template.encode(Dialogue("d", (Turn(Speaker.SUPPORTER, "您好", STRATEGIES[0]),)))
    assert not one.trained[0]
    assert not one.trained[one.turn_offsets[0]]
