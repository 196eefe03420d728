"""The summary of a sweep: a table of its trials, and plots of history, parameters and importances."""

import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console

from csc_train.config.cluster import SweepConfig
from csc_train.files import write_json, write_text
from csc_train.runs.comparison import markdown_table, save_svg, terminal_table

PLOTS = {
    "history.svg": "plot_optimization_history",
    "parallel_coordinates.svg": "plot_parallel_coordinate",
    "importances.svg": "plot_param_importances",
}
"""Plot files, and the functions of optuna.visualization.matplotlib that draw them."""


def describe_trial(config: SweepConfig, number: int, values: dict[str, Any]) -> str:
    """A trial and its parameter values in one line."""
    shown = (f"{config.override_key(name)}={_short(value)}" for name, value in values.items())
    return f"trial {number} ({', '.join(shown)})"


def summarize_sweep(directory: Path, study: optuna.Study, config: SweepConfig) -> dict[str, Any]:
    """The trials with their values and outcomes, and the best.

    `importances` are shares of the metric's variance among good trials, by Optuna's PED-ANOVA; None for fewer than two
    different results.
    """
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "parameters": {config.override_key(name): value for name, value in trial.params.items()},
            "steps": trial.last_step,
            "seconds": trial.user_attrs.get("seconds"),
            "reason": trial.user_attrs.get("reason"),
            "directory": str(directory / f"trial-{trial.number}"),
        }
        for trial in study.trials
    ]
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    importances = None
    if len({trial.value for trial in complete}) > 1:
        with warnings.catch_warnings(action="ignore"):  # about few trials
            shares = optuna.importance.get_param_importances(study)
        importances = {config.override_key(name): share for name, share in shares.items()}
    return {
        "sweep": config.name,
        "kind": config.kind,
        "metric": config.metric,
        "direction": config.direction,
        "best": study.best_trial.number if complete else None,
        "importances": importances,
        "trials": trials,
    }


def report_sweep(directory: Path, study: optuna.Study, config: SweepConfig) -> None:
    """Write `summary.json`, `summary.md` and, if two results differ, the plots; print the table and where they are.

    Raises:
        InputError: the directory cannot be written.
    """
    facts = summarize_sweep(directory, study, config)
    write_json(directory / "summary.json", facts)
    rows = _rows(facts)
    plots = _draw(directory, study, config) if facts["importances"] else []
    images = "".join(f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})\n\n" for name in plots)
    headline = _headline(facts)
    write_text(directory / "summary.md", f"# Sweep {config.name}\n\n{headline}\n\n{markdown_table(rows)}\n\n{images}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(terminal_table(rows, title=f"Sweep {config.name} (* best)"))
    console.print(headline, highlight=False)
    written = ", ".join(["summary.json", "summary.md", *plots])
    console.print(f"summary: {directory}: {written}", highlight=False, soft_wrap=True)


def _draw(directory: Path, study: optuna.Study, config: SweepConfig) -> list[str]:
    import matplotlib

    matplotlib.use("agg")  # needs no display
    import matplotlib.pyplot
    from optuna.visualization import matplotlib as plots

    for name, function in PLOTS.items():
        with warnings.catch_warnings(action="ignore"):  # about few trials and experimental functions
            figure = getattr(plots, function)(study, target_name=config.metric).figure
        for drawn in (drawn for axes in figure.axes for drawn in axes.collections if drawn.get_array() is not None):
            # In Optuna's colours the worst trials are as white as the background.
            drawn.set_cmap("turbo" if config.direction == "minimize" else "turbo_r")
        figure.set_size_inches(10, 5)
        save_svg(figure, directory / name, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
    return list(PLOTS)


def _headline(facts: dict[str, Any]) -> str:
    states = [trial["state"] for trial in facts["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    if facts["best"] is None:
        return f"{len(states)} trials: {counts}; no trial has a result"
    best = facts["trials"][facts["best"]]
    values = " ".join(f"{key}={_short(value)}" for key, value in best["parameters"].items())
    return (
        f"{len(states)} trials: {counts}; best: trial {best['number']}, {facts['metric']} {best['value']:.6g}, {values}"
    )


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    """Header and rows: complete trials from best to worst, then the others by number."""
    keys = list(dict.fromkeys(key for trial in facts["trials"] for key in trial["parameters"]))
    sign = 1 if facts["direction"] == "minimize" else -1

    def rank(trial: dict[str, Any]) -> tuple:
        complete = trial["state"] == "complete"
        return (not complete, sign * trial["value"] if complete else 0, trial["number"])

    rows = [["trial", facts["metric"], *keys, "outcome", "steps", "seconds", "reason"]]
    for trial in sorted(facts["trials"], key=rank):
        mark = "*" if trial["number"] == facts["best"] else ""
        cells = [trial["value"], *map(trial["parameters"].get, keys), *map(trial.get, ("state", "steps", "seconds"))]
        rows.append([f"{trial['number']}{mark}", *map(_short, cells), trial["reason"] or ""])
    return rows


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
