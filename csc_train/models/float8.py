"""What training in float8 takes; `models.layers` converts the decoder."""

import importlib.util

import torch

MIN_CAPABILITY = (8, 9)
"""The compute capability of the first GPUs that multiply in float8."""
MULTIPLE = 16
"""A float8 product needs multiples of this for the sizes it sums over: widths, and in the backward pass tokens."""


def float8_refusal() -> str | None:
    """Why this machine cannot train in float8, and what to do; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU with CUDA is here"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        name, lowest = torch.cuda.get_device_name(), ".".join(map(str, MIN_CAPABILITY))
        return f"{name} cannot multiply in float8, which takes compute capability {lowest} (Ada, Hopper)"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: run `pip install .[fp8]`"
    return None
