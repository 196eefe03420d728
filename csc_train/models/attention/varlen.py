"""Attention over the documents of a row, which may share a prefix.

The hidden states of a prompt do not depend on what follows it. So dialogues that start with the same ids can share one
copy of them: each attends to the prefix and to itself, and its positions continue from the prefix's end. Loss and
gradients are those of separate sequences.

Shape suffixes: B batch (1), H heads, T tokens of the row, D head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

VARLEN_ATTENTION = "varlen"
"""Name under which `varlen_attention` stands in transformers' attention registry."""


class VarlenMetadata(NamedTuple):
    """The documents of a row, in order; the causal mask of each is aligned bottom right.

    Attributes:
        query_lengths: int64 [documents]; they add up to the row's length.
        key_lengths: int64 [documents]; the query length, plus the prefix's if the document shares it.
        key_index: int64 [sum of key_lengths]; the place in the row of each key.
    """

    query_lengths: torch.Tensor
    key_lengths: torch.Tensor
    key_index: torch.Tensor


def build_varlen_metadata(lengths: list[list[int]], prefixes: list[int]) -> tuple[VarlenMetadata, torch.Tensor]:
    """The documents of a row that concatenates packs, and the row's position ids.

    Args:
        lengths: by pack, the lengths of its documents.
        prefixes: by pack, the length of its first document if the others share it as their prefix, else 0.

    Returns:
        The metadata, and int64 [length] position ids. They start at the prefix's length in a document that shares a
        prefix, else at 0.
    """
    queries, keys, index, positions = [], [], [], []
    start = 0
    for pack, prefix in zip(lengths, prefixes, strict=True):
        shared = torch.arange(start, start + prefix)
        for number, length in enumerate(pack):
            own = torch.arange(start, start + length)
            sees_prefix = prefix > 0 and number > 0
            index.append(torch.cat([shared, own]) if sees_prefix else own)
            positions.append(torch.arange(length) + (prefix if sees_prefix else 0))
            queries.append(length)
            keys.append(len(index[-1]))
            start += length
    return VarlenMetadata(torch.tensor(queries), torch.tensor(keys), torch.cat(index)), torch.cat(positions)


def document_mask(metadata: VarlenMetadata) -> torch.Tensor:
    """The dense boolean mask [1, 1, length, length]: the reference for the other implementations."""
    length = int(metadata.query_lengths.sum())
    mask = torch.zeros(length, length, dtype=torch.bool)
    start = key_start = 0
    for queries, keys in zip(metadata.query_lengths.tolist(), metadata.key_lengths.tolist(), strict=True):
        index = metadata.key_index[key_start : key_start + keys]
        mask[start : start + queries, index] = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        start, key_start = start + queries, key_start + keys
    return mask[None, None]


def check_varlen_inputs(
    attention: str,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    varlen_metadata: dict[str, torch.Tensor] | None,
) -> None:
    """Check that a call of our attention has metadata, one row, and no mask besides.

    Raises:
        ValueError: it does not, so documents would see each other.
    """
    if varlen_metadata is None:
        raise ValueError(
            f"{attention} attention was called without varlen_metadata: use it only on PackCollator batches"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{attention} attention takes one row and no attention mask")


def cast_to_common_dtype(*states: torch.Tensor) -> list[torch.Tensor]:
    """Cast queries, keys and values to autocast's dtype: rotary embeddings leave fp32, linear layers make bf16."""
    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[0].dtype
    return [each.to(dtype) for each in states]


def varlen_attention(
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
    """Attention over a row document by document, for transformers' attention registry.

    On a GPU one call of flash-attention's variable-length kernel (no test reaches it), elsewhere `_BlockwiseAttention`.

    Args:
        query: [B, H, T, D]; key and value have the key-value heads.
        varlen_metadata: the fields of `VarlenMetadata`, passed through the model as a keyword argument.

    Returns:
        [B, T, H, D], and no attention weights.

    Raises:
        ValueError: see `check_varlen_inputs`; or there is dropout on a CPU, whose kernel has none.
    """
    check_varlen_inputs(VARLEN_ATTENTION, query, attention_mask, varlen_metadata)
    metadata = VarlenMetadata(**(varlen_metadata or {}))
    query, key, value = cast_to_common_dtype(query, key, value)
    if query.is_cuda:
        return _flash_attention(query, key, value, dropout, scaling, metadata), None
    if dropout:
        raise ValueError(
            f"{VARLEN_ATTENTION} attention has no dropout on a CPU: set the model's attention_dropout to 0"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = _BlockwiseAttention.apply(query, key, value, _causal_blocks(metadata), _prefix_blocks(metadata), scaling)
    return output.transpose(1, 2).contiguous(), None


def _causal_blocks(metadata: VarlenMetadata) -> list[slice]:
    """The place of each document in the row, in which it sees itself causally."""
    ends = metadata.query_lengths.cumsum(0).tolist()
    return [slice(end - queries, end) for end, queries in zip(ends, metadata.query_lengths.tolist(), strict=True)]


def _prefix_blocks(metadata: VarlenMetadata) -> list[tuple[slice, slice]]:
    """Runs of documents, and the prefix that they share: every token of the run sees the whole prefix."""
    found: list[tuple[slice, slice]] = []
    first_keys = metadata.key_index[metadata.key_lengths.cumsum(0) - metadata.key_lengths]
    shared = metadata.key_lengths - metadata.query_lengths
    for own, start, length in zip(_causal_blocks(metadata), first_keys.tolist(), shared.tolist(), strict=True):
        prefix = slice(start, start + length)
        if length and found and found[-1] == (slice(found[-1][0].start, own.start), prefix):
            found[-1] = (slice(found[-1][0].start, own.stop), prefix)
        elif length:
            found.append((own, prefix))
    return found


class _BlockwiseAttention(torch.autograd.Function):
    """Attention over blocks of queries and keys, each by PyTorch's flash-attention for the CPU.

    A prefix is multiplied once with all documents that share it, and no causal mask is larger than a document. The
    parts of a query's softmax are joined by their log-sum-exp. From the joined output and log-sum-exp, the kernel's
    backward pass returns each block's part of the gradients. Source: Liu et al., "Ring Attention with Blockwise
    Transformers" (2023).
    """

    @staticmethod
    def forward(ctx, query, key, value, causal_blocks, prefix_blocks, scale):
        q_BHTD, k_BHTD, v_BHTD = query, key, value
        o_BHTD = torch.empty_like(query)
        lse_BHT = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for own in causal_blocks:
            o_BHTD[:, :, own], lse_BHT[:, :, own] = _flash(
                q_BHTD[:, :, own], k_BHTD[:, :, own], v_BHTD[:, :, own], 0.0, True, scale=scale
            )
        for own, prefix in prefix_blocks:
            part, part_lse = _flash(
                q_BHTD[:, :, own], k_BHTD[:, :, prefix], v_BHTD[:, :, prefix], 0.0, False, scale=scale
            )
            joined = torch.logaddexp(lse_BHT[:, :, own], part_lse)
            weight = (part_lse - joined).exp()[..., None].to(query.dtype)
            o_BHTD[:, :, own] = torch.lerp(o_BHTD[:, :, own], part, weight)
            lse_BHT[:, :, own] = joined
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, o_BHTD, lse_BHT)
        ctx.blocks = [(own, own, True) for own in causal_blocks] + [(*block, False) for block in prefix_blocks]
        ctx.scale = scale
        return o_BHTD

    @staticmethod
    def backward(ctx, grad_BHTD):
        q_BHTD, k_BHTD, v_BHTD, o_BHTD, lse_BHT = ctx.saved_tensors
        gradients = [torch.zeros_like(each) for each in (q_BHTD, k_BHTD, v_BHTD)]
        for own, seen, causal in ctx.blocks:
            parts = _flash_backward(
                grad_BHTD[:, :, own],
                q_BHTD[:, :, own],
                k_BHTD[:, :, seen],
                v_BHTD[:, :, seen],
                o_BHTD[:, :, own],
                lse_BHT[:, :, own],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for gradient, part, where in zip(gradients, parts, (own, seen, seen), strict=True):
                gradient[:, :, where] += part
        return (*gradients, None, None, None)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    metadata: VarlenMetadata,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    def bounds(lengths: torch.Tensor) -> torch.Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = flash_attn_varlen_func(
        query,
        key[metadata.key_index],
        value[metadata.key_index],
        bounds(metadata.query_lengths),
        bounds(metadata.key_lengths),
        int(metadata.query_lengths.max()),
        int(metadata.key_lengths.max()),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
    )
    return output[None]
