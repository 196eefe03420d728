"""Which tokens of a row see which: documents that share the row, and may share a prefix.

The hidden states of a prompt do not depend on what follows it, so dialogues that start with the same ids can share one
copy of them: each attends to the prefix and to itself, with positions going on from the prefix's end (issue 3). Loss
and gradients are those of separate sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

ATTENTION = "documents"
"""Name under which `document_attention` stands in transformers' attention registry."""


class Documents(NamedTuple):
    """The documents of a row, in order. A document's last query sees its last key, the one before sees one less, ...

    Attributes:
        query_lengths: int64 [documents]; they add up to the row's length.
        key_lengths: int64 [documents]; a query length, or that plus the prefix's.
        key_index: int64 [sum of key_lengths]; where in the row each key stands.
    """

    query_lengths: torch.Tensor
    key_lengths: torch.Tensor
    key_index: torch.Tensor


def row_documents(lengths: list[list[int]], prefixes: list[int]) -> tuple[Documents, torch.Tensor]:
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
    return Documents(torch.tensor(queries), torch.tensor(keys), torch.cat(index)), torch.cat(positions)


def dense_mask(documents: Documents) -> torch.Tensor:
    """What `documents` say as a boolean mask [1, 1, length, length]: the plain path, and the oracle of the others."""
    length = int(documents.query_lengths.sum())
    mask = torch.zeros(length, length, dtype=torch.bool)
    start = key_start = 0
    for queries, keys in zip(documents.query_lengths.tolist(), documents.key_lengths.tolist(), strict=True):
        index = documents.key_index[key_start : key_start + keys]
        mask[start : start + queries, index] = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        start, key_start = start + queries, key_start + keys
    return mask[None, None]


def refuse_leaks(
    attention: str,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: dict[str, torch.Tensor] | None,
) -> None:
    """Refuse a call of our own attention that does not say which documents a row has, or says it twice.

    Raises:
        ValueError: there are no documents, or there is a mask or another row besides: documents would leak.
    """
    if documents is None:
        raise ValueError(f"{attention} attention was called without documents: use it on batches of PackCollator alone")
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{attention} attention takes one row and no attention mask")


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: dict[str, torch.Tensor] | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention of a row, one document at a time, for transformers' attention registry.

    On a GPU one call of flash-attention's variable-length kernel, which takes different query and key lengths and
    aligns the causal mask bottom right (not run yet: no test reaches it); elsewhere scaled-dot-product attention
    document by document.

    Args:
        query: [1, heads, length, head_dim]; key and value have the key-value heads.
        documents: the fields of `Documents`, handed through the model as a keyword argument.

    Returns:
        [1, length, heads, head_dim], and no weights.

    Raises:
        ValueError: see `refuse_leaks`.
    """
    refuse_leaks(ATTENTION, query, attention_mask, documents)
    documents = Documents(**documents)
    if query.is_cuda:
        return _flash_attention(query, key, value, dropout, scaling, documents), None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    key_start = 0
    for queries, keys in zip(documents.query_lengths.tolist(), documents.key_lengths.tolist(), strict=True):
        index = documents.key_index[key_start : key_start + keys]
        # The prefix's queries run along and are dropped: a causal square without a mask costs less than a masked
        # oblong, of which the kernel computes the masked part as well.
        square = F.scaled_dot_product_attention(
            query[:, :, index], key[:, :, index], value[:, :, index], dropout_p=dropout, is_causal=True, scale=scaling
        )
        outputs.append(square[:, :, keys - queries :])
        key_start += keys
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    documents: Documents,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    def bounds(lengths: torch.Tensor) -> torch.Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    # With weights in fp32, rotary embeddings leave queries and keys in fp32, which the kernel does not take.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
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
