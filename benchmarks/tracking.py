"""Measure what tracking costs a training: a model of 100 M parameters, with W&B (offline), TensorBoard and MLflow.

python benchmarks/tracking.py            # five minutes on two idle cores
python benchmarks/tracking.py --quick    # a smoke test in seconds; its results mean nothing

MLflow's local store is taken from .venv/optional/mlflow-local, where make test puts it. Prints each result and writes
benchmarks/results/tracking.json.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import ROOT, Report, pack_trainer, random_examples, random_model, ratios, spread
from transformers import TrainerCallback

from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.tracker import Tracker, check_trackers

SHAPE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2560, "vocab_size": 21000, "tie_word_embeddings": True,
}  # fmt: skip
"""Some 100 M parameters."""
QUICK = {**SHAPE, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 2000}
TRACKERS = ["wandb", "tensorboard", "mlflow"]


class EveryOtherStep(TrainerCallback):
    """Tracks every other step, and takes the time from each log to the next: what a tracker still does in the
    background is in the time of the step that follows its log.

    Attributes:
        steps: seconds of steps, by whether the log before them was tracked.
        calls: seconds in the tracker's calls.
    """

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.calls: list[float] = []
        self.metrics = 0
        self._last: tuple[bool, float] | None = None

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Note the time; track the metrics of an odd step."""
        if "loss" not in logs:
            return
        started, tracked = time.perf_counter(), state.global_step % 2 == 1
        if self._last and state.global_step > 3:  # the first steps are slow
            self.steps[self._last[0]].append(started - self._last[1])
        if tracked:
            self.tracker.log(state.global_step, logs)
            self.calls.append(time.perf_counter() - started)
            self.metrics = len(logs)
        self._last = tracked, started


def background_seconds(tracker: Tracker) -> float:
    """CPU time of the trackers' threads and of W&B's processes until now, when they have done what they were given."""
    threads = [reporter._thread.submit(time.thread_time).result() for reporter in tracker._reporters]
    children = [each.cpu_times() for each in psutil.Process().children(recursive=True)]
    return sum(threads) + sum(each.user + each.system for each in children)


def measure(report: Report, shape: dict[str, Any], tokens: int, steps: int) -> None:
    """The section of the report."""
    packs, _ = pack_dialogues(
        random_examples([tokens // 2] * steps, tokens // 2, 2000), PackingConfig("off", max_length=tokens)
    )
    report.section(
        "tracking of a training",
        f"Optimizer steps of one pack of {tokens} tokens, one process, AdamW in fp32, logging_steps=1. Every other one "
        "is logged: to history.jsonl, W&B offline, TensorBoard and MLflow on SQLite. The time of a step runs from its "
        "log to the next, so it holds what the trackers still do in their threads and processes.",
        shape=shape, tokens=tokens, steps=steps, trackers=TRACKERS, load_before=os.getloadavg()[0],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = pack_trainer(random_model(shape, "sdpa"), packs, "off", f"{folder}/checkpoints", save_steps=0)
        trainer.args.max_steps = steps
        with Tracker(TrackingConfig("offline", TRACKERS), Path(folder)) as tracker:
            started = time.perf_counter()
            tracker.open(trainer.model.config.to_dict() | trainer.args.to_dict())
            opened = time.perf_counter() - started
            trainer.add_callback(watched := EveryOtherStep(tracker))
            before = background_seconds(tracker)
            trainer.train()
            background = background_seconds(tracker) - before
        assert set(tracker.run_ids) == set(TRACKERS)
        assert not any(reporter.failed for reporter in tracker._reporters)
    report.add("parameters", sum(each.numel() for each in trainer.model.parameters()))
    report.add("metrics of a step", watched.metrics)
    report.add("opening the three: seconds, once", opened)
    pairs = min(map(len, watched.steps.values()))
    calls, tracked, untracked = watched.calls[-pairs:], watched.steps[True][:pairs], watched.steps[False][:pairs]
    report.add("step that is not tracked: seconds", spread(untracked))
    report.add("step that is tracked: seconds", spread(tracked))
    report.add("in the tracker's calls: seconds", spread(calls))
    medians = [spread(each)["median"] for each in (calls, tracked, untracked)]
    report.add("in the tracker's calls / step, of medians", medians[0] / medians[2], most=0.01)
    report.add("CPU time in the background, of a logged step: seconds", background / len(watched.calls))
    report.add("that / CPU time of a step", background / len(watched.calls) / (medians[2] * torch.get_num_threads()))
    report.add("tracked / not tracked, of medians", medians[1] / medians[2], most=1.01)
    report.add("tracked / not tracked, step by step", ratios(tracked, untracked))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--steps", type=int, default=72, help="optimizer steps, of which half are tracked")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tracking.json")
    arguments = parser.parse_args()
    sys.path.append(str(Path(sys.prefix) / "optional" / "mlflow-local"))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    check_trackers(TrackingConfig("offline", TRACKERS))  # as the recipe does: MLflow is imported there
    report = Report({"quick": arguments.quick}, {})
    sizes = (QUICK, 64, 12) if arguments.quick else (SHAPE, 1024, arguments.steps)
    measure(report, *sizes)
    report.write(arguments.output)


if __name__ == "__main__":
    main()
