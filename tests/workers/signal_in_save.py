"""Run a script that trains, until a rank sends itself a signal while it writes a checkpoint in the background.

python signal_in_save.py SIGNAL STEP RANK SCRIPT ARGUMENTS...

The rank has written its files then, and has told no other. STEP is that of the checkpoint.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from csc_train.checkpoints import background

name, step, rank, *command = sys.argv[1:]
stamp_files = background.stamp_files


def stamped(written: Path, names: list[str]):
    stamps = stamp_files(written, names)
    if (written.name, os.environ.get("RANK", "0")) == (f"checkpoint-{step}", rank):
        os.kill(os.getpid(), signal.Signals[name])
    return stamps


background.stamp_files = stamped
sys.argv = command
sys.path[0] = str(Path(command[0]).parent)
runpy.run_path(command[0], run_name="__main__")
