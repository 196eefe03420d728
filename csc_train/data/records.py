"""Read the records of data files: JSON, JSONL and Parquet files, folders of these, and data sets of the hub."""

import codecs
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from csc_train.errors import InputError
from csc_train.files import os_errors, require_end
from csc_train.hub_access import offline_without_hub, split_revision
from csc_train.jsonl import BLOCK, parse_lines

HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""By suffix, after that of a JSON or JSONL file; pyarrow's names."""
MAX_LINE = 1 << 26
"""Bytes of the longest line that is read."""
_LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
"""The start of a JSON list of objects."""
_TURN_FIELDS = {"speaker", "role", "from"}
"""One of them is in each turn, so a list of such objects is a dialogue and no list of rows."""


def iter_records(
    path: str | os.PathLike | list[str], encoding: str | None = None
) -> Iterator[tuple[str | os.PathLike, int, Any]]:
    """Yield (file, row number from 1, decoded row or `BadLine`).

    Args:
        path: a file; a folder, whose files are read in the order of their names; a glob; the id of a data set of the
            hub (`owner/name`, or `owner/name@revision`); or a list of these.
        encoding: codec of the texts of JSON and JSONL; None is UTF-8, where a line of another encoding is a `BadLine`.

    Raises:
        InputError: a file is missing, unreadable as a whole, cut off or of another kind, a line is longer than
            `MAX_LINE`, or bytes are not of `encoding`.
    """
    for place in find_files(path):  # all are known before a row is read: nothing is read in part
        if isinstance(place, str):
            yield from ((place, *row) for row in _hub_records(place))
            continue
        rows = _parquet_records(place) if _kind(place) == ".parquet" else _text_records(place, encoding)
        with os_errors(place, "cannot read"):
            yield from ((place, *row) for row in rows)


def is_hub_data(path: str) -> bool:
    """Whether a path means a data set of the hub: there is no such file, and it looks like no file."""
    missing = not Path(path).exists() and not glob.has_magic(path) and _kind(Path(path)) not in FILE_SUFFIXES
    return missing and HUB_ID_PATTERN.fullmatch(path) is not None


def find_files(path: str | os.PathLike | list[str], suffixes: tuple[str, ...] = FILE_SUFFIXES) -> list[Path | str]:
    """The files of a path (see `iter_records`), each of one of these suffixes, and the ids of hub data sets."""
    return [place for each in (path if isinstance(path, list) else [path]) for place in _places(each, suffixes)]


def read_decoded(file: str | os.PathLike, encoding: str | None = None) -> str:
    """The text of a file, whose compression is that of its suffix; errors and `encoding` as of `iter_records`."""
    require_end(file, pipe=True)
    with os_errors(file, "cannot read"), _opened(Path(file)) as stream:
        if encoding is None:
            _check_encoding(Path(file), stream.peek(BLOCK))
        return _decode(Path(file), stream.read(), encoding or "utf-8")


def _kind(file: Path) -> str:
    """The suffix without that of the compression, in lower case."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def _places(path: str | os.PathLike, suffixes: tuple[str, ...]) -> Iterator[Path | str]:
    """The files of a path, or the id of a hub data set."""
    place = Path(path)
    known = f"use one of {', '.join(suffixes)}"
    if not place.exists() and glob.has_magic(str(path)):
        if not (found := sorted(glob.glob(str(path), recursive=True))):
            raise InputError(f"{path}: no file matches")
        for each in found:
            yield from _places(each, suffixes)
    elif not place.exists() and _kind(place) not in suffixes:
        if not HUB_ID_PATTERN.fullmatch(str(path)):
            raise InputError(f"{path}: no such file: give a file, a folder or the id of a hub data set (owner/name)")
        yield str(path)
    else:
        files = list(_parts(place)) if place.is_dir() else [place]
        if not files:
            raise InputError(f"{place}: the folder holds no dialogue file: {known}")
        for file in files:
            if _kind(file) not in suffixes or file.is_dir() or _packed_parquet(file):
                raise InputError(f"{file}: not a dialogue file: {known}; a folder holds nothing else")
        kinds = {_kind(file) == ".parquet": file.name for file in files}
        if len(kinds) > 1:
            raise InputError(
                f"{place}: holds two kinds of files, such as {kinds[True]} and {kinds[False]}: give one kind, "
                f"such as {place}/*.parquet"
            )
        yield from files


def _packed_parquet(file: Path) -> bool:
    return _kind(file) == ".parquet" and file.suffix.lower() in COMPRESSIONS


def _parts(folder: Path) -> Iterator[Path]:
    """The files of a folder, also of partitions (`day=01`), whose names are no data."""
    for file in sorted(folder.iterdir()):  # hidden files, Spark's markers and a data card are no data
        if file.name[0] not in "._" and file.suffix != ".md":
            partition = file.is_dir() and ("=" in file.name or file.name.isdigit())
            yield from _parts(file) if partition else [file]


def _text_records(file: Path, encoding: str | None) -> Iterator[tuple[int, Any]]:
    require_end(file, pipe=True)
    with _opened(file) as stream:
        if encoding is not None:
            decoded = _decode(file, stream.read(), encoding)
            stream = io.BufferedReader(io.BytesIO(decoded.encode("utf-8", "surrogatepass")))
        # A pipe gives what it has.
        head = stream.peek(BLOCK)
        _check_encoding(file, head)
        if (_kind(file) == ".json") or _LIST.match(head):
            yield from _json_records(file, stream.read())
        else:
            yield from parse_lines(_lines(file, stream))


def _opened(file: Path) -> io.BufferedReader:
    """A stream of a file's bytes, which raises an OSError where compressed data are cut off."""
    if (compression := COMPRESSIONS.get(file.suffix.lower())) is None:
        return io.BufferedReader(io.FileIO(file), BLOCK)
    import pyarrow

    if file.stat().st_size == 0:
        raise InputError(f"{file}: empty: no {compression} data")
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression), BLOCK)


def _decode(file: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise InputError(
            f"{file}, line {line}, byte {error.start} of the file: not {encoding}: give its own data.encoding "
            "(convert, build_csconv: encoding)"
        ) from error


def _check_encoding(file: Path, head: bytes) -> None:
    """Raise an InputError if none of the first lines with other characters than ASCII is UTF-8, but of a known code."""
    *lines, last = head.split(b"\n")
    lines = [line for line in lines or [last] if not line.isascii()]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in head[:4]:
        codec, start = "utf-16", 0
    elif lines and (starts := [_not_utf8(line) for line in lines]) and None not in starts:
        try:
            codecs.getincrementaldecoder("gb18030")().decode(head)
        except UnicodeDecodeError:
            return
        codec, start = "gb18030", starts[0]
    else:
        return
    line = 1 if codec == "utf-16" else head[: head.index(lines[0])].count(b"\n") + 1
    raise InputError(
        f"{file}, line {line}: not UTF-8 at byte {start}: try data.encoding={codec} (convert, build_csconv: encoding)"
    )


def _not_utf8(line: bytes) -> int | None:
    """The first byte of a line that is not UTF-8; its end may be missing."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _lines(file: Path, stream: io.BufferedReader | io.BytesIO) -> Iterator[bytes]:
    for number in itertools.count(1):
        if not (line := stream.readline(MAX_LINE + 1)):
            return
        if len(line) > MAX_LINE:
            raise InputError(f"{file}, line {number}: longer than {MAX_LINE >> 20} MiB: write one row a line")
        yield line


def _json_records(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    if not (content := content.removeprefix(codecs.BOM_UTF8)).strip():
        raise InputError(f"{file}: the file is empty")
    try:
        found = json.loads(content.decode())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip()[:1] == b"{":  # JSONL under another name
            yield from parse_lines(_lines(file, io.BytesIO(content)))
            return
        raise InputError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON: {first_line(error)}") from error
    yield from enumerate(_rows(file, found), start=1)


def _rows(file: Path, found: Any) -> Iterable[Any]:
    """The rows of a JSON file: a list, the lists of objects in an object, or a single row, which holds turns."""
    if isinstance(found, list):
        return found
    inner = found.values() if isinstance(found, dict) else ()
    lists = [each for each in inner if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)]
    if any(_TURN_FIELDS & row.keys() for rows in lists for row in rows[:1]):
        return [found]
    if not lists:
        raise InputError(f"{file}: expected a JSON list of dialogues, found {type(found).__name__}")
    return itertools.chain(*lists)


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
        place, revision = split_revision(name)
        try:
            # A cached copy cannot be streamed, so offline it is read whole.
            rows = datasets.load_dataset(place, revision=revision, split="train", streaming=not offline)
            yield from enumerate(rows, start=1)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"{offline} and the cache has no copy" if offline else first_line(error)
            raise InputError(f"{name}: cannot load the data set from the Hugging Face hub: {reason}") from error


def paths_text(path: str | os.PathLike | list[str]) -> str:
    """A path, or a list of paths, as text."""
    return ", ".join(map(str, path)) if isinstance(path, list) else str(path)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
