"""Near-duplicate search: MinHash (Broder 1997) with banding, confirmed by the exact Jaccard similarity."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy

SHINGLE_LENGTH = 5
"""Characters in a shingle: about three Chinese words."""
NUM_PERMUTATIONS = 128
"""Length of a MinHash signature."""
MIN_RECALL = 0.99
"""Least chance that a pair right at the threshold becomes a candidate; more similar pairs have a higher one."""

_MIX = numpy.uint64(0xBF58476D1CE4E5B9)


class MinHashedText(NamedTuple):
    """A text with its MinHash signature, uint32 [NUM_PERMUTATIONS]."""

    text: str
    signature: numpy.ndarray


class NearDuplicateIndex:
    """An index of texts that finds near-duplicates of another text.

    Two texts are near-duplicates if the Jaccard similarity of their sets of character 5-grams is at least `threshold`
    (0..1). There are no false positives, and equal texts are always found. A pair right at the threshold is missed
    with a chance of about 1 %, a more similar one with less. `seed` (0..2**32-1) fixes the hash functions.
    """

    def __init__(self, threshold: float, seed: int = 0):
        draw = numpy.random.default_rng(seed).integers
        self._rows = _rows_per_band(threshold)
        self._threshold = threshold
        self._places = draw(0, 2**64, SHINGLE_LENGTH, dtype=numpy.uint64) | numpy.uint64(1)
        self._factors = draw(0, 2**32, (NUM_PERMUTATIONS, 1), dtype=numpy.uint32) | numpy.uint32(1)
        self._shifts = draw(0, 2**32, (NUM_PERMUTATIONS, 1), dtype=numpy.uint32)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(NUM_PERMUTATIONS // self._rows)]
        self._texts: list[str] = []
        self._hashes = numpy.empty((64, NUM_PERMUTATIONS), dtype=numpy.uint32)
        # Candidates whose signatures agree less are 3 standard deviations below the threshold (1 in 700 of the pairs
        # right at it). They skip the exact comparison, of which template texts would need millions.
        self._min_agreement = threshold - 3 * math.sqrt(threshold * (1 - threshold) / NUM_PERMUTATIONS)

    def minhash(self, text: str) -> MinHashedText:
        """Prepare a text for `add` and `matches`."""
        codes = numpy.frombuffer(text.ljust(SHINGLE_LENGTH, "\0").encode("utf-32-le", "surrogatepass"), numpy.uint32)
        hashes = numpy.lib.stride_tricks.sliding_window_view(codes.astype(numpy.uint64), SHINGLE_LENGTH) @ self._places
        hashes = (hashes ^ (hashes >> numpy.uint64(29))) * _MIX
        distinct = numpy.unique((hashes >> numpy.uint64(32)).astype(numpy.uint32))
        return MinHashedText(text, (distinct * self._factors + self._shifts).min(axis=1))

    def add(self, hashed: MinHashedText) -> None:
        """Add a text; its position is the number of texts added before it."""
        position = len(self._texts)
        if position == len(self._hashes):
            self._hashes = numpy.concatenate([self._hashes, numpy.empty_like(self._hashes)])
        self._hashes[position] = hashed.signature
        for band, key in zip(self._bands, self._keys(hashed), strict=True):
            band.setdefault(key, []).append(position)
        self._texts.append(hashed.text)

    def matches(self, hashed: MinHashedText) -> Iterator[tuple[int, float]]:
        """(position, similarity) of every near-duplicate in the index, in the order of the positions."""
        found = {at for band, key in zip(self._bands, self._keys(hashed), strict=True) for at in band.get(key, ())}
        if not found:
            return
        candidates = numpy.array(sorted(found), dtype=numpy.int64)
        agreement = (self._hashes[candidates] == hashed.signature).mean(axis=1)
        own = shingles(hashed.text)
        for position in candidates[agreement >= self._min_agreement].tolist():
            if (similarity := _jaccard(own, shingles(self._texts[position]))) >= self._threshold:
                yield position, similarity

    def _keys(self, hashed: MinHashedText) -> list[bytes]:
        """The bytes of each band of a signature."""
        size, rows = hashed.signature.itemsize, self._rows
        data = hashed.signature.tobytes()
        return [data[band * rows * size : (band + 1) * rows * size] for band in range(len(self._bands))]


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE_LENGTH` characters of a text; a shorter text is one shingle."""
    return {text[start : start + SHINGLE_LENGTH] for start in range(max(1, len(text) - SHINGLE_LENGTH + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _rows_per_band(threshold: float) -> int:
    """The most rows per band (so the fewest candidates) that find a pair at `threshold` with chance `MIN_RECALL`.

    A pair of similarity s agrees in all r rows of one of b bands with chance 1 - (1 - s^r)^b.
    """
    recalls = {r: 1 - (1 - threshold**r) ** (NUM_PERMUTATIONS // r) for r in range(1, 17)}
    return max((r for r, recall in recalls.items() if recall >= MIN_RECALL), default=1)
