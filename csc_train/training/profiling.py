"""Profile a few steps of a training: a trace, a memory snapshot on a GPU, and the share of time by kernel family."""

import gzip
import json
import logging
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from csc_train.files import atomic_path
from csc_train.templates import read_yaml

logger = logging.getLogger(__name__)

FAMILIES = read_yaml(__package__, "kernel_families.yaml")
"""Families by regular expression: `ranges` decide for all that runs below them, `names` for themselves."""
OTHER, IDLE = "other elementwise", "idle"
WAIT, WARM_UP, ACTIVE = 3, 1, 3
"""Steps before the profiler starts, steps that it throws away, and steps that it keeps; fewer in a short training."""
TRACE, SNAPSHOT = "trace.json.gz", "memory_snapshot.pickle"
_STEP = "ProfilerStep#"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class ProfilerCallback(TrainerCallback):
    """Profiles a few steps on the main process, prints the time by family, and writes into `directory`:

    - `trace.json.gz`: a trace for Perfetto.
    - `memory_snapshot.pickle`, on a GPU: what was allocated when, for pytorch.org/memory_viz.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._profiler: torch.profiler.profile | None = None

    def on_train_begin(self, args, state, control, **_) -> None:
        """Plan the profiled steps; the last of them is at the latest that of the training."""
        steps = state.max_steps - state.global_step
        if steps < 1 or not state.is_world_process_zero:
            return
        active = min(ACTIVE, steps)
        warm_up = min(WARM_UP, steps - active)
        wait = min(WAIT, steps - active - warm_up)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints when it starts and stops
        if args.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=wait, warmup=warm_up, active=active, repeat=1),
            on_trace_ready=lambda profiler: self._write(profiler, state.global_step),
        )
        self._profiler.start()

    def on_step_end(self, args, state, control, **_) -> None:
        """Tell the profiler, which writes behind the last profiled step."""
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, args, state, control, **_) -> None:
        """Write what there is of a training that ended early."""
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, profiler: torch.profiler.profile, step: int) -> None:
        self._profiler = None
        with atomic_path(self.directory / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
        if torch.cuda.is_available():
            with atomic_path(self.directory / SNAPSHOT) as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)
        with gzip.open(self.directory / TRACE, "rt", encoding="utf-8") as file:
            shares = time_shares(json.load(file)["traceEvents"])
        shown = ", ".join(f"{family} {share:.1%}" for family, share in shares.items())
        logger.info(f"profile up to step {step}, in {self.directory}: {shown}")


def time_shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """The share of time by kernel family, largest first; they add up to 1.

    On a GPU of the time from its first kernel to its last, where `idle` is the time without a kernel. On a CPU of the
    steps' time, where an operator's time is without that of the operators below it, and `idle` is the time in none:
    Python, or waiting.

    Args:
        events: `traceEvents` of torch's trace.
    """
    spans = sorted((each for each in events if each.get("ph") == "X"), key=lambda each: (each["ts"], -each["dur"]))
    families, times = _families_of_operators(spans)
    total = sum(each["dur"] for each in spans if each["name"].startswith(_STEP) and each["cat"] == "user_annotation")
    if on_gpu := [each for each in spans if each.get("cat") in _ON_GPU]:
        times, busy, end = Counter(), 0.0, on_gpu[0]["ts"]
        for span in on_gpu:
            outer, own = families.get(span["args"].get("External id"), (None, OTHER))
            family = outer or _family("ranges", span["name"]) or _family("names", span["name"]) or own
            times[family] += span["dur"]
            busy += max(0.0, span["ts"] + span["dur"] - max(span["ts"], end))
            end = max(end, span["ts"] + span["dur"])
        total = end - on_gpu[0]["ts"]
    else:
        busy = min(sum(times.values()), total)
    scale = busy / (sum(times.values()) * total)  # kernels of several streams overlap
    shares = {family: time * scale for family, time in times.most_common()} | {IDLE: 1 - busy / total}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _families_of_operators(spans: list[dict[str, Any]]) -> tuple[dict[int, tuple[str | None, str]], Counter[str]]:
    """Of each operator, by id, the family of the range that it is in and its own; and the CPU's time by family."""
    families: dict[int, tuple[str | None, str]] = {}
    times: Counter[str] = Counter()
    threads: dict[Any, list[tuple[float, str | None, str, str | None]]] = defaultdict(list)
    for span in spans:
        if span.get("cat") not in ("cpu_op", "user_annotation") or span["name"].startswith(_STEP):
            continue
        above = threads[span["tid"]]  # end, range, family, and the family that has its time
        while above and above[-1][0] <= span["ts"]:
            above.pop()
        _, outer, inherited, charged = above[-1] if above else (0.0, None, OTHER, None)
        outer = outer or _family("ranges", span["name"])
        own = outer or _family("names", span["name"]) or inherited
        families[span["args"]["External id"]] = outer, own
        if span["cat"] == "cpu_op":
            times[own] += span["dur"]
            if charged:
                times[charged] -= span["dur"]
            charged = own
        above.append((span["ts"] + span["dur"], outer, own, charged))
    return families, times


def _family(kind: str, name: str) -> str | None:
    return next((family for family, pattern in FAMILIES[kind].items() if re.search(pattern, name)), None)
