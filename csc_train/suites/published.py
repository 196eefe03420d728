"""The published table that the results of a suite stand beside; `paper.csv` holds that of the paper."""

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csc_train.errors import InputError, suggestion
from csc_train.files import os_errors, require_end
from csc_train.inference.config import CONTEXTS, SHORT_CONTEXT
from csc_train.templates import read_text

PAPER = "paper"
"""The name of the paper's table."""
PUBLISHED_METRICS = ("B-2", "B-4", "R-L", "BS", "BR", "ACC")
"""The metrics of the paper, in the order of its columns."""
FIGURES = {
    f"{SHORT_CONTEXT[context]} {metric}": (context, metric) for context in CONTEXTS for metric in PUBLISHED_METRICS
}
"""The columns of a published table besides `row`: context and metric by name."""


@dataclass(frozen=True)
class PublishedTable:
    """Published figures, in percent.

    Attributes:
        place: its file.
        source: the comment at the start of the file.
        rows: by name of the row and column of `FIGURES`; None if the figure is not published.
    """

    place: str
    source: str
    rows: dict[str, dict[str, float | None]]

    def unknown(self, name: str) -> str:
        """The error about a row that the table does not have."""
        return f"{self.place}: no row {name!r}.{suggestion(name, self.rows)}"


def read_published(name: str) -> PublishedTable:
    """Read a published table.

    Args:
        name: `paper`, or the path of a CSV file. Lines at its start that begin with `#` name the source. The header is
            `row` and the columns of `FIGURES`, in any order. An empty cell is a figure that is not published.

    Raises:
        InputError: the file cannot be read, lacks a column or has an unknown one, or a row is bad; names file, line and
            column.
    """
    if name == PAPER:
        name, text = "paper.csv", read_text(__package__, "paper.csv")
    else:
        require_end(name)
        with os_errors(name, "cannot read"):
            text = Path(name).read_text(encoding="utf-8-sig")
    lines = text.splitlines(keepends=True)
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    reader = csv.reader(lines[len(comments) :], strict=True, skipinitialspace=True)
    rows: dict[str, dict[str, float | None]] = {}
    header: list[str] = []
    try:
        for cells in ([cell.strip() for cell in line] for line in reader):
            place = f"{name}, line {len(comments) + reader.line_num}"
            if not any(cells):
                continue
            if not header:
                header = _check_header(place, cells)
                continue
            if len(cells) != len(header):
                raise InputError(f"{place}: {len(cells)} cells for {len(header)} columns: correct the line")
            row = dict(zip(header, cells, strict=True))
            if (title := row.pop("row")) in rows or not title:
                raise InputError(f"{place}, column 'row': {f'a second row {title!r}' if title else 'empty'}: rename it")
            rows[title] = {column: _number(f"{place}, column {column!r}", cell) for column, cell in row.items()}
    except csv.Error as error:
        raise InputError(f"{name}, line {len(comments) + reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise InputError(f"{name}: holds no row: write a header (row, {', '.join(FIGURES)}) and a line per row")
    return PublishedTable(name, " ".join(line.strip("# \r\n") for line in comments), rows)


def _check_header(place: str, cells: Sequence[str]) -> list[str]:
    known = ("row", *FIGURES)
    for number, cell in enumerate(cells):
        if cell not in known:
            raise InputError(f"{place}: unknown column {cell!r}.{suggestion(cell, known)}")
        if cell in cells[:number]:
            raise InputError(f"{place}: two columns {cell!r}: delete one")
    if missing := [name for name in known if name not in cells]:
        raise InputError(f"{place}: no column {missing[0]!r}: add it; cells of unpublished figures are empty")
    return list(cells)


def _number(place: str, cell: str) -> float | None:
    try:
        value = float(cell) if cell else None
        if value is not None and not math.isfinite(value):
            raise ValueError
    except ValueError as error:
        raise InputError(f"{place}: {cell!r} is no number: write one such as 42.58, or leave it empty") from error
    return value
