"""What came of a sweep: a table, and plots of its history, its parameters and their importance."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from csc_train.config.cluster import SweepConfig
from csc_train.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

SUMMARY = ("summary.json", "summary.md")
PLOTS = {
    "history.svg": "plot_optimization_history",
    "parallel_coordinates.svg": "plot_parallel_coordinate",
    "importances.svg": "plot_param_importances",
}
"""File names, and the functions of optuna.visualization.matplotlib that draw them."""


def describe_trial(config: SweepConfig, number: int, values: dict[str, Any]) -> str:
    """A trial and its values in one line."""
    shown = (f"{config.key_of(name)}={_short(value)}" for name, value in values.items())
    return f"trial {number} ({', '.join(shown)})"


def summary(directory: Path, study: "optuna.Study", config: SweepConfig) -> dict[str, Any]:
    """The trials with their values and outcomes, and the best.

    `importances` are shares of the metric's variance among good trials, by Optuna's PED-ANOVA; None for fewer than two
    results that differ.
    """
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "parameters": {config.key_of(name): value for name, value in trial.params.items()},
            "steps": trial.last_step,
            "seconds": trial.user_attrs.get("seconds"),
            "reason": trial.user_attrs.get("reason"),
            "directory": str(directory / f"trial-{trial.number}"),
        }
        for trial in study.trials
    ]
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    return {
        "sweep": config.name,
        "kind": config.kind,
        "metric": config.metric,
        "direction": config.direction,
        "best": study.best_trial.number if complete else None,
        "importances": _importances(study, config),
        "trials": trials,
    }


def _importances(study: "optuna.Study", config: SweepConfig) -> dict[str, float] | None:
    import optuna

    values = {trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    if len(values) < 2:
        return None
    with warnings.catch_warnings(action="ignore"):  # that trials are few
        shares = optuna.importance.get_param_importances(study)
    return {config.key_of(name): share for name, share in shares.items()}


def write_summary(directory: Path, study: "optuna.Study", config: SweepConfig) -> None:
    """Write `summary.json`, `summary.md` and `PLOTS`; what cannot be drawn from so few results is left out.

    Raises:
        InputError: the directory cannot be written.
    """
    facts = summary(directory, study, config)
    write_json(directory / SUMMARY[0], facts)
    header, rows = _rows(facts)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    plots = _draw(directory, study, config) if facts["importances"] else []
    pictures = "".join(f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})\n\n" for name in plots)
    write_text(directory / SUMMARY[1], f"# Sweep {config.name}\n\n{_headline(facts)}\n\n{table}\n\n{pictures}")


def _draw(directory: Path, study: "optuna.Study", config: SweepConfig) -> list[str]:
    import matplotlib

    matplotlib.use("agg")  # needs no display
    import matplotlib.pyplot
    from optuna.visualization import matplotlib as plots

    for name, function in PLOTS.items():
        with warnings.catch_warnings(action="ignore"):  # that trials are few, and that the function is experimental
            axes = getattr(plots, function)(study, target_name=config.metric)
        figure = axes.figure
        figure.set_size_inches(10, 5)
        with atomic_path(directory / name) as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight")
        matplotlib.pyplot.close(figure)
    return list(PLOTS)


def show_summary(directory: Path, study: "optuna.Study", config: SweepConfig) -> None:
    """Print the table, and where it and the plots are."""
    from rich.console import Console

    facts = summary(directory, study, config)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(facts))
    console.print(_headline(facts), highlight=False)
    written = [name for name in (*SUMMARY, *PLOTS) if (directory / name).exists()]
    console.print(f"summary: {directory}: {', '.join(written)}", highlight=False, soft_wrap=True)


def _table(facts: dict[str, Any]) -> "Table":
    from rich.table import Table

    header, rows = _rows(facts)
    table = Table(*header, title=f"Sweep {facts['sweep']} (* best)", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _headline(facts: dict[str, Any]) -> str:
    states = [trial["state"] for trial in facts["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    if facts["best"] is None:
        return f"{len(states)} trials: {counts}; none came to a result"
    best = facts["trials"][facts["best"]]
    values = " ".join(f"{key}={_short(value)}" for key, value in best["parameters"].items())
    return (
        f"{len(states)} trials: {counts}; best: trial {best['number']}, {facts['metric']} {best['value']:.6g}, {values}"
    )


def _rows(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, best results first, then in order."""
    keys = list(dict.fromkeys(key for trial in facts["trials"] for key in trial["parameters"]))
    header = ["trial", facts["metric"], *keys, "outcome", "steps", "seconds", "reason"]
    sign = 1 if facts["direction"] == "minimize" else -1

    def place(trial: dict[str, Any]) -> tuple:
        done = trial["state"] == "complete"
        return (not done, sign * trial["value"] if done else 0, trial["number"])

    rows = [
        [
            f"{trial['number']}{'*' if trial['number'] == facts['best'] else ''}",
            _short(trial["value"]),
            *(_short(trial["parameters"].get(key)) for key in keys),
            trial["state"],
            _short(trial["steps"]),
            _short(trial["seconds"]),
            trial["reason"] or "",
        ]
        for trial in sorted(facts["trials"], key=place)
    ]
    return header, rows


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
