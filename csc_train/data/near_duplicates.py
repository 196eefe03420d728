"""Texts that are nearly the same: MinHash (Broder 1997) with banding, confirmed by the true similarity."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_LENGTH = 5
"""Characters in a shingle: about three Chinese words."""
PERMUTATIONS = 128
"""Length of a MinHash signature."""
RECALL = 0.99
"""Least chance that a pair at the threshold itself becomes a candidate; more similar pairs have a higher one."""


class MinHashedText(NamedTuple):
    """A text with what it is compared by."""

    text: str
    shingles: set[str]
    signature: "MinHash"


class NearDuplicates:
    """Texts, and which of them another text nearly repeats.

    Two texts are near-duplicates if the Jaccard similarity of their sets of character 5-grams is at least `threshold`
    (0..1). None is reported wrongly, equal texts are always found, and a pair right at the threshold is missed with a
    chance of about 1 %, a more similar one with less. `seed` (0..2**32-1) fixes the hash functions.
    """

    def __init__(self, threshold: float, seed: int = 0):
        import datasketch

        rows = _rows_per_band(threshold)
        self._threshold = threshold
        self._empty = datasketch.MinHash(num_perm=PERMUTATIONS, seed=seed)
        self._index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
        self._texts: list[str] = []
        self._values = numpy.empty((64, PERMUTATIONS), dtype=numpy.uint32)
        # Signatures that agree less than this are 3 standard deviations from a pair at the threshold, and such a pair
        # lands there once in 700 times: not worth the exact comparison, of which texts made from templates would need
        # millions.
        self._least = threshold - 3 * math.sqrt(threshold * (1 - threshold) / PERMUTATIONS)

    def sign(self, text: str) -> MinHashedText:
        """Make a text ready to be remembered or looked for."""
        own = shingles(text)
        signature = self._empty.copy()
        signature.update_batch([shingle.encode() for shingle in own])
        return MinHashedText(text, own, signature)

    def add(self, signed: MinHashedText) -> None:
        """Remember a text; its place is the number of texts before it."""
        place = len(self._texts)
        if place == len(self._values):
            self._values = numpy.concatenate([self._values, numpy.empty_like(self._values)])
        self._values[place] = signed.signature.hashvalues
        self._index.insert(place, signed.signature)
        self._texts.append(signed.text)

    def matches(self, signed: MinHashedText) -> Iterator[tuple[int, float]]:
        """(place, similarity) of every remembered text that this one nearly repeats, in the order of their places."""
        candidates = numpy.array(sorted(self._index.query(signed.signature)), dtype=numpy.int64)
        agreement = (self._values[candidates] == signed.signature.hashvalues).mean(axis=1)
        for place in candidates[agreement >= self._least].tolist():
            if (similarity := _jaccard(signed.shingles, shingles(self._texts[place]))) >= self._threshold:
                yield place, similarity


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE_LENGTH` characters of a text; a shorter text is one shingle."""
    return {text[start : start + SHINGLE_LENGTH] for start in range(max(1, len(text) - SHINGLE_LENGTH + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _rows_per_band(threshold: float) -> int:
    """The most rows per band, so the fewest candidates, that still find a pair at `threshold` with chance `RECALL`.

    A pair of similarity s agrees in all r rows of one of b bands with chance 1 - (1 - s^r)^b.
    """
    fitting = [r for r in range(1, 17) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(fitting, default=1)
