"""DeepSpeed's configuration for ZeRO, its start, and the check that the requested stage runs.

Stage 1 shards the optimizer states, stage 2 the gradients too, stage 3 the weights too. Source: Rajbhandari et al.,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

import functools
import math
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Trainer

from csc_train.errors import InputError
from csc_train.models.families import model_dims
from csc_train.templates import read_yaml
from csc_train.training.config import ZeroConfig, launcher_config


def launcher_stage() -> str | None:
    """The ZeRO stage in the configuration of accelerate's launcher; None without one."""
    launched = launcher_config()
    return None if launched is None else str(launched["zero_optimization"].get("stage", 0))


def deepspeed_config(zero: ZeroConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration; None without DeepSpeed, or if the launcher configures it.

    The Trainer fills in each "auto": batch sizes, accumulation, precision, clipping. The optimizer is the Trainer's
    too: DeepSpeed's would decay norms and biases.

    Raises:
        InputError: accelerate's launcher configures another stage, or none under from_launcher.
    """
    zero.check_launched()
    launched = launcher_stage()
    if launched is None:
        if zero.stage in ("auto", "off"):
            return None
    elif zero.stage in ("auto", "from_launcher", launched):
        return None
    else:
        raise InputError(
            f"zero.stage={zero.stage}, but accelerate launched DeepSpeed stage {launched}: remove one of the two"
        )
    gpu = torch.cuda.is_available()
    fixed = read_yaml(__package__, "deepspeed.yaml")
    optimization: dict[str, Any] = {"stage": int(zero.stage), "overlap_comm": gpu}
    if zero.stage == "3":
        optimization |= fixed["stage_3"]
        if zero.persistence_threshold is not None:
            optimization["stage3_param_persistence_threshold"] = zero.persistence_threshold
    if zero.offload_optimizer:
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if zero.offload_parameters:
        optimization["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    added = fixed["stage_1"] if zero.stage == "1" else {}
    # DeepSpeed compiles its CPU optimizer at first use, which takes minutes.
    return fixed["all_stages"] | added | {"zero_force_ds_cpu_optimizer": gpu, "zero_optimization": optimization}


def start_deepspeed() -> None:
    """Start DeepSpeed's process group before the model is loaded: otherwise stage 3 would see one process only."""
    import deepspeed
    import deepspeed.ops

    # Caused by DeepSpeed itself, and by TRL where it gathers all weights.
    warnings.filterwarnings("ignore", r"`(torch\.distributed\.\w+|is_gradient_checkpointing)` is", FutureWarning)
    if not torch.cuda.is_available():
        # DeepSpeed compiles communication through shared memory at first use, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # one process, without a launcher
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def prepare_experts(model: torch.nn.Module, plugin: Any) -> None:
    """Let stage 3 gather the experts of a layer as one unit (a leaf module), if a model has any.

    A loop over experts runs modules in it as often as there are chosen experts, and processes whose traces differ wait
    for each other for ever. DeepSpeed's own default, the whole MLP of Qwen3-MoE, reduces gradients of adapters before
    they exist.

    Args:
        plugin: accelerate's `DeepSpeedPlugin`, before the engine is built.
    """
    tensors = {name.rpartition(".")[2] for name in model_dims(model.config).expert_tensors}
    if experts := {type(module).__name__ for module in model.modules() if tensors & module._parameters.keys()}:
        plugin.deepspeed_config["zero_optimization"].setdefault("leaf_module", {"classes": sorted(experts)})


def hide_gathers(engine: Any) -> None:
    """Hide from selective checkpointing what stage 3 does to gather and release weights around each module.

    Both differ when a layer is recomputed, as what is already gathered does, and selective checkpointing refuses
    operators that it has not seen in the first pass.

    Args:
        engine: DeepSpeed's, of stage 3.
    """

    def hidden(function: Callable[[torch.nn.Module], None], module: torch.nn.Module) -> None:
        with _disable_current_modes():
            function(module)

    offload = engine.optimizer.parameter_offload
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, functools.partial(hidden, getattr(offload, name)))


def check_engine(trainer: Trainer) -> None:
    """Check that the requested engine runs: some set-ups silently fall back to DDP, or to separate processes.

    Raises:
        InputError: the processes do not train together, another engine or stage runs, or nothing is sharded.
    """
    asked = trainer.args.deepspeed_plugin.zero_stage if trainer.args.deepspeed_plugin else None
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != trainer.accelerator.num_processes:
        raise InputError(f"{started} processes were started, but the trainer sees {trainer.accelerator.num_processes}")
    engine: Any = trainer.model_wrapped
    running = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    if asked != running:
        raise InputError(
            f"zero asks for {_engine(asked)}, but {_engine(running)} runs: unset ACCELERATE_USE_CPU and "
            "ACCELERATE_USE_DEEPSPEED"
        )
    joined = started == 1 or isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    if asked is None and not joined:
        raise InputError(f"{started} processes were started, but {type(engine).__name__} does not train them together")
    if asked in (1, 2):
        parts = set(engine.optimizer.partition_count)
        if parts != {started} or engine.zero_optimization_partition_gradients() != (asked == 2):
            raise InputError(
                f"zero asks for ZeRO stage {asked}, but the optimizer states are in {sorted(parts)} shards"
            )
    if asked == 3:
        for name, parameter in trainer.model.named_parameters():
            if not _is_shard(parameter, started):
                raise InputError(f"zero asks for ZeRO stage 3, but {name} is not sharded over {started} processes")


def skip_nonfinite(optimizer: Any) -> None:
    """Let an optimizer leave out steps whose gradients are not finite, and tell DeepSpeed, as its ZeRO optimizers do.

    Args:
        optimizer: as accelerate wraps it under DeepSpeed's stage 0.
    """

    def before_step(optimizer: Any, *_) -> None:
        gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        optimizer.overflow = not torch.nn.utils.get_total_norm(gradients).isfinite()
        optimizer._global_grad_norm = math.inf if optimizer.overflow else None
        if optimizer.overflow:
            optimizer.zero_grad()

    optimizer.__has_overflow__ = True  # accelerate looks for it before the first step
    optimizer.optimizer.register_step_pre_hook(before_step)


def _engine(stage: int | None) -> str:
    return "DDP or one process" if stage is None else f"ZeRO stage {stage}"


def _is_shard(parameter: Any, processes: int) -> bool:
    if not hasattr(parameter, "ds_tensor"):
        return False
    shard = -(-parameter.ds_numel // processes)
    return parameter.ds_tensor.numel() == shard and (parameter.numel() == 0 or parameter.ds_persist)
