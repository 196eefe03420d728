"""Measure what the hashes of a training checkpoint cost: saves of a model of 100 M parameters, with and without them.

python benchmarks/checkpoint_hashing.py            # a minute or two
python benchmarks/checkpoint_hashing.py --quick    # a smoke test in seconds; its results mean nothing

Prints each result and writes benchmarks/results/checkpoint_hashing.json.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import ROOT, Report, pack_trainer, random_examples, random_model, ratios, seconds, side_by_side, spread

from csc_train.checkpoints import training_checkpoint
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.training.trainer import PackTrainer

SHAPE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2560, "vocab_size": 21000, "tie_word_embeddings": True,
}  # fmt: skip
"""Some 100 M parameters."""
QUICK = {**SHAPE, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 2000}


def prepared(shape: dict, directory: str) -> PackTrainer:
    """A trainer as after its first step: AdamW has its moments."""
    packs, _ = pack_dialogues(random_examples([200], 20, 2000), PackingConfig("off", max_length=400))
    trainer = pack_trainer(random_model(shape, "sdpa"), packs, "off", directory, save_in_background="false")
    trainer.create_optimizer_and_scheduler(1)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer: Any = trainer.optimizer
    optimizer.step()
    return trainer


def measure(report: Report, shape: dict, rounds: int, folder: str | None) -> None:
    """The section of the report."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        trainer = prepared(shape, directory)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        report.section(
            "saving a training checkpoint",
            "The trainer's own save in one process: weights, optimizer, flush to disk, record, pruning. The side "
            "without hashes does all but compute them. The sides take turns.",
            parameters=parameters, rounds=rounds, load_before=os.getloadavg()[0],
        )  # fmt: skip

        def save(hashed: bool) -> None:
            trainer.state.global_step += 1
            replaced = training_checkpoint._file_hash if hashed else lambda *_: ""
            with mock.patch.object(training_checkpoint, "_file_hash", replaced):
                trainer._save_checkpoint(trainer.model, None)

        actions = {"without": lambda: save(False), "with": lambda: save(True)}
        taken = side_by_side(actions, rounds)
        newest = training_checkpoint.newest_whole(Path(directory))
        files = [path for path in newest.rglob("*") if path.is_file()]
        training_checkpoint._file_hash.cache_clear()
        alone = seconds(lambda: [training_checkpoint._stamp(path) for path in files])
        size = sum(path.stat().st_size for path in files)
    report.add("bytes of the checkpoint", size)
    report.add("hashes alone, one file after the other: seconds", alone)
    for name, each in taken.items():
        report.add(f"save {name} hashes: seconds", spread(each))
    medians = [spread(taken[name])["median"] for name in ("with", "without")]
    report.add("with / without, of medians", medians[0] / medians[1], most=1.1)
    report.add("with / without, round by round", ratios(taken["with"], taken["without"]))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--folder", help="where to save; defaults to the temporary folder")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint_hashing.json")
    arguments = parser.parse_args()
    report = Report({"quick": arguments.quick}, {})
    measure(report, QUICK if arguments.quick else SHAPE, 2 if arguments.quick else 25, arguments.folder)
    report.write(arguments.output)


if __name__ == "__main__":
    main()
