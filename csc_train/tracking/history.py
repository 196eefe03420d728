"""The metrics of a run in its directory: history.jsonl and tables, then history.csv and curves.png at its end."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csc_train.files import atomic_path
from csc_train.jsonl import JsonlLog, parse_step
from csc_train.runs.comparison import history_log
from csc_train.templates import read_yaml

CURVES_FILE, CSV_FILE = "curves.png", "history.csv"
PANELS = read_yaml(__package__, "curve_panels.yaml")
"""Title of each panel, and the names of its metrics or their common prefix."""


class History:
    """The history of a run directory: one row for each call of `log`; steps are optimizer steps."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._log = history_log(directory)

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps, which a resumed training repeats."""
        self._log.truncate_after(step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: the file cannot be written.
        """
        self._log.append({"step": step, "time": time.time()} | metrics)

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
        """Write the history as a table and as curves.

        Raises:
            InputError: a file cannot be written.
        """
        self._log.close()
        if rows := self._log.read():
            write_csv(self.directory / CSV_FILE, rows)
            plot_curves(self.directory / CURVES_FILE, rows)


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


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Plot the metrics of a history over the optimizer steps.

    Args:
        path: the image to write; its suffix chooses the format.
        history: rows of metrics, each with its `step`.

    Raises:
        InputError: the image cannot be written.
    """
    import matplotlib  # only here: a training that draws nothing needs none
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    panels = {
        title: [name for name in names if (name.startswith(chosen) if isinstance(chosen, str) else name in chosen)]
        for title, chosen in PANELS.items()
    }
    panels = {title: shown for title, shown in panels.items() if shown}
    rows = max(-(-len(panels) // 3), 1)
    figure = Figure(figsize=(15, 4 * rows))
    # An automatic layout would draw everything twice.
    figure.subplots_adjust(0.04, 0.15 / rows, 0.99, 1 - 0.1 / rows, wspace=0.15, hspace=0.35)
    for place, (title, shown) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, 3, place + 1)
        for name, color in zip(shown, matplotlib.colormaps["tab20"](range(20)), strict=False):
            if points := [(row["step"], row[name]) for row in history if name in row]:
                axes.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], color=color, linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
