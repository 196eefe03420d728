"""Dialogues to packs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch

from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.packing.bin_packing import subset_sum_packing
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.global_batches import PackSlice
from csc_train.packing.loss_weights import LossWeights, count_turns
from csc_train.packing.token_groups import token_group_ids
from csc_train.packing.truncation import drop_leading_turns, num_turns_to_truncate
from csc_train.template.dialogue_template import TokenizedDialogue


@dataclass(frozen=True)
class PackingReport:
    """Account of packed dialogues; lengths in tokens."""

    dialogues: int
    truncated: int
    dropped: int
    packs: int
    tokens: int
    """Tokens in the packs, shared prefixes counted once a pack."""
    separate_tokens: int
    """Tokens of the same dialogues when each has its prefix to itself."""
    trained_tokens: int
    utilisation: float
    """Tokens over the tokens that `packs` full packs would hold."""
    strategies: dict[str, float]
    """Share of the sum of loss weights, by strategy."""

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.strategies.items())
        return (
            f"{self.dialogues - self.dropped} dialogues ({self.truncated} truncated, {self.dropped} dropped) in "
            f"{self.packs} packs, {self.tokens:,} tokens ({self.tokens / self.separate_tokens:.3f} of what they have "
            f"apart), {self.trained_tokens:,} trained ({self.trained_tokens / self.tokens:.1%}), utilisation "
            f"{self.utilisation:.4f}; share of the loss by strategy: {shares}"
        )


class PackedItem(NamedTuple):
    """A dialogue of a pack: the number of its example, and its first turn that is kept."""

    dialogue: int
    first_turn: int


class PackedDataset(torch.utils.data.Dataset):
    """Packs of encoded dialogues, put together when they are asked for.

    Attributes:
        dialogues: the encoded dialogues.
        pack_items: by pack, its dialogues in order.
        prefix_lengths: by pack, the length of the ids that its dialogues share as their prefix; 0 where they share none.
        document_lengths: by pack, the lengths of its documents in order; a shared prefix is the first of them.
        loss_weights: the loss weights.
    """

    def __init__(
        self,
        dialogues: Sequence[TokenizedDialogue],
        pack_items: list[list[PackedItem]],
        prefix_lengths: list[int],
        loss_weights: LossWeights,
    ):
        self.dialogues, self.pack_items, self.prefix_lengths, self.loss_weights = (
            dialogues,
            pack_items,
            prefix_lengths,
            loss_weights,
        )
        self.document_lengths = []
        for pack, prefix in zip(pack_items, prefix_lengths, strict=True):
            bodies = [_length(dialogues[member.dialogue], member.first_turn) - prefix for member in pack]
            self.document_lengths.append([prefix, *bodies] if prefix else bodies)

    def __len__(self) -> int:
        return len(self.pack_items)

    def __getitem__(self, part: PackSlice | int | None) -> dict[str, Any]:
        """A pack, the documents of it that `part` names, or, for None, a row of one token that is not trained.

        Returns:
            `input_ids` (int32), `weights` (float32) and `cells` (uint8, see `packing.cells`; 0 where the weight is),
            all [length]; `lengths` (int32), those of the documents in order; and `prefix` (int), the length of the
            first document where the others share it, else 0. The row of one token is marked as `empty`.
        """
        if part is None:
            return {
                "input_ids": self.dialogues[0].input_ids[:1],
                "loss_weights": numpy.zeros(1, numpy.float32),
                "token_groups": numpy.zeros(1, numpy.uint8),
                "document_lengths": [1],
                "prefix_length": 0,
                "empty": True,
            }
        if not isinstance(part, PackSlice):
            part = PackSlice(range(len(self))[part], 0, len(self.pack_items[part]))
        prefix, members = self.prefix_lengths[part.pack], self.pack_items[part.pack][part.first : part.last]
        examples = [drop_leading_turns(self.dialogues[number], first) for number, first in members]
        ids = [example.input_ids[prefix:] for example in examples]
        weights = [self.loss_weights(example)[prefix:] for example in examples]
        cells = [
            token_group_ids(example, member.first_turn)[prefix:]
            for example, member in zip(examples, members, strict=True)
        ]
        if prefix:
            ids.insert(0, examples[0].input_ids[:prefix])
            weights.insert(0, numpy.zeros(prefix, numpy.float32))
            cells.insert(0, numpy.zeros(prefix, numpy.uint8))
        weight = numpy.concatenate(weights)
        return {
            "input_ids": numpy.concatenate(ids),
            "loss_weights": weight,
            "token_groups": numpy.where(weight > 0, numpy.concatenate(cells), 0),
            "document_lengths": numpy.array([len(each) for each in ids], dtype=numpy.int32),
            "prefix_length": prefix,
        }


def pack_dialogues(
    examples: Sequence[TokenizedDialogue], config: PackingConfig, loss: LossConfig | LossWeights | None = None
) -> tuple[PackedDataset, PackingReport]:
    """Fit examples to `config.max_length`, weight their tokens by `loss` (all the same by default) and pack them.

    Args:
        loss: how tokens are weighted, or the weights that were made for other examples: held-out dialogues are weighted
            as those that are trained on.

    Returns:
        The packs, and the account of what became of each dialogue. A dialogue that the weights leave with nothing to
        train counts as dropped.

    Raises:
        InputError: as `num_turns_to_truncate`; or nothing is left to train on.
    """
    cuts = [num_turns_to_truncate(example, config, number) for number, example in enumerate(examples, start=1)]
    members = [PackedItem(number, first) for number, first in enumerate(cuts) if first is not None]
    if not members:
        raise InputError(f"none of the {len(cuts)} dialogues fits packing.max_length={config.max_length}")
    kept = (drop_leading_turns(examples[number], first) for number, first in members)
    turns = sum((count_turns(example) for example in kept), start=numpy.zeros(len(STRATEGIES) + 1, numpy.int64))
    weigh = loss if isinstance(loss, LossWeights) else LossWeights(loss or LossConfig(), turns)

    groups: dict[bytes, list[PackedItem]] = {}
    tokens = trained_tokens = 0
    weight = numpy.zeros(len(STRATEGIES) + 1)
    for member in members:
        example = drop_leading_turns(examples[member.dialogue], member.first_turn)
        weights = weigh(example)
        if not weights.any():
            continue
        shared = example.turn_offsets[0] if config.strategy == "shared_prefix" else 0
        groups.setdefault(example.input_ids[:shared].tobytes(), []).append(member)
        tokens += len(example.input_ids)
        trained_tokens += int((weights > 0).sum())
        by_turn = numpy.add.reduceat(weights, example.turn_offsets[:-1])
        weight += numpy.bincount(example.strategies, by_turn, minlength=len(weight))
    if not groups:
        raise InputError("the loss weights leave nothing to train")

    packs, prefixes = [], []
    for prefix, group in groups.items():
        shared = len(prefix) // examples[0].input_ids.itemsize
        made = _pack([_length(examples[number], first) - shared for number, first in group], shared, config)
        packs += [[group[index] for index in pack] for pack in made]
        prefixes += [shared] * len(made)
    result = PackedDataset(examples, packs, prefixes, weigh)
    packed_tokens = sum(map(sum, result.document_lengths))
    left = sum(map(len, packs))
    return result, PackingReport(
        dialogues=len(cuts),
        truncated=sum(member.first_turn > 0 for pack in packs for member in pack),
        dropped=len(cuts) - left,
        packs=len(packs),
        tokens=packed_tokens,
        separate_tokens=tokens,
        trained_tokens=trained_tokens,
        utilisation=packed_tokens / (len(packs) * config.max_length),
        strategies={s.zh: float(weight[s.number] / weight.sum()) for s in STRATEGIES if weight[s.number]},
    )


def _pack(bodies: Sequence[int], shared: int, config: PackingConfig) -> list[list[int]]:
    """The packs of one group, as indices of its members."""
    if config.strategy == "off":
        return [[index] for index in range(len(bodies))]
    return subset_sum_packing(bodies, config.max_length - shared)


def _length(example: TokenizedDialogue, first_turn: int) -> int:
    """Tokens of an example without its turns before `first_turn`."""
    return int(example.turn_offsets[0] + example.turn_offsets[-1] - example.turn_offsets[first_turn])
