"""One short training, as a function and as what torchrun starts: `loss_curve.py FOLDER MICRO_BATCH_SIZE OUTPUT`.

FOLDER holds `model` (a model directory with its tokenizer) and `packs` (a data set of packs), so that however many
processes there are, all start from the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from csc_train.files import digest
from csc_train.run import processes
from csc_train.training.config import AdapterConfig, TrainerConfig
from csc_train.training.tokenizer import load_tokenizer
from csc_train.training.trainer import build_trainer

PACKS_PER_STEP = 4
STEPS = 5


def train(folder: Path, micro_batch_size: int = 2, adapter: AdapterConfig | None = None, **options) -> SFTTrainer:
    """Train the model of `folder` on its packs; `options` go to `TrainerConfig`."""
    # One thread: what is summed in which order must not depend on the machine.
    torch.set_num_threads(1)
    options = {"max_steps": STEPS, "learning_rate": 3e-3, "warmup_ratio": 0.0, "weight_decay": 0.01} | options
    tokenizer = load_tokenizer(str(folder / "model"))
    trainer = build_trainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        tokenizer,
        datasets.load_from_disk(str(folder / "packs")),
        packing="best_fit",
        config=TrainerConfig(
            packs_per_step=PACKS_PER_STEP,
            micro_batch_size=micro_batch_size,
            precision="fp32",
            save_every=1000,
            **options,
        ),
        adapter=adapter or AdapterConfig(),
        directory=folder / "states",
        processes=processes().num_processes,
    )
    trainer.train()
    return trainer


def curve(trainer: SFTTrainer) -> dict[str, Any]:
    """What a training did: the logged figures of each step, the final weights, and what really ran."""
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    weights = {name: value.flatten().tolist() for name, value in trainer.model.state_dict().items()}
    return {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry["grad_norm"] for entry in steps],
        "weights": weights,
        "digest": digest(weights),
        "processes": trainer.accelerator.num_processes,
        "engine": type(trainer.model_wrapped).__name__,
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
    }


if __name__ == "__main__":
    folder, micro_batch_size, output = sys.argv[1:]
    trained = curve(train(Path(folder), int(micro_batch_size)))
    if processes().is_main_process:
        Path(output).write_text(json.dumps(trained), encoding="utf-8")
    torch.distributed.destroy_process_group()
