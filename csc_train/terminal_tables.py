"""Tables of results for the terminal."""

from collections.abc import Collection, Iterable, Sequence

from rich.table import Table
from rich.text import Text


def result_table(
    title: str, header: Sequence[str], rows: Iterable[Iterable[object]], numbers: Collection[int] = ()
) -> Table:
    """A table for the terminal; the columns at the indices `numbers` stand to the right. Brackets are no markup."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
