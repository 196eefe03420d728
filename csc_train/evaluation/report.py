"""The scores of several systems as Markdown, as JSON, and as a table for the terminal.

`results` maps a system's name to its contexts ("reference", "generated") and those to what `metrics.score` returned,
in the order in which rows are to appear; the last is the system that is evaluated. `drifts` maps its name to what
`metrics.drift` returned, where it was evaluated in both contexts.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from csc_train.evaluation.comparison import Difference
from csc_train.evaluation.figure import Score
from csc_train.evaluation.metrics import PROFILE_NOTES, PROFILES
from csc_train.evaluation.predictions import CONTEXTS
from csc_train.files import write_json, write_text
from csc_train.strategies import STRATEGIES

Results = dict[str, dict[str, dict]]
Drifts = dict[str, list[dict]]

NOT_EVALUATED = "not evaluated in this context"
SHORT_CONTEXT = {"reference": "ref", "generated": "gen"}
INTERVALS = "In brackets: 95 % interval, percentile bootstrap over dialogues; none where fewer than 10 dialogues count."


def write_results(directory: str | os.PathLike, results: Results, drifts: Drifts, provenance: dict[str, Any]) -> None:
    """Write `results.json` (scores with intervals, units, signatures and reasons, and `provenance`) and `table.md`.

    Raises:
        InputError: the directory cannot be written.
    """
    everything = {"provenance": provenance, "results": results, "drift": drifts}
    write_json(Path(directory) / "results.json", json.loads(json.dumps(everything, default=asdict)))
    write_text(Path(directory) / "table.md", markdown_table(results, drifts))


def markdown_table(results: Results, drifts: Drifts) -> str:
    """One table per profile: a row per system, the columns in the reference context, then in the generated one.

    Under each table: what every column counts and how, and what is a reconstruction. Then strategies, process and
    replies of every system, and of the last one each strategy, its confusions and its accuracy turn by turn. At the
    end: the counts of turns and the reasons behind each `n/a`.
    """
    footnotes: dict[str, int] = {}
    blocks = []
    for profile in _profiles(results):
        blocks += [_markdown_profile(results, profile, footnotes), _legend(results, profile)]
    blocks += [_markdown_strategies(results, footnotes)]
    blocks += [_markdown_sides(results, section, footnotes) for section in ("process", "reply")]
    last = list(results)[-1]
    for context, scores in results[last].items():
        blocks += [_markdown_by_strategy(last, context, scores, footnotes)]
        if scores["confusion"]:
            blocks += [_markdown_confusion(last, context, scores["confusion"])]
    blocks += [_markdown_by_position(last, results[last], drifts.get(last), footnotes), _counts(results)]
    if footnotes:
        blocks.append("\n".join(f"[^{number}]: {reason}" for reason, number in footnotes.items()))
    return "\n\n".join(blocks) + "\n"


def console_table(results: Results, profile: str = "paper") -> Table:
    """One profile for the terminal, with the columns of `markdown_table`; under each number half of its interval.

    Numbers need 12 columns of 5 characters; in a narrow terminal it is the systems' names that wrap.
    """
    table = Table(title="Strategy-conditioned replies, percent", padding=(0, 1, 0, 0), box=None, header_style="bold")
    table.add_column("\nsystem", overflow="fold")
    for context in CONTEXTS:
        for column in PROFILES[profile]:
            table.add_column(f"{SHORT_CONTEXT[context]}\n{column}", justify="right", no_wrap=True)
    reasons = {}
    for system in results:
        row = []
        for cell in _row(results[system], profile):
            row.append((_number(cell) or "n/a") + _half_width(cell))
            if cell.value is None:
                reasons[cell.reason] = None
        table.add_row(Text(system), *row)  # as text: a name may hold brackets, which rich would read as markup
    intervals = "±: half the width of the 95 % interval, bootstrap over dialogues."
    table.caption = "\n".join([PROFILE_NOTES[profile], intervals, *(f"n/a: {reason}" for reason in reasons)])
    table.caption_justify = "left"
    return table


def _profiles(results: Results) -> list[str]:
    scored = (
        profile for contexts in results.values() for scores in contexts.values() for profile in scores["profiles"]
    )
    return list(dict.fromkeys(scored))


def _row(contexts: dict[str, dict], profile: str) -> Iterator[Score]:
    for context in CONTEXTS:
        cells = contexts.get(context, {"profiles": {}})["profiles"].get(profile, {})
        for column in PROFILES[profile]:
            yield cells.get(column) or Score(None, "", "", NOT_EVALUATED)


def _number(cell: Score) -> str | None:
    return None if cell.value is None else f"{cell.value:.2f}"


def _half_width(cell: Score) -> str:
    """A second line that is no wider than the number."""
    if cell.low is None or cell.high is None:
        return ""
    return f"\n±{(cell.high - cell.low) / 2:.1f}"


def _cell(cell: Score, footnotes: dict[str, int]) -> str:
    """A number with its interval, or a reference to the reason why there is none."""
    if cell.value is None:
        return f"n/a[^{footnotes.setdefault(cell.reason, len(footnotes) + 1)}]"
    between = "" if cell.low is None else f" [{cell.low:.2f}, {cell.high:.2f}]"
    return _number(cell) + between


def _lines(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], labels: int = 1) -> str:
    """A Markdown table whose first `labels` columns are text and whose other ones are numbers."""
    rule = "|---" * labels + "|---:" * (len(header) - labels) + "|"
    texts = ([str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows))
    first, *others = ("| " + " | ".join(row) + " |" for row in texts)
    return "\n".join([f"### {title}", "", first, rule, *others])


def _meanings(scores: Iterable[tuple[str, Score]]) -> str:
    texts = {name: f"**{name}** {score.unit} ({score.signature})" for name, score in scores}
    return f"Units: {'; '.join(texts.values())}."


def _markdown_profile(results: Results, profile: str, footnotes: dict[str, int]) -> str:
    columns = [f"{SHORT_CONTEXT[context]} {column}" for context in CONTEXTS for column in PROFILES[profile]]
    rows = (
        [system, *(_cell(cell, footnotes) for cell in _row(contexts, profile))] for system, contexts in results.items()
    )
    title = f"Profile `{profile}` (percent; ref = reference context, gen = generated context)"
    return _lines(title, ["system", *columns], rows) + f"\n\n{INTERVALS}"


def _each(results: Results) -> Iterator[tuple[str, str, dict]]:
    for system, contexts in results.items():
        for context, scores in contexts.items():
            yield system, context, scores


def _markdown_strategies(results: Results, footnotes: dict[str, int]) -> str:
    some = [scores["strategy"] for _, _, scores in _each(results)]
    rows = [
        [system, context, *(_cell(cell, footnotes) for cell in scores["strategy"].values())]
        for system, context, scores in _each(results)
    ]
    table = _lines("Strategies (percent)", ["system", "context", *some[0]], rows, labels=2)
    return f"{table}\n\n{_meanings(some[0].items())}"


def _markdown_sides(results: Results, section: str, footnotes: dict[str, int]) -> str:
    """Figures of each system beside those of the reference."""
    some = next(scores[section] for _, _, scores in _each(results))
    rows = [
        [system, context, *(_cell(sides["system"], footnotes) for sides in scores[section].values())]
        for system, context, scores in _each(results)
    ]
    rows.append(["the reference itself", "", *(_cell(sides["reference"], footnotes) for sides in some.values())])
    title = {"process": "Process (percent)", "reply": "Replies (percent; length in characters)"}[section]
    table = _lines(title, ["system", "context", *some], rows, labels=2)
    return f"{table}\n\n{_meanings((name, sides['reference']) for name, sides in some.items())}"


def _markdown_by_strategy(system: str, context: str, scores: dict, footnotes: dict[str, int]) -> str:
    rows = [
        [label, cells["turns"], *(_cell(cells[name], footnotes) for name in ("precision", "recall", "F1"))]
        for label, cells in scores["by_strategy"].items()
    ]
    title = f"Strategy by strategy (percent): {system}, {context} context"
    return _lines(title, ["strategy", "turns", "precision", "recall", "F1"], rows)


def _markdown_confusion(system: str, context: str, confusion: list[list[int]]) -> str:
    rows = [[strategy.label, *counts[1:], counts[0]] for strategy, counts in zip(STRATEGIES, confusion, strict=True)]
    header = ["reference \\ predicted", *(str(strategy.number) for strategy in STRATEGIES), "unparsed"]
    return _lines(f"Confusion (turns): {system}, {context} context", header, rows)


def _markdown_by_position(
    system: str, contexts: dict[str, dict], drift: list[dict] | None, footnotes: dict[str, int]
) -> str:
    names = list(contexts)
    header = ["supporter turn", "turns", *(f"{SHORT_CONTEXT[name]} ACC" for name in names)]
    rows = [
        [rows[0]["position"], rows[0]["turns"], *(_cell(row["ACC"], footnotes) for row in rows)]
        for rows in zip(*(contexts[name]["by_position"] for name in names), strict=True)
    ]
    title = f"Turn by turn (percent): {system}"
    if drift is None:
        return _lines(title, header, rows)
    header += ["drift of ACC", "drift of R-L char"]
    rows = [
        [*row, _cell(lost["ACC"], footnotes), _cell(lost["R-L char"], footnotes)]
        for row, lost in zip(rows, drift, strict=True)
    ]
    note = "Drift: reference minus generated context, on the same turns."
    return f"{_lines(title, header, rows)}\n\n{note} {INTERVALS}"


def _legend(results: Results, profile: str) -> str:
    """What each column counts, and by which implementation: each variant where systems were scored differently."""
    texts: dict[str, dict[str, None]] = {column: {} for column in PROFILES[profile]}
    for contexts in results.values():
        for scores in contexts.values():
            for column, cell in scores["profiles"].get(profile, {}).items():
                texts[column][f"{cell.unit} ({cell.signature})"] = None
    columns = "; ".join(f"**{column}** {' or '.join(variants)}" for column, variants in texts.items())
    return f"Units: {columns}.\n\n{PROFILE_NOTES[profile]}"


def _counts(results: Results) -> str:
    parts = []
    for system, contexts in results.items():
        for context, scores in contexts.items():
            counts = scores["counts"]
            unparsed = "strategies not predicted" if counts["unparsed"] is None else f"{counts['unparsed']} unparsed"
            parts.append(
                f"{system}, {context} context: {counts['turns']} ({unparsed}, {counts['empty_replies']} empty)"
            )
    return f"Turns: {'; '.join(parts)}."


COMPARISON_NOTE = (
    "Decided by a sign-flip permutation test over dialogues at 5 %, after Holm's correction for the {tests} tests of "
    "this table. Brackets: 95 % interval of the difference, paired bootstrap over dialogues, of each metric alone. "
    "McNemar's test ignores that the turns of a dialogue cluster, rejects too often, and decides nothing."
)
_COMPARED = ("context", "metric", "A", "B", "A - B", "p", "p, Holm", "McNemar", "verdict")


def comparison_markdown(rows: Sequence[Difference], a: str, b: str) -> str:
    """The differences between two systems as Markdown, with what each metric counts."""
    table = _lines("Paired differences (percent)", _COMPARED, map(_compared, rows), labels=2)
    meanings = _meanings((row.metric, row) for row in rows)
    return "\n\n".join([f"A: {a}  \nB: {b}", table, _comparison_note(rows), meanings]) + "\n"


def comparison_table(rows: Sequence[Difference]) -> Table:
    """The differences for the terminal; what is n/a is left to the Markdown."""
    table = Table(title="Paired differences, percent", padding=(0, 1, 0, 0), box=None, header_style="bold")
    shown = [column for column in _COMPARED if column not in ("p", "McNemar")]
    for column in shown:
        texts = ("context", "metric", "verdict")
        table.add_column(column, justify="left" if column in texts else "right", no_wrap=column not in texts)
    for row in rows:
        if row.verdict is not None:
            cells = dict(zip(_COMPARED, _compared(row), strict=True))
            table.add_row(*(Text(cells[column]) for column in shown))
    table.caption, table.caption_justify = _comparison_note(rows), "left"
    return table


def _comparison_note(rows: Sequence[Difference]) -> str:
    return COMPARISON_NOTE.format(tests=sum(row.verdict is not None for row in rows))


def _compared(row: Difference) -> list[str]:
    if row.verdict is None:
        return [row.context, row.metric, *["n/a"] * 6, row.reason]
    between = "" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"
    mcnemar = "" if row.mcnemar is None else f"{row.mcnemar:.4f}"
    return [
        row.context, row.metric, f"{row.a:.2f}", f"{row.b:.2f}", f"{row.difference:+.2f}{between}",
        f"{row.p_value:.4f}", f"{row.adjusted:.4f}", mcnemar, row.verdict,
    ]  # fmt: skip
