"""Settings of the data: where dialogues are read from and how they are split."""

import encodings.aliases
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from csc_train.errors import InputError, check_fields, suggestion

LANGUAGE_CODES = ["zh", "en"]
"""Codes of the known languages; `languages.register_language` adds others."""
SAMPLE_LANGUAGES = ("zh", "en")
"""The languages of the sample grammar."""
KINDS = ("csc", "chat")
"""Kinds of dialogues: customer support with strategies, and ordinary chats."""
MAX_SOURCES = 200
"""Entries of a mix; the groups of trained tokens of each are numbered (see `packing.token_groups`)."""


def check_encoding(key: str, name: str | None) -> None:
    """Raise an InputError if Python knows no encoding of texts by this name; None passes."""
    try:
        "".encode("utf-8" if name is None else name)
    except (LookupError, ValueError) as error:
        near = suggestion(str(name), encodings.aliases.aliases.values())
        raise InputError(f"{key}={name}: no encoding of texts that Python knows.{near}") from error


@dataclass
class DialogueSourceConfig:
    """Where a set of dialogues is read from."""

    path: str | None = None
    """A `.json`, `.jsonl`, `.ndjson` or `.parquet` file, the texts also as `.gz` or `.zst`; a folder of such files; a
    glob in quotes; or the id of a Hugging Face data set, OWNER/NAME or OWNER/NAME@REVISION."""
    source: str | None = None
    """Keep only the rows with this `source`; null keeps all rows."""
    also: list[str] = field(default_factory=list)
    """Further files, folders, globs or ids, which are read after `path`."""

    @property
    def places(self) -> list[str]:
        """`path` and `also`; empty without a `path`."""
        return [] if self.path is None else [self.path, *self.also]


@dataclass
class MixEntryConfig(DialogueSourceConfig):
    """A source of the training dialogues, an item of `data.mix`."""

    name: str | None = None
    """Its name in logs and metrics; defaults to its `source`, or to the name of the file, folder or data set."""
    kind: str = "csc"
    """csc: customer support, with strategies and our system prompt. chat: ordinary chats, rows of `messages`; they are
    trained without strategy and with their own system prompt or none."""
    weight: float | None = None
    """Its share of an epoch, relative to the weights of the others. An epoch is as large as all sources together."""
    epochs: float | None = None
    """How many times an epoch of the training goes over it, instead of a weight. Without both, once."""
    fraction: float = 1.0
    """Share of its dialogues to use, drawn by `data.seed`."""

    @property
    def label(self) -> str:
        """Its name, given or derived."""
        if self.name is not None or self.path is None:
            return self.name or ""
        return self.source or re.split("[.@]", Path(os.path.abspath(self.path)).name)[0] or self.path


@dataclass
class DataConfig:
    """The dialogues of a run (the `data` group).

    Raises:
        InputError: a value is out of range; the message names its key. `train.path` is checked when the data are
            loaded, so that a recipe may fill it in first.
    """

    train: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    evaluation: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """Without a path, the evaluation set is split off the training file, or off the sources of kind csc."""
    mix: list[MixEntryConfig] = field(default_factory=list)
    """Several sources of training dialogues, instead of `train.path` (see `MixEntryConfig`)."""
    mix_unit: str = "tokens"
    """What the weights of a mix share out: tokens (of the turns, without system prompts) or dialogues."""
    train_fraction: float = 1.0
    """Share of the training dialogues to train on, drawn by `seed`. A smaller share is a part of a larger one."""
    evaluation_fraction: float = 0.1
    """Share of the training file that becomes the evaluation set, if `evaluation.path` is not set."""
    validation_fraction: float = 0.0
    """Share of the training dialogues set aside for validation and for the choice of the best checkpoint. 0: validation
    uses the evaluation set, which is then no independent test of the chosen checkpoint."""
    seed: int = 0
    """Seed of the splits, of the choice by `limit`, and of the hash functions of the overlap check."""
    merge_turns: str = "auto"
    """Consecutive turns of one speaker: `auto` joins them with a space, `off` rejects the dialogue. A joined supporter
    turn keeps its first strategy and lists all of them as `accepted`."""
    strict: bool = False
    """Stop at the first bad row instead of collecting the bad rows."""
    max_rejected: float = 0.1
    """Greatest share of bad rows of a set; above it nothing is trained. 1 trains on any row that is left."""
    encoding: str | None = None
    """Python's name of the encoding of JSON and JSONL files, such as gb18030 or utf-16; null is UTF-8."""
    on_overlap: str = "warn"
    """What to do about training dialogues that are also in the evaluation set: `warn`, `drop` them from the training
    set, or `error`."""
    overlap_threshold: float = 0.8
    """Jaccard similarity of character 5-grams from which two dialogues count as near-duplicates."""
    limit: int | None = None
    """Keep at most this many dialogues of each set, for debugging."""
    sample_dialogues: int | None = None
    """Number of synthetic sample dialogues: a recipe writes them to `train.path`, in runs/sample, before it loads the
    data. null: the file is the user's own."""
    sample_seed: int = 0
    """Seed of the sample dialogues."""
    sample_language: str = "zh"
    """Language of the sample dialogues: zh or en. data=sample takes that of `template.language`."""

    def __post_init__(self):
        bounds = {
            "train_fraction": (0 < self.train_fraction <= 1, "above 0 and at most 1"),
            "evaluation_fraction": (0 < self.evaluation_fraction < 1, "above 0 and below 1"),
            "validation_fraction": (0 <= self.validation_fraction < 1, "at least 0 and below 1"),
            "max_rejected": (0 <= self.max_rejected <= 1, "between 0 and 1"),
            "overlap_threshold": (0 < self.overlap_threshold <= 1, "above 0 and at most 1"),
        }
        for name, (passed, bound) in bounds.items():
            if not passed:
                raise InputError(f"data.{name}={getattr(self, name)}: must be {bound}")
        check_encoding("data.encoding", self.encoding)
        if self.evaluation.also and self.evaluation.path is None:
            raise InputError("data.evaluation.also is set, but data.evaluation.path is not: give the first file there")
        self._check_mix()
        check_fields("data.", self, "merge_turns", choices=("auto", "off"))
        check_fields("data.", self, "on_overlap", choices=("warn", "drop", "error"))
        check_fields("data.", self, "seed", "sample_seed", low=0, high=2**32 - 1)
        check_fields("data.", self, "limit", "sample_dialogues", low=1)
        if self.sample_dialogues:  # else the language may be one that has no sample grammar
            check_fields("data.", self, "sample_language", choices=SAMPLE_LANGUAGES)
        if self.evaluation.source is not None and self.evaluation.path is None:
            # The evaluation set is split off the training rows, so this source would be ignored.
            raise InputError("data.evaluation.source is set, but data.evaluation.path is not; set both or neither")

    def _check_mix(self) -> None:
        check_fields("data.", self, "mix_unit", choices=("tokens", "dialogues"))
        if self.mix and self.train.path is not None:
            raise InputError("data.mix and data.train.path are both set: make the path an entry of the mix")
        if self.mix and self.sample_dialogues:
            raise InputError("data.mix and data.sample_dialogues are both set: add data.sample_dialogues=null")
        if len(self.mix) > MAX_SOURCES:
            raise InputError(f"data.mix has {len(self.mix)} entries: at most {MAX_SOURCES} are possible")
        measures, labels = [], []
        for number, entry in enumerate(self.mix):
            place = f"data.mix[{number}]"
            if entry.path is None:
                raise InputError(f"{place}.path is not set: give a dialogue file or the id of a Hugging Face data set")
            check_fields(f"{place}.", entry, "kind", choices=KINDS)
            for name, high in {"weight": 1e12, "epochs": 1000, "fraction": 1}.items():
                if (value := getattr(entry, name)) is not None and not 0 < value <= high:
                    raise InputError(f"{place}.{name}={value}: must be above 0 and at most {high:g}")
            measures.append([name for name in ("weight", "epochs") if getattr(entry, name) is not None])
            if len(measures[-1]) == 2 or ("weight" in measures[0]) != ("weight" in measures[-1]):
                raise InputError(
                    f"{place}: give every entry of data.mix a weight, or none; an entry with a weight has no epochs"
                )
            if not entry.label.strip() or "/" in entry.label or not entry.label.isprintable():
                raise InputError(f"{place}.name={entry.label!r}: must be a printable name without /")
            if entry.label in labels:
                raise InputError(
                    f"{place}.name={entry.label}: data.mix[{labels.index(entry.label)}] has the same name: give another"
                )
            labels.append(entry.label)
