"""Read a trial's run directory: metric values while it runs, its result, and the reason of a failure."""

import json
import math
import re
from pathlib import Path

from csc_train.errors import InputError, suggestion
from csc_train.files import read_json
from csc_train.launching.supervise import read_run_record
from csc_train.runs.comparison import HISTORY_FILE, METRICS_FILE, last_metrics

OUTPUT_FILE = "output.log"
"""Output of a trial's processes, in its run directory."""
ERROR_PATTERNS = (
    r"^error: (.+)$",
    r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception): .+)$",
    r"(Signal \d+ \(\w+\) received by PID \d+)",
    r"(\S.*)",
)
"""Patterns of a failure's reason, best first: a recipe's error line, an exception, torchrun's report of a killed rank,
any line. The last match in the output counts."""


class FailedTrialError(Exception):
    """A trial ended without a result; the message gives the reason."""


class NoSuchMetricError(InputError):
    """A finished trial never logged `sweep.metric`."""


class MetricTail:
    """Follows the values of one metric in a run's history while the run writes it."""

    def __init__(self, directory: Path, name: str):
        """Follow the metric `name` in a run directory."""
        self.path, self.name, self._offset = directory / HISTORY_FILE, name, 0

    def read_new(self) -> list[tuple[int, float]]:
        """(optimizer step, value) of each new line; of all lines if the history was truncated."""
        if not self.path.is_file():
            return []
        if self.path.stat().st_size < self._offset:
            self._offset = 0
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        lines = [json.loads(line) for line in whole.splitlines()]
        return [(line["step"], line[self.name]) for line in lines if self.name in line]


def trial_result(directory: Path, metric: str) -> float:
    """The metric of a trial that has ended: the final model's, else the last logged value.

    Raises:
        FailedTrialError: the run is unfinished, or the metric is not a finite number.
        NoSuchMetricError: the run is finished, but did not log the metric.
    """
    if not read_run_record(directory).get("finished"):
        raise FailedTrialError(failure_reason(directory))
    logged = last_metrics(read_json(directory / METRICS_FILE))
    if metric not in logged:
        raise NoSuchMetricError(
            f"sweep.metric={metric}: {directory} logged no such metric.{suggestion(metric, logged)} "
            f"See its {METRICS_FILE}"
        )
    if not isinstance(logged[metric], int | float) or not math.isfinite(logged[metric]):
        raise FailedTrialError(f"{metric} is {logged[metric]}")
    return float(logged[metric])


def failure_reason(directory: Path) -> str:
    """Why a run ended early, in one line: its recorded error, else the best match of `ERROR_PATTERNS` in its output."""
    record = read_run_record(directory)
    if record.get("status") == "stopped":
        return "stopped from outside"
    outputs = [directory / OUTPUT_FILE, *sorted(directory.glob("slurm-*.out"))]
    text = "\n".join(path.read_text("utf-8", "replace") for path in outputs if path.is_file())
    found = (matches[-1] for pattern in ERROR_PATTERNS if (matches := re.findall(pattern, text, re.MULTILINE)))
    reason = record.get("error") or next(found, "ended without output: it may have been killed")
    return f"out of memory: {reason}" if re.search(r"out of memory|OutOfMemory|can't allocate", reason) else reason
