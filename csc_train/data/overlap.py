"""Overlap of training and evaluation data: equal, nearly equal and partly shared dialogues."""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import get_language
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.segmentation import split_words
from csc_train.progress import ProgressBar

NGRAM = 13
"""Words in an n-gram of `find_shared_text` where white space separates words (as Brown et al., "Language models are
few-shot learners", 2020), else characters: about eight Chinese words, more than a stock phrase has."""
_BATCH = 256
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")


@dataclass(frozen=True)
class Overlap:
    """A training dialogue and an evaluation dialogue that are too much alike.

    Attributes:
        kind: "exact" for equal texts (strategies may differ), "near" for near-duplicates, "shared" for an evaluation
            dialogue whose text is mostly contained in the training dialogue.
        similarity: 0..1, the Jaccard similarity of the two sets of character 5-grams; for "shared", the share of the
            evaluation dialogue's n-grams (see `find_shared_text`).
    """

    train_id: str
    evaluation_id: str
    kind: str
    similarity: float

    def __str__(self) -> str:
        return f"training {self.train_id} ~ evaluation {self.evaluation_id}: {self.kind}, {self.similarity:.2f}"


def find_overlaps(
    train: list[Dialogue], evaluation: list[Dialogue], threshold: float = 0.8, seed: int = 0
) -> Iterator[Overlap]:
    """Every exact or near pair, in the order of `evaluation`, then of `train`; see `NearDuplicateIndex`."""
    index = NearDuplicateIndex(threshold, seed)  # of the smaller set, since it takes memory
    for dialogue in ProgressBar(evaluation, "overlap check, evaluation", unit="dialogue"):
        index.add(index.minhash(dialogue.text))
    pairs = []
    for number, dialogue in enumerate(ProgressBar(train, "overlap check, training", unit="dialogue")):
        pairs += [(place, number, similarity) for place, similarity in index.matches(index.minhash(dialogue.text))]
    for place, number, similarity in sorted(pairs):
        one, other = train[number], evaluation[place]
        yield Overlap(one.id, other.id, "exact" if _texts(one) == _texts(other) else "near", similarity)


def best_overlaps(overlaps: Iterable[Overlap]) -> list[Overlap]:
    """The best overlap of each evaluation dialogue: exact before near, then by similarity, then the earliest."""
    best: dict[str, Overlap] = {}
    for overlap in overlaps:
        rival = best.setdefault(overlap.evaluation_id, overlap)
        if (overlap.kind == "exact", overlap.similarity) > (rival.kind == "exact", rival.similarity):
            best[overlap.evaluation_id] = overlap
    return list(best.values())


def find_shared_text(
    train: list[Dialogue], evaluation: list[Dialogue], threshold: float = 0.5, language: str = "zh"
) -> list[Overlap]:
    """The training dialogue that contains most of each evaluation dialogue, in the order of `evaluation`.

    Compares the distinct n-grams of `NGRAM` characters, or words without case and punctuation, within turns. White
    space is ignored, and every placeholder such as `[手机号码]` counts as the same one. Turns shorter than an n-gram,
    such as greetings, are ignored.

    Args:
        threshold: least share (0..1) of the evaluation dialogue's n-grams; among equal shares the earliest wins.
        language: tells whether white space separates words.
    """
    from scipy.sparse import csr_array

    ngrams = functools.partial(_ngrams, spaced=get_language(language).spaced_words)
    wanted = [*map(ngrams, evaluation)]
    columns: dict[str, int] = {}
    for gram in itertools.chain.from_iterable(wanted):
        columns.setdefault(gram, len(columns))
    if not columns or not train:
        return []

    def incidence(sets: Iterable[set[str]]) -> csr_array:
        """int [dialogues, n-grams of the evaluation]: 1 if the dialogue has the n-gram."""
        hits = [[columns[gram] for gram in grams if gram in columns] for grams in sets]
        ends = numpy.cumsum([0, *map(len, hits)])
        indices = numpy.fromiter(itertools.chain.from_iterable(hits), numpy.int32, ends[-1])
        return csr_array((numpy.ones(ends[-1], numpy.int32), indices, ends), shape=(len(hits), len(columns)))

    train_incidence = incidence(map(ngrams, train)).T.tocsr()
    overlaps = []
    for start in range(0, len(evaluation), _BATCH):
        batch = wanted[start : start + _BATCH]
        common = (incidence(batch) @ train_incidence).toarray()
        shares = common.max(axis=1) / numpy.maximum([len(grams) for grams in batch], 1)
        for row in numpy.flatnonzero(shares >= threshold):
            source = train[common[row].argmax()]
            overlaps.append(Overlap(source.id, evaluation[start + row].id, "shared", float(shares[row])))
    return overlaps


def _texts(dialogue: Dialogue) -> tuple[str, ...]:
    return tuple(turn.text for turn in dialogue.turns)


def _ngrams(dialogue: Dialogue, spaced: bool) -> set[str]:
    """All runs of `NGRAM` words or characters within the dialogue's turns; see `find_shared_text`."""
    texts = [_PLACEHOLDER.sub("□", text) for text in _texts(dialogue)]
    if not spaced:
        joined = ["".join(text.split()) for text in texts]
        return {text[start : start + NGRAM] for text in joined for start in range(len(text) - NGRAM + 1)}
    words = [[word for word in split_words(text) if word == "□" or any(map(str.isalnum, word))] for text in texts]
    return {" ".join(each[start : start + NGRAM]) for each in words for start in range(len(each) - NGRAM + 1)}
