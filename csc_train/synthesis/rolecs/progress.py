"""What a synthesis shows while it runs: a live table on a terminal, a line now and then elsewhere."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from csc_train.synthesis.rolecs.runner import Progress

REFRESH_S = 0.25
LINE_S = 10.0
"""Between two lines, where the output is no terminal."""


def figures(progress: Progress, now: float) -> dict[str, str]:
    """What there is to say about a synthesis at the time `now` (of `time.monotonic`)."""
    seconds = max(now - progress.started, 1e-9)
    left = progress.target - progress.accepted - progress.empty
    pace = progress.fresh_accepted / seconds
    return {
        "accepted": f"{progress.accepted} of {progress.target}",
        "running": str(progress.running),
        "rejected": str(progress.dropped.total()),
        "tokens": f"{progress.tokens:,} ({progress.fresh_tokens / seconds:,.0f}/s)",
        "cost": "n/a" if progress.cost is None else f"{progress.cost:,.2f}",
        "time left": _clock(left / pace) if pace else "n/a",
    }


def line(progress: Progress, now: float) -> str:
    """The figures in one line."""
    stopping = f", stopping: {progress.stopped[1]}" if progress.stopped else ""
    return ", ".join(f"{name} {value}" for name, value in figures(progress, now).items()) + stopping


def table(progress: Progress, now: float) -> Table:
    """The figures, and why dialogues were rejected."""
    grid = Table.grid(padding=(0, 2))
    for name, value in figures(progress, now).items():
        grid.add_row(name, value)
    for (rule, reason), count in progress.dropped.most_common(8):
        grid.add_row("", f"{count:>6}  {rule}: {reason}", style="dim")
    if progress.stopped:
        grid.add_row("stopping", progress.stopped[1], style="yellow")
    return grid


@contextlib.asynccontextmanager
async def shown(progress: Progress, console: Console) -> AsyncIterator[None]:
    """Show `progress` for as long as the block runs, and a last time at its end."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    async def refresh() -> None:
        while True:
            await asyncio.sleep(REFRESH_S if live else LINE_S)
            show()

    def show() -> None:
        now = time.monotonic()
        if live:
            live.update(table(progress, now), refresh=True)
        else:
            print(line(progress, now), flush=True)

    with live or contextlib.nullcontext():
        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()
            show()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
