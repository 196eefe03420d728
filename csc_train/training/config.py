"""Settings of the training: the groups `trainer`, `validation`, `alerts` and `zero`."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from csc_train.errors import InputError, check_fields, check_range

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}
"""Values of `TrainerConfig.optimizer`, and transformers' names of them."""
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
FEW_STEPS = 50
ON_NONFINITE = ("stop", "skip", "continue")
COMPILE = ("auto", "off", "layers")
BACKGROUND = ("auto", "true", "false")
CHECKPOINTING = ("off", "selective", "full")
"""Values of `TrainerConfig.gradient_checkpointing`, from the fastest to the one that needs the least memory."""
VALIDATION_METRICS = ("loss", "strategy_accuracy")
MAX_STEPS = 10**9
ZERO_STAGES = ("auto", "off", "0", "1", "2", "3", "from_launcher")


def check_steps(key: str, value: float | None) -> None:
    """Check a number of optimizer steps, or share of all steps; None is accepted.

    Raises:
        InputError: `value` is negative, or above 1 and not whole; names `key`.
    """
    check_range(key, value, 0, MAX_STEPS)
    if value is not None and value > 1 and value % 1:
        raise InputError(f"{key}={value}: choose a whole number of steps, or a share below 1")


def launches_deepspeed() -> bool:
    """Whether accelerate's launcher has a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def launcher_config() -> dict[str, Any] | None:
    """DeepSpeed's configuration by accelerate's launcher; None without one.

    Raises:
        InputError: its file cannot be read, or says nothing of ZeRO.
    """
    if not launches_deepspeed():
        return None
    from accelerate.utils import DeepSpeedPlugin

    try:
        return DeepSpeedPlugin().deepspeed_config
    except ValueError as error:
        raise InputError(f"the launcher's DeepSpeed configuration: {' '.join(str(error).split())}") from error


@dataclass
class ZeroConfig:
    """What DeepSpeed's ZeRO shards over the processes."""

    stage: str = "auto"
    """off: PyTorch's DDP, no sharding; fp32 weights, which each forward pass in bf16 casts. 0: DeepSpeed's engine, no
    sharding. 1: shard the optimizer states. 2: the gradients too. 3: the weights too. from_launcher: as accelerate's
    configuration says. auto: from_launcher if accelerate has a DeepSpeed configuration; else 1 for full fine-tuning in
    bf16, on one process too, for bf16 weights with an fp32 copy in the optimizer; else off."""
    offload_optimizer: bool = False
    """Keep the optimizer states in CPU memory and update the weights on the CPU; stages 2 and 3."""
    offload_parameters: bool = False
    """Keep the weight shards in CPU memory; stage 3."""
    persistence_threshold: int | None = None
    """Under stage 3, each process keeps whole parameters with fewer elements; defaults to ten times the hidden size."""

    def __post_init__(self):
        check_fields("zero.", self, "stage", choices=ZERO_STAGES)
        check_fields("zero.", self, "persistence_threshold", low=0)
        if self.offload_optimizer and self.stage not in ("2", "3"):
            raise InputError(f"zero.offload_optimizer=true with zero.stage={self.stage}: choose stage 2 or 3")
        if self.offload_parameters and self.stage != "3":
            raise InputError(
                f"zero.offload_parameters=true with zero.stage={self.stage}: choose stage 3, which shards the weights"
            )

    def check_launched(self) -> None:
        """Raise an InputError under from_launcher without a launcher that configures DeepSpeed."""
        if self.stage == "from_launcher" and not launches_deepspeed():
            raise InputError("zero=from_launcher: not started by `accelerate launch` with a DeepSpeed configuration")

    def resolved(self, adapter: str, precision: str) -> "ZeroConfig":
        """These settings with the stage that `auto` stands for; auto remains if accelerate launches DeepSpeed.

        Args:
            adapter: an `AdapterConfig.kind`.
            precision: of the computation, as `resolve_precision` returns it.

        Raises:
            InputError: as `check_launched`.
        """
        self.check_launched()
        if self.stage != "auto" or launches_deepspeed():
            return self
        return replace(self, stage="1" if adapter == "full" and precision != "fp32" else "off")


@dataclass
class TrainerConfig:
    """How the model is trained."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Schedule of the learning rate: linear, cosine, constant or constant_with_warmup."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    optimizer: str = "adamw"
    """adamw: AdamW with moments in fp32. adamw_8bit: AdamW of bitsandbytes, with moments in 8 bits for tensors of 4,096
    elements and more; without sharding, those of embeddings stay in fp32. Source: Dettmers et al., "8-bit Optimizers
    via Block-wise Quantization" (2022)."""
    neftune_alpha: float | None = None
    """Add noise to the embeddings in training, uniform within alpha / sqrt(tokens x width); null adds none. The
    tokens are those of the dialogue, not of the pack; a shared prefix counts the longest dialogue behind it. Source:
    Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (2023), who try 5, 10 and 15."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    epochs: float = 3.0
    """Passes through the training data."""
    max_steps: int = -1
    """Optimizer steps to train instead of `epochs`; -1: train `epochs`."""
    packs_per_step: int = 8
    """The global batch size in packs, over all ranks; the last step of an epoch has the rest. Gradient accumulation
    follows from it."""
    micro_batch_size: int = 1
    """Packs per forward pass of one process. Gradient accumulation follows from it."""
    precision: str = "auto"
    """Dtype of the computation and of the final model: bf16 or fp32. auto: bf16 on a GPU that supports it. fp8: as
    bf16, but the decoder's linear layers multiply in float8; for full fine-tuning with compiled layers, from compute
    capability 8.9 on."""
    gradient_checkpointing: str = "auto"
    """Which activations the backward pass recomputes, to save memory. off: none. selective: norms, activations and
    attention's inputs, no matrix products. full: whole layers. auto: the first of them that fits by the memory plan."""
    activation_offload: bool = False
    """Keep the inputs of layers, from which full gradient checkpointing recomputes, in CPU memory. The copies take
    time; on a CPU it saves nothing."""
    compile: str = "auto"
    """layers: compile the decoder layers, into one graph for all steps; the first step takes a minute longer. auto: on
    a GPU where it works, else off."""
    router_aux_loss_coef: float | None = None
    """Weight of the auxiliary loss that balances the load of experts; 0 leaves it out. Defaults to that of the base
    model's configuration."""
    on_nonfinite: str = "stop"
    """What to do at a step whose loss or gradient norm is not finite. stop: end the run before the weights change.
    skip: leave out the optimizer step. continue: take it; DeepSpeed leaves it out. Ten such steps in a row end the run
    in any case, and broken weights are never saved."""
    seed: int = 0
    """Seed of the order of packs, of random weights and of dropout."""
    logging_steps: int = 1
    """Optimizer steps between log entries; validations and training checkpoints add theirs."""
    save_steps: float = 0.5
    """Optimizer steps between training checkpoints; below 1, a share of all steps."""
    save_total_limit: int = 2
    """Number of training checkpoints to keep."""
    save_in_background: str = "auto"
    """true: copy the state to the host's memory, and write the training checkpoint while training goes on. false:
    training waits for it. auto: true if the host has memory for the copy."""
    profile: bool = False
    """Profile a few steps: writes a trace and, on a GPU, a memory snapshot to `profile/` in the run directory, and
    prints the share of time by kernel family."""

    def __post_init__(self):
        check_fields("trainer.", self, "learning_rate", low=1e-12)  # 0 trains nothing
        check_fields("trainer.", self, "neftune_alpha", low=1e-6, high=1e6)  # 0 adds nothing
        check_fields("trainer.", self, "weight_decay", "max_grad_norm", "router_aux_loss_coef", low=0)
        check_fields("trainer.", self, "warmup_ratio", low=0, high=0.99)
        check_fields("trainer.", self, "epochs", low=0.001, high=10**6)
        check_fields("trainer.", self, "packs_per_step", "micro_batch_size", low=1, high=MAX_STEPS)
        check_fields("trainer.", self, "logging_steps", "save_total_limit", low=1, high=MAX_STEPS)
        check_fields("trainer.", self, "max_steps", low=-1, high=MAX_STEPS)
        check_fields("trainer.", self, "seed", low=0, high=2**32 - 1)
        check_fields("trainer.", self, "lr_scheduler", choices=SCHEDULERS)
        check_fields("trainer.", self, "optimizer", choices=tuple(OPTIMIZERS))
        check_fields("trainer.", self, "on_nonfinite", choices=ON_NONFINITE)
        check_fields("trainer.", self, "compile", choices=COMPILE)
        check_fields("trainer.", self, "gradient_checkpointing", choices=(*CHECKPOINTING, "auto"))
        self.save_in_background = str(self.save_in_background).lower()
        check_fields("trainer.", self, "save_in_background", choices=BACKGROUND)
        check_fields("trainer.", self, "precision", choices=("auto", "bf16", "fp32", "fp8"))
        check_steps("trainer.save_steps", self.save_steps)
        if self.activation_offload and self.gradient_checkpointing not in ("auto", "full"):
            chosen = f"trainer.gradient_checkpointing={self.gradient_checkpointing}"
            raise InputError(f"trainer.activation_offload=true with {chosen}: choose full, which keeps inputs only")
        if self.max_steps == 0:
            raise InputError("trainer.max_steps=0: choose at least 1, or -1 to train trainer.epochs")

    def steps(self, packs: int) -> int:
        """Optimizer steps of the whole training on a number of packs."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * math.ceil(packs / self.packs_per_step))

    def few_steps_note(self, packs: int) -> str | None:
        """A note if the training has fewer than `FEW_STEPS` optimizer steps, else None."""
        if (steps := self.steps(packs)) >= FEW_STEPS:
            return None
        return (
            f"note: {steps} optimizer steps, fewer than {FEW_STEPS}, may not teach much: raise trainer.epochs or "
            "trainer.max_steps, or lower trainer.packs_per_step"
        )

    def accumulation(self, processes: int) -> int:
        """Gradient accumulation steps: forward passes of each process per optimizer step.

        Raises:
            InputError: `packs_per_step` is not a multiple of `micro_batch_size` x `processes`.
        """
        packs_per_pass = self.micro_batch_size * processes
        if self.packs_per_step % packs_per_pass:
            raise InputError(
                f"trainer.packs_per_step={self.packs_per_step} is not a multiple of trainer.micro_batch_size="
                f"{self.micro_batch_size} x {processes} processes"
            )
        return self.packs_per_step // packs_per_pass


@dataclass
class ValidationConfig:
    """Validation while training, and how it selects the final model.

    It runs on the validation dialogues if `data.validation_fraction` sets some aside, else on the evaluation dialogues.
    """

    eval_steps: float | None = None
    """Optimizer steps between validations; below 1, a share of all steps. 0: no validation; defaults to
    `trainer.save_steps`."""
    num_turns: int | None = 256
    """Number of supporter turns for the strategy accuracy, from random dialogues, the same each time. null: all turns.
    0: none. A turn is right if the reference strategy has the most likely of the 12 labels."""
    num_samples: int = 8
    """Number of supporter turns with a generated reply in `samples.jsonl`, the same each time."""
    max_new_tokens: int = 96
    """Length limit of generated replies, strategy included."""
    generated_dialogues: int = 0
    """Number of dialogues that are generated at each validation, the same each time: the model's own turns stand in the
    history of the later ones, the customer's are given. Their turns are in `generated.jsonl`. Under ZeRO stage 3 each
    process gathers all weights for it, once a validation."""
    metric_for_best_model: str = "loss"
    """The metric that selects the best checkpoint: loss or strategy_accuracy."""
    early_stopping_patience: int | None = None
    """Stop after this many validations in a row without a new best."""
    save_best: bool = False
    """Make the final model from the best checkpoint, which is kept at any age, instead of the last weights."""

    def __post_init__(self):
        check_fields("validation.", self, "metric_for_best_model", choices=VALIDATION_METRICS)
        check_fields("validation.", self, "num_samples", "num_turns", "generated_dialogues", low=0)
        check_fields("validation.", self, "max_new_tokens", "early_stopping_patience", low=1)
        check_steps("validation.eval_steps", self.eval_steps)
        if self.eval_steps == 0 and self.selects_model:
            raise InputError("validation.eval_steps=0: save_best and early_stopping_patience need validations")
        if self.num_turns == 0 and self.metric_for_best_model == "strategy_accuracy":
            raise InputError("validation.metric_for_best_model=strategy_accuracy: choose validation.num_turns above 0")

    @property
    def selects_model(self) -> bool:
        """Whether validation selects the final model, so that its dialogues cannot test it."""
        return self.early_stopping_patience is not None or self.save_best

    def selection_warning(self, dialogues: Sequence) -> str | None:
        """A warning if validation selects the model on the evaluation dialogues, else None.

        Args:
            dialogues: those set aside for validation; without any it runs on the evaluation dialogues.
        """
        if dialogues or not self.selects_model:
            return None
        return (
            f"note: {self.metric_for_best_model} on the evaluation dialogues selects the model: evaluate it on others, "
            "or select it on training dialogues that are set aside (data.validation_fraction=0.02)"
        )

    def interval(self, trainer: TrainerConfig) -> float:
        """Steps between validations, or their share of all steps; 0 for none.

        Raises:
            InputError: validation selects the model, but does not run.
        """
        interval = trainer.save_steps if self.eval_steps is None else self.eval_steps
        if not interval and self.selects_model:
            raise InputError(
                "trainer.save_steps=0: set validation.eval_steps, which save_best and early_stopping_patience need"
            )
        return interval


@dataclass
class AlertsConfig:
    """What in the metrics of a training raises an alert: a line in the log, an entry in `run.json`, an alert of W&B.

    0 or null turns one off. A fault that lasts gives one alert.
    """

    window: int = 50
    """Log entries that the next one is compared with; the first ten are not judged."""
    loss_spike: float | None = 8.0
    """Robust standard deviations above the median of the last ten at which a loss is a spike."""
    slow_throughput: float | None = 0.5
    """Share of the median of trained tokens per second; three entries in a row below it raise an alert."""
    small_gradients: float | None = 0.02
    """Share of the median gradient norm; three entries in a row below it raise an alert, after the warm-up."""
    worse_validations: int | None = 3
    """Validations in a row in which the loss rises or the strategy accuracy falls, together by more than 2 %."""

    def __post_init__(self):
        check_fields("alerts.", self, "window", low=10, high=10**4)
        check_fields("alerts.", self, "loss_spike", "worse_validations", low=0)
        check_fields("alerts.", self, "slow_throughput", "small_gradients", low=0, high=1)
        if self.worse_validations and self.worse_validations > self.window:
            raise InputError(f"alerts.worse_validations={self.worse_validations}: choose at most alerts.window")
