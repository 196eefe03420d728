"""Torch's flash-attention for documents of different lengths, on a CPU and in any dtype: a reference of plain algebra.

torch has this operator on GPUs only. `flash_on_cpu` gives it a CPU kernel, so that what we build on it runs here.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch.library import Library


def _documents(q, k, cu_q, cu_k, scale):
    """Of each document its queries, keys, scale x products, and whether a query sees a key: aligned bottom right."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for (start, first), (end, last) in itertools.pairwise(zip(cu_q.tolist(), cu_k.tolist(), strict=True)):
        own, keys = slice(start, end), slice(first, last)
        queries, seen = end - start, last - first
        scores = torch.einsum("qhd,khd->hqk", q[own], k[keys]) * scale
        sees = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
        yield own, keys, scores.masked_fill(~sees, torch.finfo(q.dtype).min)


def _all_heads(q, *key_values):
    return [each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in key_values]


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **_):
    assert (dropout, causal) == (0.0, True)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q.diff().max(), cu_k.diff().max()) <= (max_q, max_k)
    k, v = _all_heads(q, k, v)
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
    for own, keys, scores in _documents(q, k, cu_q, cu_k, scale):
        lse[:, own] = scores.logsumexp(-1)
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
    return out, lse, *(torch.empty(0) for _ in range(3))


def _backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None, **_
):  # autograd is off inside a kernel
    heads = k.shape[1]
    k, v = _all_heads(q, k, v)
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for own, keys, scores in _documents(q, k, cu_q, cu_k, scale):
        weights = (scores - lse[:, own, None]).exp()
        dv[keys] += torch.einsum("hqk,qhd->khd", weights, grad[own])
        along = torch.einsum("qhd,khd->hqk", grad[own], v[keys]) - (grad[own] * out[own]).sum(-1).T[..., None]
        dq[own] += torch.einsum("hqk,khd->qhd", weights * along, k[keys]) * factor
        dk[keys] += torch.einsum("hqk,qhd->khd", weights * along, q[own]) * factor
    return dq, *(each.unflatten(1, (heads, -1)).sum(2) for each in (dk, dv))


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Give torch's variable-length flash-attention a CPU kernel."""
    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
