"""The results of an inspection: what to look at first, as JSON, as a page and for the terminal."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.evaluation.contamination import Contamination
from csc_train.evaluation.report.tables import ReportTable
from csc_train.files import write_json, write_text
from csc_train.synthesis.quality_report import plain_number
from csc_train.templates import render

PAGE_FILE, JSON_FILE, REJECTED_FILE = "inspection.html", "inspection.json", "rejected.jsonl"
MAX_LISTED = 200
"""Most rows of a table on the page; the JSON file has all."""


def attention(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What to look at first: (text with a count, anchor of its section)."""
    reading, tokens, repeats, overlap = (report[name] for name in ("reading", "tokens", "repeats", "overlap"))
    used = report["strategies"] and report["strategies"]["strategies"]["set"]
    unused = [each.name(report["language"]) for each in STRATEGIES if used and not used[each.number - 1]]
    overlaps = overlap["overlaps"] if overlap else ()
    over = f"packing.max_length={tokens['max_length']:,}"
    stopping = len(tokens["over"]) if tokens["overflow"] == "error" else 0
    counted = [
        ("Rejected rows", reading["rejected"], f" of {reading['rows']:,}", "rows"),
        ("Private data", len(report["private"]), f" ({_kinds(report['private'])})", "private"),
        ("Broken texts", len(report["faults"]), f" ({_kinds(report['faults'])})", "texts"),
        ("Evaluation dialogues that are also here", len({each["evaluation_id"] for each in overlaps}),
         f" of {overlap['evaluation']:,}" if overlap else "", "overlap"),
        ("Exact duplicates", len(repeats["exact"]), "", "repeats"),
        ("Near duplicates", len({each["row"] for each in repeats["near"]}), "", "repeats"),
        (f"Dialogues longer than {over}, which stop the training", stopping, "", "lengths"),
        (f"Dialogues truncated at {over}", tokens["packing"]["truncated"], "", "lengths"),
        (f"Dialogues dropped at {over}", 0 if stopping else tokens["packing"]["dropped"], "", "lengths"),
        ("Unused strategies", len(unused) % len(STRATEGIES), f" ({', '.join(unused)})", "strategies"),
    ]  # fmt: skip
    return [(f"{name}: {count:,}{detail}", anchor) for name, count, detail, anchor in counted if count]


def _kinds(found: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in Counter(each["kind"] for each in found).most_common())


def summary_tables(report: dict[str, Any]) -> list[ReportTable]:
    """The sources of a mix, and the lengths, for the terminal."""
    columns = ("min", "median", "p95", "max")
    rows = [
        [name, *(plain_number(each["summary"][column]) for column in columns)]
        for name, each in {"turns per dialogue": report["turns"], **report["tokens"]["lengths"]}.items()
        if each["summary"]
    ]
    tables = [ReportTable("Lengths", ["", *columns], rows)]
    if sources := report["tokens"]["sources"]:
        cells = [[name, each["kind"], *map(plain_number, [*each.values()][1:])] for name, each in sources.items()]
        tables.insert(0, ReportTable("Sources of the mix", ["", *next(iter(sources.values()))], cells, labels=2))
    return tables


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The counts, and what to look at, for the terminal."""
    reading, packing = report["reading"], report["tokens"]["packing"]
    return [
        f"{report['path']}: {reading['rows']:,} rows, {reading['accepted']:,} accepted, {reading['rejected']:,} "
        f"rejected; turns joined: {reading['joined_turns']:,}",
        f"{packing['tokens']:,} tokens in {packing['packs']:,} packs of {report['tokens']['max_length']:,}, "
        f"{packing['trained_tokens']:,} trained",
        heading(report),
        *(f"  - {text}" for text, _ in attention(report)),
    ]


def heading(report: dict[str, Any]) -> str:
    """How many things there are to look at."""
    count = len(attention(report))
    return f"{count} {'thing' if count == 1 else 'things'} to look at" if count else "Nothing stands out"


def write_inspection(
    directory: Path, report: dict[str, Any], samples: list[dict[str, Any]], overlap: Contamination | None
) -> None:
    """Write `inspection.json`, and the self-contained page `inspection.html`.

    Raises:
        InputError: the directory cannot be written.
    """
    write_json(directory / JSON_FILE, report | {"attention": [text for text, _ in attention(report)]})
    page = render(
        "csc_train",
        "inspection/inspection.html.jinja",
        report=report,
        samples=samples,
        most_weight=max((run["weight"] for each in samples for run in each["runs"]), default=1) or 1,
        attention=attention(report),
        heading=heading(report),
        overlap=overlap,
        strategies=STRATEGIES,
        stages=[*(stage.title("en") for stage in Stage), "any (Others)"],
        plain=plain_number,
        kinds=_kinds,
        most=MAX_LISTED,
    )
    write_text(directory / PAGE_FILE, page)
