"""Trainer callbacks: progress, early stopping, graceful stop on a signal, metrics to the tracker."""

import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from csc_train.checkpoints.manifest import Manifest
from csc_train.checkpoints.training_checkpoint import read_record, step_of
from csc_train.packing.dataset import PackingReport
from csc_train.tracking.tracker import Tracker
from csc_train.training.alerts import Alerts
from csc_train.training.config import AlertsConfig

PROGRESS_SECONDS = 30.0
"""Time between progress lines without a terminal."""
SUMMARY_METRICS = (
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"
)  # fmt: skip
"""Metrics that the Trainer logs once, at the end."""


class ProgressReporter(TrainerCallback):
    """Reports steps, loss, speed, memory and remaining time on the main process.

    A terminal gets a progress bar. Otherwise the first and the last logged step are printed, and one step every
    `PROGRESS_SECONDS`. Validation metrics are always printed on a separate line.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        self._first_step, self._started, self._printed = 0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock, and the progress bar if standard error is a terminal."""
        self._first_step, self._started, self._printed = state.global_step, time.monotonic(), 0.0
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                desc="training", total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **_) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Report the logged metrics."""
        if not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in logs):
            shown = (f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
            tqdm.write(f"step {state.global_step}: {', '.join(shown)}", file=sys.stdout)
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix_str(format_metrics(logs))
        elif "loss" in logs and self._is_due(state):
            self._printed = time.monotonic()
            done, left = state.global_step - self._first_step, state.max_steps - state.global_step
            remaining = tqdm.format_interval((self._printed - self._started) * left / done)
            print(f"step {state.global_step}/{state.max_steps}: {format_metrics(logs)}, {remaining} left", flush=True)

    def on_train_end(self, args, state, control, **_) -> None:
        """Close the progress bar and report the total."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if state.is_world_process_zero:
            took = tqdm.format_interval(time.monotonic() - self._started)
            print(f"trained {state.global_step - self._first_step} steps in {took}", flush=True)

    def _is_due(self, state) -> bool:
        first_or_last = not self._printed or state.global_step == state.max_steps
        return first_or_last or time.monotonic() - self._printed >= PROGRESS_SECONDS


def format_metrics(logs: dict[str, float]) -> str:
    """The loss, speed and memory of a log entry as text; missing ones are left out."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "trained_tokens_per_second" in logs:
        parts.append(f"{logs['trained_tokens_per_second']:,.0f} trained tokens/s")
    if "memory_allocated_gib" in logs:
        parts.append(f"{logs['memory_allocated_gib']:.1f} GiB")
    return ", ".join(parts)


class EarlyStopping(EarlyStoppingCallback):
    """Ends the training after `early_stopping_patience` validations without a new best.

    Training checkpoints hold the count; the one at the end is saved too.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Train no step after a checkpoint at which training ended.

        The superclass would warn that the best model is not loaded at the end; `export.trained_model` loads it.
        """
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Count, and save a checkpoint at the end."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save |= control.should_training_stop


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 to any process: save a training checkpoint after the current step, and stop.

    SLURM sends SIGTERM to a preempted or cancelled job, and SIGUSR1 on request before the time limit. A second signal
    to the same process ends it at once.

    Attributes:
        interrupted: whether the last training stopped before its end; the same on all processes.
    """

    def __init__(self):
        self.interrupted = False
        self._received = False

    def on_train_begin(self, args, state, control, **_):
        """Install the handlers. An earlier signal ends the process: there is nothing to save."""
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._receive)

    def on_step_end(self, args, state, control, **_):
        """Stop if any process got a signal: all must save after the same step."""
        received = torch.tensor(int(self._received), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if received.item() and state.global_step < state.max_steps:
            self.interrupted = control.should_save = control.should_training_stop = True

    def _receive(self, signum, frame):
        self._received = True
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, signal.SIG_DFL)


class TrackingCallback(TrainerCallback):
    """Passes the logged metrics to a tracker."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def on_train_begin(self, args, state, control, **_) -> None:
        """Drop the history of steps that are trained again."""
        self.tracker.truncate_after(state.global_step if state.global_step else -1)

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Log metrics of a step, or those of the whole training."""
        if not state.is_world_process_zero:
            return
        if summary := {name: logs[name] for name in SUMMARY_METRICS if name in logs}:
            self.tracker.log_summary(summary)
        else:
            self.tracker.log(state.global_step, logs)

    def on_save(self, args, state, control, **_) -> None:
        """Send the step's metrics: a training resumed from this checkpoint does not repeat the step."""
        self.tracker.commit(state.global_step)


def track(
    trainer: Any,
    tracker: Tracker,
    config: dict[str, Any],
    manifest: Manifest,
    packing: PackingReport,
    checkpoint: str | None = None,
) -> None:
    """Track a training; its checkpoints then hold the ids of its runs.

    Args:
        config: of the run.
        manifest: of the model to be trained.
        packing: of the training data.
        checkpoint: the training checkpoint to resume from.

    Raises:
        InputError: as `Tracker.open`.
    """
    args, device = trainer.args, trainer.args.device
    cluster = {
        "world_size": args.world_size,
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu",
        "cpus_per_node": os.cpu_count(),
    }
    settings = trainer.model.config.to_dict() | args.to_dict() | config
    settings |= {
        "overrides": sys.argv[1:],
        "manifest": {name: value for name, value in asdict(manifest).items() if name != "config"},
        "packing_report": asdict(packing) | {"token_ratio": packing.tokens / packing.separate_tokens},
        "cluster": cluster,
    }
    resumed = Path(checkpoint) if checkpoint else None
    tracker.open(settings, *((read_record(resumed).run_ids, step_of(resumed) + 1) if resumed else ()))
    trainer.run_ids = tracker.run_ids
    trainer.add_callback(TrackingCallback(tracker))
    trainer.add_callback(Alerts(AlertsConfig(**config.get("alerts", {})), tracker))
