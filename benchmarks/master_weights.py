"""Compare the losses of the demo's training in bf16: fp32 weights under autocast, and bf16 weights with an fp32 copy.

python benchmarks/master_weights.py            # some twenty minutes on two cores
python benchmarks/master_weights.py --quick    # a smoke test; its results mean nothing

Each run is `recipes/sft.py experiment=demo`. Prints each result and writes benchmarks/results/master_weights.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_losses import read_losses
from measure import ROOT, Report, spread

from csc_train.jsonl import JsonlLog
from csc_train.runs.comparison import HISTORY_FILE

RUNS = {
    "fp32": ["trainer.precision=fp32", "zero=off"],
    "autocast": ["trainer.precision=bf16", "zero=off"],
    "stage 1": ["trainer.precision=bf16", "zero=zero1"],
    "bf16 only": ["trainer.precision=bf16", "zero=off"],
}
BF16_ONLY = "import torch, csc_train.models.precision as p; p.weight_dtype = lambda *_: torch.bfloat16"
"""Makes the recipe hold weights and moments in bf16: no setting does."""
RATES = {"3e-3, the demo's": 3e-3, "1e-5, the paper's": 1e-5}


def train(name: str, rate: float, steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """Loss and seconds of each optimizer step of one run."""
    recipe, directory = ROOT / "recipes" / "sft.py", folder / f"{name} {rate}".replace(" ", "-")
    overrides = [
        "experiment=demo", "tracking=off", "validation.eval_steps=0", "trainer.save_steps=0", "trainer.logging_steps=1",
        f"trainer.max_steps={steps}", f"trainer.learning_rate={rate}", f"run.directory={directory}", *RUNS[name],
    ]  # fmt: skip
    change = f"{BF16_ONLY}; " if name == "bf16 only" else ""
    started = f"{change}import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", started, recipe, *overrides], cwd=folder, env=environment, check=True)
    rows = [row for row in JsonlLog(directory / HISTORY_FILE).read() if "loss" in row]
    return list(read_losses(directory).values()), [row["step_seconds"] for row in rows if "step_seconds" in row]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "master_weights.json")
    arguments = parser.parse_args()
    report, steps = Report({"quick": arguments.quick}, {}), 4 if arguments.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        for label, rate in RATES.items():
            report.section(
                f"learning rate {label}",
                "Losses of the same packs in the same order; differences are step by step, between two runs.",
                steps=steps, runs=RUNS,
            )  # fmt: skip
            taken = {name: train(name, rate, steps, Path(folder)) for name in RUNS}
            losses = {name: each for name, (each, _) in taken.items()}
            for name, each in losses.items():
                report.add(f"{name}: every 20th loss", " ".join(f"{loss:.4f}" for loss in each[::20]))
                report.add(f"{name}: mean of the last 20 losses", sum(each[-20:]) / len(each[-20:]))
            for name, (_, seconds) in taken.items():
                report.add(f"{name}: seconds of a step, runs one after the other", spread(seconds))
            for one, other in (
                ("autocast", "fp32"),
                ("stage 1", "fp32"),
                ("stage 1", "autocast"),
                ("bf16 only", "autocast"),
            ):
                apart = [abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)]
                report.add(f"{one} to {other}: mean difference", sum(apart) / len(apart))
                report.add(f"{one} to {other}: largest difference", max(apart))
    report.write(arguments.output)


if __name__ == "__main__":
    main()
