"""Claims: one process, with those that it starts, works in a directory; another is refused by the claimant's name.

A claim is a lock of the operating system on a small file. All processes of a claim share the lock, so it lasts until
the last of them ends, even if killed. The file says who they are. A file system without locks has a heartbeat instead.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import filelock

from csc_train.errors import InputError
from csc_train.files import is_staging, os_errors, remove_staging, watched
from csc_train.overrides import resume_hint

LOCK_FILE = ".lock"
CLAIM_VARIABLE = "CSC_TRAIN_CLAIM"
"""Environment variable with the token of a claim that a process passes to those that it starts."""
INHERITED_VARIABLE = "CSC_TRAIN_INHERITED_CLAIMS"
"""Environment variable with the claims whose locks a process inherits from the one that it replaces (`exec`)."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without locks."""
LEASE_S = 120.0
"""Seconds without a heartbeat after which a claimant counts as dead, on a file system without locks."""
PROBE_S = 1.0
"""Seconds for which a claim is tried again: `is_claimed` takes the lock for a moment."""
logger = logging.getLogger(__name__)
_held: "weakref.WeakValueDictionary[str, Claim]" = weakref.WeakValueDictionary()
"""The claims of this process by the path of their lock file."""
_inherited: "list[Claim]" = []


class Claim:
    """A claimed directory, until `release` or the end of the process.

    Attributes:
        directory: its path.
        token: identifies the claim; a process with it in `CLAIM_VARIABLE` joins the claim.
        descriptor: of the lock file. A process that inherits it holds the lock too.
        created: the directories to remove if nobody writes to them.
        release: lets go of the directory.
    """

    def __init__(
        self,
        directory: Path,
        lock_file: Path,
        token: str,
        descriptor: int,
        lease: filelock.SoftFileLease | None = None,
    ):
        self.directory, self.token, self.descriptor = directory, token, descriptor
        self.created: list[Path] = []
        self._lock_file, self._lease = lock_file, lease
        # Also at the end of the program, and when nobody uses the claim any more.
        self.release = weakref.finalize(self, _release, lock_file, descriptor, lease, self.created)
        _held[os.path.abspath(lock_file)] = self
        watched[os.path.abspath(directory)] = weakref.WeakMethod(self.check_place)

    @property
    def place(self) -> Path | None:
        """Where the directory is now, if it was moved while it was claimed; None if it was deleted."""
        if not self.release.alive or _same_file(self._lock_file, self.descriptor):
            return self.directory
        link = Path(f"/proc/self/fd/{self.descriptor}")
        moved = Path(os.readlink(link)) if link.is_symlink() else None
        return moved.parent if moved and _same_file(moved, self.descriptor) else None

    def check_place(self) -> None:
        """Raise an InputError if the directory is no longer at its path, or another process has taken it over."""
        if self._lease is not None and self._lease.compromise:
            raise InputError(f"{self.directory}: another process took it over, since this one's heartbeat stood still")
        if (place := self.place) == self.directory:
            return
        if place is None:
            raise InputError(f"{self.directory}: deleted during the run: start a new run")
        raise InputError(f"{self.directory}: moved to {place} during the run: resume it there, by {resume_hint(place)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(directory: Path, recipe: str, lock_file: Path | None = None) -> Claim:
    """Claim a directory, and remove what killed processes left of files that they were writing there.

    A process that claims a directory twice gets the same claim.

    Args:
        recipe: name of the recipe that works there, for those that are refused.
        lock_file: defaults to `LOCK_FILE` in the directory, which is created.

    Raises:
        InputError: another process works there, or the lock file cannot be written.
    """
    path = lock_file or directory / LOCK_FILE
    if (held := _held.get(os.path.abspath(path))) and held.release.alive:
        return held
    with os_errors(directory, "cannot write"):
        created = [] if lock_file else missing(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        claimed, earlier = _acquire(directory, path, recipe)
        claimed.created += created
    if earlier:
        logger.info("note: %s: took over the lock of %s, which ended without releasing it", directory, _name(earlier))
    if lock_file is None and claimed.token != os.environ.get(CLAIM_VARIABLE):
        for leftover in list(leftovers(directory)):
            remove_staging(leftover)
    return claimed


def claim_new(directory: Path, recipe: str) -> Claim:
    """Create a directory and claim it; if the name is taken, the first free one of `directory`-2, -3, ...

    Raises:
        InputError: the directory cannot be written.
    """
    name, created = str(directory), missing(directory.parent)
    for number in itertools.count(2):
        try:
            with os_errors(directory, "cannot write"):
                directory.mkdir(parents=True)
            break
        except InputError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            directory = Path(f"{name}-{number}")
    claimed = claim(directory, recipe)
    claimed.created += [directory, *created]
    return claimed


def missing(directory: Path) -> list[Path]:
    """A directory and its parents, as far as they do not exist."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def is_claimed(directory: Path) -> bool:
    """Whether a process works in a directory."""
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # no lock file; or another user's, whose state is unknown
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - _last_beat(path) < LEASE_S
    finally:
        os.close(descriptor)


def release_all() -> None:
    """Release all claims of this process."""
    for each in list(_held.values()):
        each.release()


def pass_on(environment: dict[str, str]) -> None:
    """Let the program that replaces this process (`exec`) keep its claims.

    Args:
        environment: of that program; gets `INHERITED_VARIABLE`.
    """
    claims = [each for each in _held.values() if each.release.alive and each._lease is None]
    for each in claims:
        os.set_inheritable(each.descriptor, True)
    values = [[str(each.directory), str(each._lock_file), each.token, each.descriptor] for each in claims]
    environment[INHERITED_VARIABLE] = json.dumps(values)


def keep_inherited() -> None:
    """Keep the claims that the program before this one passed on."""
    for directory, lock_file, token, descriptor in json.loads(os.environ.pop(INHERITED_VARIABLE, "[]")):
        if _same_file(Path(lock_file), descriptor):
            os.set_inheritable(descriptor, False)
            _inherited.append(Claim(Path(directory), Path(lock_file), token, descriptor))


def leftovers(directory: Path) -> Iterator[Path]:
    """The temporary directories of `files.atomic_path` in a directory, except in runs inside it."""
    for place, folders, _ in os.walk(directory):
        paths = [Path(place) / name for name in folders]
        yield from filter(is_staging, paths)
        # A run inside, such as the evaluation of a training, may be at work.
        folders[:] = [path.name for path in paths if not is_staging(path) and not (path / "run.json").exists()]


def _release(path: Path, descriptor: int, lease: filelock.SoftFileLease | None, created: list[Path]) -> None:
    """Close the lock file, and remove it if no other process holds the claim."""
    ours = _same_file(path, descriptor)
    os.close(descriptor)
    if not ours:
        return
    with contextlib.suppress(OSError):  # others hold it, or the directory cannot be written any more
        if lease is None or lease.is_locked:  # else in a copy of the claimant, made by fork
            with open(path, "r+b") as file:
                if lease is None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(path, file.fileno()):
                    path.unlink()
            if lease is not None:
                lease.release()
            for directory in created:
                directory.rmdir()


def _acquire(directory: Path, path: Path, recipe: str) -> tuple[Claim, dict[str, Any]]:
    """The claim, and what an earlier claimant that was killed left in the lock file."""
    token, until = secrets.token_hex(8), time.monotonic() + PROBE_S
    while True:
        descriptor, claimed = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), None
        try:
            content = _read(descriptor)
            lease = _lock(directory, path, descriptor, content)
            if not _same_file(path, descriptor):  # its holder released it just now
                continue
            _write(descriptor, path, token, recipe)
            if lease is None:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            claimed = Claim(directory, path, token, descriptor, lease)
            return claimed, content
        except BlockingIOError:
            if content and content.get("token") == os.environ.get(CLAIM_VARIABLE):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                claimed = Claim(directory, path, content["token"], descriptor)
                return claimed, {}
            if time.monotonic() > until:
                raise InputError(
                    f"{directory}: in use by {_name(content)}: wait for its end, or choose another directory"
                ) from None
        finally:
            if claimed is None:
                os.close(descriptor)
        time.sleep(0.05)


def _lock(directory: Path, path: Path, descriptor: int, content: dict[str, Any]) -> filelock.SoftFileLease | None:
    """Lock the file for this process alone; on a file system without locks, by the lease that is returned.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = error.strerror
    logger.info("note: %s: no locks on this file system (%s): a heartbeat shows who works there", directory, reason)
    lease = filelock.SoftFileLease(_lease_file(path), lease_duration=LEASE_S, thread_local=False)
    first_beat, end = _last_beat(path), time.monotonic() + 1.1 * LEASE_S
    while True:
        try:
            lease.acquire(timeout=0 if first_beat == 0 else LEASE_S / 60)
            return lease
        except filelock.Timeout:
            if time.monotonic() > end or _last_beat(path) != first_beat:
                raise BlockingIOError(f"{directory}: its holder is alive") from None


def _last_beat(path: Path) -> float:
    """The time of the last heartbeat, by the file system's clock; 0 if there is none."""
    lease = _lease_file(path)
    return lease.stat().st_mtime if lease.exists() else 0


def _lease_file(path: Path) -> Path:
    return path.with_name(f"{path.name}-heartbeat")


def _read(descriptor: int) -> dict[str, Any]:
    """What the lock file says of its holder; empty if it is new, or being written."""
    try:
        content = json.loads(os.pread(descriptor, 1 << 16, 0))
        return content if isinstance(content, dict) else {}
    except ValueError:
        return {}


def _write(descriptor: int, path: Path, token: str, recipe: str) -> None:
    facts = {"token": token, "recipe": recipe, "host": socket.gethostname(), "process": os.getpid()}
    facts |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts, ensure_ascii=False).encode(), 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _name(content: dict[str, Any]) -> str:
    """The holder of a lock in words."""
    if "process" not in content:
        return "another process"
    return "{recipe} on {host}, process {process}, since {since}".format_map(content)


def _same_file(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the file of a descriptor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False
