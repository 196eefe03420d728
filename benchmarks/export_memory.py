"""Measure the peak memory of exporting LoRA adapters of a model of 1 B random parameters, beside another build's.

git worktree add --detach /tmp/before 5fab51a
python benchmarks/export_memory.py --before /tmp/before    # some ten minutes, 5 GB of disk
python benchmarks/export_memory.py --quick                 # a smoke test; its results mean nothing

Prints each result and writes benchmarks/results/export_memory.json. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import ROOT, SMALL_TOKENIZER, Report, ratios, spread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SHAPE = {
    "hidden_size": 2048, "num_hidden_layers": 15, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
QUICK = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TRAINING = [
    "debug=cpu_tiny", "adapter=lora", "model.init=pretrained", "model.tokenizer=null", "trainer.precision=bf16",
    "trainer.max_steps=2", "trainer.packs_per_step=1", "trainer.micro_batch_size=1", "packing.strategy=best_fit",
    "packing.max_length=1400", "data.sample_dialogues=20",
]  # fmt: skip
"""Two steps, since the first one has a learning rate of 0; every build takes these overrides."""
NO_VALIDATION = {"now": "validation.eval_steps=0", "before": "held_out.every=0"}


def make_base(shape: dict, directory: Path) -> int:
    """Write a model with random weights in bf16; returns its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL_TOKENIZER)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(each.numel() for each in model.parameters())


def peak_bytes(checkout: Path, folder: Path, recipe: str, *overrides: str) -> int:
    """Run a recipe of a checkout; the most memory that its process had resident, pages of mapped files included."""
    command = [sys.executable, str(checkout / "recipes" / f"{recipe}.py"), *overrides]
    with subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(checkout)}) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    return used.ru_maxrss * 1024


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of the build to compare with")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "export_memory.json")
    arguments = parser.parse_args()
    report, rounds = Report({"quick": arguments.quick}, {}), 1 if arguments.quick else 3
    builds = {"now": ROOT} | ({"before": arguments.before.absolute()} if arguments.before else {})
    with tempfile.TemporaryDirectory() as directory:
        folder, peaks = Path(directory), {name: [] for name in builds}
        parameters = make_base(QUICK if arguments.quick else SHAPE, folder / "base")
        commits = {
            name: subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=path, text=True).strip()
            for name, path in builds.items()
        }
        report.section(
            "exporting LoRA adapters",
            "Peak resident memory of recipes/export.py, mapped files included, by wait4. Each build exports the "
            "training checkpoint of its own two steps. The base has random weights in bf16. Builds take turns.",
            parameters=parameters, rounds=rounds, training=TRAINING, commits=commits,
        )  # fmt: skip
        for name, path in builds.items():
            trained = peak_bytes(
                path, folder, "sft", *TRAINING, NO_VALIDATION[name], "model.path=base", f"run.directory={name}"
            )
            report.add(f"training, {name}: peak bytes", trained)
        for number in range(rounds):
            for name, path in builds.items():
                peaks[name].append(
                    peak_bytes(path, folder, "export", f"source={name}", f"output=exported-{name}-{number}")
                )
        for name, each in peaks.items():
            report.add(f"export, {name}: peak bytes", spread(each))
        if arguments.before:
            report.add("export, now / before", ratios(peaks["now"], peaks["before"]), most=0.5)
    report.write(arguments.output)


if __name__ == "__main__":
    main()
