"""Read, check and write dialogue files.

A row of a dialogue file is an object with a `dialogue` list of `{"speaker", "strategy", "text"}` turns, as in the
published data (speakers `客服` and `客户`, a strategy on supporter turns only). Either speaker may open a dialogue.
Consecutive turns of one speaker are joined. A supporter turn may list further admissible strategies as `accepted`. `id`
and `source` are optional; other columns are kept in `Dialogue.extra`.
"""

import contextlib
import functools
import itertools
import json
import logging
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from csc_train.data.dialogue import SURROGATE, Dialogue, Speaker, Turn, has_surrogate, join_speakers
from csc_train.data.records import first_line, iter_records, paths_text
from csc_train.data.strategies import Strategy, nearest_label, parse_strategy
from csc_train.errors import InputError, suggestion
from csc_train.files import atomic_path
from csc_train.invisible import is_blank, strip_invisible
from csc_train.jsonl import BadLine, read_jsonl, write_jsonl

logger = logging.getLogger(__name__)
Checked = TypeVar("Checked")

_MEDIA = re.compile(r"<\|(?:vision|image|video|audio)_\w+\|>")
"""Control strings that stand for an image, a video or sound."""
_MEDIA_PART = re.compile(r'"(?:input_)?(?:image|video|audio)(?:_url)?"')
"""Type or name of a part of a message that holds one."""
TURN_COLUMNS = {"csc": "dialogue", "chat": "messages"}
"""The column of a row that holds its turns, by kind of dialogue."""


@dataclass(frozen=True)
class ValidationIssue:
    """A reason why a row is rejected. `turn` counts from 1; None for an issue of the whole row."""

    turn: int | None
    field: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        place = f"turn {self.turn}, " if self.turn else ""
        return f"{place}field {self.field}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class RejectedRow:
    """A rejected row: its file, its number (from 1; the line of a JSONL file), its issues, and the row as read."""

    file: str
    row: int
    issues: tuple[ValidationIssue, ...]
    record: Any

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, {self.issues[0]}"


@dataclass
class ReadReport:
    """The counts of one reading: `rows == accepted + len(rejected) + sum(other_sources.values())`."""

    path: str
    rows: int = 0
    accepted: int = 0
    other_sources: Counter = field(default_factory=Counter)
    """Rows of other sources, counted by source."""
    merged: int = 0
    """Accepted rows with consecutive turns of one speaker, which were joined."""
    merged_turns: int = 0
    """Their turns that were joined to the one before."""
    rejected: list[RejectedRow] = field(default_factory=list)
    place: tuple[Any, int] = ("", 0)
    """File and number of the row that was read last."""
    settings: str = "data."
    """Place of the setting `max_rejected` in the recipe, for messages."""

    def summary(self) -> str:
        """The counts as a few lines of text, with a table of reasons."""
        lines = [f"{self.path}: {self.rows} rows, {self.accepted} accepted, {len(self.rejected)} rejected"]
        if self.other_sources:
            lines[0] += f", {sum(self.other_sources.values())} of other sources"
        if self.merged:
            lines.append(
                f"  {self.merged:>6}  rows: {self.merged_turns} turns joined to the same speaker's turn before "
                "(data.merge_turns=off rejects such rows)"
            )
        lines += [f"  {count:>6}  {reason}" for reason, count in self._counted()]
        return "\n".join(lines)

    @property
    def checked(self) -> int:
        """Rows of the wanted source."""
        return self.accepted + len(self.rejected)

    def _counted(self) -> list[tuple[str, int]]:
        """The first reasons of the rejected rows, the most frequent first."""
        return Counter(f"{row.issues[0].field}: {row.issues[0].kind}" for row in self.rejected).most_common()

    def reasons(self) -> str:
        """The reasons by count, if there are several; the first rejected row; its fields, where one is missing."""
        counted = [f"{count} {reason}" for reason, count in self._counted()]
        said = f" ({', '.join(counted[:5])})" if len(counted) > 1 else ""
        return f"{said}; the first: {self.rejected[0]}{_fields_found(self.rejected[0])}"

    def write_rejected(self, path: str | os.PathLike, records: bool = True) -> None:
        """Write the rejected rows to `path` as JSONL: file, row, issues, and the record (null without `records`)."""
        rows = (
            vars(row if records else replace(row, record=None))
            | {"issues": [{**vars(issue), "reason": str(issue)} for issue in row.issues]}
            for row in self.rejected
        )
        write_jsonl(path, rows, ascii_only=True, default=str)

    def conclude(self, rejected_path: str | os.PathLike | None, records: bool = True) -> None:
        """Log the counts if rows were rejected or turns joined, and write the rejected rows (see `write_rejected`)."""
        if self.rejected or self.merged:
            logger.info(self.summary())
        if self.rejected and rejected_path is not None:
            self.write_rejected(rejected_path, records)
            logger.info(f"  rejected rows are in {rejected_path}")


class ReadOptions(TypedDict, total=False):
    """Keywords of `iter_checked` that those who call it pass through."""

    source: str | None
    strict: bool
    max_rejected: float
    encoding: str | None


def iter_dialogues(
    path: str | os.PathLike | list[str],
    *,
    report: ReadReport | None = None,
    merge: bool = True,
    check: "RowCheck | None" = None,
    **options: Unpack[ReadOptions],
) -> Iterator[Dialogue]:
    """Read dialogues one by one from JSON, JSONL or Parquet files, or a Hugging Face data set.

    Args:
        path: as in `iter_records`. JSONL, Parquet and hub data sets (the `train` split) are streamed.
        report: filled while reading.
        merge: join consecutive turns of one speaker; otherwise such a row is bad.
        check: turns a row into a dialogue: `check_row` (the default), or `chats.check_chat`.
        options: as of `iter_checked`.

    Raises:
        InputError: the file is missing or unreadable as a whole; no row has the wanted source (the message lists the
            sources found); no row is left; too many are bad; or `strict` and a row is bad.
    """
    report = report if report is not None else ReadReport(paths_text(path))
    seen: Counter[str] = Counter()

    def checked(record: Any, file: Any, number: int) -> tuple[Dialogue | None, list[ValidationIssue]]:
        return (check or check_row)(record, seen, merge)

    for record, dialogue in iter_checked(path, checked, report, **options):
        if joined := len(record[TURN_COLUMNS[dialogue.kind]]) - bool(dialogue.system) - len(dialogue.turns):
            report.merged, report.merged_turns = report.merged + 1, report.merged_turns + joined
        yield dialogue


def iter_checked(
    path: str | os.PathLike | list[str],
    check: Callable[[Any, Any, int], tuple[Checked | None, list[ValidationIssue]]],
    report: ReadReport,
    *,
    source: str | None = None,
    strict: bool = False,
    max_rejected: float = 1.0,
    encoding: str | None = None,
) -> Iterator[tuple[Any, Checked]]:
    """Yield (row, what `check` makes of it) of rows of any shape; errors as of `iter_dialogues`.

    Args:
        path: as in `iter_records`.
        check: turns a row, with its file and number, into an object, or lists its issues.
        report: filled while reading.
        source: keep only the rows with this `source`.
        strict: stop at the first bad row; otherwise bad rows are collected in `report`.
        max_rejected: greatest share of bad rows, which is checked after the last row.
        encoding: codec of JSON and JSONL files; None is UTF-8.
    """
    for file, number, read in iter_records(path, encoding):
        report.rows, report.place = report.rows + 1, (file, number)
        record = _unpacked(read)
        if source is not None and isinstance(record, dict) and _text(record.get("source")) != source:
            report.other_sources[_text(record.get("source"))] += 1
            continue
        checked, issues = check(record, file, number)
        if checked is None:
            raw = read.text if isinstance(read, BadLine) else read
            rejected = RejectedRow(str(file), number, tuple(issues), raw)
            report.rejected.append(rejected)
            if strict:
                raise InputError(str(rejected))
            continue
        report.accepted += 1
        yield record, checked
    if report.accepted == 0:
        if report.other_sources and not any(isinstance(row.record, dict) for row in report.rejected):
            found = ", ".join(f"{name!r} ({count})" for name, count in report.other_sources.most_common())
            raise InputError(f"{report.path}: no row has source {source!r}; found: {found}")
        if report.rejected:
            raise InputError(f"{report.path}: every row is rejected{report.reasons()}")
        raise InputError(f"{report.path}: no rows")
    if len(report.rejected) > max_rejected * report.checked:
        key = f"{report.settings}max_rejected"
        raise InputError(
            f"{report.path}: {len(report.rejected)} of {report.checked} rows are rejected, above "
            f"{key}={max_rejected}{report.reasons()}: correct the rows, or raise {key}"
        )


def read_dialogues(
    path: str | os.PathLike | list[str],
    *,
    merge: bool = True,
    check: "RowCheck | None" = None,
    rejected_path: str | os.PathLike | None = None,
    **options: Unpack[ReadOptions],
) -> list[Dialogue]:
    """Read all dialogues of `path`; other arguments as of `iter_dialogues`.

    Unless `strict`, bad rows are counted in the log and written to `rejected_path`. Joined turns are counted there too.

    Raises:
        InputError: as `iter_dialogues`.
    """
    report = ReadReport(paths_text(path))
    try:
        return list(iter_dialogues(path, report=report, merge=merge, check=check, **options))
    finally:
        if not (options.get("strict") and report.rejected):
            report.conclude(rejected_path)


def read_accept_sets(path: str | os.PathLike | None, dialogues: Sequence[Dialogue]) -> Sequence[Dialogue]:
    """The dialogues with the accept sets of a JSONL file; None changes nothing.

    Each line has `dialogue_id`, `turn` (from 0, customer turns count) and `accepted`, as a turn of a dialogue file has
    it. Turns without a line keep their own set. Lines of other dialogues are counted in the log.

    Raises:
        InputError: the file cannot be read, a line has another form, its turn is no supporter turn or stands in a line
            before, or no line is of these dialogues.
    """
    if path is None:
        return dialogues
    by_id = {dialogue.id: dialogue for dialogue in dialogues}

    def parse(row: dict[str, Any]) -> tuple[tuple[str, int], tuple[Strategy, ...]]:
        name, turn, labels = row["dialogue_id"], row["turn"], row["accepted"]
        if type(name) not in (str, int):
            raise ValueError("field dialogue_id: not a text")
        if type(turn) is not int:
            raise ValueError("field turn: not a whole number")
        dialogue = by_id.get(str(name))
        if dialogue and turn not in dialogue.supporter_turns:
            raise ValueError(
                f"field turn: {turn} is no supporter turn of dialogue {name} (from 0, customer turns count)"
            )
        issues = [] if labels is not None else [ValidationIssue(None, "accepted", "not a list", "null")]
        accepted = _accept_set(None, dialogue.turns[turn].strategy if dialogue else None, labels, issues)
        if issues:
            raise ValueError(str(issues[0]))
        return (str(name), turn), accepted

    rows = read_jsonl(path, parse, key=lambda row: f"turn {row[0][1]} of dialogue {row[0][0]}")
    sets = {place: accepted for _, (place, accepted) in rows}
    if strange := [name for name, _ in sets if name not in by_id]:
        logger.info(f"note: {path}: {len(strange)} of {len(sets)} lines are of other dialogues, such as {strange[0]}")
    if len(strange) == len(sets):
        raise InputError(f"{path}: no line is of these dialogues: give the ids of dialogues.jsonl in the run directory")

    def changed(name: str, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        return tuple(replace(turn, accepted=sets.get((name, n), turn.accepted)) for n, turn in enumerate(turns))

    return [replace(dialogue, turns=changed(dialogue.id, dialogue.turns)) for dialogue in dialogues]


def write_dialogues(path: str | os.PathLike, dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues to a `.jsonl` or `.parquet` file, atomically.

    Extra values that JSON does not know, such as dates, become text in JSONL. In Parquet, missing columns are null.

    Raises:
        InputError: another suffix, the file cannot be written, or a column's values have no common Parquet type.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        write_jsonl(path, (dialogue.row() for dialogue in dialogues), default=str)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        rows = [dialogue.row() for dialogue in dialogues]
        # Arrow takes the columns from the first row only.
        columns = dict.fromkeys(name for row in rows for name in row)
        try:
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
            with atomic_path(path) as temporary:
                pyarrow.parquet.write_table(table, temporary)
        except (pyarrow.ArrowException, OverflowError) as error:
            raise InputError(f"{path}: cannot write: {first_line(error)}") from error
    else:
        raise InputError(f"{path}: cannot write this file type: use .jsonl or .parquet")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _fields_found(row: RejectedRow) -> str:
    """The fields of a rejected row, or of its turn, and the one nearest to the wanted field, if that is not there."""
    issue, found = row.issues[0], row.record
    if issue.turn and isinstance(found, dict):
        turns = next((found[name] for name in TURN_COLUMNS.values() if isinstance(found.get(name), list)), [])
        found = turns[issue.turn - 1] if issue.turn <= len(turns) else None
    if not isinstance(found, dict) or issue.field in found or issue.field in ("row", "turn"):
        return ""
    names = ", ".join(map(str, list(found)[:12])) or "none"
    return f"; fields found: {names}; wanted: {issue.field}.{suggestion(issue.field, map(str, found))}"


def _unpacked(record: Any) -> Any:
    """A row without the traces of tables: whole numbers as floats, NaN for nothing, a list of turns as JSON text."""
    if not isinstance(record, dict):
        return record
    changed = {name: _whole(record[name]) for name in ("id", "source") if isinstance(record.get(name), float)}
    for name in TURN_COLUMNS.values():
        if isinstance(text := record.get(name), str) and text.lstrip()[:1] == "[":
            with contextlib.suppress(ValueError, RecursionError):
                changed[name] = json.loads(text)
    return record | changed if changed else record


def _whole(value: float) -> float | int | None:
    """A float that pandas made of an integer, or of nothing; others, which may have lost digits, stay."""
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


RowCheck = Callable[[Any, Counter[str], bool], tuple[Dialogue | None, list[ValidationIssue]]]
"""Turns a row into a dialogue, or lists its issues; see `check_row`."""


def _csc_turns(rows: list[Any], issues: list[ValidationIssue]) -> tuple[list[Turn | None], str]:
    return [_check_turn(number, row, issues) for number, row in enumerate(rows, start=1)], ""


def check_row(
    record: Any,
    seen: Counter[str],
    merge: bool,
    kind: str = "csc",
    read_turns: Callable[[list[Any], list[ValidationIssue]], tuple[list[Any], str]] = _csc_turns,
) -> tuple[Dialogue | None, list[ValidationIssue]]:
    """Turn a row into a dialogue, or list its issues.

    Args:
        seen: counts the ids given so far.
        merge: join consecutive turns of one speaker.
        read_turns: makes turns and a system prompt of the list in the column of this kind, or adds issues.
    """
    if issues := check_object(record):
        return None, issues
    column = TURN_COLUMNS[kind]
    if not isinstance(rows := record.get(column), list):
        issues.append(ValidationIssue(None, column, "missing" if rows is None else "not a list"))
    turns, system = read_turns(rows, issues) if not issues else ([], "")
    if not issues and merge and _repeats(turns):
        turns = [_joined(together, text) for together, text in join_speakers(turns)]
    if not issues:
        issues += _check_order(turns)
    for name, value in record.items():
        if name in ("id", "source") and not isinstance(value, str | int | None):
            issues.append(ValidationIssue(None, name, "not a text", type(value).__name__))
        elif name != column and has_surrogate(json.dumps([name, value], ensure_ascii=False, default=str)):
            issues.append(ValidationIssue(None, ascii(name)[1:-1], SURROGATE))
    if issues:
        return None, issues
    extra = {key: value for key, value in record.items() if key not in ("id", "source", column)}
    dialogue = Dialogue(_text(record.get("id")), tuple(turns), _text(record.get("source")), extra, kind, system)
    given = bool(dialogue.id)
    name = dialogue.id or dialogue.fingerprint[:16]
    seen[name] += 1
    if seen[name] > 1:
        if given:
            return None, [ValidationIssue(None, "id", "used by an earlier row", repr(name))]
        name = f"{name}-{seen[name]}"
        seen[name] += 1
    return dialogue if given else replace(dialogue, id=name), []


def check_object(record: Any) -> list[ValidationIssue]:
    """The issue of a row that is no object; none for others."""
    if isinstance(record, BadLine):
        return [ValidationIssue(None, "row", "broken JSON", record.reason)]
    return [] if isinstance(record, dict) else [ValidationIssue(None, "row", "not an object", type(record).__name__)]


def check_text(number: int, field: str, text: Any, issues: list[ValidationIssue]) -> str:
    """The text of a turn without outer white space, or "" and one issue more."""
    media = _MEDIA.search(text) if isinstance(text, str) else _MEDIA_PART.search(json.dumps(text, default=str))
    if media:
        issues.append(
            ValidationIssue(number, field, "image, video or sound: only text is trained: take it out", media[0])
        )
    elif not isinstance(text, str):
        issues.append(ValidationIssue(number, field, "not a text", type(text).__name__))
    elif is_blank(text):
        issues.append(ValidationIssue(number, field, "empty"))
    elif has_surrogate(text):
        issues.append(ValidationIssue(number, field, SURROGATE))
    else:
        return text.strip()
    return ""


# A file has few of them.
_speaker = functools.lru_cache(maxsize=1000)(Speaker.parse)
_label = functools.lru_cache(maxsize=1000)(strip_invisible)


def _check_turn(number: int, row: Any, issues: list[ValidationIssue]) -> Turn | None:
    if not isinstance(row, dict):
        issues.append(ValidationIssue(number, "turn", "not an object", type(row).__name__))
        return None
    before = len(issues)
    speaker, strategy, accepted = None, None, ()
    try:
        speaker = _speaker(row.get("speaker"))
    except (ValueError, TypeError):  # TypeError: a list or an object
        issues.append(ValidationIssue(number, "speaker", "unknown speaker", repr(row.get("speaker"))))
    text = check_text(number, "text", row.get("text"), issues)
    label = _label(_text(row.get("strategy")))
    others = row.get("accepted")
    if speaker is Speaker.SUPPORTER:
        if label:
            strategy = _parse_label(number, "strategy", label, issues)
        else:
            issues.append(ValidationIssue(number, "strategy", "missing on a supporter turn"))
        accepted = _accept_set(number, strategy, others, issues)
    elif speaker is Speaker.CUSTOMER:
        for name, value in (("strategy", label), ("accepted", others)):
            if value not in ("", None, []):
                issues.append(ValidationIssue(number, name, "given on a customer turn", repr(value)))
    return Turn(speaker, text, strategy, accepted) if len(issues) == before else None


def _parse_label(number: int | None, name: str, label: str, issues: list[ValidationIssue]) -> Strategy | None:
    try:
        return parse_strategy(label)
    except ValueError as error:
        kind = "two strategies" if str(error).startswith("more than one") else "unknown strategy"
        near = nearest_label(label) if kind.startswith("unknown") else ""
        issues.append(ValidationIssue(number, name, kind, repr(label) + (near and f".{near}")))
        return None


def _accept_set(
    number: int | None, own: Strategy | None, labels: Any, issues: list[ValidationIssue]
) -> tuple[Strategy, ...]:
    """The strategies of a turn's `accepted`, after its own; empty if there are none."""
    if not isinstance(labels, list | None):
        issues.append(ValidationIssue(number, "accepted", "not a list", type(labels).__name__))
        return ()
    if not labels:
        return ()
    parsed = [_parse_label(number, "accepted", _label(_text(each)), issues) for each in labels]
    return tuple(dict.fromkeys(each for each in (own, *parsed) if each))


def _joined(together: list[Turn], text: str) -> Turn:
    """One turn of consecutive turns of a speaker."""
    if len(together) == 1:
        return together[0]
    strategies = [strategy for turn in together for strategy in (turn.strategy, *turn.accepted) if strategy]
    return replace(together[0], text=text, accepted=tuple(dict.fromkeys(strategies)))


def _repeats(turns: list[Turn]) -> bool:
    """Whether a speaker has two turns in a row."""
    speakers = [turn.speaker for turn in turns]
    return any(map(operator.is_, speakers, speakers[1:]))


def _check_order(turns: list[Turn]) -> Iterator[ValidationIssue]:
    if not any(turn.speaker is Speaker.SUPPORTER for turn in turns):
        yield ValidationIssue(None, "dialogue", "no supporter turn")
    elif _repeats(turns):
        for number, (turn, following) in enumerate(itertools.pairwise(turns), start=2):
            if turn.speaker is following.speaker:
                yield ValidationIssue(number, "speaker", "the same speaker twice in a row", following.speaker.value)
