"""Batched greedy decoding with a key-value cache that keeps each dialogue from turn to turn."""

import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from csc_train.models.attention.gated_delta_net import (
    DeltaCacheLayer,
    DeltaStates,
    build_levels,
    level_inputs,
    prepare_delta_nets,
)
from csc_train.models.families import LINEAR_ATTENTION

GROWTH = 64
"""Minimum columns that a full cache grows by. Growing copies the whole cache."""

MULTIPLE = 16
"""In half precision on a CPU, more tokens of a forward pass are filled up to a multiple of it, and so are the rows of
logits: oneDNN compiles a product for each number of tokens, which takes some 20 times as long as a small product."""

NUM_MARKS = 4
"""Lengths that a `RewindableCache` can go back to besides its own, in a model whose states cannot be cut back."""


class _Attended(NamedTuple):
    """Cache rows whose attention is computed together. Of tuples, accelerate moves tensors to a layer's device.

    Attributes:
        tokens: of the forward pass.
        rows: the cache rows; a slice replaces a copy.
        places: int64 [tokens]; the place of each token among rows x width, row after row; None if they fill all.
        mask: [rows, 1, width x groups, columns behind the shared ones]; what is added to the scores of queries that
            share a key-value head. Of one token a row, [rows, 1, 1, columns behind the shared ones].
    """

    tokens: slice
    rows: slice | torch.Tensor
    places: torch.Tensor | None
    mask: torch.Tensor


class _ForwardLayout(NamedTuple):
    """Where the tokens of a forward pass stand in the cache: row after row, without padding.

    Attributes:
        rows: int64 [tokens]; cache rows.
        columns: int64 [tokens]; cache columns.
        shared: how many columns are the same in all rows, and seen by all tokens.
        attended: what attention reads behind them.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    shared: int
    attended: list[_Attended]


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cache_layout: _ForwardLayout,
    scaling: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention of tokens from several rows of a `DialogueCache`, for `AttentionInterface`.

    Queries that share a key-value head read it once, and few rows are copied. All queries read the shared columns once;
    the two outputs are combined by their sums of exponentials.

    Args:
        query: [1, heads, tokens, head size].
        key: the layer's buffer, [rows, key-value heads, columns, head size]; so is `value`.

    Returns:
        The output, [1, tokens, heads, head size].
    """
    shared, groups = cache_layout.shared, query.shape[1] // key.shape[1]
    # Copied once, so that those of any tokens are views: [key-value heads, tokens, groups, head size].
    queries = query[0].unflatten(0, (-1, groups)).transpose(1, 2).contiguous()
    outputs = [torch.zeros_like(queries)]
    if shared:
        outputs.append(queries.new_empty(*queries.shape[:3], 1, dtype=torch.float32))
    for tokens, rows, places, mask in cache_layout.attended:
        own, width = queries[:, tokens], max(1, mask.shape[2] // groups)
        if places is not None:
            shape = len(own), len(mask) * width, *own.shape[2:]
            own = own.new_zeros(shape).index_copy_(1, places, own)
        columns = slice(shared, shared + mask.shape[-1])
        parts = _attention(own, key[rows, :, columns], value[rows, :, columns], mask, scaling, shared > 0)
        for output, found in zip(outputs, parts, strict=True):
            output[:, tokens] = found if places is None else found.index_select(1, places)
    output = outputs[0]
    if shared:
        prefix, logs = _attention(queries, key[:1, :, :shared], value[:1, :, :shared], None, scaling, sums=True)
        output = prefix.lerp(output, (outputs[1] - logs).sigmoid().to(output.dtype))
    return output.transpose(0, 1).flatten(1, 2)[None], None


def _attention(
    queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
    sums: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Attention of queries [key-value heads, rows x width, groups, head size].

    Returns:
        The output, of the same form; and with `sums` the logarithms of the sums of exponentials, float32
        [key-value heads, rows x width, groups, 1].
    """
    (heads, tokens, groups, size), rows = queries.shape, len(key)
    folded = queries.view(heads, rows, -1, groups, size).transpose(0, 1).flatten(2, 3)
    if sums:
        output, logs = _attention_and_sums(folded, key, value, attn_mask=mask, scale=scale)
        found = [output, logs[..., None]]
    else:
        found = [F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)]
    return [each.transpose(0, 1).reshape(heads, tokens, groups, -1) for each in found]


_attention_and_sums: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
APART = ("cpu",)
"""Types of devices on which each row's new prompt is attended to alone, so that none is padded, replies in progress in
groups of like lengths, and in float32 the prefix once for all rows; others wait longer for many small products than for
padding."""
CALL_COLUMNS = 1500
"""Columns of one row that a CPU attends to in the time that a small attention call takes."""
CACHED_ATTENTION = "cached_rows"
"""The implementation that a model takes for the forward passes of a `DialogueCache`."""
AttentionInterface.register(CACHED_ATTENTION, cached_attention)


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
        rows, columns = self.layout.rows.to(self.device), self.layout.columns.to(self.device)
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[rows, :, columns] = new[0].transpose(0, 1)[: len(rows)]  # without the filling
        return tuple(self._buffers)

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


class _StatesLayer(DeltaCacheLayer):
    """A cache layer of a gated delta net: states in slots.

    Slot 0 is that of the prefix. Row r has two: slot 2r + 1 at the end of its prompt, slot 2r + 2 in its reply.

    Attributes:
        sources: int64 [states]; the slots that the segments of the next forward pass continue.
        targets: int64 [segments]; the slots that take the states at their ends.
    """

    sources: torch.Tensor
    targets: torch.Tensor

    def __init__(self):
        self._slots: DeltaStates | None = None

    def begin(self) -> DeltaStates | None:
        return self._slots and DeltaStates(
            *(slots.index_select(0, self.sources.to(slots.device)) for slots in self._slots)
        )

    def end(self, states: DeltaStates) -> None:
        if self._slots is None:
            self._slots = states
            return
        for slots, new in zip(self._slots, states, strict=True):
            slots.index_copy_(0, self.targets.to(slots.device), new.to(slots.dtype))

    def resize(self, rows: int, _: int) -> None:
        """Add the slots of new rows."""
        if self._slots is not None and (missing := 2 * rows + 1 - len(self._slots.recurrent)):
            self._slots = DeltaStates(
                *(torch.cat([slots, slots.new_zeros(missing, *slots.shape[1:])]) for slots in self._slots)
            )

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a state to another slot."""
        for slots in self._slots or ():
            slots[target] = slots[source]


@dataclass
class _Row:
    """The state of a cache row.

    Attributes:
        dialogue: key of the dialogue.
        ids: prompt and generated tokens.
        num_cached: how many of `ids` are in the cache.
        prompt_length: where the generated tokens start in `ids`.
        active: whether generation is in progress.
        slots: by number of tokens, the slot of `_StatesLayer` that holds the state behind them; -1 behind none.
    """

    dialogue: Hashable
    ids: list[int]
    num_cached: int
    slots: dict[int, int]
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

    The attention of every layer must reach back to the first token and accept a four-dimensional mask. The state of a
    gated delta net cannot be cut back: a prompt continues the longest state that it begins with, which may be that in
    the dialogue's last reply, at the end of the last prompt, or behind `prefix_ids`.

    Args:
        model: a causal language model; its gated delta nets are prepared, otherwise it is not changed.
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
        prepare_delta_nets(model)
        self._config: Any = model.config.get_text_config()
        config = self._config
        self._groups = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
        kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        self._cache: Any = Cache([_StatesLayer() if kind == LINEAR_ATTENTION else _RowsLayer() for kind in kinds])
        self._attention = [layer for layer in self._cache.layers if isinstance(layer, _RowsLayer)]
        self._delta_nets = [layer for layer in self._cache.layers if isinstance(layer, _StatesLayer)]
        ids = torch.tensor([self._prefix_ids], device=model.device)
        levels = self._levels([(range(len(prefix_ids)), -1, 0)])
        model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **levels)
        self._rows = [self._new_row()]
        self._columns = len(prefix_ids)
        self._reserve(self._columns)

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
            self._rows.append(self._new_row())
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
                # All rows of the dialogue are active: copy the one that most can be kept of.
                source = max(holders[dialogue], key=lambda holder: self._num_kept(holder, prompt), default=number)
            kept = self._num_kept(source, prompt)
            slots = {length: slot for length, slot in self._rows[source].slots.items() if length <= kept}
            if source != number:
                slots = self._copy(source, number, kept, slots)
            self._rows[number] = _Row(dialogue, list(prompt), kept, slots, len(prompt), True)
            taken.append(number)
        return taken

    def _new_row(self) -> _Row:
        return _Row(None, self._prefix_ids, len(self._prefix_ids), {0: -1, len(self._prefix_ids): 0})

    def _num_kept(self, number: int, prompt: list[int]) -> int:
        """How many tokens of a prompt need not be computed in a row, or in a copy of it."""
        row = self._rows[number]
        # The last token is always computed, for the next token's logits.
        common = min(common_prefix_length(row.ids[: row.num_cached], prompt), len(prompt) - 1)
        return max(length for length in row.slots if length <= common) if self._delta_nets else common

    def _copy(self, source: int, target: int, kept: int, slots: dict[int, int]) -> dict[int, int]:
        """Copy the first tokens of a row to another row. Returns the slots of its states."""
        for layer in self._attention:
            layer.copy(source, target, kept)
        own = {length: slot for length, slot in slots.items() if slot <= 0}
        if self._delta_nets and kept not in own:
            own[kept] = 2 * target + 1
            for layer in self._delta_nets:
                layer.copy_slot(slots[kept], own[kept])
        return own

    def step(self) -> dict[int, list[int]]:
        """Generate tokens until a row is done. New prompts share a forward pass with replies in progress.

        Returns:
            The reply of each row that is done.
        """
        active = [number for number, row in enumerate(self._rows) if row.active]
        done = {}
        while not done:
            # New prompts first.
            active.sort(key=lambda number: (min(self._rows[number].num_missing, self._max_width) == 1, number))
            for number, token in zip(active, self._forward(active), strict=True):
                row = self._rows[number]
                if row.num_missing:
                    continue
                if token not in self._stop_ids:
                    row.ids.append(token)
                full = len(row.ids) == min(row.prompt_length + self._max_new_tokens, self._max_length)
                if full or token in self._stop_ids:
                    row.active = False
                    done[number] = row.ids[row.prompt_length :]
        return done

    def _forward(self, rows: Sequence[int]) -> list[int]:
        """Compute the next tokens of these rows that are not cached, up to `max_width` of each.

        Returns:
            The likeliest next token of each row.
        """
        held = [self._rows[number] for number in rows]
        device = self._model.device
        spans = [range(row.num_cached, min(len(row.ids), row.num_cached + self._max_width)) for row in held]
        self._reserve(max(span.stop for span in spans))
        ids = [token for row, span in zip(held, spans, strict=True) for token in row.ids[span.start : span.stop]]
        places = torch.tensor([place for span in spans for place in span], device=device)
        ends = torch.tensor([len(span) for span in spans], device=device).cumsum(0)
        layout = self._layout(rows, spans, places)
        for layer in self._attention:
            layer.layout = layout
        segments, last = [], 0
        for number, row, span in zip(rows, held, spans, strict=True) if self._delta_nets else ():
            target = 2 * number + 1 + (span.stop > row.prompt_length)
            segments.append((range(last, last := last + len(span)), row.slots[span.start], target))
            # If the model fails, the content of its slot is unknown.
            row.slots = {length: slot for length, slot in row.slots.items() if slot != target}
        kept = ends - 1
        if device.type == "cpu" and self._model.dtype.itemsize == 2 and not self._delta_nets:
            places, kept = (F.pad(each, (0, -len(each) % MULTIPLE * (len(each) > MULTIPLE))) for each in (places, kept))
            ids += ids[-1:] * (len(places) - len(ids))
        usual, self._config._attn_implementation = self._config._attn_implementation, CACHED_ATTENTION
        try:
            logits = self._model(
                input_ids=torch.tensor(ids, device=device)[None],
                position_ids=places[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=kept,
                cache_layout=layout,
                **self._levels(segments),
            ).logits[0, : len(rows)]
        finally:
            self._config._attn_implementation = usual
        for row, span in zip(held, spans, strict=True):
            row.num_cached = span.stop
        for row, (_, _, target) in zip(held, segments, strict=False):
            row.slots[row.num_cached] = target
        # numpy's takes a tenth of torch's time.
        return (logits.float().numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()

    def _layout(self, rows: Sequence[int], spans: Sequence[range], columns: torch.Tensor) -> _ForwardLayout:
        """Where the tokens of a forward pass stand; `columns` are those of the cache."""
        device = columns.device
        prompts = sum(len(span) > 1 for span in spans)  # the first ones
        apart = device.type in APART
        # Each token sees the last one of the prefix, which may be itself, among its row's columns. In half precision
        # both parts would be rounded before they are combined.
        whole = not apart or self._model.dtype != torch.float32
        shared = 0 if whole else min(len(self._prefix_ids) - 1, *(span.start for span in spans))
        starts, attended = [0] * (prompts > 0) + [prompts] * (prompts < len(rows)), []
        if apart:
            starts = _groups(rows, spans, prompts)
            attended = self._attend_apart(rows, spans[:prompts], shared) if prompts else []
        ends = list(itertools.accumulate(map(len, spans), initial=0))
        for start, end in itertools.pairwise([*starts, len(rows)]):
            tokens = slice(ends[start], ends[end])
            attended.append(self._attend(tokens, rows[start:end], spans[start:end], columns, shared))
        numbers = torch.tensor([row for row, span in zip(rows, spans, strict=True) for _ in span], device=device)
        return _ForwardLayout(numbers, columns, shared, attended)

    def _attend_apart(self, rows: Sequence[int], spans: Sequence[range], shared: int) -> list[_Attended]:
        """The first rows, each alone: their masks are parts of that of the widest one behind the latest start."""
        start, width, token, attended = max(span.start for span in spans), max(map(len, spans)), 0, []
        mask = self._mask(torch.arange(start, start + width), 0, start + width).repeat_interleave(self._groups, 0)
        for row, span in zip(rows, spans, strict=False):
            own = mask[: len(span) * self._groups, start - span.start + shared : start + len(span)]
            attended.append(
                _Attended(slice(token, token := token + len(span)), slice(row, row + 1), None, own[None, None])
            )
        return attended

    def _attend(
        self, tokens: slice, rows: Sequence[int], spans: Sequence[range], columns: torch.Tensor, shared: int
    ) -> _Attended:
        """Rows whose attention is computed together, padded to the longest; padding sees the first column."""
        device, width, first = columns.device, max(map(len, spans)), rows[0]
        where, selected, count = range(len(rows)), torch.tensor(rows, device=device), len(rows)
        if 2 * count > rows[-1] - first or device.type in APART:  # all rows from first to last, which avoids a copy
            where, selected = [row - first for row in rows], slice(first, rows[-1] + 1)
            count = rows[-1] + 1 - first
        seen, places = columns[tokens], None
        if len(seen) < count * width:
            places = torch.tensor(
                [row * width + index for row, span in zip(where, spans, strict=True) for index in range(len(span))],
                device=device,
            )
            seen = columns.new_full([count * width], shared).index_copy_(0, places, seen)
        mask = self._mask(seen, shared, max(span.stop for span in spans)).view(count, 1, width, -1)
        return _Attended(tokens, selected, places, mask.repeat_interleave(self._groups, 2) if width > 1 else mask)

    def _mask(self, seen: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What is added to the scores of these columns, [tokens, columns], by the last column that each token sees."""
        hidden = torch.arange(start, stop, device=seen.device) > seen[:, None]
        return torch.zeros(hidden.shape, dtype=self._model.dtype, device=seen.device).masked_fill_(hidden, -torch.inf)

    def _levels(self, segments: Sequence[tuple[range, int, int]]) -> dict[str, Any]:
        """The model's arguments for its gated delta nets; none without them.

        Args:
            segments: of the flattened tokens of a forward pass, the slot whose state each continues (-1 for none), and
                that of the state at its end.
        """
        if not self._delta_nets:
            return {}
        device = self._model.device  # here once, not in every layer
        sources = torch.tensor([source for _, source, _ in segments if source >= 0], dtype=torch.long, device=device)
        targets = torch.tensor([target for *_, target in segments], device=device)
        for layer in self._delta_nets:
            layer.sources, layer.targets = sources, targets
        parents = itertools.count()
        level = tuple((tokens, next(parents) if source >= 0 else -1) for tokens, source, _ in segments)
        return {"delta_levels": _one_level(level, len(sources), device)}

    def _reserve(self, columns: int) -> None:
        """Make room for all rows with this many columns."""
        if columns > self._columns:
            self._columns = columns + max(GROWTH, columns // 2)
        for layer in self._cache.layers:
            layer.resize(len(self._rows), self._columns)


def _groups(rows: Sequence[int], spans: Sequence[range], start: int) -> list[int]:
    """Where groups of the rows from `start` on begin, as places in `rows`, which ascend from there.

    A row joins the group before unless that costs more columns than a call of its own, `CALL_COLUMNS`.
    """
    starts, first, width = [], 0, 0
    for place in range(start, len(rows)):
        row, stop = rows[place], spans[place].stop
        joined = (row + 1 - first) * max(width, stop)
        if not starts or joined > (rows[place - 1] + 1 - first) * width + CALL_COLUMNS + stop:
            starts.append(place)
            first, width = row, stop
        width = max(width, stop)
    return starts


@functools.lru_cache(maxsize=4)  # the same for one generated token after the other
def _one_level(level: tuple[tuple[range, int], ...], sources: int, device: torch.device) -> list[dict[str, Any]]:
    return level_inputs(build_levels([level], sources), device)


class RewindableCache(DynamicCache):
    """The cache of one sequence that can go back to an earlier length.

    Keys and values are cut back. The states of gated delta nets cannot be, so a few are copied by `mark`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._delta_nets = [each for each in self.layers if isinstance(each, LinearAttentionCacheLayerMixin)]
        self._marks: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def mark(self) -> None:
        """Make the present length one that can be gone back to."""
        if length := self._delta_nets and self.get_seq_length():
            states = [(each.conv_states[0].clone(), each.recurrent_states[0].clone()) for each in self._delta_nets]
            self._marks = dict([*self._marks.items(), (length, states)][-NUM_MARKS:])

    def rewind(self, length: int) -> int:
        """Go back to this length, or to the longest possible one below it. Returns the new length."""
        if self._delta_nets and length < self.get_seq_length():
            length = max((mark for mark in self._marks if mark <= length), default=0)
            self._marks = {mark: states for mark, states in self._marks.items() if mark <= length}
            for layer, states in zip(self._delta_nets, self._marks.get(length, ()), strict=False):
                layer.conv_states[0].copy_(states[0])
                layer.recurrent_states[0].copy_(states[1])
        if not length:
            self.reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.crop(length - layer.get_seq_length())
        return length


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the start that two sequences share."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:  # the usual case, and much faster
        return length
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
