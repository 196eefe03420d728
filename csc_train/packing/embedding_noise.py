"""Noise on the embeddings of training documents, each scaled by its own length, however they are packed.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (2023). The libraries' hook scales by
the length of the padded row, so that a pack gets less noise than its documents would.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float | None, sequence_lengths: torch.Tensor | None) -> Iterator[None]:
    """Add noise to the embeddings inside this context, uniform within alpha / sqrt(length x width) on either side.

    Args:
        model: a transformers model.
        alpha: None adds no noise.
        sequence_lengths: of a training batch (see `PackCollator`), int64 [rows, length]; padding, 0, has no noise. None
            adds no noise.
    """
    if alpha is None or sequence_lengths is None:
        yield
        return

    def add_noise(_: torch.nn.Module, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
        bound = alpha * (sequence_lengths * embeddings.shape[-1]).rsqrt().masked_fill(sequence_lengths == 0, 0)
        return embeddings + bound[..., None].to(embeddings.dtype) * torch.empty_like(embeddings).uniform_(-1, 1)

    with model.get_input_embeddings().register_forward_hook(add_noise):
        yield
