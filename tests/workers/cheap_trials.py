"""A launcher whose jobs are forks that write what a training writes, without a model; a plugin for sweeps."""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

from csc_train.launching.launchers.base import Launcher, register_launcher
from csc_train.runs.distributed import set_parent_death_signal

STEPS = 16


def train(directory: Path) -> None:
    """Steps of 20 ms from where the history ends; the loss is least for a learning rate of 1e-4.

    If there is a file `wait` here, a trial stays at step 5 until it is gone.
    """

    def end(**facts: str) -> None:
        (directory / "run.json").write_text(json.dumps({"recipe": "sft", "finished": None} | facts))

    def stop(signum, frame):
        end(status="stopped", stopped="now")
        os._exit(75)

    signal.signal(signal.SIGTERM, stop)
    set_parent_death_signal()
    rate = float(re.search(r"learning_rate: (\S+)", (directory / "resolved.yaml").read_text())[1])
    history = directory / "history.jsonl"
    done = len(history.read_text().splitlines()) if history.exists() else 0
    end(status="running")
    for folder in ("checkpoints/checkpoint-1", "model"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / folder / "weights").write_text("w")
    for step in range(done + 1, STEPS + 1):
        loss = 2 + abs(math.log10(rate) + 4) + 1 / step
        with open(history, "a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "loss": loss, "eval_loss": loss}) + "\n")
        time.sleep(0.02)
        while step == 5 and Path("wait").exists():
            time.sleep(0.02)
    (directory / "metrics.json").write_text(json.dumps({"log": [{"eval_loss": loss}]}))
    end(status="finished", finished="now")


@register_launcher("cheap_trials")
class CheapLauncher(Launcher):
    """Forks `train`."""

    attached = True

    def check(self):
        pass

    def describe(self):
        return f"train in {self.job.directory}"

    def start(self):
        sys.stdout.flush()
        self.process, self.status = os.fork(), None
        if self.process == 0:
            try:
                train(self.job.directory)
            finally:
                os._exit(0)

    def poll(self):
        if self.status is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def stop(self, signum=signal.SIGTERM):
        os.kill(self.process, signum)
