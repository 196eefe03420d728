"""One short training, as a function and as what torchrun starts: `loss_curve.py FOLDER CASES OUTPUT` (see
`train_all`).

FOLDER holds `model` (a model directory with its tokenizer), `packs` and, where a training measures itself on them,
`validation` dialogues (both pickled), so that however many processes there are, all start from the same.
"""

import contextlib
import errno
import gc
import itertools
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object
from processes import TIMEOUT_S, run_script
from transformers import TrainerCallback
from trl import SFTTrainer

from csc_train.checkpoints.manifest import Manifest
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig, ModelConfig
from csc_train.models.experts import routers
from csc_train.models.loading import load_model
from csc_train.models.precision import weight_dtype
from csc_train.models.sharded_parameters import consolidated_weights
from csc_train.models.tokenizer import load_tokenizer
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, PackingReport
from csc_train.runs.directory import Run
from csc_train.runs.distributed import distributed_state
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.history import History
from csc_train.tracking.tracker import Tracker
from csc_train.training.alerts import Alerts
from csc_train.training.callbacks import StopOnSignal, track
from csc_train.training.config import AlertsConfig, TrainerConfig, ValidationConfig, ZeroConfig
from csc_train.training.memory import copy_bytes, model_states, scenario_of
from csc_train.training.trainer import PackTrainer, build_trainer, training_arguments
from csc_train.training.validation import Validator, last_validation_metrics

PACKS_PER_STEP = 4
EPOCHS = 2
STEPS_PER_EPOCH = 3
"""The last of them with fewer packs."""
MANIFEST = Manifest("none", None, "qwen2_5", "reply_only", "zh", "1" * 64, "2" * 64, [], "3" * 64, {})
LOCAL_MLFLOW = Path(sys.prefix) / "optional" / "mlflow-local"
"""MLflow and what its SQLite store needs, beside the environment: in it, TRL would import it in every training."""
REPORT = PackingReport(30, 2, 1, 9, 900, 1000, 400, 0.9, {})


def train_all(folder: Path, cases: dict[str, dict], processes: int) -> dict[str, dict]:
    """Train all `cases`, one after the other in the same processes (most of the time is imports); what each did.

    Args:
        cases: options of `train` by name; `adapter` and `zero` as mappings.
    """
    output = folder / f"{processes}.json"
    done = run_script(__file__, folder, json.dumps(cases), output, ranks=processes)
    assert done.returncode == 0, done.stderr[-9000:]
    return json.loads(output.read_text(encoding="utf-8"))


def first_packs(packs: PackedDataset, number: int = 2 * PACKS_PER_STEP + 1) -> PackedDataset:
    """The first packs; by default for two steps and one pack, which is left for the last step of an epoch."""
    return PackedDataset(packs.dialogues, packs.pack_items[:number], packs.prefix_lengths[:number], packs.loss_weights)


def train(
    folder: Path,
    micro_batch_size: int = 2,
    adapter: AdapterConfig | None = None,
    zero: ZeroConfig | None = None,
    *,
    packs: str = "packs",
    attention: str | None = None,
    checkpoints: str = "checkpoints",
    resume: str | None = None,
    tracked: str | None = None,
    to: Sequence[str] = ("wandb",),
    ends: tuple[str, int] | None = None,
    alerts: str | None = None,
    validation: ValidationConfig | None = None,
    broken: int | None = None,
    held: bool = False,
    full: int | None = None,
    experts: str | None = None,
    **options,
) -> SFTTrainer:
    """Train the model of `folder` on its packs.

    Args:
        packs: which packs in `folder`; those called `shared` share a prefix, `single` ones hold one dialogue each.
        attention: defaults to varlen attention for packs that share a prefix, else to sdpa.
        checkpoints: where in `folder` to save training checkpoints.
        resume: a training checkpoint in `folder` to resume from.
        tracked: a run directory in `folder`, in which the training is tracked.
        to: by which trackers; W&B is offline.
        alerts: a run directory in `folder` whose `run.json` gets the alerts, without W&B.
        ends: how it ends before its time, and after which step (see `Ends`).
        validation: what to measure while training; the packs are then of mode `joint`.
        broken: a token whose embedding the model reads as NaN.
        held: whether each checkpoint is written in the background, and only when the next step has been taken.
        full: a rank whose disk has no room for its part of an optimizer.
        experts: transformers' forward function of experts; defaults to its default.
        options: go to `TrainerConfig`.
    """
    if "mlflow" in to and str(LOCAL_MLFLOW) not in sys.path:
        sys.path.append(str(LOCAL_MLFLOW))
    if tracked is not None:
        run = run_in(folder / tracked)
        run.start({})
    # One thread: what is summed in which order must not depend on the machine.
    torch.set_num_threads(1)
    defaults = {"epochs": EPOCHS, "learning_rate": 3e-3, "warmup_ratio": 0.0, "weight_decay": 0.01}
    defaults |= {"precision": "fp32", "save_steps": 1000}
    tokenizer = load_tokenizer(str(folder / "model"))
    arguments = training_arguments(
        TrainerConfig(
            packs_per_step=PACKS_PER_STEP,
            micro_batch_size=micro_batch_size,
            **(defaults | options),
        ),
        folder / checkpoints,
        distributed_state().num_processes,
        zero,
        validation,
    )
    kinds = {"shared": (VARLEN_ATTENTION, "shared_prefix"), "single": ("sdpa", "off")}
    default, packing = kinds.get(packs, ("sdpa", "best_fit"))
    training = pickle.loads((folder / packs).read_bytes())
    validator = None
    if validation is not None:
        dialogues = pickle.loads((folder / "validation").read_bytes())
        template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
        encoded = [template.encode(dialogue) for dialogue in dialogues]
        packed = PackingConfig(packing, max_length=1800)
        validator = Validator(
            dialogues,
            encoded,
            template,
            validation,
            packed,
            training.loss_weights,
            History(folder / Path(checkpoints).parent).log_table,
        )
    adapter = adapter or AdapterConfig()
    source = ModelConfig(path=str(folder / "model"))
    dtype = weight_dtype(options.get("precision", "fp32"), adapter.kind)
    model = load_model(source, tokenizer, dtype, 0, attention or default, load_in_4bit=adapter.kind == "qlora")
    if experts:
        model.set_experts_implementation(experts)
    trainer = build_trainer(
        model,
        tokenizer,
        training,
        packing=packing,
        arguments=arguments,
        adapter=adapter,
        validator=validator,
    )
    if broken is not None:
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda _, arguments, output: output.masked_fill((arguments[0] == broken)[..., None], math.nan)
        )
    if held:
        hold_saves(trainer)
    patches = contextlib.ExitStack()
    if full == trainer.args.process_index:
        save = torch.save
        patches.enter_context(mock.patch.object(torch, "save", partial(save_without_room, save)))
    trainer.documents = []
    trainer.chosen = chosen = []
    routed = routers(trainer.model)
    for layer, router in enumerate(routed):
        router.register_forward_hook(partial(note_choices, layer, chosen))  # a hook must not hold the trainer
    weigh = trainer._get_num_items_in_batch

    def recorded(batches, device):
        trainer.chosen.extend([set()] if routed else [])
        trainer.documents.append([name for batch in batches for name in documents_of(batch)])
        return weigh(batches, device)

    trainer._get_num_items_in_batch = recorded  # asked once for each optimizer step
    state = str(folder / resume) if resume else None
    trainer.add_callback(GradientBytes(trainer))
    if ends:
        trainer.add_callback(Ends(*ends))
    if alerts:
        trainer.add_callback(Alerts(AlertsConfig(), Tracker(TrackingConfig("off"), folder / alerts)))
    if tracked is None:
        with patches:
            trainer.train(resume_from_checkpoint=state)
        return trainer
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with Tracker(TrackingConfig("offline", list(to)), run.directory) as tracker:
        track(trainer, tracker, run.config, MANIFEST, REPORT, state)
        trainer.add_callback(Samples(tracker))
        trainer.train(resume_from_checkpoint=state)
        if stop.interrupted:
            run.stop()
        tracker.log_model(folder / "model", MANIFEST.hashes, run.config["data"])
    run.finish()
    return trainer


def run_in(directory: Path) -> Run:
    """A run in a directory, which resumes from the checkpoints that it finds there."""
    settings = {"run": {"directory": str(directory), "if_exists": "reuse"}}
    return Run("sft", settings | {"tracking": {"mode": "offline"}, "data": {"train": {"path": "none.jsonl"}}})


class Ends(TrainerCallback):
    """Ends a training after a step: by a "stop", the signal that a cluster sends, by an "error" in the next step, or by
    a "kill" before it, which no process can see coming."""

    def __init__(self, how: str, step: int):
        self.how, self.step = how, step

    def on_step_end(self, args, state, control, **_):
        if (self.how, self.step) == ("stop", state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args, state, control, **_):
        if (self.how, self.step) == ("kill", state.global_step):
            time.sleep(3)  # W&B writes out what it gets every second
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.how, self.step) == ("error", state.global_step):
            raise RuntimeError("as planned")


def hold_saves(trainer: PackTrainer) -> None:
    """Let a checkpoint be written after the next optimizer step, or when training waits for it."""
    trainer.args.save_in_background = "true"
    writer, stepped = trainer._writer, threading.Event()
    start, write, wait = writer.start, writer._write, writer.wait

    def held(*arguments):
        assert stepped.wait(TIMEOUT_S)
        return write(*arguments)

    writer.start = lambda *arguments: (stepped.clear(), start(*arguments))
    writer._write = held
    writer.wait = lambda: (stepped.set(), wait())

    class Stepped(TrainerCallback):
        def on_step_end(self, *_, **__):
            stepped.set()

        def on_train_end(self, *_, **__):
            trainer.copied = sum(each.nbytes for each in writer._copies._kept.values())

    trainer.add_callback(Stepped())


def save_without_room(save: Callable, state: Any, path: Any, *arguments: Any, **options: Any) -> None:
    """`torch.save` on a disk that is full when an optimizer comes."""
    if "optim_states" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(state, path, *arguments, **options)


class GradientBytes(TrainerCallback):
    """Counts the gradients between two forward passes of a step, and the optimizer's states before the next."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer
        trainer.gradient_bytes, trainer.optimizer_bytes = {}, 0

    def on_substep_end(self, args, state, control, **_):
        engine: Any = self.trainer.model_wrapped
        if sums := getattr(getattr(engine, "optimizer", None), "fp32_groups_gradients_flat", None):
            held = [each.grad for each in engine.parameters() if each.grad is not None]
            self.trainer.gradient_bytes = {
                "bf16": sum(each.nbytes for each in held),
                "fp32": sum(each.nbytes for each in sums),
                "sent": str(engine.communication_data_type),
            }

    def on_step_begin(self, args, state, control, **_):
        engine: Any = self.trainer.model_wrapped
        inner = getattr(getattr(engine, "optimizer", None), "optimizer", getattr(engine, "optimizer", None))
        if state.global_step == 1 and inner is not None:
            weights = {each.data_ptr() for each in engine.parameters()}
            groups = [each for group in inner.param_groups for each in group["params"]]
            moments = [each for entry in inner.state.values() for each in entry.values() if torch.is_tensor(each)]
            own = [each for each in groups if each.data_ptr() not in weights]
            self.trainer.optimizer_bytes = sum(each.nbytes for each in (*own, *moments))


class Samples(TrainerCallback):
    """Keeps a table of step 2."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def on_log(self, args, state, control, **_):
        if state.global_step == 2:
            self.tracker.log_table("samples", [{"prompt": "a", "reply": "b"}], 2)


def note_choices(layer: int, chosen: list[set[tuple[int, int]]], _, arguments: Any, output: Any) -> None:
    """A hook of a router: add (layer, expert) of the chosen experts to the last step's."""
    if chosen:
        chosen[-1].update((layer, expert) for expert in output[2].unique().tolist())


def documents_of(batch: dict[str, Any]) -> list[str]:
    """A digest for each trained document of a batch of rows, whose position ids start again at each."""
    if "position_ids" not in batch:
        return []
    ids, weights, positions = (batch[name].flatten() for name in ("input_ids", "loss_weights", "position_ids"))
    starts = (positions == 0).nonzero().flatten().tolist()
    spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return [digest([ids[span].tolist(), weights[span].tolist()])[:12] for span in spans if weights[span].any()]


def curve(trainer: SFTTrainer) -> dict[str, Any]:
    """What a training did: the logged figures of each step, the final weights, and what really ran."""
    log = trainer.state.log_history
    steps = [entry for entry in log if "loss" in entry]
    parameters = list(trainer.model.parameters())
    empty = [parameter.numel() == 0 for parameter in parameters]
    weights = {name: value.flatten().tolist() for name, value in consolidated_weights(trainer.model).items()}
    engine = trainer.model_wrapped
    steps_of_all = gather_object([trainer.documents])
    weighted = trainer._prepare_inputs(trainer.data_collator([trainer.packs[0]]))["loss_weights"]
    return {
        "losses": [entry["loss"] for entry in steps],
        "measured": [last_validation_metrics([entry], entry["step"]) for entry in log if "eval_loss" in entry],
        "generated": [
            (entry["eval_generated_strategy_accuracy"], entry["eval_generation_seconds"])
            for entry in log
            if "eval_generation_seconds" in entry
        ],
        "grad_norms": [entry.get("grad_norm") for entry in steps],
        "recompiles": [entry.get("recompiles") for entry in steps],
        "learning_rates": [entry["learning_rate"] for entry in steps],
        "documents": [sorted(itertools.chain(*parts)) for parts in zip(*steps_of_all, strict=True)],
        "chosen": [list(map(sorted, ranks)) for ranks in zip(*gather_object([trainer.chosen]), strict=True)],
        "aux_losses": [entry.get("aux_loss") for entry in steps],
        "weights_dtype": str(weighted.dtype),
        "first_step": trainer._initial_global_step,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "empty": sum(empty) / len(empty),
        "weights": weights,
        "digest": digest(weights),
        "processes": trainer.accelerator.num_processes,
        "engine": type(engine).__name__,
        "gradient_bytes": trainer.gradient_bytes,
        "optimizer_bytes": sum(gather_object([trainer.optimizer_bytes])),
        "optimizer_planned": model_states(scenario_of(trainer, 0)).optimizer * trainer.args.world_size,
        "copied": sum(gather_object([getattr(trainer, "copied", 0)])),
        "copy_planned": copy_bytes(scenario_of(trainer, 0)),
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
    }


if __name__ == "__main__":
    folder, cases, output = sys.argv[1:]
    trained = {}
    for name, options in json.loads(cases).items():
        kinds = {"adapter": AdapterConfig, "zero": ZeroConfig, "validation": ValidationConfig}
        made = {kind: make(**options.pop(kind)) for kind, make in kinds.items() if kind in options}
        gc.collect()  # a trainer refers to itself, and while one of ZeRO-3 lives, models are loaded in shards
        gc.freeze()  # libraries collect, too, and would look at all that was imported
        try:
            trained[name] = curve(train(Path(folder), **options, **made))
        except InputError as error:
            trained[name] = {"error": str(error)}
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # what DeepSpeed leaves behind for the next
    if distributed_state().is_main_process:
        Path(output).write_text(json.dumps(trained), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
