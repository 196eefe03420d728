"""The shapes of published data sets and chat files, and the registry to which plugins add others.

Sources: the ESConv and ABCD repositories (thu-coai, asappresearch), ShareGPT as LLaMA-Factory's data README describes
it, and the messages of OpenAI's chat API.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csc_train.conversion.config import FORMAT_NAMES, ConvertConfig
from csc_train.data.records import find_files, iter_records, read_decoded
from csc_train.errors import InputError
from csc_train.jsonl import BadLine
from csc_train.plugins import note_registration

ROLES = {
    "supporter": "supporter", "gpt": "supporter", "assistant": "supporter", "listener": "supporter",
    "sys": "supporter", "agent": "supporter",
    "customer": "customer", "human": "customer", "user": "customer", "seeker": "customer", "speaker": "customer",
    "usr": "customer",
    "system": "system", "developer": "system",
    "function_call": "drop", "observation": "drop", "tool": "drop", "function": "drop", "action": "drop",
}  # fmt: skip
"""Who the speakers of all formats are. The text of a dropped one is left out and counted; its label stays."""


CSV_SUFFIXES = (".csv", ".tsv", ".txt")
"""Of files of from=csv; a suffix of a compression may follow."""


@dataclass(frozen=True)
class SourceTurn:
    """An utterance: the speaker by the name in its data (see `ROLES`), the text, and a label if there is one."""

    speaker: Any
    text: Any
    label: Any = None


@dataclass
class SourceDialogue:
    """A dialogue of another shape.

    Attributes:
        turns: in order.
        id: its name; empty if it has none.
        extra: columns to keep.
        dropped: what the format leaves out besides turns, by name.
    """

    turns: list[SourceTurn]
    id: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


ReadFn = Callable[[dict[str, Any]], SourceDialogue]
RecordsFn = Callable[[ConvertConfig], Iterator[tuple[Any, int, Any]]]


@dataclass(frozen=True)
class Format:
    """A registered format: its functions, and the path of its table of strategies, if it has one."""

    read: ReadFn
    records: RecordsFn
    strategies: Path | None


FORMATS: dict[str, Format] = {}
"""By the value of `format`."""


def json_records(config: ConvertConfig) -> Iterator[tuple[Any, int, Any]]:
    """(file, row number, record) of JSON, JSONL, Parquet and hub data."""
    yield from iter_records(config.input, config.encoding)


def csv_records(config: ConvertConfig) -> Iterator[tuple[Any, int, Any]]:
    """(file, row number of its first turn, `{"id", "turns"}`) of each dialogue of CSV files.

    Of comma, semicolon and tab, the one that is most in the header separates. The turns of a dialogue need not follow
    each other.

    Raises:
        InputError: a file cannot be read or lacks a column.
    """
    names = vars(config.columns)
    for file in find_files(config.input, CSV_SUFFIXES):
        text = read_decoded(file, config.encoding)
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        dialogues: dict[str, tuple[int, list[dict[str, Any]]]] = {}
        try:
            found = table.fieldnames or ["none"]
            if missing := [each for each in names.items() if each[0] != "strategy" and each[1] not in found]:
                wanted, has = missing[0], ", ".join(found)
                raise InputError(f"{file}: column {wanted[1]!r} is missing; found {has}: say columns.{wanted[0]}=NAME")
            for number, row in enumerate(table, start=2):
                turn = {key: row.get(name) for key, name in names.items()}
                dialogues.setdefault(turn["id"] or "", (number, []))[1].append(turn)
        except csv.Error as error:
            raise InputError(f"{file}, line {table.line_num}: {error}: correct the line") from error
        for name, (number, turns) in dialogues.items():
            yield file, number, {"id": name, "turns": turns} if name else BadLine("", f"column {names['id']}: empty")


def dialogue_format(
    name: str, records: RecordsFn = json_records, strategies: Path | None = None
) -> Callable[[ReadFn], ReadFn]:
    """Register a function that turns a record into a `SourceDialogue` as the format `name`.

    It raises a ValueError, whose text is the reason, for a record of another shape.

    Args:
        records: where records come from, by the configuration.
        strategies: the format's table (see `strategy_table.read_table`).

    Raises:
        InputError: the name is taken.
    """

    def register(function: ReadFn) -> ReadFn:
        if name in FORMATS:
            raise InputError(f"format {name}: the name is taken: choose another")
        FORMATS[name] = Format(function, records, strategies)
        if name not in FORMAT_NAMES:
            FORMAT_NAMES.append(name)
        note_registration(function.__module__)
        return function

    return register


def list_of(record: dict[str, Any], name: str) -> list[Any]:
    """The list in a field of a record; ValueError if there is none, naming the fields that there are."""
    value = record.get(name)
    if not isinstance(value, list):
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"field {name}: " + (f"missing; found {found}" if value is None else "not a list"))
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number}: not an object")
    return value


@dialogue_format("sharegpt")
def read_sharegpt(record: dict[str, Any]) -> SourceDialogue:
    """`conversations` of `{from, value}`, with `system` and `tools` beside; a turn may have a `strategy`."""
    turns = [
        SourceTurn(turn.get("from"), turn.get("value"), turn.get("strategy"))
        for turn in list_of(record, "conversations")
    ]
    if record.get("system"):
        turns.insert(0, SourceTurn("system", record["system"]))
    tools = record.get("tools") not in (None, "", "[]", [])
    return SourceDialogue(turns, record.get("id"), dropped=Counter({"tools": 1} if tools else ()))


@dialogue_format("openai")
def read_openai(record: dict[str, Any]) -> SourceDialogue:
    """`messages` of `{role, content}`; content is a text, a list of parts or null; a message may have a `strategy`."""
    dropped: Counter[str] = Counter({"tools": 1} if record.get("tools") else ())
    turns = []
    for number, message in enumerate(list_of(record, "messages"), start=1):
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part_text(number, part) for part in content)
        if content is None:
            content = message.get("refusal")
        calls = message.get("tool_calls") or ([1] if message.get("function_call") else [])
        dropped += Counter({"tool calls": len(calls)})
        turns.append(SourceTurn(message.get("role"), content, message.get("strategy")))
    return SourceDialogue(turns, record.get("id"), dropped=dropped)


def _part_text(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise ValueError(f"turn {number}: content of type {kind}: only text is trained")
    return str(part.get("refusal" if kind == "refusal" else "text") or "")


@dialogue_format("esconv", strategies=Path(__file__).parent / "strategies.esconv.yaml")
def read_esconv(record: dict[str, Any]) -> SourceDialogue:
    """`dialog` of `{speaker, annotation: {strategy}, content}`, of ESConv and FailedESConv."""
    turns = []
    for turn in list_of(record, "dialog"):
        notes = turn.get("annotation")
        label = notes.get("strategy") if isinstance(notes, dict) else turn.get("strategy")
        turns.append(SourceTurn(turn.get("speaker"), turn.get("content", turn.get("text")), label))
    kept = ("experience_type", "emotion_type", "problem_type", "situation")
    return SourceDialogue(turns, extra={name: record[name] for name in kept if name in record})


@dialogue_format("abcd", strategies=Path(__file__).parent / "strategies.abcd.yaml")
def read_abcd(record: dict[str, Any]) -> SourceDialogue:
    """`original` of `[speaker, text]` pairs, with the action or next step in the `targets` of `delexed`."""
    steps = list_of(record, "delexed") if record.get("delexed") is not None else []
    said = record.get("original")
    if said is None:
        said = [[turn.get("speaker"), turn.get("text")] for turn in steps]
    if not isinstance(said, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in said) or not said:
        raise ValueError("field original: not a list of pairs of speaker and text")
    if steps and len(steps) != len(said):
        raise ValueError(f"field delexed: {len(steps)} turns, but original has {len(said)}")
    targets = [turn.get("targets") or [] for turn in steps] or [[]] * len(said)
    turns = [
        SourceTurn(speaker, text, next(filter(None, reversed(target[1:3])), None))
        for (speaker, text), target in zip(said, targets, strict=True)
    ]
    scenario = record.get("scenario")
    extra = {name: scenario[name] for name in ("flow", "subflow") if name in scenario} if scenario else {}
    return SourceDialogue(turns, record.get("convo_id"), extra)


@dialogue_format("csv", csv_records)
def read_csv(record: dict[str, Any]) -> SourceDialogue:
    """The rows of one dialogue, by the names in `ConvertConfig.columns`."""
    return SourceDialogue(
        [SourceTurn(turn["speaker"], turn["text"], turn["strategy"]) for turn in record["turns"]], record["id"]
    )
