"""Batched greedy decoding with a key-value cache that keeps each dialogue from turn to turn."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 64
"""Minimum columns that a full cache grows by. Growing copies the whole cache."""
REFILL_DIVISOR = 8
"""`DialogueCache.step` returns once this fraction (1/8) of the rows is done, since each refill costs a forward pass."""


@dataclass(frozen=True)
class _ForwardLayout:
    """Where the tokens of a forward pass stand in the cache.

    Attributes:
        rows: int64 [batch]; cache rows.
        positions: int64 [batch, width]; cache columns.
        columns: number of columns that attention reads.
        contiguous: whether `rows` is 0, 1, ..., batch - 1, so that a slice replaces a copy.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    columns: int
    contiguous: bool


class _RowsLayer(DynamicLayer):
    """A cache layer with buffers [rows, heads, columns, head size]; column p of a row holds its token at position p.

    Rows have different lengths; the attention mask hides columns after a row's end. The first forward pass fills row 0.
    The layer keeps no tensor but its buffers: a view of old buffers would hold their memory after a resize.
    """

    layout: _ForwardLayout

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        states = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self._buffers = list(states)
            return states
        layout = self.layout
        rows, positions = layout.rows.to(self.device), layout.positions.to(self.device)
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[rows[:, None], :, positions] = new.transpose(1, 2)
        selected = slice(0, len(rows)) if layout.contiguous else rows
        return tuple(buffer[selected, :, : layout.columns] for buffer in self._buffers)

    def resize(self, rows: int, columns: int) -> None:
        """Grow the buffers; a new row is a copy of row 0."""
        if self._buffers[0].shape[0] == rows and self._buffers[0].shape[2] == columns:
            return
        for number, old in enumerate(self._buffers):
            # Zeros, since masked columns must hold finite numbers.
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[:, :, : old.shape[2]] = old[:1]
            new[: len(old), :, : old.shape[2]] = old
            self._buffers[number] = new

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first columns of a row to another row."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]


@dataclass
class _Row:
    """The state of a cache row.

    Attributes:
        dialogue: key of the dialogue.
        ids: prompt and generated tokens.
        num_cached: how many of `ids` are in the cache.
        prompt_length: where the generated tokens start in `ids`.
        active: whether generation is in progress.
    """

    dialogue: Hashable
    ids: list[int]
    num_cached: int
    prompt_length: int = 0
    active: bool = False

    @property
    def num_missing(self) -> int:
        """How many of `ids` are not in the cache."""
        return len(self.ids) - self.num_cached


class DialogueCache:
    """Greedy decoding of many prompts at a time; each has a row of one key-value cache.

    A prompt reuses the cached tokens of its dialogue; only new tokens are computed. A finished row keeps its dialogue
    until another one needs the row.

    The attention of every layer must reach back to the first token and accept a four-dimensional mask.

    Args:
        model: a causal language model; it is not changed.
        prefix_ids: first tokens of every prompt, computed once.
        stop_ids: tokens that end a reply; replies do not include them.
        max_new_tokens: maximum tokens of a reply.
        max_length: maximum tokens of a prompt and its reply; a prompt must be shorter.
        max_width: maximum tokens of a row in a forward pass; more take several.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix_ids: Sequence[int],
        stop_ids: Collection[int],
        max_new_tokens: int,
        max_length: int = sys.maxsize,
        max_width: int = sys.maxsize,
    ):
        self._model, self._prefix_ids = model, list(prefix_ids)
        self._stop_ids, self._max_new_tokens = stop_ids, max_new_tokens
        self._max_length, self._max_width = max_length, max_width
        self._cache: Any = Cache(layer_class_to_replicate=_RowsLayer)
        ids = torch.tensor([self._prefix_ids], device=model.device)
        model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._rows = [_Row(None, self._prefix_ids, len(prefix_ids))]
        self._columns = len(prefix_ids)

    def add(self, dialogues: Sequence[Hashable], prompts: Sequence[list[int]]) -> list[int]:
        """Assign each prompt to an inactive row, or to a new row if there are too few.

        Args:
            dialogues: key of each prompt's dialogue.

        Returns:
            The row of each prompt.
        """
        free = [number for number, row in enumerate(self._rows) if not row.active]
        while len(free) < len(dialogues):
            free.append(len(self._rows))
            self._rows.append(_Row(None, self._prefix_ids, len(self._prefix_ids)))
        holders = defaultdict(list)
        for number, row in enumerate(self._rows):
            holders[row.dialogue].append(number)
        own: list[int | None] = []
        for dialogue in dialogues:
            own.append(next((number for number in holders[dialogue] if number in free), None))
            if own[-1] is not None:
                free.remove(own[-1])
        self._reserve(max(map(len, prompts), default=0))
        taken = []
        for row, dialogue, prompt in zip(own, dialogues, prompts, strict=True):
            number = source = free.pop(0) if row is None else row
            if row is None:
                # All rows of the dialogue are active: copy the longest.
                source = max(holders[dialogue], key=lambda holder: self._rows[holder].num_cached, default=number)
            held = self._rows[source]
            # The last token is always computed, for the next token's logits.
            kept = min(common_prefix_length(held.ids[: held.num_cached], prompt), len(prompt) - 1)
            if source != number:
                for layer in self._cache.layers:
                    layer.copy(source, number, kept)
            self._rows[number] = _Row(dialogue, list(prompt), kept, len(prompt), True)
            taken.append(number)
        return taken

    def step(self) -> dict[int, list[int]]:
        """Generate tokens until a fraction of the active rows is done (see `REFILL_DIVISOR`).

        Returns:
            The reply of each row that is done.
        """
        active = {number for number, row in enumerate(self._rows) if row.active}
        enough = max(1, len(active) // REFILL_DIVISOR)
        done = {}
        while len(done) < enough:
            # First only the rows with a new prompt.
            rows = [number for number in sorted(active) if self._rows[number].num_missing > 1]
            rows = rows or self._rows_to_feed(active)
            for number, token in zip(rows, self._forward(rows), strict=True):
                row = self._rows[number]
                if not row.active or row.num_missing:
                    continue
                if token not in self._stop_ids:
                    row.ids.append(token)
                full = len(row.ids) == min(row.prompt_length + self._max_new_tokens, self._max_length)
                if full or token in self._stop_ids:
                    row.active = False
                    active.discard(number)
                    done[number] = row.ids[row.prompt_length :]
        return done

    def _rows_to_feed(self, active: set[int]) -> list[int]:
        """All rows up to the last active one, which avoids a copy; only the active ones if those are under half."""
        rows = max(active) + 1
        return list(range(rows)) if 2 * len(active) >= rows else sorted(active)

    def _forward(self, rows: Sequence[int]) -> list[int]:
        """Compute the next tokens of these rows that are not cached, up to `max_width` of each.

        Returns:
            The likeliest next token of each row.
        """
        held = [self._rows[number] for number in rows]
        device = self._model.device
        width = min(self._max_width, max(1, *(row.num_missing for row in held)))
        ends = [min(len(row.ids), row.num_cached + width) for row in held]
        self._reserve(max(ends))
        # No padding: a row with fewer new tokens computes cached ones again, with the same result. A row shorter than
        # `width` repeats its first token.
        offsets = torch.arange(-width, 0, device=device)
        positions = (torch.tensor(ends, device=device)[:, None] + offsets).clamp(min=0)
        ids = [
            row.ids[:1] * (width - end) + row.ids[max(0, end - width) : end]
            for row, end in zip(held, ends, strict=True)
        ]
        contiguous = rows == list(range(len(rows)))
        layout = _ForwardLayout(torch.tensor(rows, device=device), positions, max(ends), contiguous)
        for layer in self._cache.layers:
            layer.layout = layout
        hidden = torch.arange(layout.columns, device=device) > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=device)
        logits = self._model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask.masked_fill_(hidden, torch.finfo(mask.dtype).min),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for row, end in zip(held, ends, strict=True):
            row.num_cached = end
        return logits.argmax(-1).tolist()

    def _reserve(self, columns: int) -> None:
        """Make room for all rows with this many columns."""
        if columns > self._columns:
            self._columns = columns + max(GROWTH, columns // 2)
        for layer in self._cache.layers:
            layer.resize(len(self._rows), self._columns)


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the start that two sequences share."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:  # the usual case, and much faster
        return length
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
