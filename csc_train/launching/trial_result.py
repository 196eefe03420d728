"""Read a trial's run directory: metric values while it runs, its result, and the reason of a failure."""

import math
import re
from pathlib import Path

from csc_train.errors import InputError, suggestion
from csc_train.files import read_json
from csc_train.jsonl import read_jsonl
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


def metric_values(directory: Path, metric: str) -> list[tuple[int, float]]:
    """(optimizer step, value) of each line of a run's history that has the metric; the run may still write it."""
    path = directory / HISTORY_FILE
    rows = [row for _, row in read_jsonl(path, allow_torn=True)] if path.is_file() else []
    return [(row["step"], row[metric]) for row in rows if metric in row]


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
