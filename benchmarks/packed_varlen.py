"""Our variable-length kernel for packs of other trainers: documents are where position ids start again.

TRL hands only position ids to a model whose attention is not one of flash-attention's packages. The bounds of the
documents are read from them once for each batch.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from csc_train.models.attention.varlen import cast_to_common_dtype

PACKED_VARLEN = "packed_varlen"
"""Name under which `packed_varlen_attention` stands in transformers' attention registry."""

_last: list[Any] = [None, None]


def packed_varlen_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_ids=None, **_
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of one row, for transformers' attention registry.

    Args:
        query: [1, heads, length, head_dim]; key and value have the key-value heads.
        position_ids: int64 [1, length].

    Returns:
        [1, length, heads, head_dim], and no weights.
    """
    if attention_mask is not None or dropout or position_ids is None:
        raise ValueError("packs come with position ids, without a mask and without dropout")
    states = [each[0].transpose(0, 1) for each in cast_to_common_dtype(query, key, value)]
    bounds, longest = _bounds(position_ids)
    if query.is_cuda:
        output = torch.ops.aten._flash_attention_forward(
            *states, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
        )[0]
    else:
        index = torch.arange(len(states[0]))
        output, _lse = torch.ops.csc_train.varlen_attention(*states, bounds, bounds, index, longest, longest, scaling)
    return output[None], None


def _bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """int32 [documents + 1], where each document begins and the last one ends; and the longest."""
    if _last[0] is not position_ids:
        row = position_ids.flatten()
        starts = (row == 0).nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([len(row)])]).to(torch.int32)
        _last[:] = position_ids, (bounds, int(bounds.diff().max()))
    return _last[1]


AttentionInterface.register(PACKED_VARLEN, packed_varlen_attention)
