"""Read and append JSONL: one JSON object per line, lines that end at "\\n" alone, and what to do about a bad line.

Every log of the project is read and written here: histories, answers, predictions, batch files and dialogues.
"""

import codecs
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

import pydantic

from csc_train.errors import InputError
from csc_train.files import atomic_path, os_errors, require_end, require_in_place

Row = TypeVar("Row")
CORRECT = "correct or delete the line"
"""The way to go on from a bad line of an input."""
BLOCK = 1 << 16
"""Bytes that are read at a time to find the last line."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadLine:
    """A line that is not a JSON value: its text, with replacements for what is not UTF-8, and the reason."""

    text: str
    reason: str


class JsonlLog(Generic[Row]):
    """An append-only JSONL file; each row is written out at once, so a killed process loses none.

    Args:
        path: the file; its folder is created with the first row.
        parse, key, advice: of the rows, as in `read_jsonl`.
        ascii_only: escape all other characters, for texts that UTF-8 cannot encode.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        parse: Callable[[dict[str, Any]], Row] = dict,
        *,
        key: Callable[[Row], str | None] | None = None,
        advice: str | None = None,
        ascii_only: bool = False,
    ):
        self.path = Path(path)
        self._reader = functools.partial(read_jsonl, path, parse, key=key, advice=advice, allow_torn=True)
        self._ascii_only = ascii_only
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def open(self) -> None:
        """Open the file for appending and cut off a torn last line; `append` does so if needed.

        Raises:
            InputError: the file cannot be written.
        """
        if self._file is None:
            require_in_place(self.path)
            with os_errors(self.path, "cannot write"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  # closed by `close`
                self._file.truncate(_end_of_last_line(self._file))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: the file cannot be written; the next `append` cuts off what was written of the row.
        """
        self.open()
        left = to_line(row, self._ascii_only).encode()
        try:
            with os_errors(self.path, "cannot write"):
                while left:  # a full disk takes a part of the row first
                    left = left[self._file.write(left) :]
        except InputError:
            self.close()
            raise

    def read(self) -> list[Row]:
        """All rows; none if there is no file.

        Raises:
            InputError: as `read_jsonl`.
        """
        return [row for _, row in self._reader()] if self.path.exists() else []

    def truncate_after(self, step: int) -> None:
        """Remove the rows whose `step` is later.

        Raises:
            InputError: the file cannot be read or written.
        """
        rows: list[Any] = self.read()
        if any(row["step"] > step for row in rows):
            self.close()
            write_jsonl(self.path, [row for row in rows if row["step"] <= step])

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _end_of_last_line(file: BinaryIO) -> int:
    """The bytes up to the last line break, found from the end of the file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - BLOCK))
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def to_line(row: dict[str, Any], ascii_only: bool = False, **options: Any) -> str:
    """A row as a line of JSONL; `ascii_only` escapes all other characters, `options` are those of `json.dumps`."""
    return json.dumps(row, ensure_ascii=ascii_only, **options) + "\n"


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]], **options: Any) -> None:
    """Write rows to a new file in UTF-8, atomically; `options` as in `to_line`.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(to_line(row, **options) for row in rows)


def read_jsonl(
    path: str | os.PathLike,
    parse: Callable[[dict[str, Any]], Row] = dict,
    *,
    key: Callable[[Row], str | None] | None = None,
    advice: str | None = CORRECT,
    allow_torn: bool = False,
) -> Iterator[tuple[int, Row]]:
    """(line number from 1, row) of each line that is not blank.

    Args:
        parse: checks and converts a JSON object; it raises a ValueError, KeyError or TypeError for a bad one.
        key: names a row, for messages too; a second row of one name is bad. None is no name.
        advice: the way to go on from a bad line, which ends the error. None, for figures that can be made again: a bad
            line is said and left out.
        allow_torn: skip a last line without a line break, which a killed process left.

    Raises:
        InputError: the file cannot be read, or a line is bad; names file, line and, if it is one, the field.
    """
    lines: dict[str, int] = {}
    require_end(path)
    for number, value in iter_jsonl(path, allow_torn):
        try:
            row = parse(checked_object(value))
            if key is not None and (name := key(row)) is not None and lines.setdefault(name, number) != number:
                raise ValueError(f"{name} stands in line {lines[name]} already")
        except (ValueError, KeyError, TypeError) as error:
            place = f"{path}, line {number}: {parse_reason(error)}"
            if advice is not None:
                raise InputError(f"{place}: {advice}") from error
            _warn_once(f"{place}: left out")
        else:
            yield number, row


def checked_object(value: Any) -> dict[str, Any]:
    """A value of `iter_jsonl` that is an object; for others a ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"not JSON ({value.reason})" if isinstance(value, BadLine) else "not a JSON object")
    return value


def parse_step(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a `step`, as `JsonlLog.truncate_after` needs it (see `read_jsonl`, `parse`)."""
    if type(row["step"]) is not int:
        raise ValueError("field step: not a whole number")
    return row


def iter_jsonl(path: str | os.PathLike, allow_torn: bool = False) -> Iterator[tuple[int, Any]]:
    """(line number from 1, JSON value or `BadLine`) of each line that is not blank; a byte order mark is skipped.

    Raises:
        InputError: the file cannot be read.
    """
    require_end(path, pipe=True)
    with os_errors(path, "cannot read"), open(path, "rb") as file:
        yield from parse_lines(itertools.takewhile(lambda line: line.endswith(b"\n"), file) if allow_torn else file)


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(line number from 1, JSON value or `BadLine`) of each line that is not blank; a byte order mark is skipped."""
    for number, line in enumerate(lines, start=1):
        # Without the line end, so that the error of a cut line is at its last column.
        if (content := line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")).strip():
            yield number, _parse_json(content)


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        reason = f"column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:  # Python's own limits: numbers of thousands of digits, deep nesting
        reason = str(error).split("\n")[0]
    return BadLine(line.decode(errors="replace"), reason)


def parse_reason(error: Exception) -> str:
    """An error of `parse` in one line."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"field {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"field {error.args[0]}: missing" if isinstance(error, KeyError) else " ".join(str(error).split())


@functools.cache
def _warn_once(message: str) -> None:
    """Log a message once, however often the file is read."""
    logger.warning(message)
