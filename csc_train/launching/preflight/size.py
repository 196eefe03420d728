"""The size of a training: its memory scenario, tokens, steps, FLOPs and hours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csc_train.config.recipes.training import PreflightRecipe
from csc_train.models.families import ModelDims, adapted_experts, lora_parameter_count, model_dims
from csc_train.training.memory import MemoryScenario, scenario_flops

if TYPE_CHECKING:
    from csc_train.data.dialogue import Dialogue
    from csc_train.template.dialogue_template import DialogueTemplate

SAMPLE_SIZE = 500
"""Dialogues that are tokenized and packed for an estimate."""


@dataclass(frozen=True)
class JobEstimate:
    """The size of a training job.

    Attributes:
        tokens: tokens of one epoch; a shared prefix counts once per pack.
        packs: packs of one epoch.
        steps: optimizer steps of the whole job.
        flops: model FLOPs of the whole job, without recomputation.
        hours: wall time at the assumed MFU; None if the GPU's FLOP/s are unknown.
        basis: what the estimate rests on.
        epochs: passes over the packs.
        note: on the number of steps, if there is one.
    """

    dialogues: int
    tokens: int
    packs: int
    steps: int
    flops: float
    hours: float | None
    basis: str
    epochs: float
    note: str | None = None

    def __str__(self) -> str:
        hours = "hours unknown" if self.hours is None else f"{self.hours:.1f} h"
        return (
            f"{self.dialogues:,} dialogues; {self.tokens:,} tokens in {self.packs:,} packs per epoch; {self.steps:,} "
            f"steps, {self.flops:.2e} FLOPs, {hours} ({self.basis})" + (f"; {self.note}" if self.note else "")
        )


def zero_of(config: PreflightRecipe) -> tuple[str, str]:
    """(stage, offload) as `MemoryScenario` names them; a launcher's own DeepSpeed configuration counts as stage 3."""
    zero = config.zero
    if zero.stage != "from_launcher":
        zero = zero.resolved(config.adapter.kind, precision_of(config))
    offload = "all" if zero.offload_parameters else "optimizer" if zero.offload_optimizer else "none"
    return {"from_launcher": "3", "auto": "3"}.get(zero.stage, zero.stage), offload


def precision_of(config: PreflightRecipe) -> str:
    """`trainer.precision` on the cluster's devices: bf16, fp32 or fp8."""
    auto = "bf16" if config.cluster.device == "cuda" else "fp32"
    return auto if config.trainer.precision == "auto" else config.trainer.precision


def computes_in_bf16(config: PreflightRecipe) -> bool:
    """Whether the training computes in bf16 on the cluster's devices, at least around products in float8."""
    return precision_of(config) != "fp32"


def memory_scenario(config: PreflightRecipe, dims: ModelDims | None = None) -> MemoryScenario:
    """The training as the memory estimate sees it, with packs of the configured maximum length.

    Args:
        dims: those of the base model's files; default to those of the configuration.
    """
    model, adapter, packing = config.model, config.adapter, config.packing
    dims = dims or model_dims(model.architecture, model.tokenizer_vocab_size)
    weights, active, experts = 0, 0, {}
    if adapter.kind != "full":
        experts = adapted_experts(dims, adapter.target_parameters)
        targets = adapter.target_modules, experts
        weights, active = (
            lora_parameter_count(dims, adapter.rank, *targets, each, adapter.use_dora) for each in (False, True)
        )
    stage, offload = zero_of(config)
    tokens = config.trainer.micro_batch_size * packing.max_length
    # On a GPU, sdpa and eager attention separate the documents of a pack by a dense mask of this many columns. In fp32
    # there is no other.
    masked = model.attn_implementation in ("sdpa", "eager") or not computes_in_bf16(config)
    dense = masked and config.cluster.device == "cuda"
    columns = {"off": 0, "shared_prefix": tokens}.get(packing.strategy, packing.max_length)
    return MemoryScenario(
        dims,
        adapter=adapter.kind,
        adapter_parameters=weights,
        idle_adapters=weights - active,
        adapted_experts=tuple(experts),
        dora=adapter.use_dora,
        optimizer=config.trainer.optimizer,
        stage=stage,
        offload=offload,
        processes=config.cluster.world_size,
        nodes=config.cluster.nodes,
        tokens=tokens,
        checkpointing="full" if (mode := config.trainer.gradient_checkpointing) == "auto" else mode,
        activation_offload=config.trainer.activation_offload and config.cluster.device == "cuda",
        mask_columns=columns if dense else 0,
        bf16=computes_in_bf16(config),
        save_in_background=config.trainer.save_in_background == "true",
        delta_kernel="fla" if config.cluster.device == "cuda" and model.delta_kernel == "auto" else "torch",
    )


def estimate_job(
    config: PreflightRecipe,
    scenario: MemoryScenario,
    template: "DialogueTemplate | None",
    dialogues: "Sequence[Dialogue] | None",
) -> JobEstimate | None:
    """Tokens, steps, FLOPs and hours of a training.

    Args:
        template: tokenizes a sample of `dialogues`; without it, or these, the estimate uses `preflight.dialogues` and
            `preflight.tokens_per_dialogue`.
        dialogues: those of an epoch.

    Returns:
        None if neither is known.
    """
    options, trainer = config.preflight, config.trainer
    if template is not None and dialogues:
        from csc_train.packing.dataset import pack_dialogues

        sample = dialogues[:: -(-len(dialogues) // SAMPLE_SIZE)]
        _, report = pack_dialogues(list(template.encode_all(sample)), config.packing, config.loss)
        count, scale = len(dialogues), len(dialogues) / len(sample)
        tokens, packs = report.tokens * scale, report.packs * scale
        document_length = report.separate_tokens / max(1, report.dialogues - report.dropped)
        basis = f"{len(sample):,} dialogues tokenized"
    elif options.dialogues and options.tokens_per_dialogue:
        count = max(1, round(options.dialogues * config.data.train_fraction))
        document_length = options.tokens_per_dialogue
        tokens = count * document_length
        packs = tokens / config.packing.max_length if config.packing.strategy != "off" else count
        basis = "given lengths, full packs assumed"
    else:
        return None
    packs = math.ceil(packs)
    steps = trainer.steps(packs)
    epochs = steps * trainer.packs_per_step / packs if trainer.max_steps > 0 else trainer.epochs
    flops = scenario_flops(scenario, epochs * tokens, document_length)
    hours = None
    if config.cluster.gpu_tflops:
        hours = flops / (options.mfu * config.cluster.gpu_tflops * 1e12 * config.cluster.world_size) / 3600
        basis += f", MFU {options.mfu} assumed"
    return JobEstimate(count, round(tokens), packs, steps, flops, hours, basis, epochs, trainer.few_steps_note(packs))
