"""Run a script until its N-th file event in the current directory, and kill it there.

python kill_at.py N EVENTS SCRIPT ARGUMENTS...

A file event is what changes a file: opening it to write, moving or removing it, a directory that is made or removed,
each line of an append log, each statement of a database, each flush to the disk. The process is killed before the event
happens; a line of a log is cut in its middle. With N = 0 it ends by itself, and EVENTS, a file, lists its events.
"""

import atexit
import builtins
import io
import json
import os
import runpy
import signal
import sqlite3
import sys
import threading
from pathlib import Path

number, listing, *command = sys.argv[1:]
folder = os.getcwd() + os.sep
events: list[str] = []
lock = threading.Lock()


def event(kind: str, path: str) -> bool:
    """Note an event; whether it is the last."""
    with lock:
        events.append(f"{kind} {path}")
        return len(events) == int(number)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(name: str, arguments: tuple) -> None:
    """An audit hook (see `sys.addaudithook`): Python says what it is about to do."""
    if name == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
    elif name in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"):
        path = arguments[0]
    else:
        return
    # A relative path may be relative to a descriptor of a directory: shutil.rmtree removes so.
    path = path if isinstance(path, int) else os.path.join(folder, os.fsdecode(path))
    if (isinstance(path, int) or path.startswith(folder)) and event(name, str(path).removeprefix(folder)):
        kill()


class TornFile(io.FileIO):
    """An append log."""

    def write(self, data) -> int:
        if event("write", str(self.name)):
            super().write(data[: len(data) // 2])
            kill()
        return super().write(data)


def open_log(path, mode="r", buffering=-1, **options):
    return builtins.open(path, mode, buffering, **options) if buffering else TornFile(path, mode)


def connect(*arguments, **options) -> sqlite3.Connection:
    database = real_connect(*arguments, **options)
    database.set_trace_callback(lambda statement: event("sql", statement[:60]) and kill())
    return database


def flush(descriptor: int) -> None:
    if event("fsync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(folder)):
        kill()
    real_fsync(descriptor)


if int(number) == 0:
    atexit.register(lambda: Path(listing).write_text(json.dumps(events)))
real_connect, sqlite3.connect = sqlite3.connect, connect
real_fsync, os.fsync = os.fsync, flush
import csc_train.jsonl  # noqa: E402  # after the patches

csc_train.jsonl.open = open_log
sys.addaudithook(watch)
sys.argv = command
sys.path[0] = str(Path(command[0]).parent)
runpy.run_path(command[0], run_name="__main__")
