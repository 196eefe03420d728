"""What dialogues hold, without a tokenizer: counts, strategies, repeats, broken texts, private data, overlap."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from csc_train.data.chats import check_chat
from csc_train.data.config import DataConfig, DialogueSourceConfig, MixEntryConfig
from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.mixture import Mixture
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.overlap import best_overlaps, find_overlaps
from csc_train.data.readers import ReadReport, iter_dialogues
from csc_train.data.splits import Splits, read_mix
from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.evaluation.contamination import Contamination, find_contamination
from csc_train.inspection.text_faults import find_text_faults
from csc_train.progress import ProgressBar
from csc_train.synthesis.filters.privacy import PrivateData, find_private_data
from csc_train.synthesis.quality_report import jensen_shannon, strategy_counts, summarize_lengths

MASK = "█"
CONTEXT = 12
"""Characters around private data in a masked excerpt."""


@dataclass(frozen=True)
class NumberedDialogues:
    """Dialogues, the row of each (from 1; `FILE:ROW` of several files), and the counts of their reading; of a mix, its
    sources."""

    dialogues: list[Dialogue]
    rows: list[int | str]
    report: ReadReport
    mixture: Mixture | None = None

    def place(self, index: int) -> dict[str, Any]:
        """The row and the id of a dialogue."""
        return {"row": self.rows[index], "dialogue": self.dialogues[index].id}


def read_numbered(source: DialogueSourceConfig, config: DataConfig, kind: str = "csc") -> NumberedDialogues:
    """Read the dialogues of a source, or chats of the kind "chat".

    Raises:
        InputError: as `iter_dialogues`.
    """
    report = ReadReport(", ".join(source.places))
    found = iter_dialogues(
        source.places,
        report=report,
        merge=config.merge_turns == "auto",
        check=check_chat if kind == "chat" else None,
        source=source.source,
        strict=config.strict,
        encoding=config.encoding,
    )
    pairs = [(dialogue, report.place) for dialogue in ProgressBar(found, "dialogues read", unit="dialogue")]
    several = len({file for _, (file, _) in pairs}) > 1
    rows = [f"{file}:{row}" if several else row for _, (file, row) in pairs]
    return NumberedDialogues([dialogue for dialogue, _ in pairs], rows, report)


def read_numbered_mix(config: DataConfig) -> NumberedDialogues:
    """Read the dialogues of all sources of `data.mix` (see `splits.read_mix`).

    Raises:
        InputError: as `read_numbered` and `splits.read_mix`.
    """
    report = ReadReport(", ".join(place for entry in config.mix for place in entry.places))
    rows: dict[int, int | str] = {}  # by the turns, which a dialogue keeps if it is renamed

    def read(name: str, entry: MixEntryConfig) -> list[Dialogue]:
        own = read_numbered(entry, config, entry.kind)
        for each, row in zip(own.dialogues, own.rows, strict=True):
            rows[id(each.turns)] = f"{own.report.path}:{row}" if isinstance(row, int) else row
        for count in ("rows", "accepted", "other_sources", "merged", "merged_turns", "rejected"):
            setattr(report, count, getattr(report, count) + getattr(own.report, count))
        return own.dialogues

    dialogues, mixture = read_mix(config, read)
    return NumberedDialogues(dialogues, [rows[id(each.turns)] for each in dialogues], report, mixture)


def describe_reading(report: ReadReport) -> dict[str, Any]:
    """The counts of a reading, and the rejected rows by reason with the first of each. Private data are masked."""
    reasons: dict[str, dict[str, Any]] = {}
    for row in report.rejected:
        reason = f"{row.issues[0].field}: {row.issues[0].kind}"
        first = f"{row.file}, row {row.row}, {mask_private(str(row.issues[0]))}"
        reasons.setdefault(reason, {"rows": 0, "first": first})["rows"] += 1
    return {
        "rows": report.rows, "accepted": report.accepted, "rejected": len(report.rejected),
        "other_sources": sum(report.other_sources.values()), "joined_rows": report.merged,
        "joined_turns": report.merged_turns,
        "reasons": dict(sorted(reasons.items(), key=lambda each: -each[1]["rows"])),
    }  # fmt: skip


def find_findings(read: NumberedDialogues) -> dict[str, list[dict[str, Any]]]:
    """`faults` (see `text_faults`) and `private` (masked excerpts) of all texts: row, dialogue, turn, kind, detail.

    Turn 0 is the system prompt of a chat.
    """
    faults, private = [], []
    for index, dialogue in enumerate(ProgressBar(read.dialogues, "texts checked", unit="dialogue")):
        for number, text in enumerate([dialogue.system, *(turn.text for turn in dialogue.turns)]):
            place = read.place(index) | {"turn": number}
            faults += [place | each._asdict() for each in find_text_faults(text)]
            private += [
                place | {"kind": each.kind, "detail": _excerpt(mask_private(text), each)}
                for each in find_private_data(text)
            ]
    return {"faults": faults, "private": private}


def mask_private(text: str) -> str:
    """A text of the same length without the private data in it."""
    for each in find_private_data(text):
        text = text[: each.start] + MASK * (each.end - each.start) + text[each.end :]
    return text


def _excerpt(text: str, found: PrivateData) -> str:
    before, after = text[: found.start], text[found.end :]
    start = f"…{before[-CONTEXT:]}" if len(before) > CONTEXT else before
    end = f"{after[:CONTEXT]}…" if len(after) > CONTEXT else after
    return f"{start}{MASK * 4}{end}"


def find_repeats(read: NumberedDialogues, threshold: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    """`exact`: each dialogue whose texts an earlier one has; `near`: pairs of the others (see `NearDuplicateIndex`)."""
    first: dict[tuple[str, ...], int] = {}
    exact, distinct = [], []
    for index, dialogue in enumerate(read.dialogues):
        earlier = first.setdefault((dialogue.system, *(turn.text for turn in dialogue.turns)), index)
        if earlier < index:
            exact.append(_pair(read, index, earlier, 1.0))
        else:
            distinct.append(index)
    near, lookup = [], NearDuplicateIndex(threshold, seed)
    for index in ProgressBar(distinct, "near duplicates", unit="dialogue"):
        hashed = lookup.minhash(read.dialogues[index].text)
        near += [_pair(read, index, distinct[place], similarity) for place, similarity in lookup.matches(hashed)]
        lookup.add(hashed)
    return {"exact": exact, "near": near}


def _pair(read: NumberedDialogues, index: int, earlier: int, similarity: float) -> dict[str, Any]:
    other = read.place(earlier)
    return read.place(index) | {"earlier_row": other["row"], "earlier": other["dialogue"], "similarity": similarity}


def find_overlap(read: NumberedDialogues, config: DataConfig, language: str) -> Contamination:
    """The dialogues of `config.evaluation` that are also among these."""
    evaluation = read_numbered(config.evaluation, config).dialogues
    matches = find_overlaps(read.dialogues, evaluation, config.overlap_threshold, config.seed)
    splits = Splits(read.dialogues, evaluation, best_overlaps(matches))
    return find_contamination(splits, config.overlap_threshold, language=language)


def describe_strategies(sides: dict[str, list[Dialogue]]) -> dict[str, Any]:
    """Supporter turns by strategy, stage and fifth of the dialogue, of these dialogues (`set`) and of `reference`."""
    counts = {name: strategy_counts(dialogues) for name, dialogues in sides.items()}
    strategies = {name: side["strategies"] for name, side in counts.items()}
    stages = [*Stage, None]
    return {
        "strategies": {name: side.tolist() for name, side in strategies.items()},
        "stages": {
            name: [int(sum(side[each.number - 1] for each in STRATEGIES if each.stage is stage)) for stage in stages]
            for name, side in strategies.items()
        },
        "progress_by_strategy": counts["set"]["progress_by_strategy"].tolist(),
        "divergence": jensen_shannon(*strategies.values()) if len(strategies) > 1 else None,
        "unlabelled": sum(
            turn.strategy is None
            for dialogue in sides["set"]
            for turn in dialogue.turns
            if turn.speaker is Speaker.SUPPORTER
        ),
    }


def describe_lengths(values: Sequence[int], max_bins: int = 40) -> dict[str, Any]:
    """A summary of lengths, and a histogram: the width of a bin, and (first length, count) of each bin with any."""
    step = max(1, -(-(max(values, default=0) - min(values, default=0) + 1) // max_bins))
    bins = Counter((numpy.asarray(values, int) // step * step).tolist())
    return {"summary": summarize_lengths(values), "step": step, "histogram": sorted(bins.items())}
