"""Which tokens of a row see which: documents that share the row, and may share a prefix.

The hidden states of a prompt do not depend on what follows it, so dialogues that start with the same ids can share one
copy of them: each attends to the prefix and to itself, with positions going on from the prefix's end (issue 3). Loss
and gradients are those of separate sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

VARLEN_ATTENTION = "varlen"
"""Name under which `varlen_attention` stands in transformers' attention registry."""


class VarlenMetadata(NamedTuple):
    """The documents of a row, in order. A document's last query sees its last key, the one before sees one less, ...

    Attributes:
        query_lengths: int64 [documents]; they add up to the row's length.
        key_lengths: int64 [documents]; a query length, or that plus the prefix's.
        key_index: int64 [sum of key_lengths]; where in the row each key stands.
    """

    query_lengths: torch.Tensor
    key_lengths: torch.Tensor
    key_index: torch.Tensor


def build_varlen_metadata(lengths: list[list[int]], prefixes: list[int]) -> tuple[VarlenMetadata, torch.Tensor]:
    """The documents of a row that joins packs, and the row's position ids.

    Args:
        lengths: of each pack, the lengths of its documents.
        prefixes: of each pack, how many of its leading tokens its other documents share; 0 for none. Otherwise the
            pack's first document is that prefix.

    Returns:
        The documents, and int64 [length] position ids: from 0 in a prefix or a document that shares none, else from
        the prefix's length.
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


def document_mask(documents: VarlenMetadata) -> torch.Tensor:
    """What `documents` say as a boolean mask [1, 1, length, length]: the plain path, and the oracle of the others."""
    length = int(documents.query_lengths.sum())
    mask = torch.zeros(length, length, dtype=torch.bool)
    start = key_start = 0
    for queries, keys in zip(documents.query_lengths.tolist(), documents.key_lengths.tolist(), strict=True):
        index = documents.key_index[key_start : key_start + keys]
        mask[start : start + queries, index] = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        start, key_start = start + queries, key_start + keys
    return mask[None, None]


def check_varlen_inputs(
    attention: str,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    varlen_metadata: dict[str, torch.Tensor] | None,
) -> None:
    """Refuse a call of our own attention that does not say which documents a row has, or says it twice.

    Raises:
        ValueError: there are no documents, or there is a mask or another row besides: documents would leak.
    """
    if varlen_metadata is None:
        raise ValueError(
            f"{attention} attention was called without varlen_metadata: use it on batches of PackCollator alone"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{attention} attention takes one row and no attention mask")


def same_dtype(*states: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values as autocast wants them: kernels called by hand get what rotary embeddings leave in fp32
    beside what linear layers make in bf16."""
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
    """Attention of a row, one document at a time, for transformers' attention registry.

    On a GPU one call of flash-attention's variable-length kernel, which takes different query and key lengths and
    aligns the causal mask bottom right (not run yet: no test reaches it); elsewhere block by block (`_BlockwiseAttention`).

    Args:
        query: [1, heads, length, head_dim]; key and value have the key-value heads.
        varlen_metadata: the fields of `VarlenMetadata`, handed through the model as a keyword argument.

    Returns:
        [1, length, heads, head_dim], and no weights.

    Raises:
        ValueError: see `check_varlen_inputs`; or there is dropout on a CPU, whose kernel has none.
    """
    check_varlen_inputs(VARLEN_ATTENTION, query, attention_mask, varlen_metadata)
    documents = VarlenMetadata(**varlen_metadata)
    query, key, value = same_dtype(query, key, value)
    if query.is_cuda:
        return _flash_attention(query, key, value, dropout, scaling, documents), None
    if dropout:
        raise ValueError(
            f"{VARLEN_ATTENTION} attention has no dropout on a CPU: set the model's attention_dropout to 0"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = _BlockwiseAttention.apply(query, key, value, _causal_blocks(documents), _prefix_blocks(documents), scaling)
    return output.transpose(1, 2).contiguous(), None


def _causal_blocks(documents: VarlenMetadata) -> list[slice]:
    """Where in the row each document stands: it sees itself, causally."""
    ends = documents.query_lengths.cumsum(0).tolist()
    return [slice(end - queries, end) for end, queries in zip(ends, documents.query_lengths.tolist(), strict=True)]


def _prefix_blocks(documents: VarlenMetadata) -> list[tuple[slice, slice]]:
    """Stretches of documents and the prefix that they share: all of the one sees all of the other."""
    found: list[tuple[slice, slice]] = []
    first_keys = documents.key_index[documents.key_lengths.cumsum(0) - documents.key_lengths]
    shared = documents.key_lengths - documents.query_lengths
    for own, start, length in zip(_causal_blocks(documents), first_keys.tolist(), shared.tolist(), strict=True):
        prefix = slice(start, start + length)
        if length and found and found[-1] == (slice(found[-1][0].start, own.start), prefix):
            found[-1] = (slice(found[-1][0].start, own.stop), prefix)
        elif length:
            found.append((own, prefix))
    return found


class _BlockwiseAttention(torch.autograd.Function):
    """Attention of a row by blocks of queries and keys, each by PyTorch's flash-attention for the CPU.

    A prefix is so multiplied with all that share it at once, and no causal mask is ever larger than a document. The
    parts of a query's softmax are joined by their log-sum-exp; the kernel's backward pass, given the joined output and
    log-sum-exp, returns each block's share of the gradients (as in ring attention, Liu et al. 2023).
    """

    @staticmethod
    def forward(ctx, query, key, value, squares, oblongs, scale):
        output, total = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_sum_dtype(query.dtype))
        for own in squares:
            output[:, :, own], total[:, :, own] = _flash(
                query[:, :, own], key[:, :, own], value[:, :, own], 0.0, True, scale=scale
            )
        for own, prefix in oblongs:
            part, part_total = _flash(query[:, :, own], key[:, :, prefix], value[:, :, prefix], 0.0, False, scale=scale)
            joined = torch.logaddexp(total[:, :, own], part_total)
            weight = (part_total - joined).exp()[..., None].to(query.dtype)
            output[:, :, own] = torch.lerp(output[:, :, own], part, weight)
            total[:, :, own] = joined
        ctx.save_for_backward(query, key, value, output, total)
        ctx.blocks, ctx.scale = [(own, own, True) for own in squares] + [(*block, False) for block in oblongs], scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, total = ctx.saved_tensors
        gradients = [torch.zeros_like(each) for each in (query, key, value)]
        for own, seen, causal in ctx.blocks:
            shares = _flash_backward(
                gradient[:, :, own],
                query[:, :, own],
                key[:, :, seen],
                value[:, :, seen],
                output[:, :, own],
                total[:, :, own],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for sum_, share, where in zip(gradients, shares, (own, seen, seen), strict=True):
                sum_[:, :, where] += share
        return (*gradients, None, None, None)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    documents: VarlenMetadata,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    def bounds(lengths: torch.Tensor) -> torch.Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = flash_attn_varlen_func(
        query,
        key[documents.key_index],
        value[documents.key_index],
        bounds(documents.query_lengths),
        bounds(documents.key_lengths),
        int(documents.query_lengths.max()),
        int(documents.key_lengths.max()),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
    )
    return output[None]
