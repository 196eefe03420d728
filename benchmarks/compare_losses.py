"""Compare the losses of two training runs step by step, to prove that a change leaves training as it was.

python benchmarks/compare_losses.py A B [--tolerance 0]

A and B are run directories of recipes/sft.py, history files (JSONL rows with `step` and `loss`), or golden files (JSON
with `losses` from step 1 on). Steps that only one of them logged are ignored. The exit status is 1 if a loss differs by
more than the tolerance, 2 if the runs cannot be compared.
"""

import argparse
import math
import sys
from pathlib import Path

from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.jsonl import JsonlLog
from csc_train.runs.comparison import HISTORY_FILE


def read_losses(path: Path) -> dict[int, float]:
    """The losses of a run directory, history file or golden file, by optimizer step.

    Raises:
        InputError: there are none.
    """
    if path.suffix == ".json":
        losses = dict(enumerate(read_json(path)["losses"], start=1))
    else:
        rows = JsonlLog(path / HISTORY_FILE if path.is_dir() else path).read()
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    if not losses:
        raise InputError(f"{path}: no losses: give a run directory, a history.jsonl or a golden file")
    return losses


def compare_losses(a: dict[int, float], b: dict[int, float], tolerance: float) -> tuple[str, bool]:
    """Compare the steps that both runs logged.

    Args:
        tolerance: allowed absolute difference; 0: bit for bit.

    Returns:
        A Markdown table of the first steps and of those that differ, and whether all losses agree.

    Raises:
        InputError: the runs have no step in common.
    """
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise InputError("the runs have no logged step in common: set trainer.logging_steps=1 in both")
    # NaN agrees with nothing: a run that diverged is no proof.
    differing = [step for step in steps if not abs(a[step] - b[step]) <= tolerance]
    lines = ["| step | A | B | difference |", "|---|---|---|---|"]
    for step in sorted({*steps[:10], *differing[:10]}):
        lines.append(f"| {step} | {a[step]!r} | {b[step]!r} | {a[step] - b[step]:.3g} |")
    differences = [abs(a[step] - b[step]) for step in steps]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    first = f"first in step {differing[0]}" if differing else "in no step"
    lines += ["", f"{len(steps)} steps: {len(differing)} differ by more than {tolerance:g}, {first}; max {largest:.3g}"]
    return "\n".join(lines), not differing


def main() -> int:
    """Print the comparison; the exit status is 1 if a loss differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="run directory, history file or golden file")
    parser.add_argument("b", type=Path, help="run directory, history file or golden file")
    parser.add_argument("--tolerance", type=float, default=0.0, help="allowed absolute difference; defaults to 0")
    arguments = parser.parse_args()
    try:
        text, agree = compare_losses(read_losses(arguments.a), read_losses(arguments.b), arguments.tolerance)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
