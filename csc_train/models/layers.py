"""How the decoder layers of a model run: what the backward pass recomputes, in float8 or not, compiled or not."""

import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.integrations import moe  # noqa: F401  registers its operator
from transformers.modeling_layers import GradientCheckpointingLayer

from csc_train.models.attention import varlen  # noqa: F401  registers its operator
from csc_train.models.float8 import MULTIPLE

_aten = torch.ops.aten
_GROUPED = (_aten._grouped_mm.default, torch.ops.transformers.grouped_mm_fallback.default)
"""The products of experts; the second one is that of GPUs below compute capability 8."""
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten._scaled_mm.default: 0}
_PRODUCTS |= dict.fromkeys(_GROUPED, 0)
"""The matrix products, and which argument is the left matrix."""
for _product in _GROUPED:  # torch casts no operands of these, so that experts with fp32 weights would multiply in fp32
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_product, _device, torch.bfloat16)
_KEPT = {
    torch.ops.csc_train.varlen_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    # DeepSpeed's linear layer under stage 3 adds its bias in place: done again, it would be added twice.
    _aten.add_.Tensor,
}


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers of a transformers model, in order, also behind adapters."""
    return [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]


def checkpoint_activations(model: PreTrainedModel, mode: str, offload: bool = False) -> None:
    """Let the backward pass recompute activations of the decoder layers.

    A function in the training arguments would do the same, but they could not be saved with a checkpoint.

    Args:
        model: with its adapters.
        mode: off, selective (products and attention keep their output; norms, activations and attention's inputs are
            recomputed) or full (a layer keeps its input).
        offload: keep the inputs of layers in the host's memory; transformers' own option needs a GPU.
    """
    if mode == "off":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        ranks = [each.r for each in getattr(model, "peft_config", {}).values()]
        adds_in_place = str(torch.nn.functional.linear.__module__).startswith("deepspeed")
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts,
            partial(_policy, max(ranks, default=0)),
            allow_cache_entry_mutation=adds_in_place,  # see `_KEPT`
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    for layer in decoder_layers(model) if offload else ():
        layer._gradient_checkpointing_func = partial(_offloaded, layer._gradient_checkpointing_func)


def _offloaded(checkpointed: Callable[..., Any], *arguments: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpointed(*arguments)


def _policy(rank: int, _: Any, operator: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    """Keep the output of a product or of attention; that of an adapter's second matrix is as wide as it is cheap."""
    keep = operator in _KEPT
    if operator in _PRODUCTS:
        keep = arguments[_PRODUCTS[operator]].shape[-1] > rank
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def convert_to_float8(model: PreTrainedModel) -> None:
    """Let the linear layers of the decoder multiply in float8, by torchao's rowwise recipe; names and weights stay.

    The output layer and layers with a width that is no multiple of `MULTIPLE` stay as they are.
    """
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    def fits(module: torch.nn.Module, _: str) -> bool:
        return isinstance(module, torch.nn.Linear) and not any(size % MULTIPLE for size in module.weight.shape)

    config = Float8LinearConfig.from_recipe_name("rowwise")
    for layer in decoder_layers(model):
        convert_to_float8_training(layer, module_filter_fn=fits, config=config)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers in place, each as one graph, at their first forward pass.

    Names of modules and weights stay, which `torch.compile(layer)` in a layer's place would change. All layers share
    one graph for all rows of one length, if `mark_varying` has marked them.
    """
    import torch._inductor.config

    # DDP reduces gradients when a layer's backward pass is done; dynamo would cut layers at the buckets' ends.
    torch._dynamo.config.optimize_ddp = False
    # Dropout draws what it would draw without compilation.
    torch._inductor.config.fallback_random = True
    if hasattr(model, "peft_config"):  # else the first layer, whose input has no gradient, gets a graph of its own
        model.enable_input_require_grads()
    counters["stats"].pop("unique_graphs", None)
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True)


def mark_varying(batch: dict[str, Any]) -> None:
    """Mark the sizes that differ between rows of one length, so that no graph is made for each of them."""
    torch._dynamo.maybe_mark_dynamic(batch["varlen_metadata"]["key_index"], 0)


def recompiles() -> int:
    """Graphs compiled since `compile_layers`, the first aside."""
    return max(0, counters["stats"]["unique_graphs"] - 1)


def missing_compiler() -> str | None:
    """What torch.compile lacks on this machine, and what to do; None if it lacks nothing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler: install g++, or set CXX to one"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h: install the headers of this Python (python3-dev)"
    return None
