"""The progress display of a synthesis: a live table on a terminal, a line every ten seconds elsewhere."""

import asyncio
import contextlib
import datetime
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from csc_train.synthesis.rolecs.runner import SynthesisProgress

REFRESH_S = 0.25
LINE_INTERVAL_S = 10.0
"""Interval of lines, if the output is not a terminal."""


def progress_fields(progress: SynthesisProgress, now: float) -> dict[str, str]:
    """The displayed fields at the time `now` (of `time.monotonic`)."""
    seconds = max(now - progress.started, 1e-9)
    left = progress.target - progress.accepted - progress.empty
    pace = progress.new_accepted / seconds
    return {
        "accepted": f"{progress.accepted} of {progress.target}",
        "running": str(progress.running),
        "rejected": str(progress.dropped.total()),
        "tokens": f"{progress.tokens:,} ({progress.new_tokens / seconds:,.0f}/s)",
        "cost": "n/a" if progress.cost is None else f"{progress.cost:,.2f}",
        "time left": str(datetime.timedelta(seconds=int(left / pace))) if pace else "n/a",
    }


def progress_line(progress: SynthesisProgress, now: float) -> str:
    """The fields in one line."""
    stopping = f", stopping: {progress.stopped[1]}" if progress.stopped else ""
    return ", ".join(f"{name} {value}" for name, value in progress_fields(progress, now).items()) + stopping


def progress_table(progress: SynthesisProgress, now: float) -> Table:
    """The fields, and the reasons of rejected dialogues."""
    grid = Table.grid(padding=(0, 2))
    for name, value in progress_fields(progress, now).items():
        grid.add_row(name, value)
    for (rule, reason), count in progress.dropped.most_common(8):
        grid.add_row("", f"{count:>6}  {rule}: {reason}", style="dim")
    if progress.stopped:
        grid.add_row("stopping", progress.stopped[1], style="yellow")
    return grid


@contextlib.asynccontextmanager
async def show_progress(progress: SynthesisProgress, console: Console) -> AsyncIterator[None]:
    """Display `progress` while the block runs, and once at its end."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    async def refresh() -> None:
        while True:
            await asyncio.sleep(REFRESH_S if live else LINE_INTERVAL_S)
            show()

    def show() -> None:
        now = time.monotonic()
        if live:
            live.update(progress_table(progress, now), refresh=True)
        else:
            print(progress_line(progress, now), flush=True)

    with live or contextlib.nullcontext():
        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()
            show()
