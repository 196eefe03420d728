"""Rows of documents for FlexAttention: what each token sees, and from that which blocks of tokens see each other."""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from csc_train.models.attention.varlen import VarlenMetadata, cast_to_common_dtype, check_varlen_inputs

FLEX_ATTENTION = "flex_documents"
"""Name under which `flex_document_attention` stands in transformers' attention registry."""

BLOCK = 128
"""Tokens in a block. Rows are padded to whole blocks, so that one kernel serves all of them: torch compiles it for the
first length that it meets, then once more for any."""


class FlexDocuments(NamedTuple):
    """What each token of a row sees, and which blocks follow from it: plain tensors, which the trainer can move.

    A `BlockMask` cannot be moved: its `to` leaves behind what its mask function reads.

    Attributes:
        prefix_starts: int32 [length]; where the prefix that a token sees begins.
        prefix_ends: int32 [length]; where it ends; where it begins if the token's document shares none.
        starts: int32 [length]; where the token's own document begins.
        kv_num_blocks: int32 [1, 1, blocks]; how many blocks of keys a block of queries sees in part. The rest are
            fields of `BlockMask`.
    """

    prefix_starts: torch.Tensor
    prefix_ends: torch.Tensor
    starts: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor

    def block_mask(self) -> BlockMask:
        """The mask, on the device of the tensors. It costs no computation, so each layer may make its own."""
        prefix_starts, prefix_ends, starts, *blocks = self
        length = len(starts)

        def sees(batch, head, query, key):
            prefix = (key >= prefix_starts[query]) & (key < prefix_ends[query])
            return prefix | ((key >= starts[query]) & (key <= query))

        return BlockMask((length, length), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def flex_documents(documents: VarlenMetadata) -> FlexDocuments:
    """What FlexAttention needs of a row's `documents`; the row's length is a multiple of `BLOCK`.

    torch's `create_block_mask` would evaluate every pair of tokens. What a token sees is two spans, so the pairs of a
    block are counted from their ends: tokens x blocks numbers.
    """
    queries, keys, index = documents
    first_keys = index[keys.cumsum(0) - keys]
    spans = (first_keys, first_keys + keys - queries, queries.cumsum(0) - queries)
    prefix_starts, prefix_ends, starts = (span.repeat_interleave(queries).to(torch.int32) for span in spans)
    length = len(starts)
    edges = torch.arange(0, length + 1, BLOCK, dtype=torch.int32)
    own_ends = torch.arange(1, length + 1, dtype=torch.int32)

    # How many keys before each edge a token sees, up to a constant that the differences lose.
    before = edges.clamp(prefix_starts[:, None], prefix_ends[:, None]) + edges.clamp(starts[:, None], own_ends[:, None])
    pairs = before.diff(dim=1).view(-1, BLOCK, len(edges) - 1).sum(1)
    full = pairs == BLOCK * BLOCK
    mask = BlockMask.from_kv_blocks(*_listed((pairs > 0) & ~full), *_listed(full), BLOCK_SIZE=BLOCK)
    return FlexDocuments(
        prefix_starts, prefix_ends, starts, *(getattr(mask, name) for name in FlexDocuments._fields[3:])
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Booleans [queries, keys] as a `BlockMask` holds them: how many in a row, and which columns, those first."""
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], columns.to(torch.int32)[None, None]


def flex_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    varlen_metadata: dict[str, torch.Tensor] | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention of a row by FlexAttention, for transformers' attention registry.

    Compiled on a GPU (no test reaches it); on a CPU, where torch has no backward pass of it, its plain form.

    Args:
        query: [1, heads, length, head_dim]; key and value have the key-value heads.
        varlen_metadata: the fields of `FlexDocuments`, handed through the model as a keyword argument.

    Returns:
        [1, length, heads, head_dim], and no weights.

    Raises:
        ValueError: see `check_varlen_inputs`; or there is dropout, which FlexAttention does not have.
    """
    check_varlen_inputs(FLEX_ATTENTION, query, attention_mask, varlen_metadata)
    if dropout:
        raise ValueError("FlexAttention has no dropout: set the model's attention_dropout to 0, or use another one")
    query, key, value = cast_to_common_dtype(query, key, value)
    attend = _compiled if query.is_cuda else flex_attention
    mask = FlexDocuments(**(varlen_metadata or {})).block_mask()
    output = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


_compiled = torch.compile(flex_attention)
