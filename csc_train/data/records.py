"""Read the records of data files: JSON, JSONL, Parquet, folders of these, and data sets of the Hugging Face hub."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csc_train.errors import InputError
from csc_train.files import os_errors
from csc_train.hub_access import offline_without_hub
from csc_train.jsonl import iter_jsonl

HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")


def iter_records(path: str | os.PathLike) -> Iterator[tuple[str | os.PathLike, int, Any]]:
    """Yield (file, row number from 1, decoded row or `BadLine`).

    Raises:
        InputError: a file is missing, unreadable as a whole or of another kind.
    """
    place = Path(path)
    readers = {".json": _json_records, ".jsonl": iter_jsonl, ".parquet": _parquet_records}
    if not place.exists() and place.suffix not in readers:
        if not HUB_ID_PATTERN.fullmatch(str(path)):
            raise InputError(f"{path}: no such file: give a file, a folder or the id of a hub data set (owner/name)")
        yield from ((path, *row) for row in _hub_records(str(path)))
        return
    files = [place]
    if place.is_dir():  # hidden files, Spark's markers and a data card are no data
        files = [file for file in sorted(place.iterdir()) if file.name[0] not in "._" and file.suffix != ".md"]
    known = f"use one of {', '.join(FILE_SUFFIXES)}"
    if not files:
        raise InputError(f"{place}: the folder holds no dialogue file: {known}")
    for file in files:  # all are known before a row is read: no folder is read in part
        if file.suffix not in readers or file.is_dir():
            raise InputError(f"{file}: not a dialogue file: {known}; a folder holds nothing else")
    for file in files:
        with os_errors(file, "cannot read"):
            yield from ((file, *row) for row in readers[file.suffix](file))


def _json_records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON: {first_line(error)}") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: expected a JSON list of dialogues, found {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _parquet_records(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here, so that a missing file gives the same message as elsewhere.
        with open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not a Parquet file: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: a text is not UTF-8") from error


def _hub_records(name: str) -> Iterator[tuple[int, Any]]:
    import datasets
    import datasets.exceptions

    with offline_without_hub() as offline:
        try:
            # A cached copy cannot be streamed, so offline it is read whole.
            yield from enumerate(datasets.load_dataset(name, split="train", streaming=not offline), start=1)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"{offline} and the cache has no copy" if offline else first_line(error)
            raise InputError(f"{name}: cannot load the data set from the Hugging Face hub: {reason}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
