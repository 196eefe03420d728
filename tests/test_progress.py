"""What a synthesis shows while it runs."""

import asyncio
import io

from rich.console import Console

from csc_train.synthesis.rolecs import progress as progress_view
from csc_train.synthesis.rolecs.progress import progress_fields, progress_line, progress_table, show_progress
from csc_train.synthesis.rolecs.runner import SynthesisProgress


def half_way():
    progress = SynthesisProgress(100, accepted=50, empty=10, running=8, tokens=9000, cost=1.5, new_tokens=6000)
    progress.new_accepted, progress.started = 40, 1000.0
    progress.dropped.update({("five criteria", "no point for natural"): 3, ("private data", "a phone number"): 2})
    return progress


def test_figures():
    assert progress_fields(half_way(), now=1060.0) == {
        "accepted": "50 of 100", "running": "8", "rejected": "5", "tokens": "9,000 (100/s)", "cost": "1.50",
        "time left": "0:01:00",  # 40 places at 40 a minute
    }  # fmt: skip
    begun = SynthesisProgress(10, started=0.0, cost=None)
    assert (progress_fields(begun, 1.0)["time left"], progress_fields(begun, 1.0)["cost"]) == ("n/a", "n/a")


def test_why_dialogues_were_rejected_is_in_the_table():
    progress = half_way()
    progress.stopped = ("budget", "budget.tokens=9000 is used up")
    console = Console(file=io.StringIO(), width=80)
    console.print(progress_table(progress, 1060.0))
    text = console.file.getvalue()
    assert "3  five criteria: no point for natural" in text and "budget.tokens=9000 is used up" in text
    assert progress_line(progress, 1060.0).endswith("time left 0:01:00, stopping: budget.tokens=9000 is used up")


def test_a_terminal_gets_a_table_and_a_file_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress_view, "LINE_INTERVAL_S", 0.01)

    async def watch(console):
        async with show_progress(half_way(), console):
            await asyncio.sleep(0.05)

    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    asyncio.run(watch(terminal))
    assert "no point for natural" in terminal.file.getvalue() and capsys.readouterr().out == ""
    asyncio.run(watch(Console(file=io.StringIO())))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and all(each.startswith("accepted 50 of 100, running 8, rejected 5, ") for each in lines)
