"""TRL's SFTTrainer on packs of encoded dialogues."""

import dataclasses
import re
import sys
import time
from pathlib import Path

import datasets
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from csc_train.checkpoints.reshard import load_resharded
from csc_train.checkpoints.training_checkpoint import (
    PARTIAL_FOLDER,
    build_record,
    can_resume,
    check_steps,
    checkpoint_dir,
    commit,
    read_record,
    start_save,
)
from csc_train.errors import InputError
from csc_train.models.attention.select import batch_layout
from csc_train.models.config import AdapterConfig
from csc_train.models.families import count_adapter_parameters, forward_flops, model_dims, training_flops
from csc_train.models.loading import lora_config
from csc_train.models.precision import resolve_dtype
from csc_train.packing.collator import PackCollator
from csc_train.packing.dataset import PackedDataset
from csc_train.packing.pack_cost import pack_cost
from csc_train.packing.sampler import PackBatchSampler, PackDataLoader
from csc_train.training.config import TrainerConfig, ValidationConfig, ZeroConfig
from csc_train.training.deepspeed import check_engine, deepspeed_config, launcher_stage, start_deepspeed
from csc_train.training.leak_check import check_no_leaks, forbid_kv_cache
from csc_train.training.progress import Progress
from csc_train.training.train_metrics import TrainMetrics
from csc_train.training.validation import EarlyStopping, Validator
from csc_train.training.worst_first import WorstFirst


class PackTrainer(SFTTrainer):
    """TRL's trainer on packs: their steps (`packing.schedule`), their loss weights, and only what is true of them.

    Attributes:
        packs: what it trains on.
        measures: the figures of the steps since the last log line.
        tracked: the id of the run in the tracker, which saved states keep; None where there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: SFTConfig,
        packs: PackedDataset,
        validator: Validator | None = None,
        **options,
    ):
        # TRL takes a `datasets.Dataset` alone, so it gets those of the packs' numbers.
        numbers = [
            each and datasets.Dataset.from_dict({"pack": range(len(each))})
            for each in (packs, validator and validator.packs)
        ]
        super().__init__(model, arguments, train_dataset=numbers[0], eval_dataset=numbers[1], **options)
        self.packs = packs
        self.measures = TrainMetrics(
            training_flops(model_dims(self.model.config), count_adapter_parameters(self.model)),
            arguments.device,
            arguments.bf16,
        )
        self.tracked: str | None = None
        self.validator = validator

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Wrap the model and load the state to go on from, over however many processes it was saved.

        Raises:
            InputError: training would not run as asked (see `zero.check_engine`) or not go on with the same steps.
        """
        moved = False
        if resume_from_checkpoint is not None:
            state, now = Path(resume_from_checkpoint), build_record(self)
            if not can_resume(state):
                raise InputError(f"{state} was kept for its weights: only a later state can be gone on from")
            saved = read_record(state)
            check_steps(state, saved, now)
            moved = saved.stage != now.stage or (saved.stage in (1, 2, 3) and saved.processes != now.processes)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if moved else resume_from_checkpoint)
        check_engine(self)
        if moved:
            load_resharded(self, state)
        return prepared

    def _run_epoch(self, **options):
        """Train for an epoch, unless the state that was gone on from had reached its end (see `EarlyStopping`)."""
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def batches(self) -> PackBatchSampler:
        """This process's share of the packs."""
        return self._share(self.packs, self.args.gradient_accumulation_steps)

    def _share(self, packs: PackedDataset, accumulation: int) -> PackBatchSampler:
        flops_per_token, flops_per_pair = forward_flops(self.model)
        arguments = self.args
        return PackBatchSampler(
            [
                pack_cost(lengths, prefix, flops_per_token, flops_per_pair)
                for lengths, prefix in zip(packs.document_lengths, packs.prefix_lengths, strict=True)
            ],
            arguments.per_device_train_batch_size * accumulation * arguments.world_size,
            arguments.seed,
            world_size=arguments.world_size,
            rank=arguments.process_index,
            micro_batch_size=arguments.per_device_train_batch_size,
            single_row=self.data_collator.single_row,
        )

    def get_train_dataloader(self) -> PackDataLoader:
        """The loader of `batches`.

        The Trainer takes `gradient_accumulation_steps` batches for an optimizer step and, for the last of an epoch,
        what is left; it counts trained tokens over what it took. The loader is not passed to accelerate, which would
        deal the batches out again, and repeat some for want of a full last step.
        """
        return PackDataLoader(
            self.packs,
            self.batches(),
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step, whose waiting time is measured."""
        return super().get_batch_samples(self.measures.step(epoch_iterator), num_batches, device)

    def get_eval_dataloader(self, eval_dataset=None) -> PackDataLoader:
        """The loader of the held-out packs: as many batches on each process, those without a pack included."""
        return PackDataLoader(
            self.validator.packs,
            self._share(self.validator.packs, accumulation=1),
            self.data_collator,
            generator=torch.Generator(),  # else it would draw from the one that dropout draws from
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a held-out batch, scaled so that its mean over all batches of all processes, which is what the
        Trainer takes, is sum(weight * nll) / sum(weight) over the whole set."""
        inputs = self._prepare_inputs(inputs)
        total = self.validator.weight / len(self.callback_handler.eval_dataloader)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=torch.tensor(total)), None, None

    def evaluation_loop(self, *arguments, metric_key_prefix="eval", **options):
        """Measure the held-out loss, then what else is measured (see `Validator.measure`)."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        measured = self.validator.measure(self)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this is the best state so far; it is saved where the checkpoint is made from the best."""
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.validator.config.save_best
        return best

    def best_state(self) -> Path | None:
        """The saved state to make the checkpoint from; None where that is the last."""
        best = self._best_step()
        return None if best in (None, self.state.global_step) else checkpoint_dir(Path(self.args.output_dir), best)

    def _best_step(self) -> int | None:
        if self.validator is None or not self.validator.config.save_best:
            return None
        return self.state.best_global_step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted loss: sum(weight * nll) over this batch / sum(weight) over the global batch.

        Everything else is TRL's, its fused head included, which never builds logits of all tokens at once.

        Args:
            num_items_in_batch: the sum of weights over the global batch (see `_get_num_items_in_batch`); where there
                is none, over this batch.
        """
        weights, groups, counts = (
            inputs.pop(name, None) for name in ("loss_weights", "token_groups", "token_and_pair_counts")
        )
        total = weights.sum() if num_items_in_batch is None else num_items_in_batch

        def weighted(**arguments):
            if self.model.training and groups is not None:
                with self.measures.forward():
                    outputs = model(**arguments)
                self.measures.count(outputs, groups, counts)
            else:  # held-out dialogues are no step's
                outputs = model(**arguments)
            outputs.log_probs = outputs.log_probs * weights[:, 1:]
            return outputs

        loss = super().compute_loss(weighted, inputs, num_items_in_batch=total)
        # TRL divides by at least one, as befits a count; weights may add up to less.
        return loss * (torch.as_tensor(total).clamp(min=1) / total)

    def _prepare_inputs(self, inputs):
        """Under DeepSpeed the Trainer casts every float to the engine's dtype; loss weights stay as they are."""
        return super()._prepare_inputs(inputs) | {"loss_weights": inputs["loss_weights"].to(self.args.device)}

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The sum of loss weights over the batches of an optimizer step, of all processes."""
        total = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in batch_samples).to(device, torch.float32)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def _get_output_dir(self, trial) -> str:
        """Where the Trainer writes states of training (see `states.end_state`)."""
        return str(Path(super()._get_output_dir(trial)) / PARTIAL_FOLDER)

    def _save_checkpoint(self, model, trial):
        """Save a state of training, which is there when it is whole.

        Raises:
            InputError: it cannot be written.
        """
        directory = Path(self.args.output_dir)
        try:
            start_save(self, directory)
            super()._save_checkpoint(model, trial)
            commit(self, directory, self._best_step())
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
                raise
            raise InputError(f"{self.args.output_dir}: cannot write: {str(error).splitlines()[0]}") from error

    def create_model_card(self, *_, **__) -> None:
        """Write none: TRL's says of a saved state what is not so, and asks the tracker for an address."""

    def _maybe_log_save_evaluate(self, *arguments, **options):
        """The time that evaluation and saving take is none of the steps'."""
        start = time.perf_counter()
        super()._maybe_log_save_evaluate(*arguments, **options)
        self.measures.leave_out(start)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the measures of the steps with their loss, on every process at once.

        Without `num_tokens`: TRL counts the columns of a batch and leaves out its other rows. And without what it adds
        to an evaluation: means over batches, which depend on how the packs were dealt out.
        """
        self._metrics["train"].pop("num_tokens", None)
        self._metrics["eval"].clear()
        for name in ("eval_samples_per_second", "eval_steps_per_second"):  # packs, over the time for more than these
            logs.pop(name, None)
        if "loss" in logs:
            logs |= self.measures.read(self.accelerator.gather)
        super().log(logs, start_time)


def training_arguments(
    config: TrainerConfig,
    directory: Path,
    processes: int,
    zero: ZeroConfig | None = None,
    validation: ValidationConfig | None = None,
) -> SFTConfig:
    """The arguments of a training. Made before the model, which ZeRO stage 3 shards while it is loaded.

    Args:
        directory: where states of training are saved.
        processes: how many processes train together.
        zero: what is sharded over them; nothing by default.
        validation: what is measured while training; nothing by default.

    Raises:
        InputError: as `TrainerConfig.accumulation`, `ValidationConfig.interval` and `zero.deepspeed_config`.
    """
    dtype = resolve_dtype(config.precision)
    interval = validation.interval(config) if validation else 0
    deepspeed = deepspeed_config(zero or ZeroConfig())
    if deepspeed or launcher_stage():
        start_deepspeed()
    return SFTConfig(
        output_dir=str(directory),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation(processes),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        bf16=dtype is torch.bfloat16,
        activation_checkpointing=config.gradient_checkpointing,
        disable_tqdm=not sys.stderr.isatty(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        eval_strategy="steps" if interval else "no",
        eval_steps=interval or None,
        per_device_eval_batch_size=config.micro_batch_size,
        metric_for_best_model=validation.metric_for_best_model if interval else None,
        restore_callback_states_from_checkpoint=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        deepspeed=deepspeed,
    )


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packs: PackedDataset,
    *,
    packing: str,
    arguments: SFTConfig,
    adapter: AdapterConfig,
    worst_first: bool = True,
    validator: Validator | None = None,
) -> PackTrainer:
    """The trainer of one run.

    The loss of an optimizer step is the weighted sum over its trained tokens divided by the sum of their weights, both
    taken over all micro batches and processes, so neither changes the gradient. The packs of a step follow from the
    seed, the epoch and the packs per step alone, so neither changes what is trained when.

    Args:
        packs: as `packing.pack_examples` returns them.
        packing: the `PackingConfig.strategy` by which `packs` were made.
        arguments: as `training_arguments` returns them.
        worst_first: run the largest batch before the first step (see `WorstFirst`).
        validator: what is measured as often as `arguments` say; packed as `packs` are.

    Raises:
        InputError: the model would not keep the documents of a pack apart.
    """
    attention = model.config._attn_implementation
    layout = batch_layout(attention, packing, model.config.model_type)
    collator = PackCollator(layout, tokenizer.pad_token_id, attention == "eager")
    check_no_leaks(model, collator, arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    forbid_kv_cache(model)
    trainer = PackTrainer(
        model,
        arguments,
        packs,
        validator,
        data_collator=dataclasses.replace(collator, measured=True),
        processing_class=tokenizer,
        peft_config=None if adapter.kind == "full" else lora_config(adapter, model.config.model_type),
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(Progress())
    if adapter.kind == "qlora":
        # TRL holds these adapters in bf16, in which most updates would round to nothing.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if worst_first:
        trainer.add_callback(WorstFirst(trainer))
    if validator and validator.config.early_stopping_patience:
        trainer.add_callback(EarlyStopping(validator.config.early_stopping_patience))
    return trainer
