"""The data types of weights and of the computation."""

import torch


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
    """Resolve `TrainerConfig.precision` on this machine: bf16 or fp32."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def resolve_dtype(precision: str) -> torch.dtype:
    """The dtype of the computation under a `TrainerConfig.precision` on this machine."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve_precision(precision)]
