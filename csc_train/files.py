"""Write files atomically, hash their contents, and turn OSErrors into InputErrors."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from csc_train.errors import InputError

LIBRARY_ERRORS = r"\(os error \d+\)|PytorchStreamWriter|inline_container"
"""In messages of safetensors and tokenizers, and of torch, for a file that cannot be read or written."""
STAGING = ".{name}.writing-"
"""Start of the name of a temporary directory, beside the file or directory `name` that is written there."""
STAGING_NAME = r"\.(.+)\.writing-\w{8}"
watched: dict[str, Callable[[], Callable[[], None] | None]] = {}
"""Weak references to checks by directory; each raises an InputError if its directory has been moved away."""


@contextlib.contextmanager
def os_errors(place: str | os.PathLike, what: str) -> Iterator[None]:
    """Turn errors of the operating system, also as libraries report them, and text not in UTF-8 into an InputError.

    Args:
        place: what cannot be used; the message begins with it. Usually a path.
        what: what went wrong, such as "cannot read".

    Raises:
        InputError: `place: what: reason`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: {what}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: {what}: not UTF-8 at byte {error.start}") from error
    except Exception as error:
        if isinstance(error, InputError) or not re.search(LIBRARY_ERRORS, str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        if "inline_container" in reason:  # torch names a place in its own source only
            reason = "torch cannot write the whole file, as on a full disk"
        raise InputError(f"{place}: {what}: {reason}") from OSError(reason)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    The caller creates a file or a directory at the temporary path. A file replaces a file, a directory a directory.
    Files of a replaced directory that have no successor are kept beside it, since they may be somebody else's. What
    killed processes left when they wrote to `path` is removed.

    Args:
        stale: glob patterns of files in a replaced directory that need no successor.

    Raises:
        InputError: the write failed (no permission, disk full, file-size limit, a file in the place of a directory), or
            the directory was moved away while this process works in it.
    """
    path = Path(path)
    require_in_place(path)
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _swept(path):
            # Not TemporaryDirectory: it would raise if the removal fails.
            staging = Path(tempfile.mkdtemp(prefix=STAGING.format(name=path.name), dir=path.parent))
            try:
                temporary = staging / path.name
                yield temporary
                flush_to_disk(temporary)
                if temporary.is_dir() and path.is_dir() and not path.is_symlink():
                    replaced = path.rename(staging / f"{path.name}.replaced")
                    try:
                        temporary.replace(path)
                    except OSError:
                        replaced.rename(path)
                        raise
                    _keep_foreign(replaced, path, stale)
                else:
                    temporary.replace(path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _swept(path: Path) -> Iterator[None]:
    """Share the lock of the folder of `path`. Who has it alone removes what killed processes left of `path` there."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, InputError):  # others write there now, or the file system has no locks
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(path.parent):
                if is_staging(path.with_name(name), path.name):
                    remove_staging(path.with_name(name))
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


def _keep_foreign(replaced: Path, path: Path, stale: Sequence[str] = ()) -> None:
    """Move a replaced directory beside `path` if it holds files that `path` has no successor of."""
    for file in files_below(replaced):
        if os.path.lexists(path / file.relative_to(replaced)) or any(map(file.match, stale)):
            file.unlink()
    if files_below(replaced):
        replaced.rename(free_name(f"{path}.replaced-{{}}"))


def files_below(directory: Path) -> list[Path]:
    """The files in a directory and its subdirectories, and symbolic links, which are not followed."""
    return [path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()]


def remove_empty_folders(directory: Path) -> None:
    """Remove the subdirectories of a directory that hold no file, and itself if none is left."""
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # one that is not empty
            os.rmdir(folder)


def free_name(pattern: str) -> Path:
    """The first path of a pattern with a number, from 1, that does not exist."""
    return next(path for number in itertools.count(1) if not os.path.lexists(path := Path(pattern.format(number))))


def is_staging(path: Path, name: str | None = None) -> bool:
    """Whether `atomic_path` made this temporary directory, for a file or directory of this name if one is given."""
    found = re.fullmatch(STAGING_NAME, path.name)
    return bool(found) and name in (None, found[1]) and path.is_dir() and not path.is_symlink()


def remove_staging(staging: Path) -> None:
    """Remove a temporary directory of `atomic_path` that a killed process left; what it was replacing is kept."""
    path = staging.with_name(re.fullmatch(STAGING_NAME, staging.name)[1])
    with os_errors(staging, "cannot remove"):
        if (replaced := staging / f"{path.name}.replaced").exists():
            _keep_foreign(replaced, path) if os.path.lexists(path) else replaced.rename(path)
        shutil.rmtree(staging)


def remove_directory(path: Path) -> None:
    """Remove a directory; a kill leaves it whole, or moved to where the next write or claim beside it removes it.

    Raises:
        InputError: it cannot be removed.
    """
    with os_errors(path, "cannot remove"):
        staging = Path(tempfile.mkdtemp(prefix=STAGING.format(name=path.name), dir=path.parent))
        path.rename(staging / path.name)
        shutil.rmtree(staging)


def require_end(path: str | os.PathLike, pipe: bool = False) -> None:
    """Raise an InputError if a path is a device or, unless it may be, a pipe: their content may have no end."""
    path = Path(path)
    if path.is_char_device() or path.is_block_device() or (path.is_fifo() and not pipe):
        raise InputError(f"{path}: cannot read: a device or a pipe: write its content to a file first")


def require_in_place(path: str | os.PathLike) -> None:
    """Raise an InputError if `path` lies in a watched directory (see `runs.claim`) that has been moved away."""
    place = os.path.abspath(path)
    for directory, check in list(watched.items()):
        if place.startswith(directory + os.sep) and (in_place := check()):
            in_place()


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a directory with its content, so that it survives a loss of power."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        InputError: the file is missing, not UTF-8 or no JSON object; names the file and the place in it.
    """
    require_end(path)
    with os_errors(path, "cannot read"):
        text = Path(path).read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # Python's own limits: numbers of thousands of digits, deep nesting
        raise InputError(f"{path}: broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: broken JSON: not an object")
    return value


def digest(value: Any) -> str:
    """SHA-256 (hex, 64 characters) of bytes, or of the canonical JSON of another value."""
    data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        InputError: the file cannot be read.
    """
    require_end(path)
    with os_errors(path, "cannot read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
