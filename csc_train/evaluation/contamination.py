"""Contamination: evaluation dialogues whose text is in the training data; runs are also scored without them.

Two checks of whole dialogues (see `data/splits.py`): equal or nearly equal texts, by MinHash and the Jaccard similarity
of character 5-grams; and a large share of the n-grams in one training dialogue.
"""

import os
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

from csc_train.data.languages import get_language
from csc_train.data.near_duplicates import SHINGLE_LENGTH
from csc_train.data.overlap import NGRAM, Overlap, find_shared_text
from csc_train.data.splits import Splits
from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.templates import read_yaml

CONTAMINATION_FILE = "contamination.json"
MIN_SHARED = 0.5
"""Minimum share of a dialogue's n-grams in one training dialogue for a flag."""


@dataclass(frozen=True)
class Contamination:
    """Overlaps of the evaluation dialogues of a run with its training dialogues.

    Attributes:
        definition: the criteria in words.
        training: number of training dialogues.
        evaluation: number of evaluation dialogues.
        overlaps: the best match of each evaluation dialogue by each check, the most similar first.
    """

    definition: str
    training: int
    evaluation: int
    overlaps: tuple[Overlap, ...]

    @property
    def flagged(self) -> Set[str]:
        """Ids of the evaluation dialogues with an overlap."""
        return {overlap.evaluation_id for overlap in self.overlaps}

    def __str__(self) -> str:
        return f"{len(self.flagged)} of {self.evaluation} evaluation dialogues are flagged. {self.definition}"


def find_contamination(
    splits: Splits, near: float, trained: Sequence[Overlap] = (), language: str = "zh"
) -> Contamination:
    """Search for overlaps; those with dropped training dialogues do not count.

    Args:
        near: the minimum Jaccard similarity of nearly equal dialogues in `splits`.
        trained: overlaps with the record of the model's training dialogues (see `evaluated_model.find_trained`).
        language: of the dialogues.
    """
    kept = {dialogue.id for dialogue in splits.train}
    overlaps = [overlap for overlap in splits.overlaps if overlap.train_id in kept]
    overlaps += find_shared_text(splits.train, splits.evaluation, MIN_SHARED, language)
    spaced = get_language(language).spaced_words
    ignored = "case and punctuation are ignored" if spaced else "white space is ignored"
    definition = read_yaml(__package__, "notes.yaml")["contamination"].format(
        training=len(splits.train), shingle=SHINGLE_LENGTH, near=near, share=100 * MIN_SHARED, ngram=NGRAM,
        unit="words" if spaced else "characters", ignored=ignored,
    )  # fmt: skip
    if trained:
        overlaps += trained
        definition += " " + read_yaml(__package__, "notes.yaml")["training_record"]
    overlaps.sort(key=lambda overlap: (-overlap.similarity, overlap.evaluation_id))
    return Contamination(definition, len(splits.train), len(splits.evaluation), tuple(overlaps))


def write_contamination(directory: str | os.PathLike, contamination: Contamination) -> None:
    """Write the overlaps to a run directory.

    Raises:
        InputError: it cannot be written.
    """
    write_json(Path(directory) / CONTAMINATION_FILE, asdict(contamination))


def read_contamination(directory: str | os.PathLike) -> Contamination | None:
    """The overlaps in a run directory; None if the run did not search for them.

    Raises:
        InputError: the file cannot be read, or is not a list of overlaps.
    """
    path = Path(directory) / CONTAMINATION_FILE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return Contamination(**values | {"overlaps": tuple(Overlap(**overlap) for overlap in values["overlaps"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of overlaps: {error!r}") from error
