"""Files of JSON lines that grow with a training, each line of an optimizer step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csc_train.files import os_errors, write_text


class JsonlLog:
    """A file of JSON lines, each of an optimizer step; a line is written out at once."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            InputError: it cannot be written.
        """
        with os_errors(self.path, "cannot write"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines; one that was torn by a kill, which can only be the last, is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def forget_after(self, step: int) -> None:
        """Leave out the lines of later steps."""
        if self.path.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def keep_table(directory: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Add a table of a step to `<name>.jsonl`, a line a row. What the file holds of this step or later ones is
    replaced: they were done before a state of training was gone back to.

    Raises:
        InputError: it cannot be written.
    """
    lines = JsonlLog(directory / f"{name}.jsonl")
    lines.forget_after(step - 1)
    for row in rows:
        lines.append(step, dict(zip(columns, row, strict=True)))
