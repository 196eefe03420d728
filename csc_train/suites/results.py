"""The results of a suite: its table beside the published one, as JSON, Markdown, a page, and for the terminal."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pydantic
from rich.console import Group
from rich.text import Text

from csc_train.data.sample_grammar import SAMPLE_SOURCE
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError, suggestion
from csc_train.evaluation.comparison import NOT_SIGNIFICANT
from csc_train.evaluation.config import PAPER, PROFILES
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report import tables
from csc_train.evaluation.report.tables import ReportTable
from csc_train.files import read_json, write_json, write_text
from csc_train.inference.config import SHORT_CONTEXT
from csc_train.jsonl import iter_jsonl
from csc_train.runs.comparison import RESULTS_FILE, SPEED, TrainingRun, finite, read_run, thin
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import read_run_record
from csc_train.suites.base import RowResult
from csc_train.suites.published import FIGURES, PublishedTable
from csc_train.templates import read_yaml, render

CURVES = ("loss", "eval_loss", "eval_strategy_accuracy")
"""Metrics of trainings that the page draws."""
STRATEGY_METRICS = ("macro-F1", "preference bias")
"""Metrics of strategies that stand beside those of the profile."""
MARKS = {"inside": "✓", "above": "▲", "below": "▼", None: ""}
"""Of a published value inside our interval; of ours above it; of ours below it; of a figure without an interval."""
NOTES = read_yaml(__package__, "notes.yaml")
LINKS = {"evaluation": "report.html", "training": "curves.html", "gain": "comparison.md"}
"""By field of `RowResult` with a run directory, the file of it that the page links to."""
COSTS = {"gpu_hours": ",.1f", "tokens": ",", "money": ",.2f"}
"""The fields of `Cost`, with the form of their numbers."""
WHEN = ("planned", "spent")
VERDICTS = {"A is higher": "higher", "B is higher": "lower", NOT_SIGNIFICANT: "n.s."}
Found = TypeVar("Found")
_RESULT = pydantic.TypeAdapter(MetricResult)


def write_suite_results(
    directory: Path, name: str, rows: Sequence[RowResult], published: PublishedTable | None, facts: dict[str, Any]
) -> None:
    """Write `results.json`, `results.md` and `results.html`, whatever the state of the rows.

    A file of a run that is missing or broken is named at its row. Numbers of the page link to their runs.

    Args:
        directory: of the suite.
        name: of the suite.
        published: the table to compare with; None compares the rows with each other only.
        facts: what else the page and the JSON say about the suite, by name.

    Raises:
        InputError: a file cannot be written.
    """
    found = [_read_row(row, published, directory) for row in rows]
    page = [each.pop("page") for each in found]
    summary, notes, details = _summary(found, published), _notes(found, published), _details(found)
    values = {"suite": name, "summary": summary, "facts": facts}
    values["published"] = published and {"place": published.place, "source": published.source}
    write_json(directory / "results.json", tables.to_plain(values | {"rows": found}))
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    blocks = [f"# Suite {name}", *summary, about, *_figure_tables(found, published), *notes]
    blocks += [table for table, _ in details]
    write_text(directory / "results.md", tables.markdown_tables(filter(None, blocks)))
    overlaps = {each["overlap"]["href"]: each["overlap"] for each in page if each["overlap"]}
    data = {"rows": found, "curves": _curves(found, page), "overlaps": list(overlaps.values())}
    data["strategies"] = [{"code": each.code, "title": each.en} for each in STRATEGIES]
    values |= {"rows": found, "columns": _columns(found, published), "notes": notes, "details": details}
    values |= {"marks": MARKS, "data": tables.to_plain(data)}
    write_text(directory / "results.html", render("csc_train", "suites/results.html.jinja", **values))


def console_results(name: str, rows: Sequence[RowResult], published: PublishedTable | None) -> Group:
    """The tables of `write_suite_results` for the terminal."""
    found = [_read_row(row, published, Path()) for row in rows]
    return Group(
        *map(Text, (f"Suite {name}", *_summary(found, published))),
        *map(tables.rich_table, _figure_tables(found, published, brief=True)),
        *map(Text, _notes(found, published)),
        *(tables.rich_table(table) for table, _ in _details(found, brief=True)),
    )


# --- what the runs of a row hold ---


def _attempt(problems: list[str], path: Path, read: Callable[[Path], Found], default: Found) -> Found:
    """What a file holds; `default` if there is none yet, or if it is broken, which is noted."""
    if not path.exists():
        return default
    try:
        return read(path)
    except InputError as error:
        problems.append(str(error))
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        problems.append(f"{path}: not as its recipe writes it ({reason}): run its step again")
    return default


def _read_row(row: RowResult, published: PublishedTable | None, start: Path) -> dict[str, Any]:
    """A row as `results.json` holds it, and in `page` what only the page shows.

    `figures`: by column, `published`, `ours` (a MetricResult; None if not evaluated), `difference`, and whether the
    published value lies `inside` our interval or ours is `above` or `below` it. `gain`: by column, the difference to
    the row `against`, its interval and its verdict. `shares`: by context, turns by strategy. `links` start at `start`.
    """
    problems: list[str] = []
    scores = _attempt(problems, row.evaluation / RESULTS_FILE, lambda path: _read_scores(path, row.system), {})
    profile = next((f"{each['profile']} " for each in scores.values()), "")
    gain = {}
    if row.gain is not None:
        gain = _attempt(problems, row.gain / "comparison.json", lambda path: _read_gain(path, profile), {})
    run = None
    if (place := row.training) is not None:
        run = _attempt(problems, place / RESOLVED_FILE, lambda _: read_run(place, read_run_record(place)), None)
    dialogues = row.evaluation / "dialogues.jsonl"
    source = _attempt(problems, dialogues, lambda path: next(iter_jsonl(path))[1].get("source"), None)
    expected = published.rows.get(row.published or "", {}) if published else {}
    if published and row.published and not expected:
        problems.append(published.unknown(row.published))
    ours = {
        f"{SHORT_CONTEXT[context]} {name}": value
        for context, each in scores.items()
        for name, value in each["metrics"].items()
    }
    columns = FIGURES if published else ours
    facts = run and {name: finite(run.metrics.get(name)) for name in CURVES} | {SPEED: run.speed}
    return {
        **{key: getattr(row, key) for key in ("name", "label", "state", "reason", "published", "against")},
        "problems": problems,
        "sample": source == SAMPLE_SOURCE or bool(run and run.settings.get("data.sample_dialogues")),
        "incomplete": any(each["incomplete"] for each in scores.values()),
        "figures": {column: _figure(expected.get(column), ours.get(column)) for column in columns},
        "gain": {column: gain[column] for column in columns if column in gain},
        "training": facts,
        "planned": asdict(row.planned),
        "spent": asdict(row.spent),
        "shares": {context: each["shares"] for context, each in scores.items() if each["shares"]},
        "links": {field: _link(start, getattr(row, field), name) for field, name in LINKS.items()},
        "page": {"directory": row.training, "run": run, "overlap": _overlap(run, start, problems)},
    }


def _read_scores(path: Path, system: str | None) -> dict[str, dict[str, Any]]:
    """By context, the metrics of a system in profile `paper`, or else in its first one, and turns by strategy."""
    results = read_json(path)["results"]
    if system is not None and system not in results:
        raise InputError(f"{path}: no system {system!r}.{suggestion(system, results)}")
    found = {}
    for context, scores in results[system or list(results)[-1]].items():
        profiles, confusion = scores["profiles"], scores["confusion"]
        profile = PAPER if PAPER in profiles else next(iter(profiles))
        beside = {name: cell for name, cell in scores["strategy"].items() if name in STRATEGY_METRICS}
        shares = confusion and {
            "reference": [sum(row) for row in confusion],
            "system": [sum(column) for column in zip(*confusion, strict=True)],  # the first is of unparsed turns
        }
        found[context] = {
            "profile": profile,
            "metrics": {name: _RESULT.validate_python(cell) for name, cell in (profiles[profile] | beside).items()},
            "shares": shares,
            "incomplete": scores["counts"]["incomplete"],
        }
    return found


def _read_gain(path: Path, profile: str) -> dict[str, dict[str, Any]]:
    """By column, the tested differences of a comparison; `profile` is left out of the names of metrics."""
    return {
        f"{SHORT_CONTEXT[row['context']]} {row['metric'].removeprefix(profile)}": {
            "verdict": VERDICTS[row["verdict"]],
            **{name: row[name] for name in ("difference", "low", "high", "adjusted")},
        }
        for row in read_json(path)["differences"]
        if row["verdict"]
    }


def _figure(published: float | None, ours: MetricResult | None) -> dict[str, Any]:
    value, low, high = (ours.value, ours.low, ours.high) if ours else (None, None, None)
    difference = place = None
    if published is not None and value is not None:
        difference = value - published
        if low is not None and high is not None:
            place = "above" if published < low else "below" if published > high else "inside"
    return {"published": published, "ours": ours, "difference": difference, "place": place}


def _link(start: Path, directory: Path | None, name: str) -> str | None:
    """A relative link to a file of a run, or to its directory if there is no such file; None without a directory."""
    if directory is None or not directory.is_dir():
        return None
    target = directory / name
    return quote(os.path.relpath(target if target.exists() else directory, start))


def _overlap(run: TrainingRun | None, start: Path, problems: list[str]) -> dict[str, Any] | None:
    """The overlap with profiles in the quality report beside the training data, if there is one."""
    sources = run.settings.get("data.mix") or [{"path": run.settings.get("data.train.path")}] if run else []
    places = [Path(each["path"]) for each in sources if each["path"]] or [Path(os.devnull)]
    folders = [path if path.is_dir() else path.parent for path in places]
    found = next((number for number, each in enumerate(folders) if (each / "quality.json").exists()), 0)
    data, folder = places[found], folders[found]
    rows = _attempt(problems, folder / "quality.json", lambda path: read_json(path)["profiles"], None)
    shown = {"data": "/".join(data.parts[-2:]), "href": _link(start, folder, "quality.html"), "rows": rows}
    return shown if rows else None


def _curves(found: Sequence[dict[str, Any]], page: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curves of each training: by metric, (step, trained tokens so far, value) thinned."""
    curves = {}
    for row, each in zip(found, page, strict=True):
        points: dict[str, list[tuple[int, int, float]]] = {name: [] for name in CURVES}
        step, tokens = 0, 0.0
        for line in each["run"].history if each["run"] else ():
            # The speed and the time of a step are means since the entry before.
            tokens += (line.get(SPEED) or 0) * (line.get("step_seconds") or 0) * (line["step"] - step)
            step = line["step"]
            for name in CURVES:
                if (value := finite(line.get(name))) is not None:
                    points[name].append((step, round(tokens), value))
        if step:
            curve = {"label": row["label"], "href": row["links"]["training"]}
            curves.setdefault(each["directory"], curve | {"points": {name: thin(points[name]) for name in CURVES}})
    return list(curves.values())


# --- tables ---


def _columns(found: Iterable[dict[str, Any]], published: PublishedTable | None) -> dict[str, str]:
    """The columns of figures, those in reference context first, and their headings."""
    ours = {column: cell["ours"] for row in found for column, cell in row["figures"].items() if cell["ours"]}
    arrows = {column: tables.ARROWS[result.direction] for column, result in ours.items()}
    names = FIGURES if published else sorted(ours, key=lambda column: not column.startswith("ref "))
    return {column: column + arrows.get(column, "") for column in names}


def _cell(cell: dict[str, Any] | None, brief: bool) -> str:
    """The lines of a cell: published, ours, and the difference with its mark."""
    if cell is None:
        return ""
    ours, lines = cell["ours"], []
    if cell["published"] is not None:
        lines.append(f"{cell['published']:.2f}")
    if ours and ours.value is None:
        lines.append("n/a")
    elif ours:
        interval = "" if ours.low is None else f" [{ours.low:.2f}, {ours.high:.2f}]"
        if brief and ours.low is not None:
            interval = f"±{(ours.high - ours.low) / 2:.1f}"
        lines.append(f"{ours.value:.2f}{interval}")
    if cell["difference"] is not None:
        lines.append(f"{cell['difference']:+.2f} {MARKS[cell['place']]}".strip())
    return "\n".join(lines)


def _notes(found: Sequence[dict[str, Any]], published: PublishedTable | None) -> list[str]:
    """The notes below the figures."""
    notes = [NOTES["published"], published.source, PROFILES[PAPER]] if published else [tables.NOTES["intervals"]]
    notes += [tables.NOTES["incomplete"]] * any(row["incomplete"] for row in found)
    reasons = tables.na_reasons(cell["ours"] for row in found for cell in row["figures"].values())
    return [*filter(None, notes), *(f"n/a: {reason}" for reason in reasons)]


def _summary(found: Sequence[dict[str, Any]], published: PublishedTable | None) -> list[str]:
    """Sentences for above the tables."""
    places = [cell["place"] for row in found for cell in row["figures"].values() if cell["place"]]
    done = f"{sum(row['state'] == 'done' for row in found)} of {len(found)} rows are done."
    if published and places:
        done += f" {places.count('inside')} of {len(places)} published figures lie inside our 95 % intervals."
    lines = [*[NOTES["sample"].format(source=SAMPLE_SOURCE)] * any(row["sample"] for row in found), done]
    lines += [f"{row['label']}: {row['state']}: {row['reason']}" for row in found if row["reason"]]
    return lines + [f"{row['label']}: not read: {each}" for row in found for each in row["problems"]]


def _figure_tables(
    found: Sequence[dict[str, Any]], published: PublishedTable | None, brief: bool = False
) -> list[ReportTable]:
    """A table of figures per context."""
    columns, shown = _columns(found, published), []
    for context, short in SHORT_CONTEXT.items():
        mine = {column: text for column, text in columns.items() if column.startswith(short)}
        header = ["row", *(text.removeprefix(f"{short} ") for text in mine.values())]
        labels = [row["label"] + tables.INCOMPLETE * row["incomplete"] for row in found]
        cells = [[_cell(row["figures"].get(column), brief) for column in mine] for row in found]
        rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
        shown += [ReportTable(f"{context.capitalize()} context (percent)", header, rows)] * bool(mine)
    return shown


def _details(found: Sequence[dict[str, Any]], brief: bool = False) -> list[tuple[ReportTable, list[str | None]]]:
    """Tables of gains, trainings and costs, each with the link of each row."""
    names = list(dict.fromkeys(column.split(" ", 1)[1] for row in found for column in row["gain"]))
    titles = {row["name"]: row["label"] for row in found}
    gains = [
        (row, [titles.get(row["against"], ""), context, *(_gain(row, f"{short} {name}", brief) for name in names)])
        for row in found for context, short in SHORT_CONTEXT.items()
        if any(key.startswith(short) for key in row["gain"])
    ]  # fmt: skip
    forms = dict.fromkeys(CURVES, ".4g") | {SPEED: ",.0f"}
    trained = [row for row in found if row["training"]]
    trainings = [(row, [_number(row["training"][name], form) for name, form in forms.items()]) for row in trained]
    known = [(kind, when) for kind in COSTS for when in WHEN if any(row[when][kind] is not None for row in found)]
    costs = [(row, [row["state"], *(_number(row[when][kind], COSTS[kind]) for kind, when in known)]) for row in found]
    headings = [f"{kind.replace('gpu_', 'GPU ')} {when}" for kind, when in known]
    shown = [
        ("gain", "Is the gain real?", ["against", "context", *names], 3, gains),
        ("training", "Trainings", [*CURVES, "trained tokens/s"], 1, trainings),
        ("evaluation", "States and costs", ["state", *headings], 2, costs),
    ]
    filled = []
    for key, title, header, labels, rows in (each for each in shown if each[-1]):
        cells = [[row["label"], *own] for row, own in rows]
        table = ReportTable(title, ["row", *header], cells, labels, notes=(NOTES[key],))
        filled.append((table, [row["links"][key] for row, _ in rows]))
    return filled


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _gain(row: dict[str, Any], column: str, brief: bool) -> str:
    if column not in row["gain"]:
        return ""
    cell = row["gain"][column]
    bounds = "" if brief or cell["low"] is None else f"\n[{cell['low']:+.2f}, {cell['high']:+.2f}]"
    return f"{cell['difference']:+.2f}{bounds}\n{cell['verdict']}"
