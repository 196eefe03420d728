"""The data types of weights and of the computation."""

import torch

from csc_train.errors import InputError
from csc_train.models.float8 import float8_refusal


def weight_dtype(precision: str, adapter: str) -> torch.dtype:
    """The dtype in which the weights to train are loaded.

    Trained weights are fp32 in every precision: at learning rate 1e-5, most updates would round to nothing in bf16.
    DeepSpeed casts them to bf16, and keeps an fp32 copy in its optimizer.
    Weights under an adapter are only read, so they have the dtype of the computation.

    Args:
        adapter: an `AdapterConfig.kind`.
    """
    return torch.float32 if adapter == "full" else resolve_dtype(precision)


def resolve_precision(precision: str) -> str:
    """Resolve `TrainerConfig.precision` on this machine: bf16, fp32 or fp8.

    Raises:
        InputError: this machine cannot train in fp8.
    """
    if precision == "fp8" and (refusal := float8_refusal()):
        raise InputError(f"trainer.precision=fp8: {refusal}; or choose trainer.precision=bf16")
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def resolve_dtype(precision: str) -> torch.dtype:
    """The dtype of the computation under a `TrainerConfig.precision` on this machine; under fp8, that around it."""
    return torch.bfloat16 if precision == "fp8" or resolve_precision(precision) == "bf16" else torch.float32
