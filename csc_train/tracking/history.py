"""The metrics of a run in its directory: history.jsonl and tables, then history.csv, and the page curves.html."""

import contextlib
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csc_train.errors import InputError
from csc_train.files import atomic_path, write_text
from csc_train.jsonl import JsonlLog, parse_step
from csc_train.runs.comparison import finite, history_log, thin
from csc_train.runs.directory import read_run_record
from csc_train.templates import read_yaml, render

CURVES_FILE, CSV_FILE = "curves.html", "history.csv"
PANELS = read_yaml(__package__, "curve_panels.yaml")
"""Title of each panel, and the names of its metrics or their common prefix."""
SAMPLES_TABLE, GENERATED_TABLE = "samples", "generated"
"""The tables of replies by step: to a fixed set of turns, and to all turns of dialogues in generated context."""
TABLES = {
    SAMPLES_TABLE: {"title": "Replies", "note": "The history of each turn is that of the reference dialogue."},
    GENERATED_TABLE: {
        "title": "Dialogues in generated context",
        "note": "The model's own earlier turns stand in the history of each turn; the customer's turns are given.",
    },
}
"""The tables that the page shows."""
PAGE_SECONDS = 30.0
"""Least time between pages while the training runs, validations apart."""
PAGE_SHARE = 200
"""A page is written after this many times the time that it takes, so that it costs at most half a percent."""
MAX_STEPS = 100
"""Most steps of a table on the page."""


class History:
    """The history of a run directory: one row for each call of `log`; steps are optimizer steps."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._log = history_log(directory)
        self._shown, self._page_seconds = time.monotonic(), 0.0

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps, which a resumed training repeats."""
        self._log.truncate_after(step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Add a row; after a validation, and now and then, the page is written again.

        Raises:
            InputError: the file cannot be written.
        """
        self._log.append({"step": step, "time": time.time()} | metrics)
        least = 0.0 if "eval_loss" in metrics else PAGE_SECONDS
        if (now := time.monotonic()) - self._shown >= max(least, PAGE_SHARE * self._page_seconds):
            with contextlib.suppress(InputError):  # the training goes on without it
                write_curves(self.directory, self._log.read(), running=True)
            self._shown = time.monotonic()
            self._page_seconds = self._shown - now

    def log_table(self, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Add the rows of a table to `<name>.jsonl`; they replace those of this step and later ones.

        Raises:
            InputError: the file cannot be written.
        """
        with JsonlLog(self.directory / f"{name}.jsonl", parse_step) as table:
            table.truncate_after(step - 1)
            for row in rows:
                table.append({"step": step} | row)

    def close(self) -> None:
        """Write the history as a table and as a page.

        Raises:
            InputError: a file cannot be written.
        """
        self._log.close()
        if rows := self._log.read():
            write_csv(self.directory / CSV_FILE, rows)
            write_curves(self.directory, rows)


def write_csv(path: Path, history: list[dict[str, Any]]) -> None:
    """Write a history as a table: a row for each step, a column for each metric.

    Raises:
        InputError: the file cannot be written.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in history:
        rows.setdefault(row["step"], {}).update(row)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())


def write_curves(directory: Path, history: list[dict[str, Any]], running: bool = False) -> None:
    """Write `curves.html`, a self-contained page: curves, alerts, and how replies change over the training.

    Args:
        directory: of the run; its tables and its `run.json` are read.
        history: rows of metrics, each with its `step`; at least one.
        running: whether the page says that the training runs.

    Raises:
        InputError: a table cannot be read, or the page not be written.
    """
    names = dict.fromkeys(name for row in history for name in row if name not in ("step", "time"))
    panels: dict[str, list[str]] = {title: [] for title in PANELS}
    for name in names:
        panels.setdefault(_panel_of(name), []).append(name)
    tables = {name: _replies(JsonlLog(directory / f"{name}.jsonl", parse_step).read()) for name in TABLES}
    data = {
        "panels": [_panel(title, shown, history) for title, shown in panels.items() if shown],
        "alerts": read_run_record(directory).get("alerts", []),
        "tables": [TABLES[name] | table for name, table in tables.items() if table["turns"]],
    }
    values = {"run": directory.absolute().name, "step": history[-1]["step"], "running": running, "data": data}
    write_text(directory / CURVES_FILE, render("csc_train", "tracking/curves.html.jinja", **values))


def _panel_of(metric: str) -> str:
    """The title of its panel; without one in `PANELS`, the name before the slash."""
    for title, wanted in PANELS.items():
        if metric.startswith(wanted) if isinstance(wanted, str) else metric in wanted:
            return title
    return metric.partition("/")[0]


def _panel(title: str, names: Sequence[str], history: list[dict[str, Any]]) -> dict[str, Any]:
    """A panel of the page: its title, and of each metric its name and its points (step, value)."""
    series = []
    for name in names:
        points = [(row["step"], value) for row in history if (value := finite(row.get(name))) is not None]
        shown = thin([(step, float(f"{value:.6g}")) for step, value in points])
        series.append({"name": name.partition("/")[2] or name, "points": shown})
    return {"title": title, "main": title in PANELS, "series": series}


def _replies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A table for the page: its `steps`, and each of its `turns` with the replies (strategy, text) by step."""
    steps = sorted({row["step"] for row in rows if "response" in row})
    steps = steps[:: -(-len(steps) // MAX_STEPS) or 1] + steps[-1:]
    turns: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if row["step"] in steps and "response" in row:
            names = ("dialogue_id", "turn", "customer", "reference_strategy", "reference_response")
            turn = turns.setdefault((row["dialogue_id"], row["turn"]), {name: row.get(name) for name in names})
            turn.setdefault("replies", {})[row["step"]] = row["strategy"], row["response"]
    return {"steps": sorted({*steps}), "turns": list(turns.values())}
