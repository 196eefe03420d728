"""A key-value cache of several dialogues that grow, each by other tokens, and share their beginning."""

import itertools
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Columns by which a cache grows beyond what is needed, since growing it copies all of it."""


class _GrowingLayer(DynamicLayer):
    """A layer with room for more tokens; `DynamicLayer` would copy all that is cached for each of them.

    `keys` and `values`, [rows, heads, columns, head size], are the used part of the buffers.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._buffers = [states[:, :, :0] for states in new]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [
                torch.cat([old[:, :, :start], states, states[:, :, :1].expand(-1, -1, ROOM, -1)], dim=2)
                for old, states in zip(self._buffers, new, strict=True)
            ]
        else:
            for buffer, states in zip(self._buffers, new, strict=True):
                buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def fill(self, parts: "Sequence[tuple[DynamicLayer, _Move]]", rows: int, columns: int) -> None:
        """Take `rows` rows of `columns` columns over from other layers."""
        some = parts[0][0]
        self.lazy_initialization(some.keys, some.values)
        # Zeros, since what stands in a masked column must be a number.
        self._buffers = [
            states.new_zeros(rows, states.shape[1], columns + ROOM, states.shape[3])
            for states in (some.keys, some.values)
        ]
        for layer, move in parts:
            places, index, taken = (each.to(layer.device) for each in (move.places, move.rows, move.columns))
            for buffer, states in zip(self._buffers, (layer.keys, layer.values), strict=True):
                part = states[index[:, None], :, taken].transpose(1, 2)
                buffer[places, :, columns - taken.shape[1] : columns] = part
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)


@dataclass(frozen=True)
class _Move:
    """Which rows go where: row `rows[i]` to `places[i]`, of it the `columns[i]`, which come to stand at the end."""

    rows: torch.Tensor
    places: torch.Tensor
    columns: torch.Tensor


@dataclass
class _Batch:
    """Rows that go through the model together.

    Attributes:
        mask: bool [rows, columns]; in which columns a row has a token.
        ids: of each row, the tokens that are cached.
    """

    cache: Cache
    mask: torch.Tensor
    ids: list[list[int]]


class DialogueCache:
    """The cache of a batch of rows, each a dialogue, that are brought from prompt to prompt.

    What a prompt has in common with what is cached of its dialogue is kept, the rest is computed. Rows are ragged: the
    columns in which a row has no token are masked, and positions count its tokens, not columns. A dialogue that is not
    in the next batch is forgotten, so that no more is cached than two batches take.

    The attention of every layer must reach back to the first token: sliding windows would count masked columns.

    Args:
        model: a causal model; nothing of it is changed.
        prefix: ids with which every prompt begins; they are computed once.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int]):
        self._model = model
        mask = torch.ones(1, 0, dtype=torch.bool, device=model.device)
        self._prefix = _Batch(Cache(layer_class_to_replicate=_GrowingLayer), mask, [[]])
        self._feed(self._prefix, [prefix])
        self._rows: dict[Hashable, tuple[_Batch, int]] = {}

    def generate(
        self,
        names: Sequence[Hashable],
        prompts: Sequence[Sequence[int]],
        stops: Collection[int],
        most: Sequence[int],
    ) -> tuple[list[list[int]], list[bool]]:
        """Continue prompts greedily until half of them have ended.

        The others go on in the next call, with what they have so far at the end of their prompts: in place of those
        that have ended, others can begin there, so that few steps are made for few rows.

        Args:
            names: of the dialogue of each prompt.
            stops: tokens that end a continuation; they are left out.
            most: for each prompt, the largest number of tokens to generate.

        Returns:
            The continuations, and which of them have ended.
        """
        sources = [self._rows.get(name, (self._prefix, 0)) for name in names]
        # The last token is always computed, for its logits.
        kept = [
            min(_common(batch.ids[row], prompt), len(prompt) - 1)
            for (batch, row), prompt in zip(sources, prompts, strict=True)
        ]
        batch = self._select(sources, kept)
        self._rows = {name: (batch, row) for row, name in enumerate(names)}
        logits = self._feed(batch, [prompt[length:] for prompt, length in zip(prompts, kept, strict=True)])
        generated: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        while True:
            for row, token in enumerate(logits.argmax(-1).tolist()):
                if row in going and token not in stops:
                    generated[row].append(token)
                if token in stops or len(generated[row]) == most[row]:
                    going.discard(row)
            if 2 * len(going) <= len(prompts):
                return generated, [row not in going for row in range(len(prompts))]
            logits = self._feed(batch, [generated[row][-1:] if row in going else [] for row in range(len(prompts))])

    def _select(self, sources: Sequence[tuple[_Batch, int]], kept: Sequence[int]) -> _Batch:
        """A batch whose row i is the first `kept[i]` tokens of the dialogue that `sources[i]` is a row of."""
        device, width = self._prefix.mask.device, max(kept)
        lengths = torch.tensor(kept, device=device)
        mask = torch.zeros(len(kept), width, dtype=torch.bool, device=device)
        moves = []
        for batch in {id(batch): batch for batch, _ in sources}.values():
            places = torch.tensor([place for place, source in enumerate(sources) if source[0] is batch], device=device)
            rows = torch.tensor([row for source, row in sources if source is batch], device=device)
            valid = batch.mask[rows]
            valid &= valid.cumsum(1) <= lengths[places, None]
            # Columns that nobody uses are left out: those of a row that it uses come last, in their order.
            columns = valid.int().argsort(dim=1, stable=True)[:, -width:]
            mask[places, width - columns.shape[1] :] = valid.gather(1, columns)
            moves.append((batch, _Move(rows, places, columns)))
        layers = []
        for number in range(len(self._prefix.cache.layers)):
            layers.append(_GrowingLayer())
            layers[-1].fill([(batch.cache.layers[number], move) for batch, move in moves], len(kept), width)
        ids = [batch.ids[row][:length] for (batch, row), length in zip(sources, kept, strict=True)]
        return _Batch(Cache(layers=layers), mask, ids)

    def _feed(self, batch: _Batch, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append tokens to the rows. Returns the logits behind the last column, [rows, vocabulary]."""
        width = max(map(len, tokens))
        device = batch.mask.device
        # Padding on the left, so that every row ends in the same column; a pad is masked, so any token will do.
        input_ids = torch.tensor([[0] * (width - len(new)) + list(new) for new in tokens], device=device)
        new = torch.tensor([[False] * (width - len(new)) + [True] * len(new) for new in tokens], device=device)
        batch.mask = torch.cat([batch.mask, new], dim=1)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0)[:, -width:],
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for ids, more in zip(batch.ids, tokens, strict=True):
            ids += more
        return logits


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
