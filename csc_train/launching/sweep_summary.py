"""The summary of a sweep: its trials as JSON, Markdown, a page, and for the terminal."""

import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from csc_train.config.cluster import ClusterConfig, SweepConfig
from csc_train.files import write_json, write_text
from csc_train.launching.search_space import distributions
from csc_train.launching.warm_start import EARLIER, SUMMARY_FILE, count_earlier, own_trials
from csc_train.runs.comparison import finite, history_log, markdown_table, terminal_table, thin
from csc_train.templates import render

PAGE_FILE, TABLE_FILE = "summary.html", "summary.md"
MAX_CURVES = 5
"""Most trials whose curves stand beside each other on the page."""
LINKS = ("curves.html", "curves.png", "output.log")
"""Files of a trial that the page links to, best first."""


def describe_trial(config: SweepConfig, number: int, values: dict[str, Any]) -> str:
    """A trial and its parameter values in one line."""
    shown = (f"{config.override_key(name)}={_short(value)}" for name, value in values.items())
    return f"trial {number} ({', '.join(shown)})"


def ranked(study: optuna.Study, config: SweepConfig) -> list[FrozenTrial]:
    """The complete trials of a sweep, the best first."""
    sign = 1 if config.direction == "minimize" else -1
    return sorted(own_trials(study, TrialState.COMPLETE), key=lambda trial: sign * (trial.value or 0))


def summarize_sweep(
    directory: Path, study: optuna.Study, config: SweepConfig, cluster: ClusterConfig, running: bool = False
) -> dict[str, Any]:
    """The trials with their values and outcomes, the best, and the time that they took.

    `importances` are shares of the metric's variance among good trials, also of the earlier ones, by Optuna's
    PED-ANOVA; None for fewer than two different results. `hours` are those of `unit`.

    Args:
        running: whether unfinished trials run; else they are `stopped`.
    """
    first = count_earlier(study)
    trials = [
        {
            "number": number,
            "state": "stopped" if trial.state == TrialState.RUNNING and not running else trial.state.name.lower(),
            **_result(trial, config),
            "steps": trial.last_step,
            "seconds": trial.user_attrs.get("seconds"),
            "reason": trial.user_attrs.get("reason"),
            "directory": str(directory / f"trial-{number}"),
        }
        for number, trial in enumerate(own_trials(study))
    ]
    best, importances = ranked(study, config), None
    if len({trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}) > 1:
        with warnings.catch_warnings(action="ignore"):  # about few trials
            shares = optuna.importance.get_param_importances(study)
        importances = {config.override_key(name): share for name, share in shares.items()}
    return {
        "sweep": config.name,
        "kind": config.kind,
        "metric": config.metric,
        "direction": config.direction,
        "best": best[0].number - first if best else None,
        "importances": importances,
        "hours": sum(trial["seconds"] or 0 for trial in trials) * (cluster.gpus or cluster.world_size) / 3600,
        "unit": "GPU hours" if cluster.gpus else "process hours",
        "budget": config.budget_gpu_hours,
        "asked": config.size,
        "trials": trials,
        "earlier": [
            {"directory": trial.user_attrs[EARLIER], "state": "complete", **_result(trial, config)}
            for trial in study.get_trials(deepcopy=False)[:first]
        ],
    }


def _result(trial: FrozenTrial, config: SweepConfig) -> dict[str, Any]:
    parameters = {config.override_key(name): value for name, value in trial.params.items()}
    return {"value": finite(trial.value), "parameters": parameters}


def write_summary(
    directory: Path, study: optuna.Study, config: SweepConfig, cluster: ClusterConfig, running: bool = False
) -> dict[str, Any]:
    """Write `summary.json`, `summary.md` and the self-contained page `summary.html`; returns `summarize_sweep`.

    Raises:
        InputError: the directory cannot be written.
    """
    facts = summarize_sweep(directory, study, config, cluster, running)
    write_json(directory / SUMMARY_FILE, facts)
    rows, lines = _rows(facts), _lines(facts)
    write_text(directory / TABLE_FILE, "\n\n".join([f"# Sweep {config.name}", *lines, markdown_table(rows)]) + "\n")
    best = [trial.number - count_earlier(study) for trial in ranked(study, config)[:MAX_CURVES]]
    data = {
        "metric": config.metric,
        "best": facts["best"],
        "axes": [_axis(config.override_key(name), each) for name, each in distributions(config).items()],
        "trials": [*facts["earlier"], *facts["trials"]],
        "curves": [{"number": number, "points": _curves(directory, number, config.metric)} for number in best],
    }
    folders = [directory / f"trial-{row[0].rstrip('*')}" for row in rows[1:]]
    links = [next((f"{folder.name}/{name}" for name in LINKS if (folder / name).exists()), None) for folder in folders]
    values = {"facts": facts, "lines": lines, "rows": rows, "links": links, "data": data, "running": running}
    write_text(directory / PAGE_FILE, render("csc_train", "launching/summary.html.jinja", **values))
    return facts


def report_sweep(directory: Path, study: optuna.Study, config: SweepConfig, cluster: ClusterConfig) -> None:
    """Write the summary of a sweep that has ended; print the table and where it is.

    Raises:
        InputError: the directory cannot be written.
    """
    facts = write_summary(directory, study, config, cluster)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(terminal_table(_rows(facts), title=f"Sweep {config.name} (* best)"))
    for line in _lines(facts):
        console.print(line, highlight=False)
    written = ", ".join([PAGE_FILE, TABLE_FILE, SUMMARY_FILE])
    console.print(f"summary: {directory}: {written}", highlight=False, soft_wrap=True)


def _axis(key: str, distribution: BaseDistribution) -> dict[str, Any]:
    """An axis of the page's parallel coordinates: the choices of a setting, or its range."""
    if isinstance(distribution, CategoricalDistribution):
        return {"key": key, "choices": distribution.choices}
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return {"key": key, "low": distribution.low, "high": distribution.high, "log": distribution.log}


def _curves(directory: Path, number: int, metric: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the training loss and the metric of a trial."""
    history = history_log(directory / f"trial-{number}").read()
    return {
        name: thin([(row["step"], row[name]) for row in history if finite(row.get(name)) is not None])
        for name in dict.fromkeys(("loss", metric))
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """What the sweep came to: trials and the best, time and budget, earlier trials."""
    states = [trial["state"] for trial in facts["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"{len(states)} of {facts['asked']} trials: {counts or 'none has ended'}; no trial has a result"]
    if facts["best"] is not None:
        best = facts["trials"][facts["best"]]
        values = " ".join(f"{key}={_short(value)}" for key, value in best["parameters"].items())
        result = f"best: trial {best['number']}, {facts['metric']} {best['value']:.6g}, {values}"
        lines = [f"{len(states)} of {facts['asked']} trials: {counts}; {result}"]
    if facts["budget"] is None:
        lines.append(f"{facts['hours']:.3g} {facts['unit']} used")
    else:
        lines.append(f"{facts['hours']:.3g} of {facts['budget']:g} {facts['unit']} used")
        if "running" not in states and ("stopped" in states or len(states) < facts["asked"]):
            lines[-1] += (
                f": {states.count('stopped')} stopped, {facts['asked'] - len(states)} not started; the same command "
                "with a greater sweep.budget_gpu_hours resumes"
            )
    if facts["earlier"]:
        lines.append(f"{len(facts['earlier'])} complete trials of an earlier sweep taught the sampler")
    return lines


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
