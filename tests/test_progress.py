"""What a synthesis, an evaluation and other long loops show while they run."""

import asyncio
import io
import logging
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from csc_train import progress as progress_bars
from csc_train.progress import ProgressBar
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("is_iterated", [True, False])
def test_a_long_loop_draws_a_bar_on_a_terminal_and_logs_lines_elsewhere(monkeypatch, caplog, is_iterated):
    monkeypatch.setattr(progress_bars, "LINE_INTERVAL_S", 0.05)
    monkeypatch.setattr(logging.getLogger("csc_train"), "propagate", True)
    caplog.set_level(logging.INFO)

    def work(**settings):
        if is_iterated:
            for step in ProgressBar(range(3), "trained, reference context", unit="turn", **settings):
                time.sleep(0.3 if step == 2 else 0)
        else:
            with ProgressBar(total=3, desc="trained, reference context", unit="turn", **settings) as bar:
                bar.update(2)
                time.sleep(0.3)

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work()
    lines = [record.getMessage() for record in caplog.records]
    # A step that takes long is reported too.
    assert len(lines) > 1 and lines[-1].startswith("trained, reference context: 2 of 3 turns, 00:00 elapsed, ")
    assert sys.stderr.getvalue() == ""
    work(disable=True)
    time.sleep(0.15)
    assert len(caplog.records) == len(lines)  # and none after the end
    monkeypatch.setattr(sys, "stderr", Terminal())
    work()
    assert len(caplog.records) == len(lines) and "3/3" in sys.stderr.getvalue().replace("2/3", "3/3")


def test_every_loop_of_the_package_shows_its_progress_by_one_of_the_two():
    for path in Path(progress_bars.__file__).parent.rglob("*.py"):
        if path.name not in ("progress.py", "callbacks.py"):
            assert "from tqdm import" not in path.read_text(encoding="utf-8"), path
