"""Rows of different lengths in one flat array, such as the packs of millions of dialogues."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy


class Ragged(Sequence[list]):
    """Rows of different lengths. Lists of Python numbers would take some ten times the memory.

    Attributes:
        values: [entries, ...]; of all rows, one row after the other.
        offsets: int64 [rows + 1]; where each row starts in `values`, and the end of the last.
        make: what an entry is read as; of one number, defaults to an int.
    """

    def __init__(self, values: numpy.ndarray, offsets: numpy.ndarray, make: Callable[[Any], Any] = int):
        self.values, self.offsets, self.make = values, offsets, make

    @classmethod
    def of(cls, rows: Iterable[Sequence], make: Callable[[Any], Any] = int) -> "Ragged":
        """Copy rows, unless they are ragged already; no row may be empty."""
        if isinstance(rows, Ragged):
            return rows
        rows = list(rows)
        return cls(numpy.array([entry for row in rows for entry in row]), offsets_of([len(row) for row in rows]), make)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> list:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        return [*map(self.make, self.values[self.offsets[number] : self.offsets[number + 1]].tolist())]

    def __iter__(self) -> Iterator[list]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    @property
    def lengths(self) -> numpy.ndarray:
        """int64 [rows]: the number of entries."""
        return numpy.diff(self.offsets)

    def sums(self) -> numpy.ndarray:
        """[rows, ...]: the sum of each row."""
        return numpy.add.reduceat(self.values, self.offsets[:-1]) if len(self) else self.values[:0]


def offsets_of(lengths: Any) -> numpy.ndarray:
    """int64 [rows + 1]: the `Ragged.offsets` of rows of these lengths."""
    return numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
