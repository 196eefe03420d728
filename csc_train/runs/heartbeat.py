"""Heartbeats of the ranks: one that stops answering, or hangs, ends the job in a bounded time, with its name.

Each rank writes its heartbeat to the store in which the ranks have met; rank 0 reads those of all, the others read that
of rank 0. Threads do this, so a rank that loads data, compiles or saves for long still answers.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from csc_train.runs.config import RunConfig

ROOT = Path(__file__).parents[2]
LONGEST_INTERVAL_S = 15.0
"""Seconds between two heartbeats; fewer for a short `run.timeout_s`."""


class Heartbeat:
    """This rank's heartbeat, and its view of the others'.

    Attributes:
        timeout_s: seconds after which a rank counts as lost.
    """

    def __init__(self):
        self.timeout_s: float = RunConfig.timeout_s
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._doing, self._timed, self._beats = "starting", False, 0

    def start(self, rank: int, ranks: int, store: Any) -> None:
        """Begin, once the process group has started.

        Args:
            store: of `torch.distributed`; one that this thread may block.
        """
        self._rank, self._store = rank, store
        self._last: dict[int, dict[str, Any]] = {each: {} for each in (range(ranks) if rank == 0 else (0, rank))}
        self._reset(time.monotonic())
        self._interval = min(LONGEST_INTERVAL_S, self.timeout_s / 5)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    def note(self, doing: str, timed: bool = False) -> None:
        """Note what this rank does from now on, for messages.

        Args:
            timed: whether the job hangs if no rank makes progress in this for `timeout_s`.
        """
        self._doing, self._timed = doing, timed

    def stop(self) -> None:
        """Tell the others that this rank ends; call it before the process group ends."""
        self._ended.set()
        for thread in self._threads[:1]:
            thread.join(self._interval)

    def on_lost(self, message: str) -> None:
        """Print the message and end this process, in a thread; a recipe replaces it."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def record(self, rank: int, beat: dict[str, Any], now: float) -> None:
        """Take in the last heartbeat of a rank."""
        before, self._last[rank] = self._last[rank], beat
        if beat["beats"] != before.get("beats"):
            self._heard[rank] = now
        if (beat["doing"], beat["calls"]) != (before.get("doing"), before.get("calls")):
            self._moved[rank] = now

    def lost(self, now: float) -> str | None:
        """What to say of a rank that is silent or hangs, or None.

        Args:
            now: by `time.monotonic`.
        """
        left = {rank: beat for rank, beat in self._last.items() if not beat.get("ended")}
        silent = [rank for rank in left if now - self._heard[rank] > self.timeout_s]
        if self._rank == 0 and 0 in silent:
            return f"the ranks' store: does not answer for {self.timeout_s:.0f} s: look at the machine of rank 0"
        if others := [rank for rank in silent if rank != self._rank]:
            more = f", nor do {len(others) - 1} other ranks" if others[1:] else ""
            return self._describe(others[0], "does not answer", more)
        if self._rank or not all(beat.get("timed") for beat in left.values()):
            return None
        if now - max(self._moved[rank] for rank in left) < self.timeout_s:
            return None
        calls = [beat["calls"] for beat in left.values()]
        behind = min(left, key=lambda rank: left[rank]["calls"])
        alike = min(calls) == max(calls)
        return self._describe(
            behind, "hangs", " in the same call as all others" if alike else ", awaited by the others"
        )

    def _describe(self, rank: int, what: str, others: str) -> str:
        beat, what = self._last[rank], f"{what} for {self.timeout_s:.0f} s{others}"
        if beat:
            what = "(process {process} on {host}): {}, last in {place} ({doing})".format(what, **beat)
        return f"rank {rank}{' ' if beat else ': '}{what}: look at its machine, or raise run.timeout_s"

    def _beat(self) -> None:
        self._beats += 1
        beat = {"beats": self._beats, "doing": self._doing, "timed": self._timed, "ended": self._ended.is_set()}
        place = {"host": socket.gethostname(), "process": os.getpid(), "place": _main_place()}
        self._store.set(f"heartbeat/{self._rank}", json.dumps(beat | place | {"calls": _collective_calls()}))

    def _reset(self, now: float) -> None:
        self._heard, self._moved = dict.fromkeys(self._last, now), dict.fromkeys(self._last, now)

    def _exchange(self) -> None:
        """Write and read heartbeats. If the store fails, ranks end by errors of their own, and nobody is watched."""
        with contextlib.suppress(Exception):
            while not self._ended.is_set():
                self._beat()
                for rank in self._last:
                    if self._store.check([f"heartbeat/{rank}"]):
                        self.record(rank, json.loads(self._store.get(f"heartbeat/{rank}")), time.monotonic())
                self._ended.wait(self._interval)
        self._ended.set()
        with contextlib.suppress(Exception):
            self._beat()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - last > self.timeout_s / 2:  # this process was stopped itself, as by `scontrol suspend`
                self._reset(now)
            last = now
            if message := self.lost(now):
                self.on_lost(message)
                return


this_rank = Heartbeat()
"""The heartbeat of this process."""


def _main_place() -> str:
    """Where the main thread is, by the innermost line of this project; an environment may lie in it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "csc_train") or (path.is_relative_to(ROOT) and "site-packages" not in path.parts):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a library"


def _collective_calls() -> int:
    """Collective calls that this rank has begun, over all process groups."""
    from torch.distributed import distributed_c10d

    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
