"""Greedy decoding of dialogues that grow, each by other tokens, and share their beginning."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 64
"""Columns by which a cache grows beyond what is needed, since growing it copies all of it."""
REFILL_DIVISOR = 8
"""New prompts wait until one row in so many is free: each batch of them is a forward of its own."""


@dataclass(frozen=True)
class _Step:
    """Where the tokens of a forward stand.

    Attributes:
        rows: int64 [batch]; those of the cache.
        positions: int64 [batch, width].
        columns: how many columns any token looks at.
        first: whether the rows are the first ones in order, which are then not copied.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    columns: int
    first: bool


class _RowsLayer(DynamicLayer):
    """A layer in whose buffers, [rows, heads, columns, head size], column p holds a row's token at position p.

    Rows may thus be of any lengths; what is left over behind the end of one is masked. The first forward makes row 0.
    Only the buffers are kept: what a forward looked at would hold on to the old ones when they grow.
    """

    step: _Step

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        states = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self._buffers = list(states)
            return states
        step = self.step
        rows, positions = (each.to(self.device) for each in (step.rows, step.positions))
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[rows[:, None], :, positions] = new.transpose(1, 2)
        shown = slice(0, len(rows)) if step.first else rows
        return tuple(buffer[shown, :, : step.columns] for buffer in self._buffers)

    def resize(self, rows: int, columns: int) -> None:
        """Grow to so many; a new row begins as a copy of row 0."""
        if self._buffers[0].shape[0] == rows and self._buffers[0].shape[2] == columns:
            return
        for number, old in enumerate(self._buffers):
            # Zeros, since what stands in a masked column must be a number.
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[:, :, : old.shape[2]] = old[:1]
            new[: len(old), :, : old.shape[2]] = old
            self._buffers[number] = new

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin as another one does."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]


@dataclass
class _Row:
    """What a row of the cache holds.

    Attributes:
        name: of the dialogue.
        ids: its prompt and what is generated so far.
        computed: how many of the ids are cached.
        start: where the continuation begins in `ids`.
        going: whether it has yet to end.
    """

    name: Hashable
    ids: list[int]
    computed: int
    start: int = 0
    going: bool = False


class DialogueCache:
    """Continues prompts greedily, many at a time, each in a row of its own of one key-value cache.

    What a prompt has in common with what is cached of its dialogue is kept, the rest is computed. A row whose
    continuation has ended holds its dialogue until it is needed for another one.

    The attention of every layer must reach back to the first token and take a mask of four dimensions.

    Args:
        model: a causal model; nothing of it is changed.
        prefix: ids with which every prompt begins; they are computed once.
        stops: tokens that end a continuation; they are left out.
        most: the largest number of tokens to generate.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], stops: Collection[int], most: int):
        self._model, self._prefix, self._stops, self._most = model, list(prefix), stops, most
        self._cache = Cache(layer_class_to_replicate=_RowsLayer)
        ids = torch.tensor([self._prefix], device=model.device)
        model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._rows = [_Row(None, self._prefix, len(prefix))]
        self._columns = len(prefix)

    def add(self, names: Sequence[Hashable], prompts: Sequence[list[int]]) -> list[int]:
        """Put prompts into free rows, and into new ones where there are too few.

        Args:
            names: of the dialogue of each prompt.

        Returns:
            The row of each prompt.
        """
        free = [number for number, row in enumerate(self._rows) if not row.going]
        while len(free) < len(names):
            free.append(len(self._rows))
            self._rows.append(_Row(None, self._prefix, len(self._prefix)))
        holders = defaultdict(list)
        for number, row in enumerate(self._rows):
            holders[row.name].append(number)
        own = {}
        for place, name in enumerate(names):
            own[place] = next((number for number in holders[name] if number in free), None)
            if own[place] is not None:
                free.remove(own[place])
        self._reserve(max(map(len, prompts), default=0))
        taken = []
        for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            number = source = own[place]
            if number is None:
                number = free.pop(0)
                # What a dialogue has in other rows, all of them going, is copied from the longest.
                source = max(holders[name], key=lambda holder: self._rows[holder].computed, default=number)
            self._take(number, source, name, prompt)
            taken.append(number)
        return taken

    def _take(self, number: int, source: int, name: Hashable, prompt: list[int]) -> None:
        """Put a prompt into a row, with what it has in common with a row."""
        held = self._rows[source]
        # The last token is always computed, for what comes next.
        kept = min(_common(held.ids[: held.computed], prompt), len(prompt) - 1)
        if source != number:
            for layer in self._cache.layers:
                layer.copy(source, number, kept)
        self._rows[number] = _Row(name, list(prompt), kept, len(prompt), True)

    def step(self) -> dict[int, list[int]]:
        """Generate until a share of the continuations has ended.

        Returns:
            Those, by row.
        """
        going = {number for number, row in enumerate(self._rows) if row.going}
        enough = max(1, len(going) // REFILL_DIVISOR)
        fed = [number for number in sorted(going) if len(self._rows[number].ids) - self._rows[number].computed > 1]
        ended = {}
        while len(ended) < enough:
            fed = fed or self._together(going)
            for number, token in zip(fed, self._feed(fed), strict=True):
                row = self._rows[number]
                if not row.going:
                    continue
                if token not in self._stops:
                    row.ids.append(token)
                if token in self._stops or len(row.ids) - row.start == self._most:
                    row.going = False
                    going.discard(number)
                    ended[number] = row.ids[row.start :]
            fed = []
        return ended

    def _together(self, going: set[int]) -> list[int]:
        """The rows to feed for the next token of some: all up to the last one, which are not copied, unless few go."""
        rows = max(going) + 1
        return list(range(rows)) if 2 * len(going) >= rows else sorted(going)

    def _feed(self, rows: Sequence[int]) -> list[int]:
        """Compute what is not yet cached of rows. Returns the likeliest next token of each."""
        held = [self._rows[number] for number in rows]
        device = self._model.device
        width = max(1, *(len(row.ids) - row.computed for row in held))
        ends = [len(row.ids) for row in held]
        self._reserve(max(ends))
        # Nothing is padded: where fewer tokens are new, the ones before them are computed again, to no effect; in a row
        # that is shorter altogether the first one is.
        offsets = torch.arange(-width, 0, device=device)
        positions = (torch.tensor(ends, device=device)[:, None] + offsets).clamp(min=0)
        ids = [row.ids[:1] * (width - len(row.ids)) + row.ids[-width:] for row in held]
        step = _Step(torch.tensor(rows, device=device), positions, max(ends), rows == list(range(len(rows))))
        for layer in self._cache.layers:
            layer.step = step
        hidden = torch.arange(step.columns, device=device) > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=device)
        logits = self._model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask.masked_fill_(hidden, torch.finfo(mask.dtype).min),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for row in held:
            row.computed = len(row.ids)
        return logits.argmax(-1).tolist()

    def _reserve(self, columns: int) -> None:
        """Have room for all rows, of so many columns."""
        if columns > self._columns:
            self._columns = columns + max(GROWTH, columns // 2)
        for layer in self._cache.layers:
            layer.resize(len(self._rows), self._columns)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:  # nearly always, and much faster
        return length
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
