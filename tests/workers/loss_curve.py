"""One short training, as a function and as what torchrun starts: `loss_curve.py FOLDER CASES OUTPUT`, where CASES is a
JSON list of options of `train`.

FOLDER holds `model` (a model directory with its tokenizer) and `packs` (pickled), so that however many
processes there are, all start from the same.
"""

import gc
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from csc_train.files import digest
from csc_train.packing.documents import ATTENTION
from csc_train.run import processes
from csc_train.training.config import AdapterConfig, ModelConfig, TrainerConfig, ZeroConfig
from csc_train.training.model import load_model
from csc_train.training.tokenizer import load_tokenizer
from csc_train.training.trainer import build_trainer, training_arguments
from csc_train.training.zero import whole_weights

PACKS_PER_STEP = 4
EPOCHS = 2
STEPS_PER_EPOCH = 3
"""The last of them with fewer packs."""


def train(
    folder: Path,
    micro_batch_size: int = 2,
    adapter: AdapterConfig | None = None,
    zero: ZeroConfig | None = None,
    *,
    packs: str = "packs",
    attention: str | None = None,
    states: str = "states",
    resume: str | None = None,
    worst_first: bool = True,
    **options,
) -> SFTTrainer:
    """Train the model of `folder` on its packs.

    Args:
        packs: which packs in `folder`; those called `shared` share a prefix.
        attention: `documents` for packs that share a prefix, else sdpa, where not given.
        states: where in `folder` to save states of training.
        resume: a state of training in `folder` to go on from.
        options: go to `TrainerConfig`.
    """
    # One thread: what is summed in which order must not depend on the machine.
    torch.set_num_threads(1)
    defaults = {"epochs": EPOCHS, "learning_rate": 3e-3, "warmup_ratio": 0.0, "weight_decay": 0.01}
    defaults |= {"precision": "fp32", "save_every": 1000}
    tokenizer = load_tokenizer(str(folder / "model"))
    arguments = training_arguments(
        TrainerConfig(
            packs_per_step=PACKS_PER_STEP,
            micro_batch_size=micro_batch_size,
            **(defaults | options),
        ),
        folder / states,
        processes().num_processes,
        zero,
    )
    default, packing = (ATTENTION, "shared_prefix") if packs == "shared" else ("sdpa", "best_fit")
    adapter = adapter or AdapterConfig()
    source = ModelConfig(path=str(folder / "model"))
    trainer = build_trainer(
        load_model(source, tokenizer, torch.float32, 0, attention or default, in_4_bits=adapter.kind == "qlora"),
        tokenizer,
        pickle.loads((folder / packs).read_bytes()),
        packing=packing,
        arguments=arguments,
        adapter=adapter,
        worst_first=worst_first,
    )
    trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    return trainer


def curve(trainer: SFTTrainer) -> dict[str, Any]:
    """What a training did: the logged figures of each step, the final weights, and what really ran."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = list(trainer.model.parameters())
    empty = [parameter.numel() == 0 for parameter in parameters]
    weights = {name: value.flatten().tolist() for name, value in whole_weights(trainer.model).items()}
    engine = trainer.model_wrapped
    return {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry.get("grad_norm") for entry in steps],
        "learning_rates": [entry["learning_rate"] for entry in steps],
        "first_step": trainer._initial_global_step,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "empty": sum(empty) / len(empty),
        "weights": weights,
        "digest": digest(weights),
        "processes": trainer.accelerator.num_processes,
        "engine": type(engine).__name__,
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
    }


if __name__ == "__main__":
    folder, cases, output = sys.argv[1:]
    trained = []
    for options in json.loads(cases):
        kinds = {"adapter": AdapterConfig, "zero": ZeroConfig}
        made = {name: make(**options.pop(name)) for name, make in kinds.items() if name in options}
        gc.collect()  # a trainer refers to itself, and while one of ZeRO-3 lives, models are loaded in shards
        trained.append(curve(train(Path(folder), **options, **made)))
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # what DeepSpeed leaves behind for the next
    if processes().is_main_process:
        Path(output).write_text(json.dumps(trained), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
