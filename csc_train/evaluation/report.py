"""The scores of several systems as Markdown, as JSON, and as a table for the terminal.

`results` maps a system's name to its contexts ("reference", "generated") and those to what `metrics.score` returned,
in the order in which rows are to appear.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from csc_train.evaluation.metrics import PROFILE_NOTES, PROFILES, Score
from csc_train.evaluation.predictions import CONTEXTS
from csc_train.files import write_json, write_text

Results = dict[str, dict[str, dict]]

NOT_EVALUATED = "not evaluated in this context"
SHORT_CONTEXT = {"reference": "ref", "generated": "gen"}


def write_results(directory: str | os.PathLike, results: Results, provenance: dict[str, Any]) -> None:
    """Write `results.json` (scores with units, signatures and reasons, and `provenance`) and `table.md`, atomically.

    Raises:
        InputError: the directory cannot be written.
    """
    plain = json.loads(json.dumps({"provenance": provenance, "results": results}, default=asdict))
    write_json(Path(directory) / "results.json", plain)
    write_text(Path(directory) / "table.md", markdown_table(results))


def markdown_table(results: Results) -> str:
    """One table per profile: a row per system, the columns in the reference context, then in the generated one.

    Under each table: what every column counts and how, and what is a reconstruction. At the end: the counts of turns
    and the reasons behind each `n/a`.
    """
    footnotes: dict[str, int] = {}
    blocks = []
    for profile in _profiles(results):
        blocks += [_markdown_profile(results, profile, footnotes), _legend(results, profile)]
    blocks.append(_counts(results))
    if footnotes:
        blocks.append("\n".join(f"[^{number}]: {reason}" for reason, number in footnotes.items()))
    return "\n\n".join(blocks) + "\n"


def console_table(results: Results, profile: str = "paper") -> Table:
    """One profile for the terminal, with the columns of `markdown_table`.

    Numbers need 12 columns of 5 characters; in a narrow terminal it is the systems' names that wrap.
    """
    table = Table(title="Strategy-conditioned replies, percent", padding=(0, 1, 0, 0), box=None, header_style="bold")
    table.add_column("system", overflow="fold", vertical="bottom")
    for context in CONTEXTS:
        for column in PROFILES[profile]:
            table.add_column(f"{SHORT_CONTEXT[context]}\n{column}", justify="right", no_wrap=True)
    reasons = {}
    for system in results:
        row = []
        for cell in _row(results[system], profile):
            row.append(_number(cell) or "n/a")
            if cell.value is None:
                reasons[cell.reason] = None
        table.add_row(Text(system), *row)  # as text: a name may hold brackets, which rich would read as markup
    table.caption = "\n".join([PROFILE_NOTES[profile], *(f"n/a: {reason}" for reason in reasons)])
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


def _markdown_profile(results: Results, profile: str, footnotes: dict[str, int]) -> str:
    columns = [f"{SHORT_CONTEXT[context]} {column}" for context in CONTEXTS for column in PROFILES[profile]]
    lines = [
        f"### Profile `{profile}` (percent; ref = reference context, gen = generated context)",
        "",
        "| " + " | ".join(["system", *columns]) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for system, contexts in results.items():
        cells = [
            _number(cell) or f"n/a[^{footnotes.setdefault(cell.reason, len(footnotes) + 1)}]"
            for cell in _row(contexts, profile)
        ]
        lines.append("| " + " | ".join([system.replace("|", "\\|"), *cells]) + " |")
    return "\n".join(lines)


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
