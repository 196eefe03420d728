"""SFTTrainer for packed data: its own batch sampler, weighted loss, checkpoints and metrics."""

import contextlib
import io
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from csc_train.checkpoints.background import CheckpointWriter, reason_of
from csc_train.checkpoints.reshard import load_resharded
from csc_train.checkpoints.training_checkpoint import (
    PARTIAL_FOLDER,
    TRAINER_STATE,
    build_record,
    check_resumable,
    checkpoint_dir,
    commit,
    prune,
    remove_partial,
)
from csc_train.errors import InputError, ResumableError
from csc_train.files import os_errors, write_json
from csc_train.models.config import AdapterConfig
from csc_train.models.families import (
    adapter_report,
    cache_kinds,
    count_adapter_parameters,
    forward_flops,
    model_dims,
    tensors_with_adapters,
    training_flops,
)
from csc_train.models.float8 import MULTIPLE
from csc_train.models.layers import (
    checkpoint_activations,
    compile_layers,
    convert_to_float8,
    mark_varying,
    recompiles,
)
from csc_train.models.layout import parameter_names
from csc_train.models.loading import lora_config, set_magnitudes
from csc_train.models.precision import resolve_dtype
from csc_train.packing.collator import PackCollator, run_bounds
from csc_train.packing.dataset import PackedDataset, PackingReport
from csc_train.packing.embedding_noise import noisy_embeddings
from csc_train.packing.pack_cost import pack_costs
from csc_train.packing.sampler import PackBatchSampler, PackDataLoader
from csc_train.runs.heartbeat import this_rank
from csc_train.training.callbacks import EarlyStopping, ProgressReporter
from csc_train.training.compatibility import resolve_compile
from csc_train.training.config import OPTIMIZERS, TrainerConfig, ValidationConfig, ZeroConfig
from csc_train.training.deepspeed import (
    check_engine,
    deepspeed_config,
    hide_gathers,
    launcher_stage,
    prepare_experts,
    skip_nonfinite,
    start_deepspeed,
)
from csc_train.training.leak_check import checked_collator, forbid_kv_cache
from csc_train.training.loss import add_loss_head, sum_weights
from csc_train.training.memory import choose_checkpointing, has_memory_to_copy, out_of_memory_advice
from csc_train.training.nonfinite import MAX_IN_A_ROW, describe_step, spread_nonfinite, weights_are_finite
from csc_train.training.train_metrics import TrainMetrics
from csc_train.training.validation import Validator, last_validation_metrics

logger = logging.getLogger(__name__)

SAME_ARGUMENTS = (
    "packs_per_step", "learning_rate", "weight_decay", "max_grad_norm", "max_steps", "seed", "logging_steps",
    "save_steps", "save_total_limit", "save_in_background", "on_nonfinite", "compile", "optimizer", "neftune_alpha",
    "activation_offload",
)  # fmt: skip
"""Settings of `TrainerConfig` that `PackTrainingArguments` has under the same name."""


@dataclass
class PackTrainingArguments(SFTConfig):
    """The arguments of a `PackTrainer`."""

    packs_per_step: int = 0
    """Packs in the global batch of an optimizer step."""
    compile: str = "off"
    """`TrainerConfig.compile`; `build_trainer` replaces auto."""
    float8: bool = False
    """Whether linear layers multiply in float8 (see `layers.convert_to_float8`)."""
    checkpointing: str = "full"
    """`TrainerConfig.gradient_checkpointing`; `build_trainer` replaces auto. The Trainer's own arguments are off."""
    activation_offload: bool = False
    """`TrainerConfig.activation_offload`; TRL's own `activation_offloading` needs a GPU."""
    optimizer: str = "adamw"
    """`TrainerConfig.optimizer`, of which `optim` is transformers' name."""
    neftune_alpha: float | None = None
    """`TrainerConfig.neftune_alpha`; transformers' own `neftune_noise_alpha` is off."""
    save_in_background: str = "false"
    """`TrainerConfig.save_in_background`; `build_trainer` replaces auto."""
    on_nonfinite: str = "stop"
    """What to do at a step whose loss or gradient norm is not finite (see `TrainerConfig.on_nonfinite`)."""


ROUTER_SETTINGS = ("output_router_logits", "router_aux_loss_coef")
"""What TRL changes in the configuration of a model with experts."""


class PackTrainer(SFTTrainer):
    """SFTTrainer for packed data.

    Attributes:
        packs: the training data.
        metrics: of the steps since the last log entry.
        validator: None without validation.
        run_ids: the id of the run by tracker, which checkpoints hold.
    """

    args: PackTrainingArguments
    data_collator: PackCollator

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: PackTrainingArguments,
        packs: PackedDataset,
        validator: Validator | None = None,
        **options,
    ):
        # TRL takes only a `datasets.Dataset`: it gets the packs' indices.
        train, validation = (
            each and datasets.Dataset.from_dict({"pack": range(len(each))})
            for each in (packs, validator and validator.packs)
        )
        text: Any = model.config.get_text_config()
        original = {name: value for name, value in vars(text).items() if name in ROUTER_SETTINGS}
        super().__init__(model, arguments, train_dataset=train, eval_dataset=validation, **options)
        vars(text).update(original)  # TRL's own forward pass, unused here, needs others; checkpoints would hold them
        add_loss_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        self.packs = packs
        self.metrics = TrainMetrics(
            training_flops(
                model_dims(self.model.config),
                count_adapter_parameters(self.model, active=True),
                tensors_with_adapters(self.model),
            ),
            arguments.device,
            arguments.bf16,
            packs.mixture.names if packs.mixture else ("",),
        )
        self.validator = validator
        self.run_ids: dict[str, str] = {}
        self._batch_tokens = 0
        self._token_loss: torch.Tensor | None = None  # of the present forward pass, if it has an auxiliary loss too
        self._losses: list[torch.Tensor] = []  # of the forward passes of the present step
        self._broken_steps = 0  # in a row
        self._started = time.time()
        self._writer = CheckpointWriter(self.args.process_index, self.args.world_size)

    def train(self, *arguments, **options):
        """Train; if memory runs out, say what would fit.

        Raises:
            InputError: out of memory; holds the memory estimate and what would fit.
        """
        try:
            return super().train(*arguments, **options)
        except torch.OutOfMemoryError as error:
            message = out_of_memory_advice(self, self._batch_tokens)
            if self.args.process_index:  # a recipe prints only the main process's error
                print(f"error: {message}", file=sys.stderr, flush=True)
            raise InputError(message) from error
        finally:
            self._writer.end()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A forward and backward pass; its size and loss are kept for messages. The loss of the tokens is logged."""
        this_rank.note(f"step {self.state.global_step + 1}", timed=True)
        self._batch_tokens = inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)
        self._losses.append(loss)
        return loss if self._token_loss is None else self._token_loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm. If it is not finite, what `on_nonfinite` says is done here, before the optimizer step.

        Under DeepSpeed this comes after the step, which it has then left out.

        Raises:
            InputError: the norm is not finite, and the training stops.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        broken = norm is not None and not math.isfinite(norm)  # stage 0 gives no finite one
        self._broken_steps = self._broken_steps + 1 if broken else 0
        leave_out = broken and (self.args.on_nonfinite != "continue" or self.args.deepspeed_plugin is not None)
        if broken:
            found = f"{describe_step(self, self._losses)}: the step is {'not ' * leave_out}taken"
            remedy = "try a lower trainer.learning_rate, and check these dialogues and the base model"
            if self.args.on_nonfinite == "stop":
                raise ResumableError(f"{found}: {remedy}", "trainer.on_nonfinite=skip")
            if self._broken_steps >= min(MAX_IN_A_ROW, self.state.max_steps):
                raise InputError(f"{found}; it is the last of {self._broken_steps} such steps in a row: {remedy}")
            logger.info("note: %s", found)
        if leave_out:
            model.zero_grad()  # the optimizer changes no weight without a gradient
        # Then the learning rate waits, as under DeepSpeed.
        self.optimizer._is_overflow = leave_out  # pyright: ignore[reportAttributeAccessIssue]
        return norm

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Wrap the model and load the checkpoint to resume from, saved by any number of processes and ZeRO stage.

        Raises:
            InputError: as `check_resumable` and `deepspeed.check_engine`.
        """
        reshard, self._started = False, time.time()
        if resume_from_checkpoint is not None:
            now = build_record(self)
            saved = check_resumable(Path(resume_from_checkpoint), now)
            self._started -= saved.seconds
            reshard = saved.resharded(now)
        checkpoint = None if reshard else resume_from_checkpoint
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the memory it has
            prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        check_engine(self)
        stage = self.args.deepspeed_plugin.zero_stage if self.args.deepspeed_plugin else None
        if stage == 0:
            skip_nonfinite(self.optimizer)
        if stage == 3:
            hide_gathers(self.model_wrapped)
        if reshard:
            load_resharded(self, Path(resume_from_checkpoint))
        if self.is_world_process_zero():  # what a killed process left
            remove_partial(Path(self.args.output_dir))
            self._pruning()()
        return prepared

    def _pruning(self) -> Callable[[], None]:
        """What removes the checkpoints that are not kept after the present step."""
        directory = Path(self.args.output_dir)
        return partial(prune, directory, self.args.save_total_limit, self._best_step(), self.state.global_step)

    def _run_epoch(self, **options):
        """Train for an epoch, unless the checkpoint is from the end of a training (see `EarlyStopping`)."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Report loss and time of the whole training; the Trainer would report those since the resume."""
        self._finish_save()
        resumed_at, self._initial_global_step, self._total_loss_scalar = self._initial_global_step, 0, 0.0
        steps = [(entry["step"], entry["loss"]) for entry in self.state.log_history if "loss" in entry]
        for (before, _), (step, loss) in itertools.pairwise([(0, 0.0), *steps]):
            self._total_loss_scalar += loss * (step - before)
        output = super()._finalize_training(trial, num_train_samples, self._started)
        self._initial_global_step = resumed_at
        return output

    def batch_sampler(self) -> PackBatchSampler:
        """The sampler of this process's training batches."""
        return self._sampler(self.packs, self.args.packs_per_step)

    def _sampler(self, packs: PackedDataset, packs_per_step: int) -> PackBatchSampler:
        return PackBatchSampler(
            pack_costs(packs.document_lengths, packs.prefix_lengths, *forward_flops(self.model)),
            packs_per_step,
            self.args.seed,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            micro_batch_size=self.args.per_device_train_batch_size,
            single_row=self.data_collator.single_row,
        )

    def get_train_dataloader(self) -> PackDataLoader:
        """The loader of the training batches.

        The Trainer takes `gradient_accumulation_steps` batches for an optimizer step, and the remaining ones for the
        last step of an epoch. accelerate does not wrap the loader: it would shard the batches a second time, and repeat
        some to fill the last step.
        """
        return PackDataLoader(
            self.packs,
            self.batch_sampler(),
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of an optimizer step, and measure the waiting time."""
        self._losses = []
        return super().get_batch_samples(self.metrics.start_step(epoch_iterator), num_batches, device)

    def get_eval_dataloader(self, eval_dataset=None) -> PackDataLoader:
        """The loader of the validation batches: equally many on each process, some of them empty."""
        packs = self.validator.packs
        return PackDataLoader(
            packs,
            self._sampler(packs, self.args.per_device_train_batch_size * self.args.world_size),
            replace(self.data_collator, length=None, experts=False, noise=False),
            generator=torch.Generator(),  # the default generator would change the dropout of training
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a validation batch.

        The Trainer averages over the batches of all processes. The loss is scaled so that this average is
        sum(weight * nll) / sum(weight) over the whole validation set.
        """
        inputs = self._prepare_inputs(inputs)
        total = self.validator.total_weight / len(self.callback_handler.eval_dataloader)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=torch.tensor(total)), None, None

    @torch.compiler.set_stance("force_eager")  # rows and replies of many lengths would each be compiled
    def evaluation_loop(self, *arguments, metric_key_prefix="eval", **options):
        """Compute the validation loss, then the metrics of `Validator.evaluate`.

        Raises:
            InputError: the loss is not finite, and `on_nonfinite` is stop.
        """
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        if self.args.on_nonfinite == "stop" and not math.isfinite(output.metrics[f"{metric_key_prefix}_loss"]):
            found = f"step {self.state.global_step}: the validation loss is not finite"
            raise ResumableError(f"{found}: check the validation dialogues", "trainer.on_nonfinite=skip")
        metrics = self.validator.evaluate(self)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this is the best validation so far; under `validation.save_best`, a checkpoint is then saved."""
        best = math.isfinite(metrics["eval_loss"]) and super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.validator.config.save_best
        return best

    def best_checkpoint(self) -> Path | None:
        """The checkpoint to make the final model from; None for the present weights."""
        best = self._best_step()
        return None if best in (None, self.state.global_step) else checkpoint_dir(Path(self.args.output_dir), best)

    def write_results(self, path: Path, packing: PackingReport, best: Path | None) -> None:
        """Write the results of the training as JSON: packing, validation metrics of the final model, and log.

        Args:
            best: as `best_checkpoint` returned it.

        Raises:
            InputError: the file cannot be written.
        """
        log, step = self.state.log_history, self.state.best_global_step if best else self.state.global_step
        write_json(path, {"packing": asdict(packing), "validation": last_validation_metrics(log, step), "log": log})

    def _best_step(self) -> int | None:
        save_best = self.validator is not None and self.validator.config.save_best
        return self.state.best_global_step if save_best else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted loss of a batch (see `training.loss`), in training with the auxiliary loss of routers.

        Args:
            num_items_in_batch: the sum of weights over the global batch (see `_get_num_items_in_batch`), of which DDP
                averages the gradients; defaults to the sum over this batch, of this process alone.
        """
        groups, counts = (inputs.pop(name, None) for name in ("token_groups", "token_and_pair_counts"))
        lengths = inputs.pop("sequence_lengths", None)
        if self.model.training and groups is not None:
            noise = noisy_embeddings(self.model, self.args.neftune_alpha, lengths)
            with self.metrics.time_forward(), noise:
                scores = model(**inputs, use_cache=False)
            self.metrics.update(scores, groups.flatten()[inputs["trained_index"] + 1], counts)
        else:  # a validation batch
            scores = model(**inputs, use_cache=False)
        if num_items_in_batch is None:
            num_items_in_batch, processes = inputs["loss_weights"].sum(), 1
        else:
            processes = self.args.world_size
        loss, self._token_loss = scores.loss * processes / num_items_in_batch, None
        if scores.router is not None and self.router_aux_loss_coef:
            self._token_loss, auxiliary = loss.detach(), scores.router.losses.mean() * processes / num_items_in_batch
            loss = loss + self.router_aux_loss_coef * auxiliary
        return loss if self.args.on_nonfinite == "continue" else spread_nonfinite(loss)

    def _prepare_inputs(self, inputs):
        """Keep the loss weights in fp32: under DeepSpeed the Trainer casts every float to the engine's dtype."""
        prepared = super()._prepare_inputs(inputs) | {"loss_weights": inputs["loss_weights"].to(self.args.device)}
        if self.args.compile == "layers":
            mark_varying(prepared)
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The sum of loss weights over the batches of an optimizer step, of all processes."""
        total = sum_weights(batch_samples, device)
        gathered: Any = self.accelerator.gather(total) if self.args.world_size > 1 else total
        return gathered.sum()

    def _save(self, output_dir=None, state_dict=None):
        """Save the weights under the names of the parameters, by which a resume and an export read them."""
        with parameter_names(self.model):
            super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial) -> str:
        """Where the Trainer writes a checkpoint (see `training_checkpoint.commit`)."""
        return str(Path(super()._get_output_dir(trial)) / PARTIAL_FOLDER)

    def _save_checkpoint(self, model, trial):
        """Save a training checkpoint; it gets its name when it is complete.

        Raises:
            InputError: the checkpoint cannot be written, or its weights are not finite.
        """
        if not weights_are_finite(self):
            raise InputError(
                f"step {self.state.global_step}: the weights are not finite, so neither a checkpoint nor a model is "
                "written: try a lower trainer.learning_rate, and check the base model"
            )
        self._finish_save()
        directory, best = Path(self.args.output_dir), self._best_step()
        final = checkpoint_dir(directory, self.state.global_step)
        written = directory / PARTIAL_FOLDER / final.name
        background = self.args.save_in_background == "true"
        try:
            with os_errors(directory, "cannot write"):
                if self.is_world_process_zero():
                    remove_partial(directory)
                self.accelerator.wait_for_everyone()
                with self._writer.hold(background):
                    super()._save_checkpoint(model, trial)
                # The Trainer looked for the best checkpoint in the folder of incomplete ones.
                self.state.best_model_checkpoint = str(checkpoint_dir(directory, best)) if best else None
                if self.is_world_process_zero():
                    self.state.save_to_json(str(written / TRAINER_STATE))
        except InputError:
            if self.is_world_process_zero():
                remove_partial(directory)  # makes room on a full disk
            raise
        record, prune_others = build_record(self, time.time() - self._started), self._pruning()

        def finish(files):
            commit(written, replace(record, files=files), final)
            prune_others()

        self._writer.start(self.state.global_step, written, finish)
        if not background:
            self._finish_save()

    def _finish_save(self, wait: bool = True) -> None:
        """End the save in progress, at once or, without `wait`, if all ranks are done; all call this after one step.

        Raises:
            InputError: a rank could not write; the same on all.
        """
        writer = self._writer
        if writer.step is None:
            return
        if wait:
            writer.wait()
        progress = torch.tensor([writer.done(), writer.error() is not None], device=self.args.device).float()
        ranks: Any = self.accelerator.reduce(progress)
        ended, failed = ranks.tolist()
        if failed:
            writer.wait()
            errors = filter(None, gather_object([(error := writer.error()) and reason_of(error)]))
            writer.step = None
            raise error or InputError(next(errors))
        if ended == self.args.world_size:
            writer.step = None

    def create_model_card(self, *_, **__) -> None:
        """Write no model card: TRL's is wrong for a checkpoint, and asks W&B for an address."""

    def _maybe_log_save_evaluate(self, *arguments, **options):
        """Leave the time of validation and saving out of the steps' time.

        The steps before a checkpoint are logged in it: a resumed training then logs the same as one without a break.
        """
        this_rank.note(f"after step {self.state.global_step}")
        start = time.perf_counter()
        self._finish_save(wait=False)
        self.control.should_log |= self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*arguments, **options)
        self.metrics.exclude(start)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of the steps with their loss; every process calls this after the same step."""
        for name in ("eval_samples_per_second", "eval_steps_per_second"):  # of packs, by the time of all metrics
            logs.pop(name, None)
        if "loss" in logs:
            logs |= self.metrics.compute(self.accelerator.gather)
            if self.args.compile == "layers":
                logs["recompiles"] = recompiles()
            self._tr_loss.zero_()  # the Trainer subtracts it from itself, which would keep a NaN
        super().log(logs, start_time)


def training_arguments(
    config: TrainerConfig,
    directory: Path,
    processes: int,
    zero: ZeroConfig | None = None,
    validation: ValidationConfig | None = None,
) -> PackTrainingArguments:
    """The arguments of a training. Build them before the model, which ZeRO stage 3 shards while it is loaded.

    Args:
        directory: of the training checkpoints.
        processes: number of processes that train together.
        zero: defaults to no sharding.
        validation: defaults to no validation.

    Raises:
        InputError: as `TrainerConfig.accumulation`, `ValidationConfig.interval` and `deepspeed.deepspeed_config`.
    """
    eval_steps = validation.interval(config) if validation else 0
    zero = zero or ZeroConfig()
    deepspeed = deepspeed_config(zero)
    bf16 = resolve_dtype(config.precision) is torch.bfloat16
    if deepspeed or launcher_stage():
        start_deepspeed()
        held = "bf16, with an fp32 copy in the optimizer" if bf16 else "fp32"
        logger.info(f"ZeRO stage {zero.stage if deepspeed else launcher_stage()}: trained weights in {held}")
    return PackTrainingArguments(
        **{name: getattr(config, name) for name in SAME_ARGUMENTS},
        output_dir=str(directory),
        optim=OPTIMIZERS[config.optimizer],
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation(processes),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        router_aux_loss_coef=config.router_aux_loss_coef,
        bf16=bf16,
        float8=config.precision == "fp8",
        activation_checkpointing=False,
        checkpointing="full" if config.activation_offload else config.gradient_checkpointing,
        disable_tqdm=not sys.stderr.isatty(),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps or None,
        per_device_eval_batch_size=config.micro_batch_size,
        metric_for_best_model=validation.metric_for_best_model if eval_steps else None,
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
    arguments: PackTrainingArguments,
    packing: str,
    adapter: AdapterConfig,
    validator: Validator | None = None,
) -> PackTrainer:
    """Build the trainer of a run, after checking that the model keeps packed documents apart.

    The packs of a step depend only on the seed, the epoch and the packs per step, not on the number of processes.

    Args:
        packs: as `packing.dataset.pack_dialogues` returns them.
        arguments: as `training_arguments` returns them.
        packing: the `PackingConfig.strategy` of `packs`.
        validator: packed as `packs` are; runs as often as `arguments` say.

    Raises:
        InputError: the model does not keep packed documents apart, layers for float8 are not compiled, or a model with
            sliding-window attention should generate dialogues.
    """
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    collator = checked_collator(model, packing, tokenizer.pad_token_id, arguments.device, dtype)
    forbid_kv_cache(model)
    if validator and validator.generated and "window" in cache_kinds(model.config):
        raise InputError("validation.generated_dialogues: sliding-window attention is not supported: choose 0")
    runs, rows = [packs, *([validator.packs] if validator else [])], arguments.per_device_train_batch_size
    longest = rows * int(packs.document_lengths.sums().max())
    stage = str(arguments.deepspeed_plugin.zero_stage) if arguments.deepspeed_plugin else "off"
    dims = model_dims(model.config)
    attention, device = model.config._attn_implementation, arguments.device.type
    arguments.compile = resolve_compile(arguments.compile, stage, attention, device, dims, arguments.float8)
    length = longest if arguments.compile == "layers" else None
    if arguments.float8:
        length = MULTIPLE * math.ceil(longest / MULTIPLE)
        convert_to_float8(model)
    bounds = run_bounds(runs, rows, length)
    trainer = PackTrainer(
        model,
        arguments,
        packs,
        validator,
        data_collator=replace(
            collator,
            measured=True,
            bounds=bounds,
            length=length,
            experts=dims.experts is not None,
            noise=arguments.neftune_alpha is not None,
        ),
        processing_class=tokenizer,
        peft_config=None if adapter.kind == "full" else lora_config(adapter, model),
    )
    if stage == "3":
        prepare_experts(trainer.model, arguments.deepspeed_plugin)
    if adapter.kind != "full":
        logger.info(f"adapters: {adapter_report(adapter, dims, arguments.bf16)}")
    if arguments.checkpointing == "auto":
        arguments.checkpointing = choose_checkpointing(trainer, longest)
    if arguments.save_in_background == "auto":
        arguments.save_in_background = str(has_memory_to_copy(trainer, longest)).lower()
    logger.info("gradient checkpointing: %s, compiled: %s", arguments.checkpointing, arguments.compile)
    checkpoint_activations(trainer.model, arguments.checkpointing, arguments.activation_offload)
    if arguments.compile == "layers":
        compile_layers(trainer.model)
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(ProgressReporter())
    if adapter.kind == "qlora":
        # TRL holds these adapters in bf16, which would round most updates to zero.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if adapter.use_dora and arguments.bf16:  # in fp32 they are right, and sharded under stage 3
        set_magnitudes(trainer.model)
    if validator and validator.config.early_stopping_patience:
        trainer.add_callback(EarlyStopping(validator.config.early_stopping_patience))
    return trainer
