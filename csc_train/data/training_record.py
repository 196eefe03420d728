"""The record of the dialogues that a model was trained on: ids and hashes, small enough to stay with the model.

It finds an evaluation dialogue that the model has seen, after the data file changed: other ids, another order, edited
texts. Texts are compared without case, punctuation and white space, by a bottom-k sketch of their character 5-grams.
Source: Broder, "On the resemblance and containment of documents" (1997).
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from csc_train.data.dialogue import Dialogue
from csc_train.data.near_duplicates import SHINGLE_LENGTH
from csc_train.data.overlap import Overlap
from csc_train.files import digest
from csc_train.jsonl import read_jsonl, write_jsonl

RECORD_FILE = "training_dialogues.jsonl"
"""In a run directory and a model directory."""
SKETCH_LENGTH = 16
"""Hashes in a sketch. The similarity of two texts is estimated with a standard error of at most 0.13."""
SAME_ID_SIMILARITY = 0.3
"""Least estimated similarity of a dialogue and the recorded one of the same id. Ids alone prove nothing: two data sets
may both count their dialogues."""


@dataclass(frozen=True)
class RecordedDialogue:
    """A dialogue that a model was trained on.

    Attributes:
        text: the first 8 bytes (hex) of the SHA-256 of its normalized text.
        sketch: the smallest hashes of the text's 5-grams, ascending, each 4 bytes (hex); at most `SKETCH_LENGTH`.
    """

    id: str
    text: str
    sketch: Sequence[str]

    def similarity(self, other: "RecordedDialogue") -> float:
        """The estimated Jaccard similarity (0..1) of the texts' sets of 5-grams."""
        union = sorted({*self.sketch, *other.sketch})[:SKETCH_LENGTH]
        return len(set(self.sketch).intersection(other.sketch, union)) / len(union)


def sketch_dialogue(dialogue: Dialogue) -> RecordedDialogue:
    """The record of a dialogue."""
    folded = unicodedata.normalize("NFKC", dialogue.text).casefold()
    text = "".join(character for character in folded if character.isalnum()) or dialogue.text
    codes = numpy.frombuffer(text.encode("utf-32-le").ljust(4 * SHINGLE_LENGTH, b"\0"), "<u4").astype(numpy.uint64)
    hashes = numpy.zeros(len(codes) - SHINGLE_LENGTH + 1, numpy.uint64)
    for offset in range(SHINGLE_LENGTH):  # a polynomial of the characters, then the finalizer of SplitMix64
        hashes = hashes * numpy.uint64(0x100000001B3) + codes[offset : offset + len(hashes)]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> numpy.uint64(shift))) * numpy.uint64(factor)
    smallest = numpy.unique(hashes >> numpy.uint64(32))[:SKETCH_LENGTH]
    return RecordedDialogue(dialogue.id, digest(text)[:16], tuple(f"{value:08x}" for value in smallest.tolist()))


def write_training_record(directory: str | os.PathLike, training: Iterable[Dialogue]) -> None:
    """Write the record of training dialogues into a directory.

    Raises:
        InputError: it cannot be written.
    """
    write_jsonl(Path(directory) / RECORD_FILE, (asdict(sketch_dialogue(dialogue)) for dialogue in training))


def read_training_record(directory: str | os.PathLike) -> list[RecordedDialogue] | None:
    """The record of training dialogues in a directory; None if there is none.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(directory) / RECORD_FILE
    if not path.exists():
        return None
    advice = "copy the file again from the run"
    return [row for _, row in read_jsonl(path, lambda row: RecordedDialogue(**row), advice=advice)]


def find_recorded(training: Sequence[RecordedDialogue], evaluation: Iterable[Dialogue], near: float) -> list[Overlap]:
    """The best match of each evaluation dialogue that a model was trained on, in the order of `evaluation`.

    A match has the same normalized text ("exact"), or an estimated similarity of at least `near` ("near"), or the same
    id and a similarity of at least `SAME_ID_SIMILARITY` ("edited").
    """
    texts = {each.text: each for each in reversed(training)}
    holders = defaultdict(list)
    for index, each in enumerate(training):
        for value in each.sketch:
            holders[value].append(index)
    found = []
    for dialogue in evaluation:
        own = sketch_dialogue(dialogue)
        if same := texts.get(own.text):
            found.append(Overlap(same.id, own.id, "exact", 1.0))
            continue
        shared = Counter(index for value in own.sketch for index in holders[value])
        # Fewer common hashes cannot make `SAME_ID_SIMILARITY`.
        least = SAME_ID_SIMILARITY * len(own.sketch)
        similarities = {index: own.similarity(training[index]) for index in shared if shared[index] >= least}
        matches = {
            index: similarity
            for index, similarity in similarities.items()
            if similarity >= near or (training[index].id == own.id and similarity >= SAME_ID_SIMILARITY)
        }
        if matches:
            best = max(matches, key=matches.__getitem__)
            kind = "near" if matches[best] >= near else "edited"
            found.append(Overlap(training[best].id, own.id, kind, matches[best]))
    return found
