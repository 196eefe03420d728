"""Append-only JSONL files: one JSON object per line; an incomplete last line is cut off."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from csc_train.errors import InputError
from csc_train.files import atomic_path, os_errors


class JsonlLog:
    """An append-only JSONL file; each row is written out at once, so a killed process loses none.

    Args:
        path: the file; its folder is created with the first row.
        ascii_only: escape all other characters, for texts that UTF-8 cannot encode.
    """

    def __init__(self, path: str | os.PathLike, ascii_only: bool = False):
        self.path = Path(path)
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
            with os_errors(self.path, "cannot write"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  # closed by `close`
                self._file.seek(0)
                self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: the file cannot be written.
        """
        self.open()
        with os_errors(self.path, "cannot write"):
            self._file.write(to_line(row, self._ascii_only).encode())

    def read(self) -> list[dict[str, Any]]:
        """All complete rows; none if there is no file.

        Raises:
            InputError: as `read_jsonl`.
        """
        return [row for _, row in read_jsonl(self.path, allow_torn=True)] if self.path.exists() else []

    def truncate_after(self, step: int) -> None:
        """Remove the rows whose `step` is later.

        Raises:
            InputError: the file cannot be read or written.
        """
        if self.path.exists():
            self.close()
            write_jsonl(self.path, [row for row in self.read() if row["step"] <= step])

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


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


def read_jsonl(path: str | os.PathLike, allow_torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of each line that is not blank.

    Args:
        allow_torn: skip a last line without a line break, which a killed process left.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object in UTF-8; names the file and the line.
    """
    with os_errors(path, "cannot read"), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or (allow_torn and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: not UTF-8 at byte {error.start} of the line") from error
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object")
            yield number, row
