"""Attention over the documents of a row, which may share a prefix.

The hidden states of a prompt do not depend on what follows it. So dialogues that start with the same ids can share one
copy of them: each attends to the prefix and to itself, and its positions continue from the prefix's end. Loss and
gradients are those of separate sequences.

One algorithm, two kernels of one operator, `csc_train::varlen_attention`. On a GPU, keys and values are gathered by
document (prefix, then own tokens) for the variable-length flash-attention that torch carries. On a CPU, which has no
such kernel, blocks of queries and keys are joined; this is the reference in tests.

Shape suffixes: B batch (1), H heads, T tokens of the row, D head dimension.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

VARLEN_ATTENTION = "varlen"
"""Name under which `varlen_attention` stands in transformers' attention registry."""


class VarlenBounds(NamedTuple):
    """What no row of a run exceeds, so that all rows look alike to kernels and compilers.

    Attributes:
        documents: in a row, those of padding included.
        max_q: tokens of a document; `max_k`: tokens of a document with its prefix.
    """

    documents: int
    max_q: int
    max_k: int


class VarlenMetadata(NamedTuple):
    """The documents of a row, in order; the causal mask of each is aligned bottom right.

    Attributes:
        cu_seqlens_q: int32 [documents + 1]; where each document begins in the row, and where the last one ends. The
            last value may be repeated, as documents without tokens.
        cu_seqlens_k: int32 [documents + 1]; the same among the keys: the prefix's, if it is shared, then the
            document's own.
        key_index: int64 [keys]; the place in the row of each key.
        max_q: at least the longest document; `max_k`: at least the most keys of one.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    max_q: int
    max_k: int


def build_varlen_metadata(
    lengths: list[list[int]], prefixes: list[int], bounds: VarlenBounds | None = None
) -> tuple[VarlenMetadata, Tensor]:
    """The documents of a row that concatenates packs, and the row's position ids.

    Args:
        lengths: by pack, the lengths of its documents.
        prefixes: by pack, the length of its first document if the others share it as their prefix, else 0.
        bounds: of the run; defaults to those of the row.

    Returns:
        The metadata, and int64 [length] position ids. They start at the prefix's length in a document that shares a
        prefix, else at 0.

    Raises:
        ValueError: the row exceeds its bounds, beyond which a kernel would read and write.
    """
    queries, keys, index, positions = [0], [0], [], []
    start = 0
    for pack, prefix in zip(lengths, prefixes, strict=True):
        shared = torch.arange(start, start + prefix)
        for number, length in enumerate(pack):
            own = torch.arange(start, start + length)
            sees_prefix = prefix > 0 and number > 0
            index.append(torch.cat([shared, own]) if sees_prefix else own)
            positions.append(torch.arange(length) + (prefix if sees_prefix else 0))
            start += length
            queries.append(start)
            keys.append(keys[-1] + len(index[-1]))
    cu_seqlens = torch.tensor([queries, keys], dtype=torch.int32)
    found = VarlenBounds(len(queries) - 1, *cu_seqlens.diff().amax(1).tolist())
    bounds = bounds or found
    if any(mine > most for mine, most in zip(found, bounds, strict=True)):
        raise ValueError(f"a row has {found}, above the {bounds} of its run: pack all dialogues in one run")
    cu_seqlens = torch.nn.functional.pad(cu_seqlens, (0, bounds.documents - found.documents), "replicate")
    metadata = VarlenMetadata(cu_seqlens[0], cu_seqlens[1], torch.cat(index), bounds.max_q, bounds.max_k)
    return metadata, torch.cat(positions)


def document_mask(metadata: VarlenMetadata) -> Tensor:
    """The dense boolean mask [1, 1, length, length]: the reference for the other implementations."""
    length = int(metadata.cu_seqlens_q[-1])
    mask = torch.zeros(length, length, dtype=torch.bool)
    for own, keys in _documents(metadata.cu_seqlens_q, metadata.cu_seqlens_k):
        queries, seen = own.stop - own.start, keys.stop - keys.start
        mask[own, metadata.key_index[keys]] = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
    return mask[None, None]


def check_varlen_inputs(query: Tensor, attention_mask: Tensor | None, varlen_metadata: dict[str, Any] | None) -> None:
    """Check that a call of our attention has metadata, one row, and no mask besides.

    Raises:
        ValueError: it does not, so documents would see each other.
    """
    if varlen_metadata is None:
        raise ValueError(
            f"{VARLEN_ATTENTION} attention was called without varlen_metadata: use it only on PackCollator batches"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{VARLEN_ATTENTION} attention takes one row and no attention mask")


def cast_to_common_dtype(*states: Tensor) -> list[Tensor]:
    """Cast queries, keys and values to autocast's dtype: rotary embeddings leave fp32, linear layers make bf16."""
    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[0].dtype
    return [each.to(dtype) for each in states]


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    varlen_metadata: dict[str, Any] | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention over a row document by document, for transformers' attention registry.

    Args:
        query: [B, H, T, D]; key and value have the key-value heads.
        varlen_metadata: the fields of `VarlenMetadata`, passed through the model as a keyword argument.

    Returns:
        [B, T, H, D], and no attention weights.

    Raises:
        ValueError: see `check_varlen_inputs`; or there is dropout, which the kernels do not have.
    """
    check_varlen_inputs(query, attention_mask, varlen_metadata)
    if dropout:
        raise ValueError(f"{VARLEN_ATTENTION} attention has no dropout: set the model's attention_dropout to 0")
    row = [states[0].transpose(0, 1) for states in cast_to_common_dtype(query, key, value)]
    output, _lse = torch.ops.csc_train.varlen_attention(*row, *VarlenMetadata(**(varlen_metadata or {})), scaling)
    return output[None], None


# The operator: one node for compilers and for selective checkpointing, which need not look inside


@torch.library.custom_op("csc_train::varlen_attention", mutates_args=(), device_types="cpu")
def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_index: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention by blocks of queries and keys, each by PyTorch's flash-attention for the CPU.

    A prefix is multiplied once with all documents that share it, and no causal mask is larger than a document. The
    parts of a query's softmax are joined by their log-sum-exp. From the joined output and log-sum-exp, the kernel's
    backward pass returns each block's part of the gradients. Source: Liu et al., "Ring Attention with Blockwise
    Transformers" (2023).

    Args:
        query: [T, H, D]; key and value have the key-value heads.

    Returns:
        The output [T, H, D], and the log-sum-exp [H, T] in fp32 or higher.

    Raises:
        ValueError: the documents do not end where the row ends.
    """
    if (end := int(cu_seqlens_q[-1])) != len(query):
        raise ValueError(f"a row of {len(query)} tokens has documents of {end}")
    q_BHTD, k_BHTD, v_BHTD = _all_heads(query, key, value)
    output = query.new_empty(query.shape)
    o_BHTD = output.transpose(0, 1)[None]
    lse_BHT = query.new_empty(q_BHTD.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for own, seen, causal in _blocks(cu_seqlens_q, cu_seqlens_k, key_index):
        part, part_lse = _flash(q_BHTD[:, :, own], k_BHTD[:, :, seen], v_BHTD[:, :, seen], 0.0, causal, scale=scale)
        if causal:
            o_BHTD[:, :, own], lse_BHT[:, :, own] = part, part_lse
            continue
        joined = torch.logaddexp(lse_BHT[:, :, own], part_lse)
        weight = (part_lse - joined).exp()[..., None].to(query.dtype)
        o_BHTD[:, :, own] = torch.lerp(o_BHTD[:, :, own], part, weight)
        lse_BHT[:, :, own] = joined
    return output, lse_BHT[0]


@attend_in_blocks.register_kernel("cuda")
def attend_gathered(query, key, value, cu_seqlens_q, cu_seqlens_k, key_index, max_q, max_k, scale):
    """As `attend_in_blocks`, by one call of torch's flash-attention for documents of different lengths."""
    keys, values = key.index_select(0, key_index), value.index_select(0, key_index)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, True, False, scale=scale
    )
    return output.contiguous(), lse


@attend_in_blocks.register_fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, key_index, max_q, max_k, scale):
    lse = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("csc_train::varlen_attention_backward", mutates_args=(), device_types="cpu")
def backward_in_blocks(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_index: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend_in_blocks`' query, key and value, from that of its output."""
    q_BHTD, k_BHTD, v_BHTD = states = _all_heads(query, key, value)
    g_BHTD, o_BHTD = (each.transpose(0, 1)[None] for each in (gradient, output))
    gradients = [torch.zeros_like(each) for each in states]
    for own, seen, causal in _blocks(cu_seqlens_q, cu_seqlens_k, key_index):
        parts = _flash_backward(
            g_BHTD[:, :, own],
            q_BHTD[:, :, own],
            k_BHTD[:, :, seen],
            v_BHTD[:, :, seen],
            o_BHTD[:, :, own],
            lse[None, :, own],
            0.0,
            causal,
            scale=scale,
        )
        for whole, part, where in zip(gradients, parts, (own, seen, seen), strict=True):
            whole[:, :, where] += part
    rows = [whole[0].transpose(0, 1) for whole in gradients]
    grouped = (
        row.reshape(*to.shape[:2], -1, to.shape[2]).sum(2) for row, to in zip(rows, (query, key, value), strict=True)
    )
    return tuple(grouped)  # pyright: ignore[reportReturnType]


@backward_in_blocks.register_kernel("cuda")
def backward_gathered(
    gradient, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, key_index, max_q, max_k, scale
):
    """The gradients of `attend_gathered`; those of a prefix are summed over its copies, in fp32 or higher."""
    keys, values = key.index_select(0, key_index), value.index_select(0, key_index)
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that there is not
    own, *gathered = torch.ops.aten._flash_attention_backward(
        gradient.contiguous(),
        *(query, keys, values, output, lse),
        *(cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, True, unused, unused),
        scale=scale,
    )
    wide = torch.promote_types(query.dtype, torch.float32)
    sums = (
        torch.zeros(whole.shape, dtype=wide, device=key.device).index_add_(0, key_index, part.to(wide)).to(key.dtype)
        for whole, part in zip((key, value), gathered, strict=True)
    )
    return own.contiguous(), *sums


@backward_in_blocks.register_fake
def _(gradient, query, key, value, *_):
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_q, ctx.max_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, gradient: Tensor, _) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.csc_train.varlen_attention_backward(
        gradient, *ctx.saved_tensors, ctx.max_q, ctx.max_k, ctx.scale
    )
    return *gradients, *[None] * 6


attend_in_blocks.register_autograd(_backward, setup_context=_setup_context)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _all_heads(query: Tensor, *key_values: Tensor) -> list[Tensor]:
    """[T, heads, D] as [B, H, T, D]: key-value heads are repeated for the query heads that share them."""
    groups = query.shape[1] // key_values[0].shape[1]
    repeated = [query, *(each.repeat_interleave(groups, dim=1) for each in key_values)]
    return [each.transpose(0, 1)[None] for each in repeated]


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """The place of each document in the row, and that of its keys among all keys; those without tokens left out."""
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    bounds = itertools.pairwise(ends)
    return [(slice(start, end), slice(first, last)) for (start, first), (end, last) in bounds if end > start]


def _blocks(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_index: Tensor) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, causal) of each block: every document by itself, then every run of documents by its prefix."""
    causal, shared = [], []
    for own, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        causal.append((own, own, True))
        length = (keys.stop - keys.start) - (own.stop - own.start)
        start = int(key_index[keys.start])
        prefix = slice(start, start + length)
        if length and shared and shared[-1][:2] == (slice(shared[-1][0].start, own.start), prefix):
            shared[-1] = (slice(shared[-1][0].start, own.stop), prefix, False)
        elif length:
            shared.append((own, prefix, False))
    return causal + shared
