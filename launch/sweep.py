"""Sweep over settings of a recipe: sampled by Optuna, a grid or a list, on this machine or as SLURM jobs.

python launch/sweep.py sweep=lr experiment=qwen2_5_7b_lora cluster=gpu1
python launch/sweep.py sweep=lr debug=cpu_tiny sweep.trials=4
"""

import sys

try:
    from csc_train.launching.sweep import sweep
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

if __name__ == "__main__":
    sys.exit(sweep(sys.argv[1:]))
