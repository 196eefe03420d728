"""Supervise the processes of one node: forward signals to the ranks and leave no process behind.

python -m csc_train.launching.supervise RUN_DIRECTORY COMMAND...
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from csc_train.errors import InputError
from csc_train.files import write_text
from csc_train.launching.launch_commands import starts_ranks
from csc_train.runs.config import RESOLVED_FILE, may_change
from csc_train.runs.directory import EXIT_STOPPED, flatten_keys, read_run_record
from csc_train.runs.distributed import set_parent_death_signal

INTERRUPT_GRACE = 10.0
"""Seconds that the ranks have to clean up after Ctrl-C."""
CONFIG_VARIABLE = "CSC_TRAIN_CONFIG"
"""Environment variable with the frozen configuration of a job that brings it along."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that reach the ranks."""


def supervise(directory: Path, command: list[str]) -> int:
    """Run torchrun, accelerate or the recipe itself until it ends.

    - SIGTERM and SIGUSR1 go directly to the ranks: torchrun would kill them after 30 seconds, before a large checkpoint
      is saved.
    - SIGINT (Ctrl-C) goes to the ranks too; `INTERRUPT_GRACE` seconds later all remaining processes are killed.
    - A second signal kills all processes at once.
    - If this process is killed, torchrun receives SIGTERM and ends the ranks.

    Args:
        directory: the run directory.
        command: as of `launch_commands`.

    Returns:
        The exit status: `EXIT_STOPPED` if the ranks saved a checkpoint and stopped; 128 + signal number if a signal
        ended them; else the command's own.
    """
    stopped_before = read_run_record(directory).get("stopped")
    received, deadline = [], float("inf")
    set_child_subreaper()

    def forward(signum: int, frame: Any) -> None:
        nonlocal deadline
        received.append(signum)
        if len(received) > 1:
            deadline = 0.0
            return
        if signum == signal.SIGINT:
            deadline = time.monotonic() + INTERRUPT_GRACE
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(agent.pid).children() if starts_ranks(command) else []
            for process in ranks or [agent]:
                _send(process, signum)

    agent = subprocess.Popen(
        command,
        start_new_session=True,  # Ctrl-C in a terminal only reaches this process
        preexec_fn=set_parent_death_signal,
    )
    with signal_handler(forward, FORWARDED):
        try:
            while agent.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            if agent.poll() is None:
                agent.kill()
                agent.wait()
            _kill_all()
    status = agent.returncode
    if status and read_run_record(directory).get("stopped") not in (None, stopped_before):
        return EXIT_STOPPED
    if status and received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, Any], None], signums: Iterable[int]) -> Iterator[None]:
    """Install a handler for some signals, and restore the previous handlers at the end."""
    previous = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, earlier in previous.items():
            signal.signal(signum, earlier)


def place_config(directory: Path) -> None:
    """Write the configuration that the job brings along, unless the run directory has it; two nodes may do so.

    Raises:
        InputError: the directory holds a run of another configuration: this one would be resumed as that one.
    """
    text, file = os.environ.pop(CONFIG_VARIABLE, ""), directory / RESOLVED_FILE
    if text and not file.exists():
        write_text(file, text)
    elif text:
        # A run that has started has commits of the hub in it (see `pin_revisions`).
        unpinned = (re.sub(r"@[\w./-]+", "", each) for each in (text, file.read_text(encoding="utf-8")))
        brought, held = (flatten_keys(yaml.safe_load(each)) for each in unpinned)
        for key in (key for key in brought if not (may_change(key) or key.endswith("revision"))):
            if held.get(key, brought[key]) != brought[key]:
                raise InputError(
                    f"{directory}: holds a run with {key}={held[key]}, not {brought[key]}: choose another run.directory"
                )


def set_child_subreaper() -> None:
    """Become a child subreaper, so `_kill_all` also sees orphaned descendants (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _send(process: psutil.Process | subprocess.Popen, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


def _kill_all() -> None:
    """Kill every descendant of this process."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=5)


if __name__ == "__main__":
    try:
        place_config(Path(sys.argv[1]))
    except InputError as refused:
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)
    sys.exit(supervise(Path(sys.argv[1]), sys.argv[2:]))
