"""Training, validation and evaluation sets: seeded splits by dialogue, and the check that they do not overlap.

Whatever is drawn here depends on a seed and on what a dialogue says, never on its place in a file: adding, removing
or reordering rows moves no other dialogue from one side to the other.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from csc_train.data.dialogue import Dialogue, read_dialogues
from csc_train.data.near_duplicates import NearDuplicates
from csc_train.errors import InputError

logger = logging.getLogger(__name__)

NGRAM = 13
"""Characters in an n-gram of `find_shared_text`: about eight Chinese words, more than a stock phrase has."""
_BLOCK = 256
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")


@dataclass
class DialogueSourceConfig:
    """Where a set of dialogues is read from."""

    path: str | None = None
    """A `.json`, `.jsonl` or `.parquet` file, or the id of a Hugging Face data set."""
    source: str | None = None
    """Keep only the rows whose `source` is this; None keeps all."""


@dataclass
class DataConfig:
    """The dialogues of a run (the `data` group).

    Raises:
        InputError: a value is out of range; the message names its key. Whether `train.path` is set is checked when
            the data are loaded, so that a recipe may fill it in first.
    """

    train: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    evaluation: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """With no path, the evaluation set is held out of the training file."""
    held_out_fraction: float = 0.1
    """Share of the training file that is held out, where the evaluation set has no path of its own."""
    validation_fraction: float = 0.0
    """Share of the training dialogues that is set aside, for a training to measure itself and to choose its checkpoint
    on. 0: it measures itself on the evaluation set, which is then no test of a checkpoint that was chosen on it."""
    seed: int = 0
    """Decides who is held out or set aside, who is kept by `limit`, and the hash functions of the overlap check."""
    strict: bool = False
    """Stop at the first bad row instead of collecting the bad rows."""
    on_overlap: str = "warn"
    """What to do about training dialogues that are also in the evaluation set: `warn`, `drop` them from the training
    set, or `raise`."""
    overlap_threshold: float = 0.8
    """Jaccard similarity of character 5-grams from which two dialogues count as near-duplicates."""
    limit: int | None = None
    """Keep at most this many dialogues of each set, for debugging."""
    sample_dialogues: int | None = None
    """How many synthetic sample dialogues stand at `train.path`: a recipe writes them there before it loads the data.
    None: the file is the user's own."""
    sample_seed: int = 0
    """Seed of the sample dialogues."""

    def __post_init__(self):
        checks = {
            "held_out_fraction": (0 < self.held_out_fraction < 1, "must lie between 0 and 1, both excluded"),
            "validation_fraction": (0 <= self.validation_fraction < 1, "must be at least 0 and below 1"),
            "seed": (0 <= self.seed < 2**32, "must lie in 0..2**32-1"),
            "sample_seed": (0 <= self.sample_seed < 2**32, "must lie in 0..2**32-1"),
            "on_overlap": (self.on_overlap in ("warn", "drop", "raise"), "must be warn, drop or raise"),
            "overlap_threshold": (0 < self.overlap_threshold <= 1, "must be above 0 and at most 1"),
            "limit": (self.limit is None or self.limit >= 1, "must be at least 1, or null"),
            "sample_dialogues": (
                self.sample_dialogues is None or self.sample_dialogues >= 1,
                "must be at least 1, or null",
            ),
        }
        for name, (passed, rule) in checks.items():
            if not passed:
                raise InputError(f"data.{name}={getattr(self, name)} {rule}")
        if self.evaluation.source is not None and self.evaluation.path is None:
            # Held-out dialogues come from the training rows, so this source would be ignored.
            raise InputError("data.evaluation.source is set, but data.evaluation.path is not; set both or neither")


@dataclass(frozen=True)
class Overlap:
    """A training dialogue and an evaluation dialogue that are too much alike.

    `kind` is "exact" where all texts are equal (strategies may differ), "near" where their Jaccard similarity is high,
    and "shared" where much of the evaluation dialogue stands in the training dialogue, whatever else does.
    `similarity`, 0..1, is the Jaccard similarity of the two sets of character 5-grams; of a "shared" one it is the
    share of the evaluation dialogue's n-grams (see `find_shared_text`).
    """

    train_id: str
    evaluation_id: str
    kind: str
    similarity: float

    def __str__(self) -> str:
        return f"training {self.train_id} ~ evaluation {self.evaluation_id}: {self.kind}, {self.similarity:.2f}"


@dataclass
class Splits:
    """The dialogues of a run.

    Attributes:
        overlaps: the best match of each evaluation dialogue that has one in the training or validation set, as these
            were before any were dropped.
        validation: set aside from the training set; empty where nothing is.
    """

    train: list[Dialogue]
    evaluation: list[Dialogue]
    overlaps: list[Overlap] = field(default_factory=list)
    validation: list[Dialogue] = field(default_factory=list)

    @property
    def held_out(self) -> list[Dialogue]:
        """What a training measures itself on: the validation set, or the evaluation set where there is none."""
        return self.validation or self.evaluation


def split(
    dialogues: list[Dialogue], fraction: float, seed: int, purpose: str = "split"
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Split dialogues into (kept, held out), each in the order of the input.

    A dialogue's side depends only on `purpose`, `seed` and its fingerprint, so equal dialogues are never parted.
    `fraction` (0..1) is the expected share of distinct dialogues held out, not an exact count.
    """
    kept, held_out = [], []
    for dialogue in dialogues:
        (held_out if _uniform(purpose, seed, dialogue) < fraction else kept).append(dialogue)
    return kept, held_out


def find_overlap(
    train: list[Dialogue], evaluation: list[Dialogue], threshold: float = 0.8, seed: int = 0
) -> list[Overlap]:
    """The best match in `train` of each evaluation dialogue that has one, in the order of `evaluation`.

    Equal texts are always found. Near-duplicates, at Jaccard similarity `threshold` or more, are searched for by
    MinHash (Broder 1997) with banding and confirmed by the true similarity: none is reported wrongly, and a pair
    right at the threshold is missed with a chance of about 1 %, a more similar one with less. `seed` (0..2**32-1)
    fixes the hash functions.
    """
    return _best(_overlaps(train, evaluation, threshold, seed))


def find_shared_text(train: list[Dialogue], evaluation: list[Dialogue], threshold: float = 0.5) -> list[Overlap]:
    """The training dialogue that holds most of each evaluation dialogue, in the order of `evaluation`.

    What is counted is the different n-grams of `NGRAM` characters within the turns of the evaluation dialogue: white
    space is left out, and a placeholder such as `[手机号码]` is one character, the same for all of them. Listed is
    where one training dialogue has at least the share `threshold` of them; of equal ones, the earliest. A turn shorter
    than an n-gram counts for nothing, so that greetings and thanks do not make dialogues alike.
    """
    from scipy.sparse import csr_array

    sought = [_ngrams(dialogue) for dialogue in evaluation]
    columns: dict[str, int] = {}
    for gram in itertools.chain.from_iterable(sought):
        columns.setdefault(gram, len(columns))
    if not columns or not train:
        return []

    def incidence(sets: Iterable[set[str]]) -> csr_array:
        """int [dialogues, n-grams of the evaluation]: 1 where a dialogue has an n-gram."""
        places = [[columns[gram] for gram in grams if gram in columns] for grams in sets]
        ends = np.cumsum([0, *map(len, places)])
        return csr_array(
            (np.ones(ends[-1], np.int32), np.fromiter(itertools.chain.from_iterable(places), np.int32, ends[-1]), ends),
            shape=(len(places), len(columns)),
        )

    held = incidence(map(_ngrams, train)).T.tocsr()
    overlaps = []
    for start in range(0, len(evaluation), _BLOCK):
        grams = sought[start : start + _BLOCK]
        common = (incidence(grams) @ held).toarray()
        shares = common.max(axis=1) / np.maximum([len(each) for each in grams], 1)
        for place in np.flatnonzero(shares >= threshold):
            source = train[common[place].argmax()]
            overlaps.append(Overlap(source.id, evaluation[start + place].id, "shared", float(shares[place])))
    return overlaps


def read_splits(config: DataConfig, rejects_directory: Path | None = None) -> Splits:
    """Read the dialogues of a run; whether they overlap is not looked for.

    Refused rows go to `rejects-train.jsonl` and `rejects-evaluation.jsonl` in `rejects_directory`.

    Raises:
        InputError: a file cannot be read or has no usable row, or a set ends up empty. The message names the key.
    """
    train = _read("train", config.train, config, rejects_directory)
    if config.evaluation.path is None:
        train, evaluation = _part(train, "held_out_fraction", "split", "evaluation", config)
    else:
        evaluation = _read("evaluation", config.evaluation, config, rejects_directory)
    if config.limit is not None:
        train, evaluation = (_first(side, config.limit, config.seed) for side in (train, evaluation))
    validation = []
    if config.validation_fraction:
        train, validation = _part(train, "validation_fraction", "validation", "validation", config)
    return Splits(train, evaluation, validation=validation)


def load_splits(config: DataConfig, rejects_directory: Path | None = None) -> Splits:
    """As `read_splits`, and check them for overlap. One line with the sizes and the overlap is logged.

    Raises:
        InputError: as `read_splits`, or the sets overlap and `on_overlap` is "raise". The message names the key.
    """
    splits = read_splits(config, rejects_directory)
    known = [*splits.train, *splits.validation]
    matches = list(_overlaps(known, splits.evaluation, config.overlap_threshold, config.seed))
    # A closer match that was set aside must not hide one that is trained on.
    trained = {dialogue.id for dialogue in splits.train}
    overlaps = _best(match for match in matches if match.train_id in trained)
    found = {overlap.evaluation_id for overlap in overlaps}
    splits.overlaps = overlaps = overlaps + _best(match for match in matches if match.evaluation_id not in found)
    kinds = [overlap.kind for overlap in overlaps]
    finding = (
        f"{len(overlaps)} evaluation dialogues are also in the training data ({kinds.count('exact')} exact, "
        f"{kinds.count('near')} near at {config.overlap_threshold})"
    )
    if overlaps and config.on_overlap == "raise":
        raise InputError(f"data.on_overlap=raise: {finding}; the first: {overlaps[0]}")
    if config.on_overlap == "drop":
        # All matches count here, not only the best: the second copy of a dialogue gives it away as well.
        flagged = {match.train_id for match in matches}
        finding += f"; {len(flagged)} training dialogues dropped"
        for name in ("train", "validation"):
            before = getattr(splits, name)
            setattr(splits, name, [dialogue for dialogue in before if dialogue.id not in flagged])
            if before and not getattr(splits, name):
                raise InputError(f"data.on_overlap=drop leaves no {name} dialogue: {finding}")
    elif overlaps:
        finding += f"; kept (data.on_overlap=warn); the first: {overlaps[0]}"
    aside = f", {len(splits.validation)} validation" if splits.validation else ""
    logger.info(
        f"data: {len(splits.train)} training{aside} and {len(splits.evaluation)} evaluation dialogues; {finding}"
    )
    return splits


def _part(
    dialogues: list[Dialogue], key: str, purpose: str, name: str, config: DataConfig
) -> tuple[list[Dialogue], list[Dialogue]]:
    """`split` by the fraction that `data.<key>` names; neither side may be empty."""
    fraction = getattr(config, key)
    train, other = split(dialogues, fraction, config.seed, purpose)
    for side_name, side in (("training", train), (name, other)):
        if not side:
            raise InputError(
                f"data.{key}={fraction} with data.seed={config.seed} leaves no {side_name} dialogue of "
                f"{len(dialogues)} in {config.train.path}"
            )
    return train, other


def _read(name: str, where: DialogueSourceConfig, config: DataConfig, rejects_directory: Path | None) -> list[Dialogue]:
    if where.path is None:
        raise InputError(f"data.{name}.path is not set: give a dialogue file or the id of a Hugging Face data set")
    rejects = None if rejects_directory is None else Path(rejects_directory) / f"rejects-{name}.jsonl"
    try:
        return read_dialogues(where.path, source=where.source, strict=config.strict, rejects_path=rejects)
    except InputError as error:
        raise InputError(f"data.{name}: {error}") from error


def _uniform(purpose: str, seed: int, dialogue: Dialogue) -> float:
    """A number in [0, 1) drawn from (purpose, seed, fingerprint); draws for two purposes are independent."""
    drawn = hashlib.sha256(f"{purpose} {seed} {dialogue.fingerprint}".encode()).digest()
    # 53 bits are what a float holds; more could round up to 1.
    return (int.from_bytes(drawn[:8]) >> 11) / 2**53


def _first(dialogues: list[Dialogue], limit: int, seed: int) -> list[Dialogue]:
    """The `limit` dialogues that come first in a seeded order of their fingerprints, in the order of the input."""
    ranked = sorted(range(len(dialogues)), key=lambda i: (_uniform("limit", seed, dialogues[i]), dialogues[i].id))
    return [dialogues[i] for i in sorted(ranked[:limit])]


def _best(overlaps: Iterable[Overlap]) -> list[Overlap]:
    """The best overlap of each evaluation dialogue: exact before near, then by similarity, then the earliest."""
    best: dict[str, Overlap] = {}
    for overlap in overlaps:
        rival = best.setdefault(overlap.evaluation_id, overlap)
        if (overlap.kind == "exact", overlap.similarity) > (rival.kind == "exact", rival.similarity):
            best[overlap.evaluation_id] = overlap
    return list(best.values())


def _overlaps(train: list[Dialogue], evaluation: list[Dialogue], threshold: float, seed: int) -> Iterator[Overlap]:
    """Every pair at or above `threshold`, in the order of `evaluation`, then of `train`."""

    def progress(dialogues: list[Dialogue], name: str) -> Iterator[Dialogue]:
        # disable=None: silent where the output is not a terminal.
        return tqdm(dialogues, desc=f"overlap check, {name}", unit="dialogue", disable=None)

    seen = NearDuplicates(threshold, seed)
    for dialogue in progress(train, "training"):
        seen.add(seen.sign(dialogue.text))
    for dialogue in progress(evaluation, "evaluation"):
        for place, similarity in seen.matches(seen.sign(dialogue.text)):
            other = train[place]
            kind = "exact" if _texts(other) == _texts(dialogue) else "near"
            yield Overlap(other.id, dialogue.id, kind, similarity)


def _texts(dialogue: Dialogue) -> tuple[str, ...]:
    return tuple(turn.text for turn in dialogue.turns)


def _ngrams(dialogue: Dialogue) -> set[str]:
    """All runs of `NGRAM` characters within the dialogue's turns; see `find_shared_text`."""
    texts = ("".join(_PLACEHOLDER.sub("□", text).split()) for text in _texts(dialogue))
    return {text[start : start + NGRAM] for text in texts for start in range(len(text) - NGRAM + 1)}
