"""Training in float8: the linear layers of the decoder multiply in it, by torchao and its rowwise recipe."""

import importlib.util

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

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


def convert_to_float8(model: PreTrainedModel) -> None:
    """Let the linear layers of the decoder layers multiply in float8; the weights and all names stay.

    The output layer and layers with a width that is no multiple of `MULTIPLE` stay as they are.
    """
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    def fits(module: torch.nn.Module, _: str) -> bool:
        return isinstance(module, torch.nn.Linear) and not any(size % MULTIPLE for size in module.weight.shape)

    config = Float8LinearConfig.from_recipe_name("rowwise")
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            convert_to_float8_training(layer, module_filter_fn=fits, config=config)
