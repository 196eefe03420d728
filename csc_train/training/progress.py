"""What a training says while it runs: one live line on a terminal, else a plain line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

EVERY = 30.0
"""Seconds between plain lines."""


class Progress(TrainerCallback):
    """Steps, loss, trained tokens a second, memory and the time left, on the main process.

    On a terminal these stand in one live line; else a line is printed for the first step that is logged, for the last,
    and every `EVERY` seconds between them. What a held-out set says is a line of its own either way.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        self._first, self._began, self._said = 0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock, and the live line where standard error is a terminal."""
        self._first, self._began, self._said = state.global_step, time.monotonic(), 0.0
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                desc="training", total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **_) -> None:
        """Move the live line on."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Say what was logged."""
        if not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in logs):
            shown = (f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
            tqdm.write(f"step {state.global_step}: {', '.join(shown)}", file=sys.stdout)
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix_str(describe(logs))
        elif "loss" in logs and self._due(state):
            self._said = time.monotonic()
            left = (
                (self._said - self._began) * (state.max_steps - state.global_step) / (state.global_step - self._first)
            )
            print(
                f"step {state.global_step}/{state.max_steps}: {describe(logs)}, {tqdm.format_interval(left)} left",
                flush=True,
            )

    def on_train_end(self, args, state, control, **_) -> None:
        """Leave the live line, and say what was done."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if state.is_world_process_zero:
            took = tqdm.format_interval(time.monotonic() - self._began)
            print(f"trained {state.global_step - self._first} steps in {took}", flush=True)

    def _due(self, state) -> bool:
        ends = not self._said or state.global_step == state.max_steps
        return ends or time.monotonic() - self._said >= EVERY


def describe(logs: dict[str, float]) -> str:
    """The loss, the speed and the memory of a log line, those of them that it has."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "trained_tokens_per_second" in logs:
        parts.append(f"{logs['trained_tokens_per_second']:,.0f} trained tokens/s")
    if "memory_allocated_gib" in logs:
        parts.append(f"{logs['memory_allocated_gib']:.1f} GiB")
    return ", ".join(parts)
