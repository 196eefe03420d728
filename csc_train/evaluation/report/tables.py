"""Tables of results, in Markdown and for the terminal."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.comparison import Difference, left_out_note
from csc_train.evaluation.config import PROFILES
from csc_train.evaluation.contamination import Contamination
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.scoring import Drifts, Results
from csc_train.files import write_json, write_text
from csc_train.inference.config import CONTEXTS, SHORT_CONTEXT
from csc_train.inference.predictions import describe_kinds
from csc_train.templates import read_yaml
from csc_train.terminal_tables import result_table

NOT_EVALUATED = MetricResult(None, reason="not evaluated in this context")
NOTES = read_yaml("csc_train.evaluation", "notes.yaml")
"""Texts below tables, from `notes.yaml`."""
INCOMPLETE = " †"
"""At the name of a system of which too many turns failed."""
ARROWS = {"lower": " ↓", "higher": "", "none": ""}
Cell = str | int | MetricResult


@dataclass(frozen=True)
class ReportTable:
    """A table with its notes, independent of the output format.

    Attributes:
        title: the heading.
        header: a name per column.
        rows: cells; a MetricResult is a number with its interval.
        labels: number of leading text columns.
        meanings: by column name, what it counts and by which implementation.
        notes: paragraphs below the table.
    """

    title: str
    header: Sequence[str]
    rows: list[list[Cell]]
    labels: int = 1
    meanings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def to_plain(value: Any, fields: Callable[[MetricResult], dict[str, Any]] = asdict) -> Any:
    """Results with each MetricResult as a dictionary, as in `results.json`.

    Args:
        fields: makes the dictionary; defaults to all fields.

    Raises:
        ValueError: a number is not finite, which JSON has no form for.
    """
    return json.loads(json.dumps(value, default=fields, allow_nan=False))


def write_results(
    directory: str | os.PathLike,
    results: Results,
    drifts: Drifts,
    provenance: dict[str, Any],
    contamination: Contamination | None = None,
) -> None:
    """Write `results.json` (results with intervals, units, signatures and reasons, and `provenance`) and `table.md`.

    Raises:
        InputError: the directory cannot be written.
    """
    everything = {"provenance": provenance, "results": results, "drift": drifts}
    write_json(Path(directory) / "results.json", to_plain(everything))
    write_text(Path(directory) / "table.md", results_markdown(results, drifts, contamination))


def results_markdown(results: Results, drifts: Drifts, contamination: Contamination | None = None) -> str:
    """All tables of all systems, and the details of the last: each strategy, confusions, results by turn."""
    last = list(results)[-1]
    details = results[last]
    results = mark_incomplete(results)
    tables = [*decontaminated_tables(results, contamination), *behaviour_tables(results)]
    for context, scores in details.items():
        tables.append(_by_strategy(last, context, scores))
        if scores["confusion"]:
            tables.append(_confusion(last, context, scores["by_strategy"], scores["confusion"]))
    tables.append(_by_position(last, details, drifts.get(last)))
    overlap = [] if contamination is None else [f"Training overlap: {contamination}"]
    return markdown_tables(
        [*metric_profile_tables(results), *overlap, *tables, f"Turns: {'; '.join(turn_counts(results))}."]
    )


def markdown_tables(blocks: Iterable[ReportTable | str]) -> str:
    """Tables and paragraphs as Markdown, with the reasons of each n/a as footnotes."""
    footnotes: dict[str, int] = {}
    texts = [each if isinstance(each, str) else _markdown_table(each, footnotes) for each in blocks]
    if footnotes:
        texts.append("\n".join(f"[^{number}]: {reason}" for reason, number in footnotes.items()))
    return "\n\n".join(texts) + "\n"


def _markdown_table(table: ReportTable, footnotes: dict[str, int]) -> str:
    rows = [table.header, *([cell_text(cell, footnotes) for cell in row] for row in table.rows)]
    first, *others = (
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |" for row in rows
    )
    rule = "|---" * table.labels + "|---:" * (len(table.header) - table.labels) + "|"
    lines = "\n".join([f"### {table.title}", "", first, rule, *others])
    units = [f"Units: {'; '.join(f'**{name}** {text}' for name, text in table.meanings.items())}."]
    return "\n\n".join([lines, *(units if table.meanings else []), *table.notes])


def rich_table(table: ReportTable) -> Table:
    """A table for the terminal, with its notes below."""
    footnotes: dict[str, int] = {}
    cells = [[cell_text(cell, footnotes).replace("[^", " [") for cell in row] for row in table.rows]
    found = result_table(table.title, table.header, cells, numbers=range(table.labels, len(table.header)))
    notes = [*table.notes, *(f"[{number}] {reason}" for reason, number in footnotes.items())]
    found.caption, found.caption_justify = Text("\n".join(notes)), "left"
    return found


def console_table(results: Results, profile: str = "paper") -> Table:
    """One profile for the terminal, with half of the interval below each number.

    Columns that are n/a for every system are left out. Numbers need 12 columns of 5 characters; in a narrow terminal
    the names of the systems wrap.
    """
    results = mark_incomplete(results)
    title = f"Strategy-conditioned replies, percent, profile {profile}"
    table = Table(title=title, padding=(0, 1, 0, 0), box=None, header_style="bold")
    table.add_column("\nsystem", overflow="fold")
    columns = [(context, name) for context in CONTEXTS for name in _columns(results, profile)]
    rows = [_profile_row(contexts, profile, columns) for contexts in results.values()]
    shown = [index for index in range(len(columns)) if any(row[index].value is not None for row in rows)]
    for context, name in (columns[index] for index in shown):
        heading = name.replace(" ", "\n")
        table.add_column(f"{SHORT_CONTEXT[context]}\n{heading}", justify="right", no_wrap=True)
    for system, row in zip(results, rows, strict=True):
        cells = [(_number(row[index]) or "n/a") + _half_width(row[index]) for index in shown]
        table.add_row(Text(system), *cells)  # Text: rich would read brackets in a name as markup
    intervals = "±: half the width of the 95 % interval, bootstrap over dialogues."
    reasons = [f"n/a: {reason}" for reason in na_reasons(cell for row in rows for cell in row)]
    table.caption, table.caption_justify = (
        "\n".join([PROFILES[profile], intervals, *reasons, *_incomplete_note(results)]),
        "left",
    )
    return table


def _number(cell: MetricResult) -> str | None:
    return None if cell.value is None else f"{cell.value:.2f}"


def _half_width(cell: MetricResult) -> str:
    """A second line that is no wider than the number."""
    return "" if cell.low is None or cell.high is None else f"\n±{(cell.high - cell.low) / 2:.1f}"


def cell_text(cell: Cell, footnotes: dict[str, int]) -> str:
    """A number with its interval, or n/a with the footnote of its reason."""
    if not isinstance(cell, MetricResult):
        return str(cell)
    if cell.value is None:
        return f"n/a[^{footnotes.setdefault(cell.reason, len(footnotes) + 1)}]"
    return _number(cell) + ("" if cell.low is None else f" [{cell.low:.2f}, {cell.high:.2f}]")


def na_reasons(cells: Iterable[object]) -> list[str]:
    """The reasons of the cells without a number, each once."""
    missing = (cell for cell in cells if isinstance(cell, MetricResult) and cell.value is None)
    return list(dict.fromkeys(str(cell.reason) for cell in missing))


def _meanings(results: Iterable[tuple[str, MetricResult]]) -> dict[str, str]:
    """Unit and signature by name; all variants if systems were scored differently."""
    texts: dict[str, dict[str, None]] = {}
    for name, result in results:
        texts.setdefault(name, {})[f"{result.unit} ({result.signature})"] = None
    return {name: " or ".join(variants) for name, variants in texts.items()}


def mark_incomplete(results: Results) -> Results:
    """The results with a mark at the names of the systems of which too many turns failed."""
    return {
        f"{system}{INCOMPLETE}" if any(each["counts"]["incomplete"] for each in contexts.values()) else system: contexts
        for system, contexts in results.items()
    }


def _incomplete_note(results: Results) -> tuple[str, ...]:
    return (NOTES["incomplete"],) if any(system.endswith(INCOMPLETE) for system in results) else ()


def _each(results: Results) -> Iterator[tuple[str, str, dict]]:
    for system, contexts in results.items():
        for context, scores in contexts.items():
            yield system, context, scores


# --- profiles ---


def metric_profile_tables(results: Results) -> list[ReportTable]:
    """A table per profile: a row per system; columns in reference context, then in generated context."""
    return [_profile_table(results, profile) for profile in _profiles(results)]


def decontaminated_tables(results: Results, contamination: Contamination | None) -> list[ReportTable]:
    """The profiles without the flagged dialogues; none if no dialogue is flagged or the run did not search."""
    if contamination is None or not contamination.flagged:
        return []
    rest = {
        system: {context: scores["decontaminated"] for context, scores in contexts.items()}
        for system, contexts in results.items()
    }
    return [_profile_table(rest, profile, contamination) for profile in _profiles(results)]


def _profiles(results: Results) -> list[str]:
    return list(dict.fromkeys(profile for _, _, scores in _each(results) for profile in scores["profiles"]))


def _columns(results: Results, profile: str) -> list[str]:
    return list(dict.fromkeys(name for _, _, scores in _each(results) for name in scores["profiles"].get(profile, {})))


def _profile_row(contexts: dict[str, dict], profile: str, columns: Sequence[tuple[str, str]]) -> list[MetricResult]:
    cells = {context: scores["profiles"].get(profile, {}) for context, scores in contexts.items()}
    return [cells.get(context, {}).get(name, NOT_EVALUATED) for context, name in columns]


def _profile_table(results: Results, profile: str, without: Contamination | None = None) -> ReportTable:
    columns = [(context, name) for context in CONTEXTS for name in _columns(results, profile)]
    cells = [cell for _, _, scores in _each(results) for cell in scores["profiles"].get(profile, {}).items()]
    arrows = {name: ARROWS[cell.direction] for name, cell in cells}
    header = ["system", *(f"{SHORT_CONTEXT[context]} {name}{arrows[name]}" for context, name in columns)]
    notes = (PROFILES[profile], *_marked(dict(cells))[1], NOTES["intervals"], *_incomplete_note(results))
    rows = [[system, *_profile_row(contexts, profile, columns)] for system, contexts in results.items()]
    if without is not None:
        rest = without.evaluation - len(without.flagged)
        title = f"Profile `{profile}` without the flagged dialogues (percent; {rest} of {without.evaluation} dialogues)"
        return ReportTable(title, header, rows)
    title = f"Profile `{profile}` (percent; ref = reference context, gen = generated context)"
    return ReportTable(title, header, rows, 1, _meanings(cells), notes)


# --- behaviour ---


def behaviour_tables(results: Results) -> list[ReportTable]:
    """Strategy choices, likelihoods, process and replies of all systems."""
    return [
        _section_table(results, "strategy", "Strategies (percent; bias as a standard deviation)"),
        _section_table(results, "likelihood", "Likelihoods (percent; NLL in nats per token)"),
        _gold_section_table(results, "process", "Process (percent)"),
        _gold_section_table(results, "reply", "Replies (percent; length in characters)"),
    ]


def _section_table(results: Results, section: str, title: str) -> ReportTable:
    rows = [[system, context, *scores[section].values()] for system, context, scores in _each(results)]
    cells = [cell for _, _, scores in _each(results) for cell in scores[section].items()]
    header, note = _marked(dict(cells))
    return ReportTable(title, ["system", "context", *header], rows, 2, _meanings(cells), note)


def _gold_section_table(results: Results, section: str, title: str) -> ReportTable:
    """The results of each system, and of the reference dialogues on the turns of each system."""
    rows, references = [], {}
    for system, context, scores in _each(results):
        rows.append([system, context, *(sides["system"] for sides in scores[section].values())])
        reference = tuple(sides["reference"] for sides in scores[section].values())
        references.setdefault(reference, []).append(f"{system}, {context}")
    for reference, others in sorted(references.items(), key=lambda each: len(each[1]), reverse=True):
        whose = "" if others == max(references.values(), key=len) else f"turns of {'; '.join(others)}"
        rows.append(["reference dialogues", whose, *reference])
    first = next(scores[section] for _, _, scores in _each(results))
    cells = {name: sides["reference"] for name, sides in first.items()}
    header, notes = _marked(cells)
    notes += ("Columns without an arrow have no better direction: compare them with the reference dialogues.",)
    if len(references) > 1:
        notes += ("The reference dialogues have a row per set of turns, since some turns failed.",)
    return ReportTable(title, ["system", "context", *header], rows, 2, _meanings(cells.items()), notes)


def _marked(cells: dict[str, MetricResult]) -> tuple[list[str], tuple[str, ...]]:
    """The column names with arrows, and the note that explains the arrow."""
    names = [name + ARROWS[cell.direction] for name, cell in cells.items()]
    return names, ("↓: lower is better.",) if names != list(cells) else ()


# --- details of one system ---


def _by_strategy(system: str, context: str, scores: dict) -> ReportTable:
    rows = [[label, *cells.values()] for label, cells in scores["by_strategy"].items()]
    title = f"Results by strategy (percent; 1 is the mean preference): {system}, {context} context"
    return ReportTable(title, ["strategy", *next(iter(scores["by_strategy"].values()))], rows)


def _confusion(system: str, context: str, labels: Iterable[str], confusion: list[list[int]]) -> ReportTable:
    rows = [[label, *counts[1:], counts[0]] for label, counts in zip(labels, confusion, strict=True)]
    header = ["reference \\ predicted", *(str(strategy.number) for strategy in STRATEGIES), "unparsed"]
    return ReportTable(f"Confusion (turns): {system}, {context} context", header, rows)


def position_metrics(results: Results) -> list[str]:
    """The names of the metrics by supporter turn."""
    rows = (row for _, _, scores in _each(results) for row in scores["by_position"])
    return [name for name in next(rows, {}) if name not in ("position", "turns")]


def _by_position(system: str, contexts: dict[str, dict], drift: list[dict] | None) -> ReportTable:
    """Results by supporter turn; with `drift`, on the turns of both contexts."""
    names = position_metrics({system: contexts})
    sides = [
        [row[context] for row in drift] if drift else scores["by_position"] for context, scores in contexts.items()
    ]
    turns = drift or [max(rows, key=lambda row: row["turns"]) for rows in zip(*sides, strict=True)]
    rows = [
        [row["position"], row["turns"], *(side[name] for name in names for side in by_context)]
        + [row[name] for name in names if drift]
        for row, *by_context in zip(turns, *sides, strict=True)
    ]
    header = [
        "supporter turn",
        "turns",
        *(f"{SHORT_CONTEXT[context]} {name}" for name in names for context in contexts),
    ]
    header += [f"drift of {name}" for name in names if drift]
    notes = (f"{NOTES['drift']} {NOTES['intervals']}",) if drift else ()
    return ReportTable(f"Results by supporter turn (percent): {system}", header, rows, notes=notes)


def turn_counts(results: Results, brief: bool = False) -> list[str]:
    """For each system and context, in words, the turns that were scored, unparsed, empty, cut off and failed.

    Args:
        brief: only where turns were cut off or failed.
    """
    parts = []
    for system, context, scores in _each(results):
        here = scores["counts"]
        if brief and not (here["cut_off"] or here["failed"]):
            continue
        unparsed = "strategies not predicted" if here["unparsed"] is None else f"{here['unparsed']} unparsed"
        text = f"{system}, {context} context: {here['turns']} ({unparsed}, {here['empty_replies']} empty, "
        text += f"{here['cut_off']} cut off)"
        if here["failed"]:
            text += f", {here['failed']} more failed ({describe_kinds(here['failures'])}) and are not scored; process "
            text += "and transitions omit their dialogues"
        parts.append(text)
    return parts


# --- comparison ---

_COMPARISON_COLUMNS: dict[str, Callable[[Difference], str]] = {
    "context": lambda row: row.context,
    "metric": lambda row: row.metric + ARROWS[row.direction],
    "A": lambda row: f"{row.a:.2f}",
    "B": lambda row: f"{row.b:.2f}",
    "A - B": lambda row: f"{row.difference:+.2f}" + ("" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"),
    "p": lambda row: f"{row.p_value:.4f}",
    "p, Holm": lambda row: f"{row.adjusted:.4f}",
    "McNemar": lambda row: "" if row.mcnemar is None else f"{row.mcnemar:.4f}",
    "verdict": lambda row: row.verdict or "",
}


def comparison_table(rows: Sequence[Difference], brief: bool = False) -> ReportTable:
    """The differences between two systems.

    Args:
        brief: for the terminal, without n/a rows, uncorrected p-values, McNemar's test and meanings.
    """
    columns = [name for name in _COMPARISON_COLUMNS if not brief or name not in ("p", "McNemar")]
    cells = []
    for row in rows:
        if row.verdict is not None:
            cells.append([_COMPARISON_COLUMNS[name](row) for name in columns])
        elif not brief:
            cells.append([row.context, row.metric, *["n/a"] * (len(columns) - 3), row.reason])
    note = NOTES["comparison"].format(tests=sum(row.verdict is not None for row in rows))
    left_out = {row.context: left_out_note(row.left_out) for row in rows if row.left_out}
    note = " ".join([note, *(f"In {context} context: {each}" for context, each in left_out.items())])
    meanings = {} if brief else _meanings((row.metric, row) for row in rows)
    return ReportTable("Paired differences (percent)", columns, cells, 2, meanings, (note,))
