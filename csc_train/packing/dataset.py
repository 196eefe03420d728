"""Pack tokenized dialogues, and the dataset that assembles a pack when it is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch

from csc_train.data.mixture import Mixture
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.packing.bin_packing import subset_sum_packing
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.loss_weights import LossWeights, count_token_types, count_trained_turns
from csc_train.packing.pack_cost import PackSlice
from csc_train.packing.ragged import Ragged, offsets_of
from csc_train.packing.token_groups import token_group_ids
from csc_train.packing.truncation import drop_leading_turns, num_turns_to_truncate
from csc_train.template.dialogue_template import TokenizedDialogue


@dataclass(frozen=True)
class PackingReport:
    """Statistics of packed dialogues; lengths in tokens."""

    dialogues: int
    truncated: int
    dropped: int
    packs: int
    tokens: int
    """Tokens in the packs; a shared prefix counts once in each pack."""
    separate_tokens: int
    """Tokens of the same dialogues, each with its own prefix."""
    trained_tokens: int
    utilization: float
    """Tokens over the capacity of the packs."""
    strategies: dict[str, float]
    """Share of the sum of loss weights, by strategy."""
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a mix: by source its `dialogues`, how many times an epoch goes over them (`epochs`), the `tokens` of its turns
    in an epoch, and its shares of all dialogues and tokens (`dialogue_share`, `token_share`)."""
    unused: int = 0
    """Dialogues that a mix leaves out of an epoch."""

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.strategies.items())
        sources = "".join(
            f"; source {name}: {each['dialogues']:,} dialogues, {each['epochs']:.2f} times in an epoch, "
            f"{each['token_share']:.1%} of the tokens, {each['dialogue_share']:.1%} of the dialogues"
            for name, each in self.sources.items()
        )
        unused = f", {self.unused} not in an epoch" if self.unused else ""
        return (
            f"{self.dialogues - self.dropped - self.unused} dialogues ({self.truncated} truncated, {self.dropped} "
            f"dropped{unused}) in {self.packs} packs, {self.tokens:,} tokens "
            f"({self.tokens / self.separate_tokens:.3f} of the unpacked), {self.trained_tokens:,} trained "
            f"({self.trained_tokens / self.tokens:.1%}), utilization {self.utilization:.4f}; share of the "
            f"loss by strategy: {shares or 'none'}{sources}"
        )


class PackedItem(NamedTuple):
    """A dialogue of a pack: its index, its first turn that is kept, and its length without the turns before."""

    dialogue: int
    first_turn: int
    length: int


class PackedDataset(torch.utils.data.Dataset):
    """Packs of tokenized dialogues, each assembled when it is read.

    Attributes:
        dialogues: the tokenized dialogues.
        pack_items: by pack, its dialogues in order.
        prefix_lengths: by pack, the length of the prefix that its dialogues share; 0 for none.
        document_lengths: by pack, the lengths of its documents in order; a shared prefix is the first document.
        loss_weights: computes the loss weights of a dialogue.
        mixture: the sources of the dialogues, if there are several.
    """

    def __init__(
        self,
        dialogues: Sequence[TokenizedDialogue],
        pack_items: Sequence[Sequence[PackedItem]],
        prefix_lengths: list[int],
        loss_weights: LossWeights,
        mixture: Mixture | None = None,
    ):
        self.dialogues, self.loss_weights, self.mixture = dialogues, loss_weights, mixture
        self.pack_items, self.prefix_lengths = Ragged.of(pack_items, PackedItem._make), prefix_lengths
        first, prefixes = self.pack_items.offsets[:-1], numpy.array(prefix_lengths)
        shared = prefixes > 0
        lengths = self.pack_items.values[:, 2] - prefixes.repeat(self.pack_items.lengths)
        self.document_lengths = Ragged(
            numpy.insert(lengths, first[shared], prefixes[shared]), self.pack_items.offsets + offsets_of(shared)
        )

    def __len__(self) -> int:
        return len(self.pack_items)

    def __getitem__(self, part: PackSlice | int | None) -> dict[str, Any]:
        """A pack, a slice of one, or for None a row of one token that is not trained.

        Returns:
            `input_ids` (int32), `loss_weights` (float32) and `token_groups` (int16, see `packing.token_groups`; 0 where
            the weight is 0), each [length]; `document_lengths` (int32 [documents]); `prefix_length` (int), the length
            of the first document if the others share it, else 0. The row of one token has the key `empty`.
        """
        if part is None:
            return {
                "input_ids": self.dialogues[0].input_ids[:1],
                "loss_weights": numpy.zeros(1, numpy.float32),
                "token_groups": numpy.zeros(1, numpy.int16),
                "document_lengths": [1],
                "prefix_length": 0,
                "empty": True,
            }
        if not isinstance(part, PackSlice):
            part = PackSlice(range(len(self))[part], 0, len(self.pack_items[part]))
        prefix = self.prefix_lengths[part.pack]
        ids, weights, groups = [], [], []
        for item in self.pack_items[part.pack][part.start : part.stop]:
            dialogue = drop_leading_turns(self.dialogues[item.dialogue], item.first_turn)
            if prefix and not ids:
                ids.append(dialogue.input_ids[:prefix])
                weights.append(numpy.zeros(prefix, numpy.float32))
                groups.append(numpy.zeros(prefix, numpy.int16))
            ids.append(dialogue.input_ids[prefix:])
            weights.append(self.loss_weights(dialogue)[prefix:])
            source = self.mixture.members[dialogue.id][0] if self.mixture else 0
            groups.append(token_group_ids(dialogue, item.first_turn, source)[prefix:])
        weight = numpy.concatenate(weights)
        return {
            "input_ids": numpy.concatenate(ids),
            "loss_weights": weight,
            "token_groups": numpy.where(weight > 0, numpy.concatenate(groups), 0),
            "document_lengths": numpy.array([len(each) for each in ids], dtype=numpy.int32),
            "prefix_length": prefix,
        }


def pack_dialogues(
    dialogues: Sequence[TokenizedDialogue],
    config: PackingConfig,
    loss: LossConfig | LossWeights | None = None,
    language: str = "zh",
    mixture: Mixture | None = None,
) -> tuple[PackedDataset, PackingReport]:
    """Fit dialogues to `config.max_length`, choose those of an epoch, weight their tokens and pack them.

    Of several prefixes, those are shared whose dialogues fill a pack.

    Args:
        loss: how tokens are weighted (defaults to `LossConfig()`), or the weights of other dialogues: validation
            dialogues are weighted by the training set's factors.
        language: of the strategies' names in the statistics.
        mixture: of the dialogues, which says how often each is in the packs; None takes each once.

    Returns:
        The packs and their statistics. A dialogue without a positive loss weight counts as dropped.

    Raises:
        InputError: as `num_turns_to_truncate` and `Mixture.choose`; or nothing is left to train on.
    """
    kept, prefixes = [], {}
    for number, dialogue in enumerate(dialogues):
        first = num_turns_to_truncate(dialogue, config, number + 1)
        if first is not None:
            dialogue = drop_leading_turns(dialogue, first)
            shared = dialogue.turn_offsets[0] if config.strategy == "shared_prefix" else 0
            prefix = dialogue.input_ids[:shared].tobytes()
            prefix = prefixes.setdefault(prefix, prefix)  # one copy of equal ones
            item = PackedItem(number, first, len(dialogue.input_ids))
            kept.append((item, prefix, count_token_types(dialogue), dialogue.strategies, dialogue.id))
    if not kept:
        raise InputError(
            f"none of the {len(dialogues)} dialogues fits packing.max_length={config.max_length}: raise it"
        )
    unused = 0
    if mixture:
        sizes = [int(types.sum()) for _, _, types, *_ in kept]
        chosen = mixture.choose([each[-1] for each in kept], sizes)
        unused, kept = len(kept) - len({*chosen}), [kept[index] for index in chosen]
    if not isinstance(loss, LossWeights):
        turns = sum(count_trained_turns(types, strategies) for _, _, types, strategies, _ in kept)
        loss = LossWeights(loss or LossConfig(), turns)

    groups: dict[bytes, list[PackedItem]] = {}
    trained_tokens, taken = 0, []
    by_strategy = numpy.zeros(len(STRATEGIES) + 1)
    for item, prefix, types, strategies, name in kept:
        weights = loss.token_weights_by_turn(types, strategies)
        if weights.any(where=types > 0):
            groups.setdefault(prefix, []).append(item)
            if mixture:
                taken.append((mixture.members[name][0], item.dialogue, int(types.sum())))
            trained_tokens += int(types[weights > 0].sum())
            by_strategy += numpy.bincount(strategies, (types * weights).sum(axis=1), minlength=len(by_strategy))
    if not groups:
        raise InputError(
            "the loss weights leave no trained token: raise loss.strategy_weight, reply_weight or strategy_factors"
        )

    parts, sizes, prefix_lengths = [], [], []
    for prefix, items in _shareable(groups, config.max_length).items():
        shared, entries = len(prefix) // dialogues[0].input_ids.itemsize, numpy.array(items)
        packs = _pack(entries[:, 2] - shared, config.max_length - shared, config.strategy)
        parts.append(entries[packs.values])
        sizes.append(packs.lengths)
        prefix_lengths += [shared] * len(packs)
    items = numpy.concatenate(parts)
    pack_items = Ragged(items, offsets_of(numpy.concatenate(sizes)), PackedItem._make)
    packed = PackedDataset(dialogues, pack_items, prefix_lengths, loss, mixture)
    tokens = int(packed.document_lengths.values.sum())
    return packed, PackingReport(
        dialogues=len(dialogues),
        truncated=len(numpy.unique(items[items[:, 1] > 0, 0])),
        dropped=len(dialogues) - unused - len(numpy.unique(items[:, 0])),
        packs=len(packed),
        tokens=tokens,
        separate_tokens=int(items[:, 2].sum()),
        trained_tokens=trained_tokens,
        utilization=tokens / (len(packed) * config.max_length),
        strategies={
            s.name(language): float(by_strategy[s.number] / by_strategy.sum())
            for s in STRATEGIES
            if by_strategy[s.number]
        },
        sources=_source_shares(mixture, taken) if mixture else {},
        unused=unused,
    )


def _shareable(groups: dict[bytes, list[PackedItem]], max_length: int) -> dict[bytes, list[PackedItem]]:
    """The dialogues by the prefix that they share; of several prefixes, those that do not fill a pack are not shared,
    since their packs would be half empty."""
    if len(groups) < 2:
        return groups
    shared: dict[bytes, list[PackedItem]] = {}
    for prefix, items in groups.items():
        fills = sum(item.length for item in items) >= max_length
        shared.setdefault(prefix if fills else b"", []).extend(items)
    return shared


def _source_shares(mixture: Mixture, taken: list[tuple[int, int, int]]) -> dict[str, dict[str, float]]:
    """`PackingReport.sources` of the dialogues of an epoch: their sources, numbers and tokens.

    Raises:
        InputError: a source has none.
    """
    shares, (sources, numbers, tokens) = {}, numpy.array(taken).T
    for source, name in enumerate(mixture.names):
        own = sources == source
        if not own.any():
            raise InputError(
                f"data.mix: the loss weights leave no trained token of {name}: raise loss.reply_weight, or take {name} "
                "out of the mix"
            )
        times, distinct = int(own.sum()), len(numpy.unique(numbers[own]))
        shares[name] = {
            "dialogues": distinct,
            "epochs": times / distinct,
            "tokens": int(tokens[own].sum()),
            "token_share": float(tokens[own].sum() / tokens.sum()),
            "dialogue_share": times / len(taken),
        }
    return shares


def _pack(lengths: numpy.ndarray, capacity: int, strategy: str) -> Ragged:
    """The packs of dialogues that share a prefix, as their indices; lengths without the prefix."""
    if strategy == "off":
        return Ragged(numpy.arange(len(lengths)), numpy.arange(len(lengths) + 1))
    return subset_sum_packing(lengths, capacity)
