"""Packs to model inputs."""

from dataclasses import dataclass
from typing import Any

import torch

from csc_train.models.attention.flex import BLOCK, flex_documents
from csc_train.models.attention.varlen import VarlenMetadata, build_varlen_metadata, document_mask
from csc_train.packing.global_batches import pack_cost

IGNORE_INDEX = -100
"""The label of a token that is not trained."""

SHARING = ("varlen", "flex", "dense_mask")
"""The layouts that take shared prefixes."""

WORK = ((1, 0), (0, 1))
"""What `pack_cost` counts: tokens, then pairs of tokens."""


@dataclass(frozen=True)
class PackCollator:
    """Turns packs into a batch in which no document sees another.

    How that is said depends on the layout:

    - `padded`: a row is one document, padded, with a two-dimensional attention mask.
    - `position_ids`: a row is a pack. Position ids restart at each document, and there is no mask: from that, and while the
      model runs with `use_cache=False` (TRL's trainer does), transformers 5 derives the block mask. What pads a row is
      a document of its own.
    - `padding_free`: as `position_ids`, but all packs in one row, as flash-attention's variable-length kernel wants it.
    - `varlen`: all packs in one row, with the `VarlenMetadata` that our own attention needs. Takes shared prefixes.
    - `flex`: the same with `FlexDocuments`; what pads the row to whole blocks is a document of its own.
    - `dense_mask`: all packs in one row, with a dense four-dimensional mask. Takes shared prefixes; the plain path, whose
      cost grows with the square of the row.

    Attributes:
        layout: one of the above.
        pad_id: the token that pads.
        additive: in layout `dense_mask`, give the mask as numbers to add (eager attention) instead of booleans.
        measured: add what a training's figures are computed from (see `training.measures`).
    """

    layout: str
    pad_id: int
    additive: bool = False
    measured: bool = False

    @property
    def single_row(self) -> bool:
        """Whether all packs of a batch lie in one row, so that they take no more room than their tokens."""
        return self.layout == "padding_free" or self.layout in SHARING

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate packs of `pack_examples`, or one that is marked as `empty`.

        Returns:
            `input_ids` and `labels`, int64 [rows, length], `loss_weights`, float32 [rows, length], and what the layout adds
            of `position_ids` (int64 [rows, length]), `attention_mask` and `varlen_metadata` (the fields of `VarlenMetadata` or
            `FlexDocuments`). Where measured, also `token_groups`, uint8 [rows, length], and `token_and_pair_counts`: how many tokens there are
            without padding, and how many pairs of tokens, as `pack_cost` counts them.

        Raises:
            ValueError: nothing in the batch is trained, the first token of a document is (what precedes it in the
                row belongs to another document), or the layout cannot express a shared prefix.
        """
        rows = [self._row(pack) for pack in packs]
        extra = {}
        if self.single_row:
            rows = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        if self.layout in SHARING:
            lengths = [[int(length) for length in pack["document_lengths"]] for pack in packs]
            prefixes = [int(pack["prefix_length"]) for pack in packs]
            if self.layout == "flex" and longest % BLOCK:
                lengths.append([BLOCK - longest % BLOCK])
                prefixes.append(0)
                longest += lengths[-1][0]
            documents, rows[0]["position_ids"] = build_varlen_metadata(lengths, prefixes)
            extra = self._describe(documents)
        batch = {name: torch.stack([self._pad(name, row[name], longest) for row in rows]) for name in rows[0]}
        if (batch["labels"] == IGNORE_INDEX).all() and not all("empty" in pack for pack in packs):
            raise ValueError("a batch has no trained token")
        if self.measured:
            extra["token_and_pair_counts"] = tuple(
                sum(pack_cost(pack["document_lengths"], pack["prefix_length"], *what).total for pack in packs)
                for what in WORK
            )
        return batch | extra

    def _row(self, pack: dict[str, Any]) -> dict[str, torch.Tensor]:
        input_ids = torch.as_tensor(pack["input_ids"], dtype=torch.int64)
        weights = torch.as_tensor(pack["loss_weights"], dtype=torch.float32)
        lengths = torch.as_tensor(pack["document_lengths"], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        if (weights[starts] > 0).any():
            raise ValueError("the first token of a document has a loss weight")
        if pack["prefix_length"] and self.layout not in SHARING:
            raise ValueError(f"layout {self.layout} cannot share a prefix")
        row = {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(weights == 0, IGNORE_INDEX),
            "loss_weights": weights,
        }
        if self.measured:
            row["token_groups"] = torch.as_tensor(pack["token_groups"])
        if self.layout == "padded":
            row["attention_mask"] = torch.ones_like(input_ids)
        else:
            row["position_ids"] = torch.arange(len(input_ids)) - starts.repeat_interleave(lengths)
        return row

    def _describe(self, documents: VarlenMetadata) -> dict[str, Any]:
        # Plain dictionaries, which the trainer can move to a device.
        if self.layout == "varlen":
            return {"varlen_metadata": documents._asdict()}
        if self.layout == "flex":
            return {"varlen_metadata": flex_documents(documents)._asdict()}
        mask = document_mask(documents)
        if self.additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return {"attention_mask": mask}

    def _pad(self, name: str, values: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - len(values)
        if name == "position_ids":
            padding = torch.arange(missing)
        else:
            fill = {
                "input_ids": self.pad_id,
                "labels": IGNORE_INDEX,
                "loss_weights": 0,
                "token_groups": 0,
                "attention_mask": 0,
            }[name]
            padding = torch.full((missing,), fill, dtype=values.dtype)
        return torch.cat([values, padding])
