"""Watching over the processes of one node: signals reach them, and none is left behind.

python -m csc_train.launching.supervise RUN_DIRECTORY COMMAND...
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from csc_train.files import read_json
from csc_train.runs.directory import EXIT_STOPPED, RECORD_FILE
from csc_train.runs.distributed import set_parent_death_signal

INTERRUPT_GRACE = 10.0
"""Seconds that the ranks have to clean up after Ctrl-C."""


def supervise(directory: Path, command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run torchrun or accelerate to its end.

    SIGTERM and SIGUSR1 go to the ranks, not to torchrun: that would give them 30 seconds, and saving a state of
    training may take longer. SIGINT (Ctrl-C) goes to them too, and after `INTERRUPT_GRACE` all that is left is killed.
    A second signal kills at once. If this process is killed, torchrun is told to end, and with it the ranks.

    Args:
        directory: the run's.
        environment: variables to add.

    Returns:
        The exit status: 0 where the command's is, `EXIT_STOPPED` where the ranks saved a checkpoint and stopped, 128
        and the number of the signal where one ended them otherwise, else the command's.
    """
    stopped_before = _stopped(directory)
    received, deadline = [], float("inf")
    if sys.platform == "linux":
        _set_child_subreaper()

    def forward(signum, frame):
        nonlocal deadline
        received.append(signum)
        if len(received) > 1:
            deadline = 0.0
        elif signum == signal.SIGINT:
            deadline = time.monotonic() + INTERRUPT_GRACE
        if len(received) == 1:
            for rank in _children(agent.pid) or [agent]:
                _send(rank, signum)

    agent = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        start_new_session=True,  # Ctrl-C in a terminal reaches this process alone
        preexec_fn=set_parent_death_signal,
    )
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {signum: signal.signal(signum, forward) for signum in handled}
    try:
        while agent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        if agent.poll() is None:
            agent.kill()
            agent.wait()
        _kill_all()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    status = agent.returncode
    if status and _stopped(directory) != stopped_before:
        return EXIT_STOPPED
    if status and received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def _stopped(directory: Path) -> str | None:
    """When the run was last stopped with a state to go on from."""
    record = directory / RECORD_FILE
    return read_json(record).get("stopped") if record.exists() else None


def _set_child_subreaper() -> None:
    """Become a child subreaper, so `_kill_all` also sees orphaned descendants."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process | subprocess.Popen, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


def _kill_all() -> None:
    """Kill every process below this one."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=5)


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), sys.argv[2:]))
