"""A key-value cache of several dialogues that grow, each by other tokens, and share their beginning."""

import itertools
from collections.abc import Collection, Hashable, Sequence

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

    def arrange(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Let row i be the columns `columns[i]` of what was row `rows[i]`."""
        index = rows[:, None].to(self.device), slice(None), columns.to(self.device)
        self._buffers = [states[index].transpose(1, 2) for states in (self.keys, self.values)]
        self.keys, self.values = self._buffers


class DialogueCache:
    """The cache of a batch of rows, each a dialogue, that are brought from prompt to prompt.

    What a prompt has in common with what is cached of its dialogue is kept, the rest is computed. Rows are ragged: the
    columns in which a row has no token are masked, and positions count its tokens, not columns. A dialogue that is not
    in the next batch is forgotten, so a cache is never larger than one batch.

    The attention of every layer must reach back to the first token: sliding windows would count masked columns.

    Args:
        model: a causal model; nothing of it is changed.
        prefix: ids with which every prompt begins; they are computed once.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int]):
        self._model = model
        self._cache = Cache(layer_class_to_replicate=_GrowingLayer)
        self._mask = torch.ones(1, 0, dtype=torch.bool, device=model.device)
        self._ids: list[list[int]] = [[]]
        self._rows: dict[Hashable, int] = {}
        self._feed([prefix])

    def generate(
        self, names: Sequence[Hashable], prompts: Sequence[Sequence[int]], stops: Collection[int], most: int
    ) -> list[list[int]]:
        """Continue prompts greedily.

        Args:
            names: of the dialogue of each prompt.
            stops: tokens that end a continuation; they are left out.
            most: the largest number of tokens to generate.
        """
        logits = self._reach(names, prompts)
        generated: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        while True:
            for row, token in enumerate(logits.argmax(-1).tolist()):
                if row in going and token in stops:
                    going.remove(row)
                elif row in going:
                    generated[row].append(token)
                    if len(generated[row]) == most:
                        going.remove(row)
            if not going:
                return generated
            logits = self._feed([generated[row][-1:] if row in going else [] for row in range(len(prompts))])

    def _reach(self, names: Sequence[Hashable], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Make the prompts the rows of the cache. Returns the logits behind them, [prompts, vocabulary]."""
        # Any row begins with the prefix, so the first one will do for a dialogue that is new.
        sources = [self._rows.get(name, 0) for name in names]
        # The last token is always computed, for its logits.
        kept = [
            min(_common(self._ids[source], prompt), len(prompt) - 1)
            for source, prompt in zip(sources, prompts, strict=True)
        ]
        self._arrange(sources, kept)
        self._rows = {name: row for row, name in enumerate(names)}
        return self._feed([prompt[length:] for prompt, length in zip(prompts, kept, strict=True)])

    def _arrange(self, sources: list[int], kept: list[int]) -> None:
        """Let row i be the first `kept[i]` tokens of what was row `sources[i]`, without columns that nobody uses."""
        rows = torch.tensor(sources, device=self._mask.device)
        mask = self._mask[rows]
        mask &= mask.cumsum(1) <= torch.tensor(kept, device=mask.device)[:, None]
        columns = mask.int().argsort(dim=1, stable=True)[:, -max(kept) :]
        self._mask = mask.gather(1, columns)
        self._ids = [self._ids[source][:length] for source, length in zip(sources, kept, strict=True)]
        for layer in self._cache.layers:
            layer.arrange(rows, columns)

    def _feed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append tokens to the rows. Returns the logits behind the last column, [rows, vocabulary]."""
        width = max(map(len, tokens))
        device = self._mask.device
        # Padding on the left, so that every row ends in the same column; a pad is masked, so any token will do.
        input_ids = torch.tensor([[0] * (width - len(new)) + list(new) for new in tokens], device=device)
        new = torch.tensor([[False] * (width - len(new)) + [True] * len(new) for new in tokens], device=device)
        self._mask = torch.cat([self._mask, new], dim=1)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=self._mask.long(),
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, -width:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for ids, more in zip(self._ids, tokens, strict=True):
            ids += more
        return logits


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
