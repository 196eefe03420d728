"""Remove the weights of ended runs."""

from pathlib import Path

from csc_train.files import remove_directory, write_json
from csc_train.runs.claim import claim
from csc_train.runs.directory import RECORD_FILE, read_run_record

WEIGHTS = ("checkpoints", "model", "base")
"""Folders of a training's directory that hold weights."""


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
