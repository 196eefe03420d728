"""Launch a recipe on a cluster: on this machine or as a SLURM job.

python launch/launch.py recipe=sft experiment=qwen2_5_7b_lora cluster=node8
python launch/launch.py run=runs/sft-20260101-120000 resume=true
"""

import sys

try:
    from csc_train.launching.job import launch
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
