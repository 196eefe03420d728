"""Compare training runs: the settings that differ, the last metrics, the speed and the curves."""

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from csc_train.errors import InputError
from csc_train.files import atomic_path, read_json, write_json, write_text
from csc_train.jsonl import JsonlLog, parse_step
from csc_train.runs.claim import is_claimed
from csc_train.runs.config import IGNORED_GROUPS, RESOLVED_FILE
from csc_train.runs.directory import flatten_keys, read_config, read_run_record

if TYPE_CHECKING:
    from rich.table import Table

HISTORY_FILE, METRICS_FILE, RESULTS_FILE = "history.jsonl", "metrics.json", "results.json"
SKIPPED_FOLDERS = ("checkpoints", "model", "base", "tokenizer", "wandb", "tensorboard", "predictions")
"""Folders of a run directory that hold no other run."""
SPEED = "trained_tokens_per_second"
MAX_POINTS = 300
"""Most points of a curve on a page."""
Point = TypeVar("Point", bound=tuple)


@dataclass(frozen=True)
class TrainingRun:
    """A run of recipes/sft.py."""

    directory: str
    status: str
    """finished, stopped, failed or running; `crashed` if it was killed; `not started` if a launch prepared it and it
    never ran."""
    settings: dict[str, Any]
    """By dotted key, without those of `IGNORED_GROUPS`."""
    metrics: dict[str, float]
    """The last logged value of each (see `last_metrics`)."""
    speed: float | None
    """Trained tokens per second of all processes, median over the log."""
    error: str | None
    """The error of a failed run."""
    history: list[dict[str, Any]] = field(repr=False)
    """The metrics of each log line, with its `step`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Metrics of an evaluation of its final model, by context, profile and name."""


def history_log(directory: Path) -> JsonlLog[dict[str, Any]]:
    """The history of a run directory: one row of metrics for each call of the tracker, with its `step`."""
    return JsonlLog(directory / HISTORY_FILE, _parse_metrics)


def _parse_metrics(row: dict[str, Any]) -> dict[str, Any]:
    if wrong := [name for name, value in parse_step(row).items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"field {wrong[0]}: not a number")
    return row


def last_metrics(directory: Path) -> dict[str, Any]:
    """The last value of each metric of a run: in its `metrics.json`, or before its end in its history.

    Validation metrics are those of the final model, which may be an earlier checkpoint.

    Raises:
        InputError: a file is broken.
    """
    file = directory / METRICS_FILE
    metrics: dict[str, Any] = read_json(file) if file.is_file() else {"log": history_log(directory).read()}
    try:
        last = {name: value for line in metrics["log"] for name, value in line.items()}
        return last | {f"eval_{name}": value for name, value in metrics.get("validation", {}).items() if name != "step"}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not the metrics of a training: resume the run, which writes them again") from error


def finite(value: float | None) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of the points of a curve: the first, the last, and the extremes of each stretch between.

    Args:
        points: tuples that end with the value.
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    stretches = MAX_POINTS // 2 - 1
    bounds = [1 + round(number * (len(points) - 2) / stretches) for number in range(stretches + 1)]
    kept = {0, len(points) - 1}
    for first, end in itertools.pairwise(bounds):
        order = sorted(range(first, end), key=lambda place: points[place][-1])
        kept |= {order[0], order[-1]}
    return [points[place] for place in sorted(kept)]


def find_runs(folders: Sequence[Path]) -> tuple[list[TrainingRun], list[str]]:
    """The training runs in folders and their subfolders, and the errors of those that cannot be read.

    Raises:
        InputError: there is no such folder, or it holds no training run.
    """
    runs: dict[Path, TrainingRun] = {}
    broken: dict[Path, str] = {}
    evaluations = []
    for directory in itertools.chain.from_iterable(map(_run_directories, folders)):
        try:
            record = read_run_record(directory)
            if record.get("recipe", "sft" if (directory / "launch.yaml").exists() else None) == "sft":
                runs[directory.resolve()] = read_run(directory, record)
            elif record.get("recipe") == "evaluate" and (directory / RESULTS_FILE).exists():
                evaluations.append((_settings(directory).get("checkpoint"), read_json(directory / RESULTS_FILE)))
        except (InputError, KeyError, TypeError, AttributeError, ValueError) as error:
            broken[directory.resolve()] = f"{directory}: {' '.join(str(error).split()) or type(error).__name__}"
    for folder in folders:
        if not any(place.is_relative_to(folder.resolve()) for place in (*runs, *broken)):
            raise InputError(f"{folder}: holds no training run")
    for checkpoint, results in evaluations:
        for place in (Path(checkpoint), Path(checkpoint).parent) if checkpoint else ():
            if run := runs.get(place.resolve()):
                run.scores.update(_scores(results["results"]))
    return list(runs.values()), list(broken.values())


def _run_directories(folder: Path) -> Iterator[Path]:
    """The folder and its subfolders that are run directories."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        if RESOLVED_FILE in files:
            yield Path(place)


def read_run(directory: Path, record: dict[str, Any]) -> TrainingRun:
    """Read a run directory.

    Args:
        record: its `run.json`; empty if the run never started.

    Raises:
        InputError: a file is broken.
    """
    metrics, history = last_metrics(directory), history_log(directory).read()
    speeds = [line[SPEED] for line in history if isinstance(line.get(SPEED), int | float)]
    status = record.get("status", "finished" if record.get("finished") else "running") if record else "not started"
    return TrainingRun(
        directory=str(directory),
        status="crashed" if status == "running" and not is_claimed(directory) else status,
        settings={key: value for key, value in _settings(directory).items() if key.split(".")[0] not in IGNORED_GROUPS},
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        speed=statistics.median(speeds) if speeds else None,
        error=record.get("error"),
        history=history,
    )


def _settings(directory: Path) -> dict[str, Any]:
    return flatten_keys(read_config(directory / RESOLVED_FILE))


def _scores(results: dict[str, Any]) -> dict[str, float]:
    """Metrics of the evaluated system, which is the last one, in the first profile."""
    scores = {}
    for context, each in results[list(results)[-1]].items():
        profile, metrics = next(iter(each["profiles"].items()))
        for name, score in metrics.items():
            if score["value"] is not None:
                scores[f"{context} {profile} {name}"] = score["value"]
    return scores


def differing_settings(runs: Iterable[TrainingRun]) -> list[str]:
    """The keys whose values differ between runs; of models with different names, the name only."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    if "model.name" in found:
        found = [key for key in found if key == "model.name" or not key.startswith("model.")]
    return found


def sort_runs(runs: Iterable[TrainingRun], metric: str, direction: str) -> list[TrainingRun]:
    """The finished runs by their `metric`, best first, then the others by directory."""
    sign = 1 if direction == "minimize" else -1

    def key(run: TrainingRun) -> tuple:
        value = run.metrics.get(metric, math.nan)
        ranked = run.status == "finished" and math.isfinite(value)
        return (not ranked, sign * value if ranked else 0, run.directory)

    return sorted(runs, key=key)


def write_comparison(directory: Path, runs: list[TrainingRun], broken: list[str], metric: str) -> None:
    """Write `runs.json`, `runs.md` and `runs.svg`.

    Args:
        runs: in the order of the table.
        broken: errors of the runs that cannot be read.

    Raises:
        InputError: they cannot be written.
    """
    facts = [{name: value for name, value in asdict(run).items() if name != "history"} for run in runs]
    comparison = {"metric": metric, "differing": differing_settings(runs), "runs": facts, "broken": broken}
    write_json(directory / "runs.json", comparison)
    text = "\n\n".join(["# Runs", *map(markdown_table, _tables(runs, metric, 160)), "![loss curves](runs.svg)"])
    write_text(directory / "runs.md", "\n".join([text, "", *(f"- {line}" for line in _errors(runs, broken)), ""]))
    _plot(directory / "runs.svg", runs, metric)


def show_comparison(runs: list[TrainingRun], broken: list[str], metric: str) -> None:
    """Print the tables, and the errors below."""
    from rich.console import Console

    console = Console()
    for rows in _tables(runs, metric, console.width):
        console.print(terminal_table(rows))
    for line in _errors(runs, broken):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def terminal_table(rows: list[list[str]], title: str | None = None) -> "Table":
    """A table for the terminal; the first row is the header."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        table.add_column(name.replace(" ", "\n"), overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # brackets in a name or reason are no markup
    return table


def _tables(runs: list[TrainingRun], metric: str, width: int) -> list[list[list[str]]]:
    """Tables of at most `width` characters, each with its header: results, and the settings that differ.

    Settings are columns beside the metric if all fit in one table, else a table of their own lists their values.
    """
    first: dict[str, list[Any]] = {"run": [run.directory for run in runs], "status": [run.status for run in runs]}
    first[metric] = [run.metrics.get(metric) for run in runs]
    settings = {key: [run.settings.get(key) for run in runs] for key in differing_settings(runs)}
    columns: dict[str, list[Any]] = {}
    for name in ("eval_loss", "eval_strategy_accuracy", "loss"):
        if any(name in run.metrics for run in runs):
            columns[name] = [run.metrics.get(name) for run in runs]
    columns["steps"] = [max((line["step"] for line in run.history), default=None) for run in runs]
    columns["trained tokens/s"] = [None if run.speed is None else f"{run.speed:,.0f}" for run in runs]
    columns |= {name: [each.scores.get(name) for each in runs] for run in runs for name in run.scores}
    if len(_split(first | settings, width)) == 1:
        return _split(first | settings | columns, width)
    rows = [["setting", "value", "runs"]]
    for key, values in settings.items():
        numbers: dict[str, list[int]] = {}
        for number, value in enumerate(map(_short, values), 1):
            numbers.setdefault(value, []).append(number)
        rows += [[key if not place else "", value, _ranges(numbers[value])] for place, value in enumerate(numbers)]
    return [*_split(first | columns, width), rows]


def _split(columns: dict[str, list[Any]], width: int) -> list[list[list[str]]]:
    """Tables of these columns that fit the width; each starts with the numbers of the runs."""
    tables: list[list[list[str]]] = []
    for name, values in columns.items():
        column = [name, *map(_short, values)]
        if not tables or sum(map(_width, [*tables[-1], column])) + 2 > width:
            tables.append([["#", *map(str, range(1, len(column)))]])
        tables[-1].append(column)
    rows = [[list(row) for row in zip(*table, strict=True)] for table in tables]
    return [[header, *(row for row in table if {*row[1:]} != {_short(None)})] for header, *table in rows]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words, such as `1-3 5`."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(found[0], found[-1]) for _, group in groups for found in [[number for _, number in group]]]
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _width(column: list[str]) -> int:
    """Characters of a column in a table, whose header breaks between words."""
    return 3 + max(map(len, [*column[0].split(), *column[1:]]))


def _errors(runs: list[TrainingRun], broken: list[str]) -> list[str]:
    failed = [f"#{number} {run.status}: {run.error}" for number, run in enumerate(runs, 1) if run.error]
    return failed + [f"not read: {line}" for line in broken]


def _short(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(path: Path, runs: list[TrainingRun], metric: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    colours = itertools.cycle(matplotlib.colormaps["tab20"](range(20)))
    panels = list(dict.fromkeys(("loss", metric)))
    *curves, bars = figure.subplots(1, len(panels) + 1)
    places = [Path(run.directory).resolve() for run in runs]
    common = os.path.commonpath([place.parent for place in places]) if places else ""
    values = []
    for run, place, colour in zip(runs, places, colours, strict=False):
        for axes, name in zip(curves, panels, strict=True):
            points = [(line["step"], line[name]) for line in run.history if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=".")
            axes.set(title=name, xlabel="optimizer step")
        if metric in run.metrics:
            values.append(run.metrics[metric])
            bars.barh(os.path.relpath(place, common), values[-1], color=colour)
    bars.invert_yaxis()
    bars.set(title=f"{metric}, last")
    if values and (margin := (max(values) - min(values)) * 0.1):  # near the best, where differences show
        bars.set_xlim(min(values) - margin, max(values) + margin)
    save_svg(figure, path)


def save_svg(figure: Any, path: Path, **options: Any) -> None:
    """Save a figure of matplotlib as SVG; the same figure gives the same file. `options` are those of `savefig`."""
    import matplotlib

    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "csc_train"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None}, **options)
