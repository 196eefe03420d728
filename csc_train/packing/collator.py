"""Collate packs into model inputs in which no document sees another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from csc_train.models.attention.gated_delta_net import build_delta_levels
from csc_train.models.attention.varlen import VarlenBounds, VarlenMetadata, build_varlen_metadata, document_mask
from csc_train.packing.dataset import PackedDataset
from csc_train.packing.pack_cost import pack_cost

IGNORE_INDEX = -100
"""The label of a token that is not trained."""

SHARED_PREFIX_LAYOUTS = ("varlen", "dense_mask")
"""The layouts that can express a shared prefix."""

_PADDING = {"labels": IGNORE_INDEX, "loss_weights": 0, "token_groups": 0, "attention_mask": 0}
_PADDING |= {"sequence_lengths": 0}


@dataclass(frozen=True)
class PackCollator:
    """Collates packs into a batch; the layout tells the model which tokens belong to one document.

    - `padded`: each row is one document, padded, with a two-dimensional attention mask.
    - `position_ids`: each row is a pack. Position ids restart at each document, and there is no mask: transformers
      derives the block mask from them, while the model runs with `use_cache=False`. Padding is its own document.
    - `varlen`: all packs in one row, with `VarlenMetadata` for our own attention. Padding is documents of its own.
    - `dense_mask`: all packs in one row, with a four-dimensional mask, whose size grows with the square of the row.

    Attributes:
        layout: one of the above.
        pad_id: the padding token.
        additive: in layout `dense_mask`, make the mask numbers to add (eager attention) instead of booleans.
        measured: add the fields that training metrics need (see `training.train_metrics`).
        bounds: in layout `varlen`, what no row exceeds (see `run_bounds`); defaults to each row's own.
        length: pad every row to this length in layout `varlen`; defaults to no padding.
        delta_levels: add the `delta_levels` that the gated delta nets of a model need to keep documents apart.
        experts: add the `document_tokens` that the auxiliary loss of routers needs.
        noise: add the `sequence_lengths` that `noisy_embeddings` needs.
    """

    layout: str
    pad_id: int
    additive: bool = False
    measured: bool = False
    bounds: VarlenBounds | None = None
    length: int | None = None
    delta_levels: bool = False
    experts: bool = False
    noise: bool = False

    @property
    def single_row(self) -> bool:
        """Whether all packs of a batch are in one row, without padding between them."""
        return self.layout in SHARED_PREFIX_LAYOUTS

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate packs of a `PackedDataset`, the `empty` one included.

        Returns:
            `input_ids` and `labels`, int64 [rows, length]; `loss_weights`, float32 [rows, length]; `trained_index`,
            int64 [trained tokens], the flat places (row x length + column) whose next token is trained; by layout
            `position_ids`, int64 [rows, length], `attention_mask`, and `varlen_metadata`, the fields of
            `VarlenMetadata`; if asked for, `delta_levels`, the fields of each `DeltaLevel`, and `document_tokens`, bool
            [documents, rows x length], the tokens of each document and of its prefix, and `sequence_lengths`, int64
            [rows, length], the tokens of each token's document and its prefix: in a shared prefix, of the longest
            document behind it; in padding, 0. If measured, also
            `token_groups`, uint8 [rows, length], and `token_and_pair_counts`: the tokens without padding, and the pairs
            of tokens that `pack_cost` counts.

        Raises:
            ValueError: the batch has no trained token, the first token of a document is trained (the token before it
                belongs to another document), the layout cannot express a shared prefix, or a row is longer than
                `length` or exceeds `bounds`.
        """
        rows = [self._row(pack) for pack in packs]
        extra = {}
        if self.single_row:
            rows = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        lengths = [[int(length) for length in pack["document_lengths"]] for pack in packs]
        prefixes = [int(pack["prefix_length"]) for pack in packs]
        if self.layout in SHARED_PREFIX_LAYOUTS:
            if self.length:
                if longest > self.length:
                    raise ValueError(f"a row of {longest} tokens is longer than the {self.length} of its run")
                piece = self.bounds.max_q if self.bounds else self.length
                lengths.append([min(piece, self.length - start) for start in range(longest, self.length, piece)])
                prefixes.append(0)
                longest = self.length
            metadata, rows[0]["position_ids"] = build_varlen_metadata(lengths, prefixes, self.bounds)
            extra = self._describe(metadata)
        if self.delta_levels:
            if not self.single_row:
                lengths = [[*own, longest - sum(own)] for own in lengths]
            extra["delta_levels"] = [level._asdict() for level in build_delta_levels(lengths, prefixes)]
        batch = {name: torch.stack([self._pad(name, row[name], longest) for row in rows]) for name in rows[0]}
        # The token before a trained one is in the same row: no document begins with a trained token.
        extra["trained_index"] = (batch["labels"] != IGNORE_INDEX).flatten().nonzero().flatten() - 1
        if not len(extra["trained_index"]) and not all("empty" in pack for pack in packs):
            raise ValueError("a batch has no trained token")
        if self.experts:
            extra["document_tokens"] = _document_tokens(packs, longest * (not self.single_row), batch["labels"].numel())
        if self.measured:
            extra["token_and_pair_counts"] = tuple(
                sum(pack_cost(pack["document_lengths"], pack["prefix_length"], *unit).total for pack in packs)
                for unit in ((1, 0), (0, 1))
            )
        return batch | extra

    def _row(self, pack: dict[str, Any]) -> dict[str, torch.Tensor]:
        input_ids = torch.as_tensor(pack["input_ids"], dtype=torch.int64)
        weights = torch.as_tensor(pack["loss_weights"], dtype=torch.float32)
        lengths = torch.as_tensor(pack["document_lengths"], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        if (weights[starts] > 0).any():
            raise ValueError("the first token of a document has a loss weight")
        if pack["prefix_length"] and self.layout not in SHARED_PREFIX_LAYOUTS:
            raise ValueError(f"layout {self.layout} cannot share a prefix")
        labels = input_ids.masked_fill(weights == 0, IGNORE_INDEX)
        row = {"input_ids": input_ids, "labels": labels, "loss_weights": weights}
        if self.measured:
            row["token_groups"] = torch.as_tensor(pack["token_groups"])
        if self.noise:
            prefix = int(pack["prefix_length"])
            own = lengths + prefix
            if prefix and len(lengths) > 1:  # the prefix itself comes first
                own[0] = own[1:].max()
            row["sequence_lengths"] = own.repeat_interleave(lengths)
        if self.layout == "padded":
            row["attention_mask"] = torch.ones_like(input_ids)
        else:
            row["position_ids"] = torch.arange(len(input_ids)) - starts.repeat_interleave(lengths)
        return row

    def _describe(self, metadata: VarlenMetadata) -> dict[str, Any]:
        # Plain dictionaries, which the trainer can move to a device.
        if self.layout == "varlen":
            return {"varlen_metadata": metadata._asdict()}
        mask = document_mask(metadata)
        if self.additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return {"attention_mask": mask}

    def _pad(self, name: str, values: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - len(values)
        if name == "position_ids":
            return torch.cat([values, torch.arange(missing)])
        return torch.nn.functional.pad(values, (0, missing), value=_PADDING.get(name, self.pad_id))


def _document_tokens(packs: list[dict[str, Any]], distance: int, places: int) -> torch.Tensor:
    """bool [documents, places]: the tokens of each document and of its prefix; padding and empty packs are in none.

    Args:
        distance: between the starts of two packs; 0 if each starts where the one before it ends.
        places: of all rows.
    """
    members, end = [torch.zeros(0, places, dtype=torch.bool)], 0
    for number, pack in enumerate(packs):
        first = start = number * distance or end
        shared = bool(pack["prefix_length"])
        for index, length in enumerate(map(int, pack["document_lengths"])):
            end = start + length
            if "empty" not in pack and not (shared and index == 0):
                members.append(torch.zeros(1, places, dtype=torch.bool))
                members[-1][0, first : first + int(pack["prefix_length"])] = True
                members[-1][0, start:end] = True
            start = end
    return torch.cat(members)


def run_bounds(runs: Sequence[PackedDataset], micro_batch_size: int, length: int | None = None) -> VarlenBounds:
    """What no row of a run exceeds, slices of packs included (see `assign_to_ranks`).

    Args:
        runs: the packs of training and of validation.
        micro_batch_size: slots in a row; each holds a pack, or two slices of packs.
        length: as in `PackCollator`.
    """
    lengths = [run.document_lengths for run in runs]
    max_q = max(int(each.values.max()) for each in lengths)
    max_k = max(int(run.pack_items.values[:, 2].max()) for run in runs)  # a dialogue sees the prefix and itself
    documents = 2 * micro_batch_size * max(int(each.lengths.max()) for each in lengths)
    return VarlenBounds(documents + -(-(length or 0) // max_q), max_q, max_k)
