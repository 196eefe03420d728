"""Heartbeats: who is lost, who only works for long, and what is said of them."""

import importlib
import signal
import threading
import time

import pytest
from conftest import ROOT
from processes import TIMEOUT_S, Script, start_ranks

from csc_train.errors import InputError
from csc_train.runs import heartbeat
from csc_train.runs.config import RunConfig
from csc_train.runs.heartbeat import Heartbeat

LIMIT = 100


@pytest.fixture
def watcher(request, monkeypatch):
    """The heartbeat of a rank (by default 0) among four, whose clock stands at 0; its own beats the test makes."""
    for thread in ("_exchange", "_watch"):
        monkeypatch.setattr(Heartbeat, thread, lambda self: None)
    own = Heartbeat()
    own.timeout_s = LIMIT
    own.start(getattr(request, "param", 0), 4, None)
    own._reset(0)
    yield own
    own.stop()


def beat(number: int, calls: int = 7, timed: bool = True, **others) -> dict:
    facts = {"beats": number, "doing": "step 3", "timed": timed, "ended": False, "host": "node2", "process": 99}
    return facts | {"place": "csc_train/training/loss.py:180 forward", "calls": calls} | others


def see(watcher: Heartbeat, now: float, *beats: dict) -> None:
    for rank, each in enumerate(beats):
        watcher.record(rank, each, now)


LAST = "last in csc_train/training/loss.py:180 forward (step 3): look at its machine, or raise run.timeout_s"


def test_a_silent_rank_is_named_after_the_time_out_and_not_before(watcher):
    see(watcher, 10, *[beat(1)] * 4)
    see(watcher, 60, *[beat(2, calls=8)] * 2, beat(1), beat(2, calls=8))  # rank 2's has not changed
    assert watcher.lost(10 + LIMIT) is None
    said = watcher.lost(10 + LIMIT + 1)
    assert said == f"rank 2 (process 99 on node2): does not answer for 100 s, {LAST}"
    see(watcher, 61 + LIMIT, beat(3))
    said = watcher.lost(61 + LIMIT)
    assert said == f"rank 1 (process 99 on node2): does not answer for 100 s, nor do 2 other ranks, {LAST}"


def test_a_rank_that_never_answered_or_has_ended(watcher):
    see(watcher, 10, beat(1), beat(1), beat(1))
    see(watcher, LIMIT, beat(2), beat(2), beat(2, ended=True))
    assert watcher.lost(LIMIT + 1) == ("rank 3: does not answer for 100 s: look at its machine, or raise run.timeout_s")
    watcher.record(3, beat(1, ended=True), LIMIT)
    assert watcher.lost(LIMIT + 1) is None
    see(watcher, 300, beat(3, calls=8), beat(3, calls=8))
    assert watcher.lost(301) is None


def test_a_rank_that_hangs_in_a_step_is_the_one_with_the_fewest_calls(watcher):
    see(watcher, 10, *[beat(1)] * 4)
    for number in range(2, 12):
        see(watcher, 10 * number, *[beat(number, calls=8)] * 3, beat(number))
    assert watcher.lost(20 + LIMIT - 1) is None
    see(watcher, 20 + LIMIT, *[beat(12, calls=8)] * 3, beat(12))
    assert watcher.lost(20 + LIMIT) == (f"rank 3 (process 99 on node2): hangs for 100 s, awaited by the others, {LAST}")
    watcher.record(3, beat(13, calls=8), 20 + LIMIT)  # it gets on
    assert watcher.lost(20 + LIMIT) is None
    see(watcher, 30 + 2 * LIMIT, *[beat(14, calls=8)] * 4)
    assert (
        watcher.lost(30 + 2 * LIMIT)
        == f"rank 0 (process 99 on node2): hangs for 100 s in the same call as all others, {LAST}"
    )


def test_what_takes_long_outside_a_step_is_no_hang(watcher):
    for number in range(1, 50):
        waits = beat(number, timed=False)
        see(watcher, 10 * number, beat(number, timed=False, doing="after step 3"), *[waits] * 3)
        assert watcher.lost(10 * number) is None


def test_rank_0_says_so_if_its_store_is_silent(watcher):
    see(watcher, 10, *[beat(1)] * 4)
    assert watcher.lost(11 + LIMIT) == ("the ranks' store: does not answer for 100 s: look at the machine of rank 0")


@pytest.mark.parametrize("watcher", [2], indirect=True)
def test_the_others_watch_rank_0(watcher):
    assert watcher._last.keys() == {0, 2}
    watcher.record(0, beat(1), 10)
    assert watcher.lost(10 + LIMIT) is None
    assert watcher.lost(11 + LIMIT) == f"rank 0 (process 99 on node2): does not answer for 100 s, {LAST}"


def test_a_library_in_an_environment_of_the_checkout_is_no_place_of_the_project(tmp_path, monkeypatch):
    library = tmp_path / ".venv" / "lib" / "site-packages" / "library.py"
    library.parent.mkdir(parents=True)
    library.write_text("def call(function):\n    return function()\n")
    monkeypatch.syspath_prepend(library.parent)
    monkeypatch.setattr(heartbeat, "ROOT", tmp_path)
    found = []
    watcher = threading.Thread(target=lambda: found.append(heartbeat._main_place()))
    importlib.import_module("library").call(lambda: (watcher.start(), watcher.join()))
    assert found == ["a library"]


def test_a_time_out_below_the_bound_is_refused():
    with pytest.raises(InputError, match=r"^run.timeout_s=4: must be at least 5$"):
        RunConfig(timeout_s=4)


def wait_for(ranks: list[Script], text: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not all(text in rank.stdout for rank in ranks):
        assert all(rank.poll() is None for rank in ranks), [rank.stderr for rank in ranks]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.distributed
def test_a_slow_start_and_a_pause_of_all_are_no_loss_but_a_rank_that_hangs_is():
    ranks = start_ranks(ROOT / "tests" / "workers" / "slow_ranks.py", "5", ranks=2)
    try:
        wait_for(ranks, "did step 1\n")  # rank 0 came 8 s late
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                rank.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(8)
                steps = min(rank.stdout.count("did step") for rank in ranks)
        wait_for(ranks, f"did step {steps + 5}\n")
        ranks[1].send_signal(signal.SIGUSR1)
        done = ranks[0].wait()
    finally:
        for rank in ranks:
            rank.kill()
    assert done.returncode == 1
    assert f"error: rank 1 (process {ranks[1].pid} on " in done.stderr
    assert "hangs for 5 s, awaited by the others, last in tests/workers/slow_ranks.py" in done.stderr
