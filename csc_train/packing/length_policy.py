"""What happens to a dialogue that is longer than a pack."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy

from csc_train.errors import InputError
from csc_train.packing.config import PackingConfig
from csc_train.template.dialogue_template import Example


@dataclass
class LengthReport:
    """What the policy did: `dialogues` in, of which `trimmed` were shortened and `dropped` left out."""

    dialogues: int = 0
    trimmed: int = 0
    dropped: int = 0


def fit_examples(examples: Iterable[Example], config: PackingConfig, report: LengthReport) -> Iterator[Example]:
    """Yield the examples that fit `config.max_length`, after applying the policy `config.too_long`; count in `report`.

    Raises:
        InputError: `max_length` is shorter than the system prompt, or a dialogue is too long under policy `raise`.
    """
    for example in examples:
        report.dialogues += 1
        prefix, length = int(example.boundaries[0]), len(example.input_ids)
        if config.max_length <= prefix:
            raise InputError(
                f"packing.max_length={config.max_length} leaves no room beside the system prompt, "
                f"which takes {prefix} tokens"
            )
        if length <= config.max_length:
            yield example
        elif config.too_long == "raise":
            raise InputError(
                f"dialogue {report.dialogues} has {length} tokens, more than packing.max_length={config.max_length}; "
                "packing.too_long=trim or drop would go on"
            )
        elif config.too_long == "trim" and (shorter := trim_leading_turns(example, config.max_length)) is not None:
            report.trimmed += 1
            yield shorter
        else:
            report.dropped += 1


def trim_leading_turns(example: Example, max_length: int) -> Example | None:
    """Cut the fewest whole leading turns so that `example` fits; the prefix stays.

    What is left starts with a customer turn, so that no supporter turn is trained without what it answers. None when
    nothing trained would be left.
    """
    prefix = int(example.boundaries[0])
    # Turns alternate from the supporter's greeting on: customer turns have odd indices.
    for first in range(1, len(example.boundaries) - 1, 2):
        start = int(example.boundaries[first])
        if prefix + len(example.input_ids) - start <= max_length:
            kept = numpy.r_[0:prefix, start : len(example.input_ids)]
            shorter = Example(
                example.input_ids[kept], example.weights[kept], example.boundaries[first:] - (start - prefix)
            )
            return shorter if shorter.weights.any() else None
    return None
