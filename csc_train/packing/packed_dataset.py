"""Dialogues to a data set whose rows are packs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import numpy
import pyarrow

from csc_train.errors import InputError
from csc_train.packing.config import PackingConfig
from csc_train.packing.length_policy import LengthReport, fit_examples
from csc_train.packing.tight_fit import tight_fit
from csc_train.template.dialogue_template import Example


@dataclass(frozen=True)
class PackingReport:
    """Account of a packed data set; lengths in tokens."""

    dialogues: int
    trimmed: int
    dropped: int
    packs: int
    tokens: int
    """Tokens in the packs, shared prefixes counted once a pack."""
    separate_tokens: int
    """Tokens of the same dialogues when each has its prefix to itself."""
    trained_tokens: int
    utilisation: float
    """Tokens over the tokens that `packs` full packs would hold."""

    def __str__(self) -> str:
        return (
            f"{self.dialogues - self.dropped} dialogues ({self.trimmed} trimmed, {self.dropped} dropped) in "
            f"{self.packs} packs, {self.tokens:,} tokens ({self.tokens / self.separate_tokens:.3f} of what they have "
            f"apart), {self.trained_tokens / self.tokens:.1%} trained, utilisation {self.utilisation:.4f}"
        )


def pack_examples(examples: Iterable[Example], config: PackingConfig) -> tuple[datasets.Dataset, PackingReport]:
    """Fit examples to `config.max_length` and pack them.

    Returns:
        A data set with a row per pack: `input_ids` (int32) and `weights` (float32), both of the pack's length;
        `lengths` (int32), those of its documents in order; and `prefix` (int32), the length of the first document
        where the others share it as their prefix, else 0. And the account of what became of each dialogue.

    Raises:
        InputError: as `fit_examples`; or nothing is left to train on.
    """
    counts = LengthReport()
    fitted = list(fit_examples(examples, config, counts))
    if not fitted:
        raise InputError(f"none of the {counts.dialogues} dialogues fits packing.max_length={config.max_length}")
    packs, shared = [], []
    for prefix, members in _groups(fitted, config):
        made = _pack(prefix, members, config)
        packs += made
        shared += [len(prefix)] * len(made)
    tokens = sum(len(example.input_ids) for pack in packs for example in pack)
    table = pyarrow.table(
        {
            "input_ids": _list_column([[example.input_ids for example in pack] for pack in packs]),
            "weights": _list_column([[example.weights for example in pack] for pack in packs]),
            "lengths": _list_column(
                [[numpy.array([len(example.input_ids) for example in pack], dtype=numpy.int32)] for pack in packs]
            ),
            "prefix": pyarrow.array(shared, pyarrow.int32()),
        }
    )
    report = PackingReport(
        counts.dialogues,
        counts.trimmed,
        counts.dropped,
        len(packs),
        tokens,
        sum(len(example.input_ids) for example in fitted),
        sum(int((example.weights > 0).sum()) for example in fitted),
        tokens / (len(packs) * config.max_length),
    )
    return datasets.Dataset(datasets.table.InMemoryTable(table)), report


def _groups(examples: list[Example], config: PackingConfig) -> Iterator[tuple[numpy.ndarray, list[Example]]]:
    """Examples that may share a pack, with the ids that they share as prefix (none but under `shared_prefix`)."""
    if config.strategy != "shared_prefix":
        yield numpy.empty(0, dtype=numpy.int32), examples
        return
    groups: dict[bytes, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.input_ids[: example.boundaries[0]].tobytes(), []).append(example)
    for prefix, members in groups.items():
        yield numpy.frombuffer(prefix, dtype=numpy.int32), members


def _pack(prefix: numpy.ndarray, members: list[Example], config: PackingConfig) -> list[list[Example]]:
    """The documents of each pack of one group; a prefix that is shared is the first of them."""
    shared = len(prefix)
    lengths = [len(example.input_ids) - shared for example in members]
    if config.strategy == "off":
        packs = [[index] for index in range(len(members))]
    else:
        packs = tight_fit(lengths, config.max_length - shared)
    first = [Example(prefix, numpy.zeros(shared, numpy.float32), numpy.array([0, shared]))] if shared else []
    bodies = [Example(e.input_ids[shared:], e.weights[shared:], e.boundaries - shared) for e in members]
    return [first + [bodies[index] for index in pack] for pack in packs]


def _list_column(packs: list[list[numpy.ndarray]]) -> pyarrow.Array:
    """A column with a list per pack: the pack's arrays joined end to end."""
    lengths = [sum(len(array) for array in pack) for pack in packs]
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int64)
    return pyarrow.LargeListArray.from_arrays(
        offsets, pyarrow.array(numpy.concatenate([array for pack in packs for array in pack]))
    )
