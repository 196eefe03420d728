"""What a user may choose about the trainer."""

from dataclasses import dataclass

from csc_train.errors import InputError, check_choice, check_range

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
VALIDATION_METRICS = ("loss", "strategy_accuracy")
"""What the best state of a training may be chosen by."""


def check_steps(key: str, value: float) -> None:
    """Refuse a number of steps that is neither whole nor a share of all steps.

    Raises:
        InputError: `value` is above 1 and not whole; names `key`.
    """
    if value > 1 and value % 1:
        raise InputError(f"{key}={value}: a whole number of steps, or a share below 1")


@dataclass
class ZeroConfig:
    """What is sharded over the processes, by DeepSpeed's ZeRO."""

    stage: str = "auto"
    """off: nothing, PyTorch's DDP. 0: nothing, but DeepSpeed's engine. 1: the optimizer's states. 2: the gradients as
    well. 3: the weights as well. from_launcher: what accelerate's own configuration says. auto: from_launcher where
    accelerate brings one, else off."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in the memory of the CPU and update the weights there."""
    offload_parameters: bool = False
    """Under stage 3, keep the shards of the weights in the memory of the CPU."""
    persistence_threshold: int | None = None
    """Under stage 3, parameters of fewer elements stay whole on every process; ten times the hidden size where not
    given."""

    def __post_init__(self):
        check_choice("zero.stage", self.stage, ("auto", "off", "0", "1", "2", "3", "from_launcher"))
        if self.persistence_threshold is not None:
            check_range("zero.persistence_threshold", self.persistence_threshold, 0)
        if self.offload_optimizer and self.stage not in ("2", "3"):
            raise InputError(f"zero.offload_optimizer=true with zero.stage={self.stage}: choose stage 2 or 3")
        if self.offload_parameters and self.stage != "3":
            raise InputError(
                f"zero.offload_parameters=true with zero.stage={self.stage}: only stage 3 shards the weights"
            )


@dataclass
class TrainerConfig:
    """How the model is trained."""

    learning_rate: float = 1e-5
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int = -1
    """Stop after this many optimizer steps; -1: after `epochs`."""
    packs_per_step: int = 8
    """Packs in the batch of one optimizer step, over all processes; the last step of an epoch has what is left.
    Gradient accumulation follows from it."""
    micro_batch_size: int = 1
    """Packs in one forward pass of one process."""
    precision: str = "auto"
    """Of the computation and the checkpoint. auto: bf16 where the GPU has it, else fp32. Or bf16, fp32."""
    gradient_checkpointing: bool = True
    seed: int = 0
    logging_steps: int = 1
    """Optimizer steps between log lines."""
    save_steps: float = 0.5
    """Optimizer steps between saved states of training; below 1, a share of the run's steps."""
    save_total_limit: int = 2
    """How many saved states to keep."""
    worst_first: bool = True
    """Run the largest batch forward and backward before the first step, so that memory runs out at once or never."""

    def __post_init__(self):
        check_range("trainer.learning_rate", self.learning_rate, 0)
        check_range("trainer.warmup_ratio", self.warmup_ratio, 0, 0.99)
        check_range("trainer.weight_decay", self.weight_decay, 0)
        check_range("trainer.max_grad_norm", self.max_grad_norm, 0)
        check_range("trainer.epochs", self.epochs, 0.001)
        check_range("trainer.packs_per_step", self.packs_per_step, 1)
        check_range("trainer.micro_batch_size", self.micro_batch_size, 1)
        check_range("trainer.save_steps", self.save_steps, 0)
        check_range("trainer.logging_steps", self.logging_steps, 1)
        check_range("trainer.save_total_limit", self.save_total_limit, 1)
        check_range("trainer.seed", self.seed, 0, 2**32 - 1)
        check_choice("trainer.lr_scheduler", self.lr_scheduler, SCHEDULERS)
        check_steps("trainer.save_steps", self.save_steps)
        if self.max_steps == 0:
            raise InputError("trainer.max_steps=0: must be at least 1, or -1 for as many as `epochs` makes")
        check_choice("trainer.precision", self.precision, ("auto", "bf16", "fp32"))

    def accumulation(self, processes: int) -> int:
        """Forward passes of each process in an optimizer step.

        Raises:
            InputError: `packs_per_step` cannot be divided among `processes` x `micro_batch_size`.
        """
        each = self.micro_batch_size * processes
        if self.packs_per_step % each:
            raise InputError(
                f"trainer.packs_per_step={self.packs_per_step} is not a multiple of trainer.micro_batch_size="
                f"{self.micro_batch_size} x {processes} processes"
            )
        return self.packs_per_step // each



@dataclass
class ValidationConfig:
    """What is measured on held-out dialogues while training, and what follows from it.

    They are the validation dialogues, or those of the evaluation (see `data.validation_fraction`)."""

    eval_steps: float | None = None
    """Optimizer steps between measurements; below 1, a share of the run's steps. As `trainer.save_steps` where not
    given; 0: nothing is measured."""
    num_turns: int | None = 256
    """Supporter turns whose strategy is predicted, by the likelihood of the 12 labels: those of dialogues drawn at
    random, the same ones each time. null: all; 0: none."""
    num_samples: int = 8
    """Supporter turns that are replied to, into `samples.jsonl`: the same ones each time."""
    max_new_tokens: int = 96
    """The longest of these replies, strategy included."""
    metric_for_best_model: str = "loss"
    """By which the best state is chosen: loss or strategy_accuracy."""
    early_stopping_patience: int | None = None
    """Stop after this many measurements in a row that are no better than the best before them."""
    save_best: bool = False
    """Make the final model from the best checkpoint, which is then kept however old it is, not from the last one."""

    def __post_init__(self):
        check_choice("validation.metric_for_best_model", self.metric_for_best_model, VALIDATION_METRICS)
        check_range("validation.num_samples", self.num_samples, 0)
        check_range("validation.max_new_tokens", self.max_new_tokens, 1)
        if self.eval_steps is not None:
            check_range("validation.eval_steps", self.eval_steps, 0)
            check_steps("validation.eval_steps", self.eval_steps)
        if self.num_turns is not None:
            check_range("validation.num_turns", self.num_turns, 0)
        if self.early_stopping_patience is not None:
            check_range("validation.early_stopping_patience", self.early_stopping_patience, 1)
        if self.eval_steps == 0 and self.chooses:
            raise InputError(
                "validation.eval_steps=0 measures nothing to choose the best state or the end of training by"
            )
        if self.num_turns == 0 and self.metric_for_best_model == "strategy_accuracy":
            raise InputError(
                "validation.metric_for_best_model=strategy_accuracy with validation.num_turns=0: there is nothing to measure"
            )

    @property
    def chooses(self) -> bool:
        """Whether the measurements decide what the checkpoint is, so that these dialogues are no test of it."""
        return self.early_stopping_patience is not None or self.save_best

    def interval(self, trainer: TrainerConfig) -> float:
        """Steps, or the share of them, between measurements; 0 where there are none.

        Raises:
            InputError: the best state or the end of training depends on measurements, and there are none.
        """
        interval = trainer.save_steps if self.eval_steps is None else self.eval_steps
        if not interval and self.chooses:
            raise InputError("trainer.save_steps=0: say by validation.eval_steps when the best state is looked for")
        return interval
