"""The scores of several systems as tables: in Markdown, in JSON, and for the terminal (`html_report` has the page).

`results` maps a system's name to its contexts ("reference", "generated") and those to what `metrics.score` returned,
in the order in which rows are to appear; the last is the system that is evaluated. `drifts` maps its name to what
`metrics.drift` returned, where it was evaluated in both contexts.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
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
from csc_train.evaluation.metrics.profiles import PROFILE_COLUMNS
from csc_train.files import write_json, write_text
from csc_train.inference.config import CONTEXTS

Results = dict[str, dict[str, dict]]
Drifts = dict[str, list[dict]]

NOT_EVALUATED = "not evaluated in this context"
SHORT_CONTEXT = {"reference": "ref", "generated": "gen"}
DRIFT = "Drift: reference minus generated context. Turns that failed in one of them are left out here of both."
LOWER_IS_BETTER = {"ECE", "NLL", "perplexity", "same strategy thrice", "stage regressions", "new numbers"}
"""Columns that tables mark with an arrow down."""
INTERVALS = "Intervals: 95 %, percentile bootstrap over dialogues; none where fewer than 10 dialogues count."


@dataclass(frozen=True)
class Section:
    """A table and what a reader must know of it, whatever it is written in.

    Attributes:
        title: what it shows.
        header: a name per column.
        rows: cells; a Score is a number with its interval.
        labels: how many of the first columns are text.
        meanings: by name of a column, what it counts and by which implementation.
        notes: paragraphs to read with it.
    """

    title: str
    header: Sequence[str]
    rows: list[list[str | int | MetricResult]]
    labels: int = 1
    meanings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plain(value: Any) -> Any:
    """Results with each Score as a dictionary, as `results.json` has them.

    Raises:
        ValueError: a number is not finite, which JSON cannot say; what is not defined is to be a Score with a reason.
    """
    return json.loads(json.dumps(value, default=asdict, allow_nan=False))


def write_results(
    directory: str | os.PathLike,
    results: Results,
    drifts: Drifts,
    provenance: dict[str, Any],
    contamination: Contamination | None = None,
) -> None:
    """Write `results.json` (scores with intervals, units, signatures and reasons, and `provenance`) and `table.md`.

    Raises:
        InputError: the directory cannot be written.
    """
    everything = {"provenance": provenance, "results": results, "drift": drifts}
    write_json(Path(directory) / "results.json", plain(everything))
    write_text(Path(directory) / "table.md", markdown_table(results, drifts, contamination))


def markdown_table(results: Results, drifts: Drifts, contamination: Contamination | None = None) -> str:
    """What is shown of every system, then of the last one each strategy, its confusions and its accuracy turn by turn.

    At the end: the counts of turns and the reasons behind each `n/a`.
    """
    footnotes: dict[str, int] = {}
    blocks = [_markdown_section(section, footnotes) for section in profiles(results)]
    if contamination is not None:
        blocks.append(f"Training overlap: {contamination}")
    sections = [*decontaminated(results, contamination), *behaviour(results)]
    last = list(results)[-1]
    for context, scores in results[last].items():
        sections.append(_by_strategy(last, context, scores))
        if scores["confusion"]:
            sections.append(_confusion(last, context, scores["confusion"]))
    sections.append(_by_position(last, results[last], drifts.get(last)))
    blocks += [_markdown_section(section, footnotes) for section in sections]
    blocks.append(f"Turns: {'; '.join(counts(results))}.")
    return _joined(blocks, footnotes)


def sections_markdown(sections: Iterable[Section]) -> str:
    """Tables as Markdown, with the reasons behind each `n/a` at the end."""
    footnotes: dict[str, int] = {}
    return _joined([_markdown_section(section, footnotes) for section in sections], footnotes)


def section_table(section: Section) -> Table:
    """A table for the terminal, its notes below."""
    table = Table(title=section.title, title_justify="left", padding=(0, 1, 0, 0), box=None, header_style="bold")
    for number, name in enumerate(section.header):
        table.add_column(name, justify="left" if number < section.labels else "right", overflow="fold")
    footnotes: dict[str, int] = {}
    for row in section.rows:
        table.add_row(*(Text(_cell(cell, footnotes).replace("[^", " [")) for cell in row))
    notes = [*section.notes, *(f"[{number}] {reason}" for reason, number in footnotes.items())]
    table.caption, table.caption_justify = Text("\n".join(notes)), "left"
    return table


def _joined(blocks: list[str], footnotes: dict[str, int]) -> str:
    """Blocks of Markdown as one text, the footnotes at its end."""
    if footnotes:
        blocks = [*blocks, "\n".join(f"[^{number}]: {reason}" for reason, number in footnotes.items())]
    return "\n\n".join(blocks) + "\n"


def profiles(results: Results) -> list[Section]:
    """A table per profile: a row per system, the columns in the reference context, then in the generated one."""
    return [_profile(results, profile) for profile in _profiles(results)]


def decontaminated(results: Results, contamination: Contamination | None) -> list[Section]:
    """The same without the dialogues that the training data hold; nothing where there are none, or none were sought."""
    if contamination is None or not contamination.flagged:
        return []
    rest = {
        system: {context: scores["decontaminated"] for context, scores in contexts.items()}
        for system, contexts in results.items()
    }
    return [_profile(rest, profile, contamination) for profile in _profiles(results)]


def behaviour(results: Results) -> list[Section]:
    """How the systems choose strategies, lead a dialogue and write."""
    scores = [_scores(results, name) for name in ("strategy", "likelihood")]
    return [*scores, *(_sides(results, name) for name in ("process", "reply"))]


def console_table(results: Results, profile: str = "paper") -> Table:
    """One profile for the terminal, with the columns of `markdown_table`; under each number half of its interval.

    A column that is n/a for every system is left out. Numbers need 12 columns of 5 characters; in a narrow terminal it
    is the systems' names that wrap.
    """
    title = f"Strategy-conditioned replies, percent, profile {profile}"
    table = Table(title=title, padding=(0, 1, 0, 0), box=None, header_style="bold")
    table.add_column("\nsystem", overflow="fold")
    headings = [(context, column) for context in CONTEXTS for column in PROFILE_COLUMNS[profile]]
    rows = [list(_row(contexts, profile)) for contexts in results.values()]
    shown = [place for place in range(len(headings)) if any(row[place].value is not None for row in rows)]
    for context, column in (headings[place] for place in shown):
        heading = column.replace(" ", "\n")
        table.add_column(f"{SHORT_CONTEXT[context]}\n{heading}", justify="right", no_wrap=True)
    for system, row in zip(results, rows, strict=True):
        cells = [(_number(row[place]) or "n/a") + _half_width(row[place]) for place in shown]
        table.add_row(Text(system), *cells)  # as text: a name may hold brackets, which rich would read as markup
    absent = reasons(cell for row in rows for cell in row)
    intervals = "±: half the width of the 95 % interval, bootstrap over dialogues."
    table.caption = "\n".join([PROFILES[profile], intervals, *(f"n/a: {reason}" for reason in absent)])
    table.caption_justify = "left"
    return table


def _profiles(results: Results) -> list[str]:
    scored = (
        profile for contexts in results.values() for scores in contexts.values() for profile in scores["profiles"]
    )
    return list(dict.fromkeys(scored))


def _row(contexts: dict[str, dict], profile: str) -> Iterator[MetricResult]:
    for context in CONTEXTS:
        cells = contexts.get(context, {"profiles": {}})["profiles"].get(profile, {})
        for column in PROFILE_COLUMNS[profile]:
            yield cells.get(column) or MetricResult(None, "", "", NOT_EVALUATED)


def _number(cell: MetricResult) -> str | None:
    return None if cell.value is None else f"{cell.value:.2f}"


def _half_width(cell: MetricResult) -> str:
    """A second line that is no wider than the number."""
    if cell.low is None or cell.high is None:
        return ""
    return f"\n±{(cell.high - cell.low) / 2:.1f}"


def _cell(cell: object, footnotes: dict[str, int]) -> str:
    """A number with its interval, or a reference to the reason why there is none."""
    if not isinstance(cell, MetricResult):
        return str(cell)
    if cell.value is None:
        return f"n/a[^{footnotes.setdefault(cell.reason, len(footnotes) + 1)}]"
    between = "" if cell.low is None else f" [{cell.low:.2f}, {cell.high:.2f}]"
    return _number(cell) + between


def _lines(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """A Markdown table whose first `labels` columns are text and whose other ones are numbers."""
    rule = "|---" * labels + "|---:" * (len(header) - labels) + "|"
    texts = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    first, *others = ("| " + " | ".join(row) + " |" for row in texts)
    return "\n".join([f"### {title}", "", first, rule, *others])


def reasons(cells: Iterable[object]) -> list[str]:
    """Why there is no number in those of the cells that have none, each reason once."""
    return list(dict.fromkeys(cell.reason for cell in cells if isinstance(cell, MetricResult) and cell.value is None))


def _markdown_section(section: Section, footnotes: dict[str, int]) -> str:
    rows = [[_cell(cell, footnotes) for cell in row] for row in section.rows]
    table = _lines(section.title, section.header, rows, section.labels)
    return "\n\n".join([table, *filter(None, [_units(section.meanings)]), *section.notes])


def _units(meanings: dict[str, str]) -> str:
    return f"Units: {'; '.join(f'**{name}** {text}' for name, text in meanings.items())}." if meanings else ""


def _meanings(scores: Iterable[tuple[str, MetricResult]]) -> dict[str, str]:
    """What each name counts, and by which implementation: each variant where systems were scored differently."""
    texts: dict[str, dict[str, None]] = {}
    for name, score in scores:
        texts.setdefault(name, {})[f"{score.unit} ({score.signature})"] = None
    return {name: " or ".join(variants) for name, variants in texts.items()}


def _profile(results: Results, profile: str, without: Contamination | None = None) -> Section:
    columns = [f"{SHORT_CONTEXT[context]} {column}" for context in CONTEXTS for column in PROFILE_COLUMNS[profile]]
    rows = [[system, *_row(contexts, profile)] for system, contexts in results.items()]
    if without is not None:
        rest = without.evaluation - len(without.flagged)
        title = f"Profile `{profile}` without the flagged dialogues (percent; {rest} of {without.evaluation} dialogues)"
        return Section(title, ["system", *columns], rows)
    title = f"Profile `{profile}` (percent; ref = reference context, gen = generated context)"
    cells = [cell for _, _, scores in _each(results) for cell in scores["profiles"].get(profile, {}).items()]
    return Section(title, ["system", *columns], rows, 1, _meanings(cells), (PROFILES[profile], INTERVALS))


def _each(results: Results) -> Iterator[tuple[str, str, dict]]:
    for system, contexts in results.items():
        for context, scores in contexts.items():
            yield system, context, scores


def _scores(results: Results, name: str) -> Section:
    rows = [[system, context, *scores[name].values()] for system, context, scores in _each(results)]
    cells = [cell for _, _, scores in _each(results) for cell in scores[name].items()]
    meanings = _meanings(cells)
    title = {
        "strategy": "Strategies (percent)",
        "likelihood": "Likelihoods (top-2 ACC and ECE in percent, NLL in nats per token)",
    }[name]
    return Section(title, ["system", "context", *_marked(meanings)], rows, 2, meanings, _directions(meanings))


def _sides(results: Results, name: str) -> Section:
    """Figures of each system beside those of the reference, which differ where systems have other turns."""
    some = next(scores[name] for _, _, scores in _each(results))
    rows, references = [], {}
    for system, context, scores in _each(results):
        rows.append([system, context, *(sides["system"] for sides in scores[name].values())])
        reference = tuple(sides["reference"] for sides in scores[name].values())
        references.setdefault(reference, []).append(f"{system}, {context}")
    for reference, others in sorted(references.items(), key=lambda each: len(each[1]), reverse=True):
        whose = "" if others == max(references.values(), key=len) else f"turns of {'; '.join(others)}"
        rows.append(["the reference itself", whose, *reference])
    title = {"process": "Process (percent)", "reply": "Replies (percent; length in characters)"}[name]
    meanings = _meanings((column, sides["reference"]) for column, sides in some.items())
    notes = (
        *_directions(some),
        "Without an arrow, neither more nor less is better: read it beside the reference itself.",
    )
    if len(references) > 1:
        notes += ("The reference itself has a row for each set of turns that systems have: some turns failed.",)
    return Section(title, ["system", "context", *_marked(some)], rows, 2, meanings, notes)


def _marked(columns: Iterable[str]) -> list[str]:
    return [f"{name} ↓" if name in LOWER_IS_BETTER else name for name in columns]


def _directions(columns: Iterable[str]) -> tuple[str, ...]:
    return ("↓: lower is better.",) if LOWER_IS_BETTER & set(columns) else ()


def _by_strategy(system: str, context: str, scores: dict) -> Section:
    rows = [
        [label, cells["turns"], *(cells[name] for name in ("precision", "recall", "F1"))]
        for label, cells in scores["by_strategy"].items()
    ]
    title = f"Strategy by strategy (percent): {system}, {context} context"
    return Section(title, ["strategy", "turns", "precision", "recall", "F1"], rows)


def _confusion(system: str, context: str, confusion: list[list[int]]) -> Section:
    rows = [[strategy.label, *counts[1:], counts[0]] for strategy, counts in zip(STRATEGIES, confusion, strict=True)]
    header = ["reference \\ predicted", *(str(strategy.number) for strategy in STRATEGIES), "unparsed"]
    return Section(f"Confusion (turns): {system}, {context} context", header, rows)


def _by_position(system: str, contexts: dict[str, dict], drift: list[dict] | None) -> Section:
    names = list(contexts)
    header = ["supporter turn", "turns", *(f"{SHORT_CONTEXT[name]} ACC" for name in names)]
    title = f"Turn by turn (percent): {system}"
    if drift:
        rows = [
            [row["position"], row["turns"], *(row[name]["ACC"] for name in names), row["ACC"], row["R-L char"]]
            for row in drift
        ]
        return Section(title, [*header, "drift of ACC", "drift of R-L char"], rows, notes=(f"{DRIFT} {INTERVALS}",))
    by_position = zip(*(contexts[name]["by_position"] for name in names), strict=True)
    rows = [
        [position, max(row["turns"] for row in rows), *(row["ACC"] for row in rows)]
        for position, rows in enumerate(by_position, start=1)
    ]
    return Section(title, header, rows)


def counts(results: Results) -> list[str]:
    """For each system and context, in words, how many turns were scored, and how many of them hold nothing to score."""
    parts = []
    for system, context, scores in _each(results):
        here = scores["counts"]
        unparsed = "strategies not predicted" if here["unparsed"] is None else f"{here['unparsed']} unparsed"
        failed = f", {here['failed']} more failed and are not scored" if here["failed"] else ""
        failed += "; process and transitions leave their dialogues out" if here["failed"] else ""
        parts.append(
            f"{system}, {context} context: {here['turns']} ({unparsed}, {here['empty_replies']} empty){failed}"
        )
    return parts


COMPARISON_NOTE = (
    "Decided by a sign-flip permutation test over dialogues at 5 %, after Holm's correction for the {tests} tests of "
    "this table. Brackets: 95 % interval of the difference, paired bootstrap over dialogues, of each metric alone. "
    "McNemar's test ignores that the turns of a dialogue cluster, rejects too often, and decides nothing."
)
_COMPARED = ("context", "metric", "A", "B", "A - B", "p", "p, Holm", "McNemar", "verdict")


def comparison_markdown(rows: Sequence[Difference], a: str, b: str) -> str:
    """The differences between two systems as Markdown, with what each metric counts."""
    table = _lines("Paired differences (percent)", _COMPARED, map(_compared, rows), labels=2)
    units = _units(_meanings((row.metric, row) for row in rows))
    return "\n\n".join([f"A: {a}  \nB: {b}", table, _comparison_note(rows), units]) + "\n"


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
    note = COMPARISON_NOTE.format(tests=sum(row.verdict is not None for row in rows))
    left_out = {row.context: left_out_note(row.left_out) for row in rows if row.left_out}
    return " ".join([note, *(f"In {context} context: {each}" for context, each in left_out.items())])


def _compared(row: Difference) -> list[str]:
    if row.verdict is None:
        return [row.context, row.metric, *["n/a"] * 6, row.reason]
    between = "" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"
    mcnemar = "" if row.mcnemar is None else f"{row.mcnemar:.4f}"
    return [
        row.context, row.metric, f"{row.a:.2f}", f"{row.b:.2f}", f"{row.difference:+.2f}{between}",
        f"{row.p_value:.4f}", f"{row.adjusted:.4f}", mcnemar, row.verdict,
    ]  # fmt: skip
