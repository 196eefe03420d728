"""Compare the training choices on the demo: losses, memory and time of a step against the default.

python benchmarks/choices.py            # two minutes on two cores
python benchmarks/choices.py --quick    # a smoke test; its results mean nothing

All trainings take the same packs in the same order, step by step in turn. Prints each result and writes
benchmarks/results/choices.json.
"""

import argparse
import itertools
import logging
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, Report, Steps, ratios, side_by_side

from csc_train.config.compose import compose
from csc_train.data.sample_grammar import provide_sample
from csc_train.data.splits import read_and_check_splits
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.models.loading import load_model
from csc_train.packing.dataset import pack_dialogues
from csc_train.runs.distributed import distributed_state
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.tokenizer_training import get_tokenizer
from csc_train.training.trainer import PackTrainer, build_trainer, training_arguments

LORA = {"kind": "lora", "rank": 32, "alpha": 64}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "optimizer=adamw_8bit": {"optimizer": "adamw_8bit"},
    "neftune_alpha=5": {"neftune_alpha": 5.0},
    "gradient_checkpointing=full": {"gradient_checkpointing": "full"},
    "activation_offload=true": {"activation_offload": True, "gradient_checkpointing": "full"},
    "adapter=lora": {"adapter": LORA},
    "adapter=lora, use_rslora=true": {"adapter": LORA | {"use_rslora": True}},
    "adapter=lora, use_dora=true": {"adapter": LORA | {"use_dora": True}},
}
"""Settings of `trainer` and, under `adapter`, of the adapter."""


def kept_bytes(trainer: PackTrainer, numbers: list[int]) -> int:
    """Bytes that a forward pass leaves on the device for the backward pass, weights aside."""
    own = {each.untyped_storage().data_ptr() for each in trainer.model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    batch = trainer._prepare_inputs(trainer.data_collator([trainer.packs[number] for number in numbers]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(trainer.model.train(), batch)
    return sum(storage.nbytes() for storage in seen.values())


def moment_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's moments, with their scales."""
    states = [item for state in optimizer.state.values() for item in state.items()]
    return sum(value.nbytes for name, value in states if name != "step" and "qmap" not in name)


@torch.no_grad()
def validation_loss(trainer: PackTrainer, packs: Any) -> float:
    """sum(weight * nll) / sum(weight) of packs, without noise."""
    collator, total, weights = replace(trainer.data_collator, noise=False), 0.0, 0.0
    trainer.model.eval()
    for pack in packs:
        batch = trainer._prepare_inputs(collator([pack]))
        weight = batch["loss_weights"].sum().item()
        total, weights = total + weight * trainer.compute_loss(trainer.model, batch).item(), weights + weight
    return total / weights


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "choices.json")
    arguments = parser.parse_args()
    output, steps = arguments.output.absolute(), 2 if arguments.quick else 40
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the sample is written
        config, job = compose("sft", ["experiment=demo"]), distributed_state()
        provide_sample(config.data)
        splits = read_and_check_splits(config.data)
        tokenizer = get_tokenizer(config.model, config.template, splits.train, Path(folder, "tokenizer"), job)
        template = DialogueTemplate(tokenizer, "qwen2_5", config.template)
        packs, validation = (
            pack_dialogues(list(template.encode_all(each)), config.packing, config.loss)[0]
            for each in (splits.train, splits.validation_dialogues[: 4 if arguments.quick else None])
        )
        size, order = config.trainer.packs_per_step, torch.randperm(len(packs), generator=torch.manual_seed(0)).tolist()
        report = Report({"quick": arguments.quick}, {})
        report.section(
            "choices on the demo",
            f"Each choice trains the demo's model from the same random weights for {steps} steps in fp32, in turn with "
            "the others, at the demo's learning rate without its schedule. Kept is what a forward pass leaves for the "
            "backward pass on the device; on a CPU, offloaded inputs are counted as if they had left it. Adapters are "
            "on random weights, so their losses compare with each other only.",
            steps=steps, packs_per_step=size, learning_rate=config.trainer.learning_rate, choices=CHOICES,
        )  # fmt: skip
        trainings, kept = {}, {}
        for name, options in CHOICES.items():
            adapter = AdapterConfig(**options.get("adapter", {}))
            own = {key: value for key, value in options.items() if key != "adapter"}
            trainer = replace(config.trainer, **{"precision": "fp32", "gradient_checkpointing": "off"} | own)
            made = training_arguments(trainer, Path(folder, "checkpoints"), 1)
            model = load_model(config.model, tokenizer, torch.float32, 0, VARLEN_ATTENTION)
            built = build_trainer(model, tokenizer, packs, made, config.packing.strategy, adapter)
            kept[name] = kept_bytes(built, order[:size])
            trainings[name] = Steps(built, itertools.cycle(order), size)
        taken = side_by_side({name: partial(each) for name, each in trainings.items()}, steps - 1)
        for name, training in trainings.items():
            base = "adapter=lora" if name.startswith("adapter") else "default"
            report.add(f"{name}: mean of the last 10 losses", sum(training.losses[-10:]) / len(training.losses[-10:]))
            report.add(f"{name}: validation loss", validation_loss(training.trainer, validation))
            report.add(f"{name}: bytes of moments", moment_bytes(training.optimizer.optimizer))
            report.add(f"{name}: bytes kept for the backward pass", kept[name])
            if name != base:
                report.add(f"{name}: time of a step, over that of {base}", ratios(taken[name], taken[base]))
    report.write(output)


if __name__ == "__main__":
    main()
