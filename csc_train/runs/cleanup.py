"""Remove what ended runs wrote: their models and checkpoints only, or all of it."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csc_train.errors import InputError
from csc_train.files import files_below, os_errors, remove_directory, remove_empty_folders, write_json
from csc_train.runs.claim import LOCK_FILE, claim, is_claimed
from csc_train.runs.directory import RECORD_FILE, read_run_record, recorded_files, run_places, written_files

WEIGHTS = ("checkpoints", "model", "base")
"""Folders of a training's directory that hold weights."""
DAY_S = 86_400


@dataclass(frozen=True)
class Removable:
    """A directory that may be removed.

    Attributes:
        kind: the recipe of a run, or what else it is.
        days: since its last use.
        size: of its files, in bytes.
        reason: why it must stay; None if it may go.
    """

    directory: Path
    kind: str
    days: float
    size: int
    reason: str | None = None


def measure(directory: Path) -> tuple[float, int]:
    """(days since the last write, bytes) of the files in a directory; symbolic links are not followed."""
    stats = []
    for place, _, names in os.walk(directory):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            stats += [os.lstat(os.path.join(place, name)) for name in names if not name.startswith(LOCK_FILE)]
    last = max((each.st_mtime for each in stats), default=0.0)
    return (time.time() - last) / DAY_S, sum(each.st_size for each in stats)


def find_ended_runs(root: Path, unfinished: bool) -> Iterator[Removable]:
    """The runs in a folder and its subfolders, each with the runs inside it; symbolic links are not followed.

    Args:
        unfinished: whether a run that a resume could continue may be removed, too.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RECORD_FILE in files:
            folders.clear()
            yield _judge(Path(place), unfinished)


def _judge(directory: Path, unfinished: bool) -> Removable:
    kind, reason = "run", None
    try:
        places = run_places(directory)
        records = [read_run_record(place) for place in places]
        kind = str(records[0].get("recipe", "run"))
        if any(map(is_claimed, [*places, *directory.absolute().parents])):  # such as a sweep and its trials
            reason = "in use"
        elif not unfinished and not all(record.get("finished") for record in records):
            reason = "unfinished: unfinished=true removes it, too"
        elif not all(isinstance(recorded_files(record), list) for record in records):
            reason = "does not say what it wrote"
    except InputError as error:
        reason = f"not read: {error}"
    return Removable(directory, kind, *measure(directory), reason)


def remove_run(run: Removable, unfinished: bool) -> int:
    """Remove what a run and the runs inside it wrote; a second call completes the work of a killed one.

    Args:
        run: as `find_ended_runs` found it.

    Returns:
        The number of files that stay, since no run wrote them.

    Raises:
        InputError: it is in use or was resumed meanwhile, or a file cannot be removed.
    """
    found = _judge(run.directory, unfinished)
    if found.reason or found.days < run.days:
        raise InputError(f"{run.directory}: {found.reason or 'written to meanwhile'}")
    with contextlib.ExitStack() as stack:
        places = run_places(run.directory)
        for place in places:
            stack.enter_context(claim(place, "clean"))
        for place in reversed(places):  # the outer one last: by its record it is found again
            with os_errors(place, "cannot remove"):
                for path in written_files(place):
                    path.unlink(missing_ok=True)
    remove_empty_folders(run.directory)
    return len(files_below(run.directory))


def remove_weights(directory: Path, reason: str) -> None:
    """Remove the model and the checkpoints of a training that has ended; all else stays, and `run.json` says why.

    A kill leaves each folder whole or not there. What no run wrote is left alone.

    Raises:
        InputError: another process works there, or the directory cannot be written.
    """
    folders = [path for name in WEIGHTS if (path := directory / name).is_dir() and not path.is_symlink()]
    if not folders or not read_run_record(directory):
        return
    with claim(directory, "removal"):
        write_json(directory / RECORD_FILE, read_run_record(directory) | {"removed": reason})
        for folder in folders:
            remove_directory(folder)
