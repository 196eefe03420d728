"""Parameters that DeepSpeed's ZeRO stage 3 shards: detect them, gather them, load models without sharding."""

import contextlib
import os
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration


def consolidated_weights(model: torch.nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Gather the parameters of a model one by one onto the CPU of the main process.

    Call it on every process; the others get an empty dictionary.

    Args:
        trained_only: leave out frozen parameters.

    Returns:
        The parameters by name, in their own dtype.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with _gathered(parameter):
            if int(os.environ.get("RANK", "0")) == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether ZeRO stage 3 shards the weights, so that no process holds all of them."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def lacking_memory(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """GiB that a device lacks to hold all sharded weights for a while, float32 [1]; at most 0 if they fit."""
    if device.type != "cuda":
        return torch.zeros(1, device=device)
    held = sum(getattr(each, "ds_numel", 0) * each.element_size() for each in model.parameters())
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return torch.tensor([(held - 0.9 * free) / 2**30], device=device)


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Build or load models whole inside this context, under any ZeRO stage."""
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
