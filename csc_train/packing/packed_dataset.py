"""Dialogues to a data set whose rows are packs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import datasets
import numpy
import pyarrow

from csc_train.errors import InputError
from csc_train.packing.best_fit import best_fit_decreasing
from csc_train.packing.config import PackingConfig
from csc_train.packing.length_policy import LengthReport, fit_examples
from csc_train.template.dialogue_template import Example


@dataclass(frozen=True)
class PackingReport:
    """Account of a packed data set; lengths in tokens."""

    dialogues: int
    trimmed: int
    dropped: int
    packs: int
    tokens: int
    trained_tokens: int
    utilisation: float
    """Tokens over the tokens that `packs` full packs would hold."""

    def __str__(self) -> str:
        return (
            f"{self.dialogues - self.dropped} dialogues ({self.trimmed} trimmed, {self.dropped} dropped) in "
            f"{self.packs} packs, {self.tokens:,} tokens, {self.trained_tokens / self.tokens:.1%} trained, "
            f"utilisation {self.utilisation:.4f}"
        )

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def pack_examples(examples: Iterable[Example], config: PackingConfig) -> tuple[datasets.Dataset, PackingReport]:
    """Fit examples to `config.max_length` and pack them.

    Returns:
        A data set with a row per pack: `input_ids` (int32), `weights` (float32), both of the pack's length, and
        `lengths` (int32), those of its documents in order; and the account of what became of each dialogue.

    Raises:
        InputError: as `fit_examples`; or nothing is left to train on.
    """
    counts = LengthReport()
    fitted = list(fit_examples(examples, config, counts))
    if not fitted:
        raise InputError(f"none of the {counts.dialogues} dialogues fits packing.max_length={config.max_length}")
    lengths = [len(example.input_ids) for example in fitted]
    if config.strategy == "off":
        packs = [[index] for index in range(len(fitted))]
    else:
        packs = best_fit_decreasing(lengths, config.max_length)
    order = [index for pack in packs for index in pack]
    pack_lengths = [sum(lengths[index] for index in pack) for pack in packs]
    table = pyarrow.table(
        {
            "input_ids": _list_column([fitted[index].input_ids for index in order], pack_lengths),
            "weights": _list_column([fitted[index].weights for index in order], pack_lengths),
            "lengths": _list_column(
                [numpy.array([lengths[index] for index in order], dtype=numpy.int32)], [len(pack) for pack in packs]
            ),
        }
    )
    tokens = sum(lengths)
    report = PackingReport(
        counts.dialogues,
        counts.trimmed,
        counts.dropped,
        len(packs),
        tokens,
        sum(int((example.weights > 0).sum()) for example in fitted),
        tokens / (len(packs) * config.max_length),
    )
    return datasets.Dataset(datasets.table.InMemoryTable(table)), report


def _list_column(arrays: list[numpy.ndarray], lengths: list[int]) -> pyarrow.Array:
    """A column of lists, of the given lengths, over the arrays joined end to end."""
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int64)
    return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(numpy.concatenate(arrays)))
