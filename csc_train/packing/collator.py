"""Packs to model inputs."""

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class PackCollator:
    """Turns packs into a batch in which no document sees another.

    With transformers 5 documents in a row are kept apart only while there is no attention mask, position ids restart
    at each document and the model runs with `use_cache=False` (TRL's trainer does): then the model derives the block
    mask, or the variable-length kernel's bounds, from the positions.

    Attributes:
        packed: rows hold several documents; position ids are given and there is no attention mask. Otherwise a row is
            one document, padded, with a two-dimensional mask.
        one_row: join all packs in one row, as variable-length kernels (flash-attention) want it. Otherwise each pack
            is a row, and what pads it is a document of its own.
        pad_id: the token that pads.
    """

    packed: bool
    one_row: bool
    pad_id: int

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate packs of `pack_examples`.

        Returns:
            `input_ids`, `labels` and `position_ids` or `attention_mask`, int64 [rows, length].

        Raises:
            ValueError: nothing in the batch is trained, or the first token of a document is (what precedes it in the
                row belongs to another document).
        """
        rows = [self._row(pack) for pack in packs]
        if self.packed and self.one_row:
            rows = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {name: torch.stack([self._pad(name, row[name], longest) for row in rows]) for name in rows[0]}
        if (batch["labels"] == IGNORED).all():
            raise ValueError("a batch has no trained token")
        return batch

    def _row(self, pack: dict[str, Any]) -> dict[str, torch.Tensor]:
        input_ids = torch.as_tensor(pack["input_ids"], dtype=torch.int64)
        weights = torch.as_tensor(pack["weights"])
        lengths = torch.as_tensor(pack["lengths"], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        if (weights[starts] > 0).any():
            raise ValueError("the first token of a document has a loss weight")
        row = {"input_ids": input_ids, "labels": input_ids.masked_fill(weights == 0, IGNORED)}
        if self.packed:
            row["position_ids"] = torch.arange(len(input_ids)) - starts.repeat_interleave(lengths)
        else:
            row["attention_mask"] = torch.ones_like(input_ids)
        return row

    def _pad(self, name: str, values: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - len(values)
        if name == "position_ids":
            padding = torch.arange(missing)
        else:
            padding = torch.full((missing,), {"input_ids": self.pad_id, "labels": IGNORED, "attention_mask": 0}[name])
        return torch.cat([values, padding])
