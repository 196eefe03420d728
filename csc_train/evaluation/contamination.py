"""Evaluation dialogues whose text the training data holds as well: listed, so that a run is scored without them too.

Two checks of whole dialogues (see `splits`): equal or nearly equal ones, by MinHash and the Jaccard similarity of
character 5-grams, and those of whose n-grams one training dialogue holds a large share, whatever else stands in it.
"""

import os
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path

from csc_train.data.near_duplicates import SHINGLE_LENGTH
from csc_train.data.overlap import NGRAM, Overlap, find_shared_text
from csc_train.data.splits import Splits
from csc_train.errors import InputError
from csc_train.files import read_json, write_json

FILE = "contamination.json"
SHARED = 0.5
"""Share of an evaluation dialogue's n-grams in one training dialogue from which it is flagged."""


@dataclass(frozen=True)
class Contamination:
    """What was found between the training and the evaluation dialogues of a run.

    Attributes:
        definition: how it was searched for, in a sentence or two.
        training: number of training dialogues.
        evaluation: number of evaluation dialogues.
        overlaps: the best match of each evaluation dialogue by each of the two checks, the most alike first.
    """

    definition: str
    training: int
    evaluation: int
    overlaps: tuple[Overlap, ...]

    @property
    def flagged(self) -> Set[str]:
        """Ids of the evaluation dialogues with an overlap of either kind."""
        return {overlap.evaluation_id for overlap in self.overlaps}

    def __str__(self) -> str:
        return f"{len(self.flagged)} of {self.evaluation} evaluation dialogues are flagged. {self.definition}"


def find_contamination(splits: Splits, near: float) -> Contamination:
    """Compare the dialogues of a run; what `splits` dropped from the training data counts no more.

    Args:
        near: the Jaccard similarity from which `splits` holds dialogues for nearly equal.
    """
    kept = {dialogue.id for dialogue in splits.train}
    overlaps = [overlap for overlap in splits.overlaps if overlap.train_id in kept]
    overlaps += find_shared_text(splits.train, splits.evaluation, SHARED)
    definition = (
        f"A dialogue is flagged where one of the {len(splits.train)} training dialogues is equal or nearly equal to it "
        f"(Jaccard similarity of character {SHINGLE_LENGTH}-grams of {near} or more, found by MinHash), or holds at least "
        f"{100 * SHARED:.0f} % of its {NGRAM}-grams (of characters, within turns; white space left out, a placeholder "
        f"such as [手机号码] counts as one character, turns shorter than {NGRAM} characters not at all)."
    )
    overlaps.sort(key=lambda overlap: (-overlap.similarity, overlap.evaluation_id))
    return Contamination(definition, len(splits.train), len(splits.evaluation), tuple(overlaps))


def write_contamination(directory: str | os.PathLike, contamination: Contamination) -> None:
    """Keep the list in a run directory.

    Raises:
        InputError: it cannot be written.
    """
    write_json(Path(directory) / FILE, asdict(contamination))


def read_contamination(directory: str | os.PathLike) -> Contamination | None:
    """The list that a run directory holds; None where the run was made without one.

    Raises:
        InputError: the file cannot be read, or is no such list.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return Contamination(**values | {"overlaps": tuple(Overlap(**overlap) for overlap in values["overlaps"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of overlaps: {error!r}") from error
