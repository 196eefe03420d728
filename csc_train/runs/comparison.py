"""Training runs beside each other: what they differ in, what came of them, and how fast they were."""

import math
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from csc_train.errors import InputError
from csc_train.files import atomic_path, read_json, write_json, write_text
from csc_train.jsonl import JsonlLog
from csc_train.runs.config import IGNORED_GROUPS, RESOLVED_FILE
from csc_train.runs.directory import RECORD_FILE, flatten_keys

if TYPE_CHECKING:
    from rich.table import Table

HISTORY_FILE, METRICS_FILE, RESULTS_FILE = "history.jsonl", "metrics.json", "results.json"
INSIDE = ("checkpoints", "model", "base", "tokenizer", "wandb", "predictions")
"""In a run directory: where no other run is looked for."""
SPEED = "trained_tokens_per_second"
UNKNOWN = "n/a"


@dataclass(frozen=True)
class TrainingRun:
    """A run of recipes/sft.py."""

    directory: str
    status: str
    """finished, stopped, failed or running, as the run recorded it (one that was killed could not, and is still said to
    be running); `not started` where a launch was frozen and never ran."""
    settings: dict[str, Any]
    """By dotted key, without those of `IGNORED_GROUPS`."""
    figures: dict[str, float]
    """The last that was logged of each (see `last_metrics`)."""
    speed: float | None
    """Trained tokens a second of all processes, median over the log."""
    error: str | None
    """What a failed run ended with."""
    history: list[dict[str, Any]] = field(repr=False)
    """The figures of each log line, with its `step`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of an evaluation of its checkpoint: by context, profile and metric."""


def last_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The last value of each figure in a run's `metrics.json`.

    Of what is measured on held-out dialogues it is the checkpoint's, which may be made from an earlier state than the
    last.
    """
    last = {name: value for line in metrics["log"] for name, value in line.items()}
    return last | {f"eval_{name}": value for name, value in metrics.get("validation", {}).items() if name != "step"}


def find_runs(folder: Path) -> tuple[list[TrainingRun], list[str]]:
    """The training runs in a folder and its subfolders, and what is wrong with those that cannot be read.

    Raises:
        InputError: there is no such folder, or it holds no training run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    runs: dict[Path, TrainingRun] = {}
    evaluations, broken = [], []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in INSIDE and not name.startswith("."))
        directory = Path(place)
        if RESOLVED_FILE not in files:
            continue
        try:
            record = read_json(directory / RECORD_FILE) if RECORD_FILE in files else {}
            if record.get("recipe", "sft" if "launch.yaml" in files else None) == "sft":
                runs[directory.resolve()] = read_run(directory, record)
            elif record.get("recipe") == "evaluate" and RESULTS_FILE in files:
                evaluations.append((_settings(directory).get("checkpoint"), read_json(directory / RESULTS_FILE)))
        except (InputError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            broken.append(f"{directory}: {' '.join(str(error).split()) or type(error).__name__}")
    if not runs and not broken:
        raise InputError(f"{folder}: holds no training run")
    for checkpoint, results in evaluations:
        if checkpoint and (run := runs.get(Path(checkpoint).parent.resolve())):
            run.scores.update(_scores(results["results"]))
    return list(runs.values()), broken


def read_run(directory: Path, record: dict[str, Any]) -> TrainingRun:
    """What a run directory says.

    Args:
        record: its `run.json`; empty for a run that never began.

    Raises:
        InputError: a file of it is broken.
    """
    metrics = read_json(directory / METRICS_FILE) if (directory / METRICS_FILE).is_file() else None
    history = JsonlLog(directory / HISTORY_FILE).read()
    if metrics is None:
        figures = {name: value for line in history for name, value in line.items()}
    else:
        figures = last_metrics(metrics)
    speeds = [line[SPEED] for line in history if SPEED in line]
    settings = {key: value for key, value in _settings(directory).items() if key.split(".")[0] not in IGNORED_GROUPS}
    return TrainingRun(
        directory=str(directory),
        status=record.get("status", "finished" if record.get("finished") else "running") if record else "not started",
        settings=settings,
        figures={name: value for name, value in figures.items() if isinstance(value, int | float)},
        speed=statistics.median(speeds) if speeds else None,
        error=record.get("error"),
        history=history,
    )


def _settings(directory: Path) -> dict[str, Any]:
    return flatten_keys(yaml.safe_load((directory / RESOLVED_FILE).read_text(encoding="utf-8")))


def _scores(results: dict[str, Any]) -> dict[str, float]:
    """Those of the first profile, of the system that was evaluated: the last."""
    contexts = results[list(results)[-1]]
    scores = {}
    for context, each in contexts.items():
        profile = next(iter(each["profiles"]))
        for metric, score in each["profiles"][profile].items():
            if score["value"] is not None:
                scores[f"{context} {profile} {metric}"] = score["value"]
    return scores


def differing_settings(runs: Iterable[TrainingRun]) -> list[str]:
    """The keys of the settings that are not the same in all runs; of models that differ by name, not what follows."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    if "model.name" in found:
        found = [key for key in found if key == "model.name" or not key.startswith("model.")]
    return found


def sort_runs(runs: Iterable[TrainingRun], metric: str, direction: str) -> list[TrainingRun]:
    """The finished runs by their `metric`, the best first, then the others by directory."""
    sign = 1 if direction == "minimize" else -1

    def place(run: TrainingRun) -> tuple:
        value = run.figures.get(metric, math.nan)
        counts = run.status == "finished" and math.isfinite(value)
        return (not counts, sign * value if counts else 0, run.directory)

    return sorted(runs, key=place)


def write_comparison(directory: Path, runs: list[TrainingRun], broken: list[str], metric: str) -> None:
    """Write `runs.json`, `runs.md` and `runs.svg`.

    Args:
        directory: to write them to.
        runs: in the order in which they are to appear.
        broken: what could not be read.

    Raises:
        InputError: they cannot be written.
    """
    kept = [{name: value for name, value in asdict(run).items() if name != "history"} for run in runs]
    write_json(
        directory / "runs.json",
        {"metric": metric, "differing": differing_settings(runs), "runs": kept, "broken": broken},
    )
    header, rows = _rows(runs, metric)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    unread = "".join(f"- {line}\n" for line in broken)
    text += "\n\n![loss curves](runs.svg)\n" + (f"\nNot read:\n\n{unread}" if broken else "")
    write_text(directory / "runs.md", f"# Runs\n\n{text}")
    _plot(directory / "runs.svg", runs, metric)


def show_comparison(runs: list[TrainingRun], broken: list[str], metric: str) -> None:
    """Print the table, and what could not be read."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(_table(runs, metric))
    for line in broken:
        console.print(f"not read: {line}", highlight=False, soft_wrap=True)


def _table(runs: list[TrainingRun], metric: str) -> "Table":
    from rich.table import Table

    header, rows = _rows(runs, metric)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(runs: list[TrainingRun], metric: str) -> tuple[list[str], list[list[str]]]:
    settings = differing_settings(runs)
    figures = [name for name in dict.fromkeys((metric, "eval_loss", "eval_strategy_accuracy", "loss"))
               if any(name in run.figures for run in runs)]  # fmt: skip
    scores = list(dict.fromkeys(name for run in runs for name in run.scores))
    header = ["run", "status", *settings, *figures, *scores, "steps", "trained tokens/s", "error"]
    if not any(run.error for run in runs):
        header.pop()
    rows = [
        [
            run.directory,
            run.status,
            *(_short(run.settings.get(key)) for key in settings),
            *(_short(run.figures.get(name)) for name in figures),
            *(_short(run.scores.get(name)) for name in scores),
            _short(max((line["step"] for line in run.history), default=None)),
            UNKNOWN if run.speed is None else f"{run.speed:,.0f}",
            run.error or "",
        ][: len(header)]
        for run in runs
    ]
    return header, rows


def _short(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(path: Path, runs: list[TrainingRun], metric: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    colours = matplotlib.colormaps["tab20"].colors
    panels = list(dict.fromkeys(("loss", metric)))
    *curves, bars = figure.subplots(1, len(panels) + 1)
    labels = _labels(runs)
    for axes, name in zip(curves, panels, strict=True):
        for number, run in enumerate(runs):
            points = [(line["step"], line[name]) for line in run.history if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colours[number % len(colours)], marker=".")
        axes.set(title=name, xlabel="optimizer step")
    values = [(number, run.figures[metric]) for number, run in enumerate(runs) if metric in run.figures]
    bars.barh([labels[number] for number, _ in values], [value for _, value in values],
              color=[colours[number % len(colours)] for number, _ in values])  # fmt: skip
    bars.invert_yaxis()
    bars.set(title=f"{metric}, last")
    if len(values) > 1:  # from near the best, where differences can be seen
        low, high = min(value for _, value in values), max(value for _, value in values)
        margin = (high - low) * 0.1
        bars.set_xlim(low - margin, high + margin) if margin else None
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")


def _labels(runs: list[TrainingRun]) -> list[str]:
    """The directories without what they all begin with."""
    common = os.path.commonpath([Path(run.directory).parent for run in runs])
    return [os.path.relpath(run.directory, common) for run in runs]
