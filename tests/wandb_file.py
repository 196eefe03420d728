"""Reading back what W&B keeps offline.

A file begins with seven bytes; then it is a LevelDB log: blocks of 32 KiB that hold records, each behind a checksum
(four bytes), its length (two) and a kind (one): whole, or the first, a middle or the last part of one.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import TIMEOUT_S
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, BEGINNING, HEADER = 32768, 7, 7
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Record]:
    """The records of a file; what a kill tore at its end is left out."""
    data, place, part = path.read_bytes(), BEGINNING, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # too little is left of the block for a header
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        place += HEADER
        part += data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


class OfflineRun:
    """One file of an offline run.

    Attributes:
        id: of the run.
        run: its record: project, entity, name, tags and the like.
        config: as it was at the end.
        rows: {step: {figure: value}}, as they were closed.
        artifacts: {name: type}.
        alerts: (title, text, level) of each.
        exit_code: None where the run was not closed.
    """

    def __init__(self, folder: Path):
        (path,) = folder.glob("*.wandb")
        self.config: dict[str, Any] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.artifacts: dict[str, str] = {}
        self.alerts: list[tuple[str, str, str]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run, self.id = record.run, record.run.run_id
                self._update(self.config, record.run.config.update)
            elif kind == "config":
                self._update(self.config, record.config.update)
            elif kind == "summary":
                self._update(self.summary, record.summary.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                self._update(row, record.history.item)
                assert row["_step"] not in self.rows
                self.rows[row["_step"]] = row
            elif kind == "artifact":
                self.artifacts[record.artifact.name] = record.artifact.type
            elif kind == "alert":
                self.alerts.append((record.alert.title, record.alert.text, record.alert.level))
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _update(values: dict[str, Any], items) -> None:
        for item in items:
            values[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)


def offline_runs(directory: Path) -> list[OfflineRun]:
    """The offline runs in a run directory, in the order in which they were begun.

    The last one is waited for: on a busy machine W&B's service writes its end out after `finish` has returned.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        runs = [OfflineRun(folder) for folder in sorted((directory / "wandb").glob("offline-run-*"))]
        if runs[-1].exit_code is not None or time.monotonic() > deadline:
            return runs
        time.sleep(0.1)
