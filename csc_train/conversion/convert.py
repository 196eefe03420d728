"""Turn records of another shape into dialogues or chats, and count what was joined, mapped and left out."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from csc_train.conversion.config import ConvertConfig
from csc_train.conversion.formats import FORMATS, ROLES, SourceDialogue
from csc_train.conversion.strategy_table import find_strategy, read_table
from csc_train.data.chats import check_chat
from csc_train.data.dialogue import ROLES as MESSAGE_ROLES
from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.readers import check_row
from csc_train.data.records import paths_text
from csc_train.data.strategies import OTHERS, Strategy, nearest_label, parse_strategy
from csc_train.errors import InputError
from csc_train.invisible import is_blank, strip_invisible
from csc_train.jsonl import BadLine
from csc_train.terminal_tables import result_table

_BRACKETS = re.compile(r"\s*[\[【]([^\[\]【】]+)[\]】](.*)", re.DOTALL)
"""A label at the start of a text, and the rest."""
_NUMBERED = re.compile(r"turn [0-9]+[,:] ")
ROLE_OF = {"system": "system"} | {speaker.name.lower(): role for speaker, role in MESSAGE_ROLES.items()}


GROUPS = ("records", "left out", "turns", "dropped", "label", "unknown label")
"""What a conversion counts, in the order of the report."""
JOINED, WRITTEN, PREDICTED = (
    ("turns", "joined to the one before"),
    ("turns", "written"),
    ("turns", "labelled by the model"),
)
UNLABELLED = ("turns", "of the supporter without a label")


@dataclass
class ConversionReport:
    """The counts of a conversion, and the records that fit nothing, with file, row and reason.

    Attributes:
        records: read; each is written or in `rejected`.
        counts: by group (see `GROUPS`) and name: what was written, joined, dropped and labelled. Turns without a label,
            and those that the model labelled, are the supporter's after joining; those written are of whole dialogues.
        agreement: of the model with labels by hand (see `labelling.label_agreement`).
    """

    records: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, Any] | None = None

    def reject(self, file: Any, row: int, reason: str) -> None:
        """Count a record that fits nothing."""
        self.rejected.append({"file": str(file), "row": row, "reason": reason})

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """(group, name, count) of everything counted, the most frequent of a group first."""
        reasons = Counter(("left out", _NUMBERED.sub("", row["reason"]).partition(" (")[0]) for row in self.rejected)
        records = {("records", "read"): self.records, ("records", "written"): self.records - len(self.rejected)}
        counted = self.counts + reasons + Counter(records)
        for (group, name), count in sorted(counted.items(), key=lambda each: (GROUPS.index(each[0][0]), -each[1])):
            yield group, f"{name}.{nearest_label(name)}" if group == "unknown label" else name, count

    def table(self, title: str) -> Table:
        """The counts for the terminal."""
        return result_table(title, ("what", "name", "count"), self.rows(), numbers=[2])

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values, with the agreement."""
        counts = [{"what": what, "name": name, "count": count} for what, name, count in self.rows()]
        return {"counts": counts, "agreement": self.agreement}


@dataclass(frozen=True)
class Converted:
    """A converted dialogue with its place; `missing` are the turns whose strategy is to predict."""

    file: str
    row: int
    dialogue: Dialogue
    missing: tuple[int, ...] = ()

    def with_strategies(self, strategies: list[Strategy]) -> Dialogue:
        """The dialogue with these strategies, one for each supporter turn, where they are missing."""
        turns = list(self.dialogue.turns)
        for index, strategy in zip(self.dialogue.supporter_turns, strategies, strict=True):
            if index in self.missing:
                turns[index] = replace(turns[index], strategy=strategy, accepted=())
        return replace(self.dialogue, turns=tuple(turns))


@dataclass
class _MappedTurn:
    """A turn with our speaker, its number in the record from 1, and the strategy of its label if it has one."""

    number: int
    speaker: str
    text: str
    strategy: Strategy | None = None
    label: str = ""
    """One that nobody knows."""


def convert_records(config: ConvertConfig) -> tuple[list[Converted], ConversionReport]:
    """Convert all records of the input by its format.

    Turns whose strategy is to predict hold the strategy Others.

    Raises:
        InputError: the input cannot be read, the table is bad, or no record fits; names the first reason.
    """
    chosen = FORMATS[config.format]
    path = config.strategies or chosen.strategies
    table = read_table(path) if path and config.kind == "csc" else {}
    default = parse_unlabelled(config.unlabelled)
    seen: Counter[str] = Counter()
    report, converted = ConversionReport(), []
    for file, number, record in chosen.records(config):
        report.records += 1
        try:
            if isinstance(record, BadLine):
                raise ValueError(f"broken line ({record.reason})")
            if not isinstance(record, dict):
                raise ValueError(f"not an object ({type(record).__name__})")
            source = chosen.read(record)
            report.counts.update({("dropped", name): count for name, count in source.dropped.items()})
            mapped = _label_groups(_map_turns(source, config, table, report))
            named = {"id": source.id, "source": config.source or config.format}
            if config.kind == "chat":
                missing = ()
                messages = [{"role": ROLE_OF[each.speaker], "content": each.text} for each in mapped]
                dialogue, issues = check_chat(named | {"messages": messages}, seen)
            else:
                missing = _fill(mapped, config.label, default, report)
                turns = [
                    {
                        "speaker": each.speaker,
                        "text": each.text,
                        "strategy": each.strategy and each.strategy.code,
                    }
                    for each in mapped
                ]
                dialogue, issues = check_row(named | {"dialogue": turns} | source.extra, seen, True)
            if dialogue is None:
                raise ValueError(str(issues[0]))
        except ValueError as error:
            report.reject(file, number, str(error))
            continue
        spoken = sum(each.speaker != "system" for each in mapped)
        report.counts.update({WRITTEN: len(dialogue.turns), JOINED: spoken - len(dialogue.turns)})
        converted.append(Converted(str(file), number, dialogue, missing))
    if not report.records:
        raise InputError(f"{paths_text(config.input)}: no records")
    if not converted:
        place = "{file}, row {row}: {reason}".format_map(report.rejected[0])
        raise InputError(f"{place}: none of {report.records} records fits format={config.format} kind={config.kind}")
    return converted, report


def _map_turns(
    source: SourceDialogue, config: ConvertConfig, table: dict[str, Strategy | None], report: ConversionReport
) -> list[_MappedTurn]:
    """The turns with our speakers and strategies; what is left out is counted. A label without a text stays."""
    turns = []
    for number, turn in enumerate(source.turns, start=1):
        name, speaker = str(turn.speaker), _speaker(number, turn.speaker, config)
        if not isinstance(turn.text, str | None):
            raise ValueError(f"turn {number}: text is not a text ({type(turn.text).__name__})")
        each = _MappedTurn(number, speaker, strip_invisible(turn.text or ""))
        if config.kind == "csc" and speaker in ("supporter", "drop"):
            _find_label(each, str(turn.label or ""), table, report)
        left_out = speaker == "drop" or (speaker == "system" and config.kind == "csc")
        if left_out or is_blank(each.text):
            report.counts["dropped", name if left_out else f"{name} without text"] += 1
            each.text = ""
        if each.text or each.strategy:
            each.speaker = "supporter" if speaker == "drop" else speaker
            turns.append(each)
    return turns


def _speaker(number: int, name: Any, config: ConvertConfig) -> str:
    role = config.speakers.get(str(name)) or ROLES.get(str(name).strip().casefold())
    try:
        return role or Speaker.parse(name).name.lower()
    except ValueError:
        raise ValueError(
            f"turn {number}: unknown speaker {name!r}: say who it is by +speakers.NAME=supporter"
        ) from None


def _find_label(each: _MappedTurn, label: str, table: dict[str, Strategy | None], report: ConversionReport) -> None:
    """Set the strategy of a label, or of one in brackets at the start of the text, which then leaves the text."""
    match = None if strip_invisible(label) else _BRACKETS.fullmatch(each.text)
    each.label = strip_invisible(match[1] if match else label)
    if not each.label:
        return
    try:
        each.strategy = find_strategy(table, each.label)
    except ValueError:
        report.counts["unknown label", each.label] += 1
        return
    report.counts["label", f"{each.label} -> {each.strategy.en if each.strategy else 'none'}"] += 1
    each.label = ""
    if match:
        each.text = strip_invisible(match[2])


def _label_groups(turns: list[_MappedTurn]) -> list[_MappedTurn]:
    """The turns that have a text; one without a strategy takes the first of the turns that it will be joined with."""
    for _, group in itertools.groupby(turns, key=lambda each: each.speaker):
        together = list(group)
        first = next((each.strategy for each in together if each.strategy), None)
        for each in together:
            each.strategy = each.strategy or first
    return [each for each in turns if each.text]


def parse_unlabelled(label: str | None) -> Strategy | None:
    """The strategy that `unlabelled` names; an InputError if it names none."""
    try:
        return parse_strategy(label) if label else None
    except ValueError as error:
        raise InputError(f"unlabelled={label}: {error}: choose one of ours.{nearest_label(str(label))}") from error


def _fill(turns: list[_MappedTurn], label: str, default: Strategy | None, report: ConversionReport) -> tuple[int, ...]:
    """Give supporter turns without a label the default, or Others where a strategy is predicted.

    Returns:
        The turns to predict, by index among the joined turns.

    Raises:
        ValueError: one has no strategy.
    """
    missing = []
    for index, (speaker, group) in enumerate(itertools.groupby(turns, key=lambda each: each.speaker)):
        together = list(group)
        if speaker != "supporter":
            continue
        if not together[0].strategy:
            report.counts[UNLABELLED] += 1
            if not default and label == "given":
                first = together[0]
                unknown = f"unknown label ({first.label!r}.{nearest_label(first.label)})" if first.label else "no label"
                raise ValueError(f"turn {first.number}: {unknown}")
        if label == "llm" or (label == "fill" and not together[0].strategy):
            missing.append(index)
        for each in together:
            each.strategy = each.strategy or default or OTHERS
    return tuple(missing)
