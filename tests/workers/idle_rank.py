"""What a launch looks after, without the training: `idle_rank.py` waits for ever; with `fails` rank 1 raises an error,
and with `stubborn` every rank ignores Ctrl-C."""

import os
import signal
import sys
import time

from csc_train.config.cli import run_recipe


def main(config):
    if "stubborn" in behaviour:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"rank {os.environ['RANK']} waits", flush=True)
    if "fails" in behaviour and os.environ["RANK"] == "1":
        raise ZeroDivisionError("planted in rank 1")
    time.sleep(3600)


if __name__ == "__main__":
    behaviour = sys.argv[1:]
    sys.argv[1:] = []
    run_recipe("write_sample", main)
