"""A stand-in for a training: what it writes and how it stops, without a model. Its loss falls by its learning rate."""

import json
import signal
import sys
import time
from pathlib import Path

import yaml

directory = Path(sys.argv[1])
rate = yaml.safe_load((directory / "resolved.yaml").read_text())["trainer"]["learning_rate"]


def end(**facts: str) -> None:
    """Record how it ended."""
    (directory / "run.json").write_text(json.dumps({"recipe": "sft", "finished": None} | facts))


def stop(signum, frame):
    end(status="stopped", stopped="now")
    sys.exit(75)


signal.signal(signal.SIGTERM, stop)
log = []
for step in range(1, 41 if rate > 1e-12 else 2001):
    log.append({"step": step, "eval_loss": 7.0 - rate * step})
    with open(directory / "history.jsonl", "a") as history:
        history.write(json.dumps(log[-1]) + "\n")
    time.sleep(0.02)
(directory / "metrics.json").write_text(json.dumps({"log": log}))
end(status="finished", finished="now")
