"""Training, validation and evaluation sets: seeded splits by dialogue, checked for overlap.

Every draw depends on a seed and on the content of a dialogue, never on its position in a file. So adding, removing or
reordering rows moves no other dialogue to another set.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from csc_train.data.chats import check_chat
from csc_train.data.config import DataConfig, DialogueSourceConfig, MixEntryConfig
from csc_train.data.dialogue import Dialogue
from csc_train.data.mixture import Mixture
from csc_train.data.overlap import Overlap, best_overlaps, find_overlaps
from csc_train.data.readers import read_dialogues
from csc_train.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Splits:
    """The dialogues of a run.

    Attributes:
        overlaps: the best match of each evaluation dialogue that has one in the training or validation set, before
            any were dropped.
        validation: set aside from the training set; may be empty.
        mixture: the sources of the training set; None unless `data.mix` names several.
    """

    train: list[Dialogue]
    evaluation: list[Dialogue]
    overlaps: list[Overlap] = field(default_factory=list)
    validation: list[Dialogue] = field(default_factory=list)
    mixture: Mixture | None = None

    @property
    def epoch(self) -> list[Dialogue]:
        """About the dialogues of an epoch of the training, with repeats: sizes are counted in characters."""
        if self.mixture is None:
            return self.train
        sizes = [len(dialogue.text) for dialogue in self.train]
        return [self.train[index] for index in self.mixture.choose([each.id for each in self.train], sizes)]

    @property
    def validation_dialogues(self) -> list[Dialogue]:
        """The dialogues for validation during training: the validation set, or the evaluation set if that is empty."""
        return self.validation or self.evaluation


def split(
    dialogues: list[Dialogue], fraction: float, seed: int, purpose: str = "split"
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Split dialogues into (kept, set aside), each in the order of the input.

    The side of a dialogue depends only on `purpose`, `seed` and its fingerprint, so equal dialogues stay together.
    `fraction` (0..1) is the expected share of distinct dialogues set aside, not an exact count.
    """
    kept, set_aside = [], []
    for dialogue in dialogues:
        (set_aside if _uniform(purpose, seed, dialogue) < fraction else kept).append(dialogue)
    return kept, set_aside


def read_splits(config: DataConfig, rejected_directory: Path | None = None) -> Splits:
    """Read the dialogues of a run, without the overlap check.

    Rejected rows are written to `rejected-train.jsonl` (of a mix `rejected-mix-0.jsonl` and so on) and
    `rejected-evaluation.jsonl` in `rejected_directory`.

    Raises:
        InputError: a file cannot be read or has no usable row, or a set ends up empty. The message names the key.
    """
    mixture = None
    if config.mix:
        train, mixture = read_mix(config, lambda name, entry: _read(name, entry, config, rejected_directory))
    else:
        train = _read("train", config.train, config, rejected_directory)
    if config.evaluation.path is None:
        train, evaluation = _split_by("evaluation_fraction", train, "split", config)
        _check_sources(f"data.evaluation_fraction={config.evaluation_fraction}", train, mixture)
    else:
        evaluation = _read("evaluation", config.evaluation, config, rejected_directory)
    if config.limit is not None:
        train, evaluation = (_limited(side, config.limit, config.seed) for side in (train, evaluation))
        _check_sources(f"data.limit={config.limit}", train, mixture)
    if config.train_fraction < 1:
        count = len(train)
        if not (train := split(train, config.train_fraction, config.seed, "train_fraction")[1]):
            raise InputError(f"data.train_fraction={config.train_fraction} leaves no dialogue of {count}: raise it")
        _check_sources(f"data.train_fraction={config.train_fraction}", train, mixture)
    validation = []
    if config.validation_fraction:
        train, validation = _split_by("validation_fraction", train, "validation", config)
        _check_sources(f"data.validation_fraction={config.validation_fraction}", train, mixture)
    return Splits(train, evaluation, validation=validation, mixture=mixture)


def read_and_check_splits(config: DataConfig, rejected_directory: Path | None = None) -> Splits:
    """Read the dialogues of a run (see `read_splits`) and check them for overlap.

    Logs one line with the sizes and the result of the check.

    Raises:
        InputError: as `read_splits`, or the sets overlap and `on_overlap` is "error". The message names the key.
    """
    splits = read_splits(config, rejected_directory)
    known = [*splits.train, *splits.validation]
    matches = list(find_overlaps(known, splits.evaluation, config.overlap_threshold, config.seed))
    # A closer match in the validation set must not hide one in the training set.
    trained = {dialogue.id for dialogue in splits.train}
    overlaps = best_overlaps(match for match in matches if match.train_id in trained)
    found = {overlap.evaluation_id for overlap in overlaps}
    overlaps += best_overlaps(match for match in matches if match.evaluation_id not in found)
    splits.overlaps = overlaps
    kinds = [overlap.kind for overlap in overlaps]
    finding = (
        f"{len(overlaps)} evaluation dialogues are also in the training data ({kinds.count('exact')} exact, "
        f"{kinds.count('near')} near at {config.overlap_threshold})"
    )
    if overlaps and config.on_overlap == "error":
        raise InputError(f"data.on_overlap=error: {finding}; the first: {overlaps[0]}")
    if config.on_overlap == "drop":
        # All matches count here, not only the best: a second copy of a dialogue is dropped as well.
        flagged = {match.train_id for match in matches}
        finding += f"; {len(flagged)} training dialogues dropped"
        for name in ("train", "validation"):
            before = getattr(splits, name)
            setattr(splits, name, [dialogue for dialogue in before if dialogue.id not in flagged])
            if before and not getattr(splits, name):
                raise InputError(f"data.on_overlap=drop leaves no {name} dialogue: {finding}")
        _check_sources("data.on_overlap=drop", splits.train, splits.mixture)
    elif overlaps:
        finding += f"; kept (data.on_overlap=warn); the first: {overlaps[0]}"
    validation = f", {len(splits.validation)} validation" if splits.validation else ""
    logger.info(
        f"data: {len(splits.train)} training{validation} and {len(splits.evaluation)} evaluation dialogues; {finding}"
    )
    return splits


def _split_by(
    key: str, dialogues: list[Dialogue], purpose: str, config: DataConfig
) -> tuple[list[Dialogue], list[Dialogue]]:
    """`split` by the fraction `data.<key>`; neither side may be empty. Chats are never set aside."""
    fraction, name = getattr(config, key), key.removesuffix("_fraction")
    own = [dialogue for dialogue in dialogues if dialogue.kind == "csc"]
    if not own and dialogues:
        advice = "give data.evaluation.path=..." if name == "evaluation" else "leave it out"
        raise InputError(f"data.{key}={fraction}: there are chats only, which are never set aside: {advice}")
    sides = split(own, fraction, config.seed, purpose)
    for side_name, side in zip(("training", name), sides, strict=True):
        if not side:
            places = config.train.path or ", ".join(str(entry.path) for entry in config.mix if entry.kind == "csc")
            raise InputError(
                f"data.{key}={fraction} with data.seed={config.seed} leaves no {side_name} dialogue of "
                f"{len(own)} in {places}: choose another fraction"
            )
    kept = {dialogue.id for dialogue in sides[0]}
    return [each for each in dialogues if each.id in kept or each.kind == "chat"], sides[1]


def _check_sources(cause: str, train: list[Dialogue], mixture: Mixture | None) -> None:
    """Raise an InputError if a source of the mix has no dialogue in the training set."""
    left = {mixture.members[dialogue.id][0] for dialogue in train} if mixture else set()
    for number, name in enumerate(mixture.names if mixture else ()):
        if number not in left:
            raise InputError(
                f"{cause} leaves no training dialogue of {name}, data.mix[{number}]: choose another value, or take it "
                "out of the mix"
            )


def read_mix(
    config: DataConfig, read: Callable[[str, MixEntryConfig], list[Dialogue]]
) -> tuple[list[Dialogue], Mixture]:
    """The dialogues of all sources of `data.mix`, in their order, and how they are mixed. An id of two sources is
    preceded by the name of the second one.

    Args:
        read: reads a source, called `mix[0]` and so on.

    Raises:
        InputError: as `read`, or `fraction` leaves no dialogue of a source.
    """
    dialogues: dict[str, Dialogue] = {}
    members: dict[str, tuple[int, float]] = {}
    for number, entry in enumerate(config.mix):
        own = read(f"mix[{number}]", entry)
        if entry.fraction < 1:
            count = len(own)
            if not (own := split(own, entry.fraction, config.seed, "mix_fraction")[1]):
                raise InputError(
                    f"data.mix[{number}].fraction={entry.fraction} leaves no dialogue of {count} in {entry.path}: "
                    "raise it"
                )
        for dialogue in own:
            draw = _uniform("mix", config.seed, dialogue)
            while dialogue.id in dialogues:
                dialogue = replace(dialogue, id=f"{entry.label}/{dialogue.id}")
            dialogues[dialogue.id], members[dialogue.id] = dialogue, (number, draw)
    weights = [entry.weight for entry in config.mix if entry.weight is not None]
    epochs = [entry.epochs or 1.0 for entry in config.mix]
    names = [entry.label for entry in config.mix]
    return list(dialogues.values()), Mixture(names, weights or None, epochs, config.mix_unit, members)


def _read(
    name: str, where: DialogueSourceConfig, config: DataConfig, rejected_directory: Path | None
) -> list[Dialogue]:
    if where.path is None:
        raise InputError(f"data.{name}.path is not set: give a dialogue file or the id of a Hugging Face data set")
    file = f"rejected-{name.replace('[', '-').removesuffix(']')}.jsonl"
    chats = isinstance(where, MixEntryConfig) and where.kind == "chat"
    try:
        return read_dialogues(
            where.places,
            source=where.source,
            strict=config.strict,
            max_rejected=config.max_rejected,
            encoding=config.encoding,
            rejected_path=None if rejected_directory is None else Path(rejected_directory) / file,
            merge=config.merge_turns == "auto",
            check=check_chat if chats else None,
        )
    except InputError as error:
        raise InputError(f"data.{name}: {error}") from error


def _uniform(purpose: str, seed: int, dialogue: Dialogue) -> float:
    """A number in [0, 1) drawn from (purpose, seed, fingerprint); draws for two purposes are independent."""
    drawn = hashlib.sha256(f"{purpose} {seed} {dialogue.fingerprint}".encode()).digest()
    # A float holds 53 bits; more could round up to 1.
    return (int.from_bytes(drawn[:8]) >> 11) / 2**53


def _limited(dialogues: list[Dialogue], limit: int, seed: int) -> list[Dialogue]:
    """The first `limit` dialogues in a seeded order of their fingerprints, in the order of the input."""
    ranked = sorted(range(len(dialogues)), key=lambda i: (_uniform("limit", seed, dialogues[i]), dialogues[i].id))
    return [dialogues[i] for i in sorted(ranked[:limit])]
