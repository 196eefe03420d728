"""Dialogues: what they are, and reading, checking and writing them.

A row of a dialogue file is an object with a `dialogue` list of `{"speaker", "strategy", "text"}` turns, as in the
published data (speakers `客服` and `客户`, a strategy on supporter turns only). `id` and `source` are optional; other
columns are kept in `Dialogue.extra`.
"""

import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from csc_train.data.strategies import Strategy, parse_strategy
from csc_train.errors import InputError
from csc_train.files import atomic_path, digest, os_errors

logger = logging.getLogger(__name__)

HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
SURROGATE = "lone surrogate, which UTF-8 cannot hold"


class Speaker(Enum):
    """Who says a turn; the value is the published data's name."""

    SUPPORTER = "客服"
    CUSTOMER = "客户"

    @classmethod
    def parse(cls, name: Any) -> "Speaker":
        """The speaker called `name`: the data's Chinese name, or `supporter`/`customer`.

        Raises:
            ValueError: any other value.
        """
        for speaker in cls:
            if name in (speaker.value, speaker.name.lower()):
                return speaker
        raise ValueError(name)


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. `text` has no outer white space; `strategy` is set on supporter turns and None otherwise."""

    speaker: Speaker
    text: str
    strategy: Strategy | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation: strictly alternating turns, the supporter first.

    `id` names the dialogue in every output. `source` says which data set it belongs to.
    """

    id: str
    turns: tuple[Turn, ...]
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of speakers, strategies and texts: equal for equal conversations, whatever their ids."""
        return digest([[t.speaker.value, t.strategy.number if t.strategy else 0, t.text] for t in self.turns])

    @property
    def supporter_turns(self) -> list[int]:
        """Indices into `turns` of the supporter's turns."""
        return [index for index, turn in enumerate(self.turns) if turn.speaker is Speaker.SUPPORTER]

    @property
    def text(self) -> str:
        """The texts of all turns, one line per turn."""
        return "\n".join(turn.text for turn in self.turns)

    def row(self) -> dict[str, Any]:
        """The row of a dialogue file that reads back as this dialogue."""
        turns = [
            {"speaker": t.speaker.value, "strategy": t.strategy.label if t.strategy else "", "text": t.text}
            for t in self.turns
        ]
        return {"id": self.id, "dialogue": turns, "source": self.source, **self.extra}


def data_digest(dialogues: Iterable[Dialogue]) -> str:
    """SHA-256 (hex) over the dialogues' ids and contents, in order."""
    return digest([[dialogue.id, dialogue.fingerprint] for dialogue in dialogues])


@dataclass(frozen=True)
class ValidationIssue:
    """Why a row is refused. `turn` counts from 1; None where the problem is the row's own."""

    turn: int | None
    field: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        place = f"turn {self.turn}, " if self.turn else ""
        return f"{place}field {self.field}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class RejectedRow:
    """A refused row: its file, row (from 1; the line of a JSONL file), what is wrong, and the row as it was read."""

    file: str
    row: int
    problems: tuple[ValidationIssue, ...]
    record: Any

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, {self.problems[0]}"


@dataclass
class ReadReport:
    """The account of a reading: `rows == accepted + len(rejects) + sum(unselected.values())`."""

    path: str
    rows: int = 0
    accepted: int = 0
    unselected: Counter = field(default_factory=Counter)
    """Rows of other sources, counted by source."""
    rejects: list[RejectedRow] = field(default_factory=list)

    def summary(self) -> str:
        """The account as a few lines of text, with a table of reasons."""
        lines = [f"{self.path}: {self.rows} rows, {self.accepted} accepted, {len(self.rejects)} refused"]
        if self.unselected:
            lines[0] += f", {sum(self.unselected.values())} of other sources"
        reasons = Counter((p.field, p.kind) for reject in self.rejects for p in reject.problems[:1])
        lines += [f"  {count:>6}  {name}: {kind}" for (name, kind), count in reasons.most_common()]
        return "\n".join(lines)

    def write_rejects(self, path: str | os.PathLike) -> None:
        """Write the refused rows to `path` as JSONL, each with its file, row, problems and the row itself."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for reject in self.rejects:
                problems = [{**vars(problem), "reason": str(problem)} for problem in reject.problems]
                line = {"file": reject.file, "row": reject.row, "problems": problems, "record": reject.record}
                # Escaped, because a refused row may hold what UTF-8 cannot.
                file.write(json.dumps(line, default=str) + "\n")


@dataclass(frozen=True)
class _UnreadableRow:
    """Stands for a row whose bytes are not a JSON value."""

    raw: str
    reason: str


def iter_dialogues(
    path: str | os.PathLike, *, source: str | None = None, strict: bool = False, report: ReadReport | None = None
) -> Iterator[Dialogue]:
    """Read dialogues one by one from a `.json` list, a `.jsonl` or `.parquet` file, or a Hugging Face data set.

    Args:
        path: a file, or the id of a data set (`owner/name`), whose `train` split is read. JSONL, Parquet and hub data
            sets are streamed.
        source: keep only the rows whose `source` is this.
        strict: stop at the first bad row; otherwise bad rows are collected in `report`.
        report: filled while reading.

    Raises:
        InputError: the file is missing or unreadable as a whole, no row has the wanted source (the sources found are
            listed), no row is left, or `strict` and a row is bad.
    """
    report = report if report is not None else ReadReport(str(path))
    seen: Counter[str] = Counter()
    for number, record in _records(path):
        report.rows += 1
        if source is not None and isinstance(record, dict) and _source(record) != source:
            report.unselected[_source(record)] += 1
            continue
        dialogue, problems = _check(record, seen)
        if problems:
            reject = RejectedRow(
                str(path), number, tuple(problems), record.raw if isinstance(record, _UnreadableRow) else record
            )
            report.rejects.append(reject)
            if strict:
                raise InputError(str(reject))
            continue
        report.accepted += 1
        yield dialogue
    if report.accepted == 0:
        if report.unselected and not any(isinstance(reject.record, dict) for reject in report.rejects):
            found = ", ".join(f"{name!r} ({count})" for name, count in report.unselected.most_common())
            raise InputError(f"{path}: no row has source {source!r}; found: {found}")
        if report.rejects:
            raise InputError(f"{path}: every row is refused; the first: {report.rejects[0]}")
        raise InputError(f"{path}: no rows")


def read_dialogues(
    path: str | os.PathLike,
    *,
    source: str | None = None,
    strict: bool = False,
    rejects_path: str | os.PathLike | None = None,
) -> list[Dialogue]:
    """Read all dialogues of `path` (see `iter_dialogues`).

    Unless `strict`, bad rows are logged, counted and kept in `rejects_path`.

    Raises:
        InputError: as `iter_dialogues`.
    """
    report = ReadReport(str(path))
    try:
        return list(iter_dialogues(path, source=source, strict=strict, report=report))
    finally:
        if report.rejects and not strict:
            logger.info(report.summary())
            if rejects_path is not None:
                report.write_rejects(rejects_path)
                logger.info("  refused rows are in %s", rejects_path)


def write_dialogues(path: str | os.PathLike, dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues to a `.jsonl` or `.parquet` file, whole or not at all.

    Extra values that JSON does not know, such as dates, become text in JSONL. In Parquet, a column that only some rows
    have is null in the others.

    Raises:
        InputError: another suffix, the file cannot be written, or a column's values have no common Parquet type.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for dialogue in dialogues:
                file.write(json.dumps(dialogue.row(), ensure_ascii=False, default=str) + "\n")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        rows = [dialogue.row() for dialogue in dialogues]
        # Arrow takes the columns from the first row alone.
        columns = dict.fromkeys(name for row in rows for name in row)
        try:
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
            with atomic_path(path) as temporary:
                pyarrow.parquet.write_table(table, temporary)
        except (pyarrow.ArrowException, OverflowError) as error:
            raise InputError(f"{path}: cannot write: {_first_line(error)}") from error
    else:
        raise InputError(f"{path}: dialogues are written as .jsonl or .parquet")


def _records(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, decoded row or `_UnreadableRow`)."""
    file = Path(path)
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    if file.suffix in readers:
        with os_errors(file, "cannot read"):
            yield from readers[file.suffix](file)
    elif HUB_ID_PATTERN.fullmatch(str(path)) and not file.is_file():
        yield from _hub_records(str(path))
    elif file.exists():
        raise InputError(f"{file}: not a dialogue file; known are {', '.join(FILE_SUFFIXES)}")
    else:
        raise InputError(f"{path}: no such file, nor the id of a Hugging Face data set")


def _json_records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON: {_first_line(error)}") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: expected a JSON list of dialogues, found {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _jsonl_records(file: Path) -> Iterator[tuple[int, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            # Without its end, so that a line cut short is wrong at its last column.
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"column {error.colno}: {error.msg}"
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start}"
            except (ValueError, RecursionError) as error:
                # Python's own limits: a number of thousands of digits, nesting too deep.
                reason = _first_line(error)
            else:
                yield number, record
                continue
            yield number, _UnreadableRow(line.decode("utf-8", "replace"), reason)


def _parquet_records(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here because Arrow words a missing file in its own way.
        with open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not a Parquet file: {_first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: holds a text that is not UTF-8") from error


def _hub_records(name: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        # A cached copy cannot be streamed, so offline it is read whole.
        rows = datasets.load_dataset(name, split="train", streaming=not datasets.config.HF_HUB_OFFLINE)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{name}: cannot load the data set from the Hugging Face hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _source(record: dict[str, Any]) -> str:
    return _text(record.get("source"))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _check(record: Any, seen: Counter[str]) -> tuple[Dialogue | None, list[ValidationIssue]]:
    """Turn a row into a dialogue, or say everything that is wrong with it. `seen` counts the ids given so far."""
    if isinstance(record, _UnreadableRow):
        return None, [ValidationIssue(None, "row", "broken JSON", record.reason)]
    if not isinstance(record, dict):
        return None, [ValidationIssue(None, "row", "not an object", type(record).__name__)]
    rows = record.get("dialogue")
    if not isinstance(rows, list):
        return None, [ValidationIssue(None, "dialogue", "missing" if rows is None else "not a list")]
    problems: list[ValidationIssue] = []
    turns = [_check_turn(number, row, problems) for number, row in enumerate(rows, start=1)]
    if not problems:
        problems += _check_order(turns)
    for name, value in record.items():
        if name in ("id", "source") and not isinstance(value, str | int | None):
            problems.append(ValidationIssue(None, name, "not a text", type(value).__name__))
        elif name != "dialogue" and has_surrogate(json.dumps([name, value], ensure_ascii=False, default=str)):
            problems.append(ValidationIssue(None, ascii(name)[1:-1], SURROGATE))
    if problems:
        return None, problems
    extra = {key: value for key, value in record.items() if key not in ("id", "dialogue", "source")}
    dialogue = Dialogue(_text(record.get("id")), tuple(turns), _source(record), extra)
    given = bool(dialogue.id)
    name = dialogue.id or dialogue.fingerprint[:16]
    seen[name] += 1
    if seen[name] > 1:
        if given:
            return None, [ValidationIssue(None, "id", "used by an earlier row", repr(name))]
        name = f"{name}-{seen[name]}"
        seen[name] += 1
    return Dialogue(name, dialogue.turns, dialogue.source, extra), []


def _check_turn(number: int, row: Any, problems: list[ValidationIssue]) -> Turn | None:
    if not isinstance(row, dict):
        problems.append(ValidationIssue(number, "turn", "not an object", type(row).__name__))
        return None
    before = len(problems)
    speaker = strategy = None
    try:
        speaker = Speaker.parse(row.get("speaker"))
    except ValueError:
        problems.append(ValidationIssue(number, "speaker", "unknown speaker", repr(row.get("speaker"))))
    text = row.get("text")
    if not isinstance(text, str):
        problems.append(ValidationIssue(number, "text", "not a text", type(text).__name__))
    elif not (text := text.strip()):
        problems.append(ValidationIssue(number, "text", "empty"))
    elif has_surrogate(text):
        problems.append(ValidationIssue(number, "text", SURROGATE))
    label = _text(row.get("strategy")).strip()
    if speaker is Speaker.SUPPORTER:
        try:
            strategy = parse_strategy(label) if label else None
        except ValueError as error:
            kind = "two strategies" if str(error).startswith("more than one") else "unknown strategy"
            problems.append(ValidationIssue(number, "strategy", kind, repr(label)))
        else:
            if strategy is None:
                problems.append(ValidationIssue(number, "strategy", "missing on a supporter turn"))
    elif speaker is Speaker.CUSTOMER and label:
        problems.append(ValidationIssue(number, "strategy", "given on a customer turn", repr(label)))
    return Turn(speaker, text, strategy) if len(problems) == before else None


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a pair of UTF-16, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_order(turns: list[Turn]) -> Iterator[ValidationIssue]:
    if not any(turn.speaker is Speaker.SUPPORTER for turn in turns):
        yield ValidationIssue(None, "dialogue", "no supporter turn")
        return
    if turns[0].speaker is Speaker.CUSTOMER:
        yield ValidationIssue(1, "speaker", "the customer speaks first")
    for number, (turn, following) in enumerate(itertools.pairwise(turns), start=2):
        if turn.speaker is following.speaker:
            yield ValidationIssue(number, "speaker", "the same speaker twice running", following.speaker.value)
