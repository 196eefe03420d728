"""The largest batch of a training, run before its first step: memory runs out in the first minute, or not at all."""

import contextlib
import copy
import math
import os
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from csc_train.errors import InputError
from csc_train.models.families import model_dims
from csc_train.packing.global_batches import assign_to_ranks, global_batches
from csc_train.packing.pack_cost import PackSlice
from csc_train.packing.sampler import PackBatchSampler
from csc_train.training.memory import GIB, MemoryScenario, advice, estimate_memory

if TYPE_CHECKING:
    from csc_train.training.trainer import PackTrainer


class WorstFirst(TrainerCallback):
    """Runs the largest batch forward and backward on every process, and leaves no trace of it.

    It is the same batch on every process. With gradient accumulation it runs twice, the second time with the gradients
    of the first in memory. Adam makes its moments in the first step, so until then as much memory is held in their
    place; DeepSpeed has them already. Afterwards gradients and what DeepSpeed accumulates of them are gone, and the
    random number generators stand where they stood: losses are bitwise those of a training without it.
    """

    def __init__(self, trainer: "PackTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_) -> None:
        """Run the largest batch.

        Raises:
            InputError: memory ran out; the message holds the memory plan and what would fit.
        """
        trainer = self.trainer
        loader = trainer.callback_handler.train_dataloader
        parts, tokens = largest_batch(loader.batch_sampler, range(math.ceil(state.num_train_epochs)))
        try:
            with _no_trace(trainer):
                moments = _stand_ins(trainer)
                for _ in range(min(2, args.gradient_accumulation_steps)):
                    batch = trainer.data_collator([trainer.packs[part] for part in parts])
                    weight = batch["loss_weights"].sum().to(args.device)
                    trainer.training_step(trainer.model_wrapped, batch, num_items_in_batch=weight)
                del moments
        except torch.OutOfMemoryError as error:
            message = out_of_memory(setting_of(trainer, tokens), args, tokens)
            if args.process_index:  # a recipe prints the main process's error alone, which may have had enough
                print(f"error: {message}", file=sys.stderr, flush=True)
            raise InputError(message) from error


def largest_batch(batches: PackBatchSampler, epochs: range) -> tuple[list[PackSlice], int]:
    """The batch of all processes and epochs that has the most tokens, padding included, and how many it has; the
    costliest of several."""

    def size(parts: list[PackSlice]) -> tuple[int, float]:
        lengths = [part.tokens(batches.packs) for part in parts]
        tokens = sum(lengths) if batches.single_row else len(lengths) * max(lengths)
        return tokens, sum(part.flops(batches.packs) for part in parts)

    candidates = (
        parts
        for epoch in epochs
        for step in global_batches(batches.packs, batches.packs_per_step, batches.seed, epoch)
        for process in assign_to_ranks(
            step, batches.packs, batches.world_size, batches.micro_batch_size, single_row=batches.single_row
        )
        for parts in process
        if parts
    )
    largest = max(candidates, key=size)
    return largest, size(largest)[0]


def setting_of(trainer: "PackTrainer", tokens: int) -> MemoryScenario:
    """A training that has been set up, as the memory plan sees it."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    # Under ZeRO-3 a parameter's own size is that of its part on this process.
    trained = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    adapter = "full" if not hasattr(model, "peft_config") else "qlora" if _quantized(model) else "lora"
    plugin, layout = args.deepspeed_plugin, trainer.data_collator.layout
    return MemoryScenario(
        model_dims(model.config),
        adapter=adapter,
        adapter_parameters=0 if adapter == "full" else trained,
        stage="off" if plugin is None else str(plugin.zero_stage),
        processes=args.world_size,
        nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        tokens=tokens,
        checkpointing=args.gradient_checkpointing,
        mask_columns={"dense_mask": tokens, "position_ids": tokens // args.per_device_train_batch_size}.get(layout, 0),
        bf16=args.bf16,
    )


def _quantized(model: torch.nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))


def out_of_memory(setting: MemoryScenario, args, tokens: int) -> str:
    """What to say when the largest batch does not fit: the plan, and what would."""
    planned = estimate_memory(setting)
    # Memory ran out, whatever the plan says: less than was planned has to be enough.
    limit, having = 0.9 * planned.total, ""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(args.device).total_memory
        limit, having = min(limit, memory), f" of {memory / GIB:.1f} GiB"
    per_node = setting.processes // setting.nodes
    return (
        f"out of memory on process {args.process_index} in the largest batch ({tokens:,} tokens), before the first "
        f"step; planned: {planned}{having}; {advice(setting, args.per_device_train_batch_size, per_node, limit)}"
    )


@contextlib.contextmanager
def _no_trace(trainer: "PackTrainer") -> Iterator[None]:
    """Undo what forward and backward passes leave behind, and keep them from being part of a step."""
    model, gradients = trainer.model_wrapped, trainer.accelerator.gradient_state
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    measures, trainer.measures = trainer.measures, copy.copy(trainer.measures)
    trainer.measures.forget()
    states, synced = (random.getstate(), numpy.random.get_state()), gradients.sync_gradients
    # A synced backward pass would make DeepSpeed take a step.
    gradients._set_sync_gradients(False)
    # What DDP would average is thrown away, and by its first average it decides how it goes on.
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    try:
        with torch.random.fork_rng(), alone:
            yield
    finally:
        gradients._set_sync_gradients(synced)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        trainer.measures = measures
        measures.forget()
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)
        model.zero_grad()
        if trainer.is_deepspeed_enabled:
            _forget_sums(model.optimizer)


def _forget_sums(optimizer) -> None:
    """Empty what DeepSpeed's ZeRO optimizers keep of the micro batches of a step, and their count of them."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

    if not isinstance(optimizer, ZeROOptimizer):
        return
    optimizer.zero_grad()
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        optimizer.averaged_gradients.clear()
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.all_grad_tensors.clear()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID


def _stand_ins(trainer: "PackTrainer") -> list[torch.Tensor]:
    """As much memory as Adam's moments will take, where it has none yet."""
    if trainer.is_deepspeed_enabled or trainer.optimizer.state:
        return []
    weights = [each for group in trainer.optimizer.param_groups for each in group["params"]]
    return [torch.empty_like(each) for each in weights for _ in range(2)]
