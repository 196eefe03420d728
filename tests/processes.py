"""Python scripts in processes that tests fork from one which has imported the libraries.

Most of the time of a short training is imports. A fork server (one for each pytest worker) pays for them once; each
script is still a process with its own arguments, environment, directory, output and exit status.
"""

import atexit
import contextlib
import logging
import multiprocessing.context
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from pathlib import Path
from unittest import mock

import psutil

TIMEOUT_S = 900
"""How long a test waits for anything, in seconds of wall: long enough for a machine that is busy with other work."""

# Apart from the one that the project's own code may start in the test's process, which imports less.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["workers.preload"])


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj):
        # The server passes over a module that it cannot import, and does not search the path of this process.
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
            _SERVER.ensure_running()
        with mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            super()._launch(process_obj)


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj):
        return _Popen(process_obj)


class Script:
    """A Python script that runs in a separate process.

    Args:
        command: the path of the script (or `-m` and a module), and its arguments.
        cwd: the directory to run in; defaults to the test's own.
        env: the whole environment; defaults to the test's own.
        largest_file: no file may be written that is larger, in bytes.
        forks: fork the Python scripts that it starts, too, and those that they start (see `_fork_child`): for what
            launchers start, where a test is about what that does, and not about how Python is started.
        merge: standard error goes where standard output goes.
    """

    def __init__(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        largest_file: int | None = None,
        forks: bool = False,
        merge: bool = False,
    ):
        self.command = [str(word) for word in command]
        self._output = tempfile.TemporaryDirectory()
        files = [str(Path(self._output.name) / name) for name in ("stdout", "stdout" if merge else "stderr")]
        environment = dict(os.environ if env is None else env)
        environment.pop("WANDB_SERVICE", None)  # the service of this process's W&B, which ends when a test says so
        arguments = (self.command, str(cwd or Path.cwd()), environment, files, largest_file, forks)
        self._process = _Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        self._files = [Path(self._output.name) / name for name in ("stdout", "stderr")]

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that may have ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and everything that it started."""
        if self._process.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(self.pid).children(recursive=True), self._process]:
                    process.kill()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read(0)

    @property
    def stderr(self) -> str:
        """What it has printed to standard error so far."""
        return self._read(1)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for the end; the exit status with the output."""
        self._process.join(TIMEOUT_S)
        if self._process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired(self.command, TIMEOUT_S, self.stdout, self.stderr)
        return subprocess.CompletedProcess(self.command, self._process.exitcode, self.stdout, self.stderr)

    def _read(self, number: int) -> str:
        file = self._files[number]
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def start_ranks(*command: str | Path, ranks: int, env: dict[str, str] | None = None, **options) -> list[Script]:
    """Start a script as torchrun does on one machine, without its agent."""
    environment = dict(os.environ if env is None else env)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"LOCAL_SIZE": str(ranks)}  # otherwise DeepSpeed starts a process at each gradient to count them
    return [
        Script(*command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def run_script(*command: str | Path, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run a script to its end, as `Script` says; with several `ranks`, as torchrun does.

    Returns:
        The exit status of a rank that failed, else 0, and the output of all ranks.
    """
    if ranks == 1:
        return Script(*command, **options).wait()
    scripts = start_ranks(*command, ranks=ranks, **options)
    end = time.monotonic() + TIMEOUT_S
    while not any(codes := [script.poll() for script in scripts]) and None in codes and time.monotonic() < end:
        time.sleep(0.02)
    for script in scripts:  # the others would wait for a rank that failed
        script.kill()
    done = [script.wait() for script in scripts]
    output = ["".join(getattr(each, stream) for each in done) for stream in ("stdout", "stderr")]
    if not any(codes) and None in codes:
        raise subprocess.TimeoutExpired(scripts[0].command, TIMEOUT_S, *output)
    return subprocess.CompletedProcess(scripts[0].command, next(filter(None, codes), 0), *output)


def stop_fork_server() -> None:
    """Stop it if it was started, and wait for its end: its CPU time then counts as the tests'."""
    _SERVER._stop()


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _run(
    command: list[str], cwd: str, environment: dict[str, str], files: list[str], largest_file: int | None, forks: bool
) -> None:
    """What the forked process does: as `python COMMAND` would, up to the exit status."""
    assert "workers.preload" in sys.modules, "the fork server imported nothing: each script would import all again"
    sys.modules["workers.preload"].own_directories()
    for stream, file in zip((1, 2), files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    if forks:
        subprocess.Popen._execute_child = _fork_child
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2)
    if status := _python(command, cwd, environment):
        sys.exit(status)


def _python(command: list[str], cwd: str, environment: dict[str, str]) -> int:
    """Do in this process what `python COMMAND` would; its exit status."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    status = 0
    # W&B keeps tables in a folder that it makes when it is imported; the first fork to end removes that.
    private = sys.modules.get("wandb.sdk.data_types._private")
    with tempfile.TemporaryDirectory("wandb-media") as media:
        if private:
            private.MEDIA_TMP.name = media
        try:
            if command[0] == "-m":
                sys.argv = command[1:]
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = command
                sys.path.insert(0, str(Path(command[0]).parent))
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


_execute_child = subprocess.Popen._execute_child


def _fork_child(
    self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
    p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, new_session, group,
):  # fmt: skip
    """In `subprocess.Popen`: a Python script or module is forked from this process instead of executed.

    It is a child as any: of the same parent, in its own session if asked, with the signals, descriptors, environment
    and directory that Popen gives it. What this process has imported of the project, the child imports again.
    """
    command = [os.fspath(word) for word in args] if not isinstance(args, str) else []
    python = command[:1] == [sys.executable] and command[1:2] != ["-c"] and not shell
    if not python:
        _execute_child(
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
            new_session, group,
        )  # fmt: skip
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    self.pid = os.fork()
    if self.pid == 0:
        status = 1
        try:
            _inherit((p2cread, c2pwrite, errwrite), pass_fds, new_session, preexec_fn)
            status = _python(
                [word for word in command[1:] if word != "-u"],
                cwd or os.getcwd(),
                dict(os.environ if env is None else env),
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _inherit(streams: Iterable[int], others: Iterable[int], new_session: bool, preexec_fn: Callable | None) -> None:
    """Turn a fork into what a new process would be: its descriptors, signals, session, and no module of the project."""
    for number, stream in enumerate(streams):
        if stream not in (-1, number):
            os.dup2(stream, number)
    kept = sorted({2, *others})
    for first, last in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(first + 1, last)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if new_session:
        os.setsid()
    if preexec_fn:
        preexec_fn()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("csc_train", "recipes", "launch")]:
        del sys.modules[name]
    for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values()):
        if getattr(logger, "name", "").partition(".")[0] in ("root", "csc_train"):
            logger.handlers.clear()
    atexit._clear()
    resource_tracker._resource_tracker = resource_tracker.ResourceTracker()  # that of the parent is closed
