"""What happens to a dialogue that is longer than a pack."""

import numpy

from csc_train.errors import InputError
from csc_train.packing.config import PackingConfig
from csc_train.template.dialogue_template import TokenizedDialogue


def num_turns_to_truncate(example: TokenizedDialogue, config: PackingConfig, number: int) -> int | None:
    """How many leading turns of an example must go so that it fits `config.max_length`: 0 where it fits as it is.

    Whole turns go, as few as possible; the prefix stays. What is left starts with a customer turn, so that no supporter
    turn is trained without what it answers.

    Args:
        number: the dialogue's place in the data, for the error message.

    Returns:
        None where the example is to be dropped: by the policy, or since nothing trained would be left.

    Raises:
        InputError: `max_length` is shorter than the system prompt, or the example is too long under policy `raise`.
    """
    prefix, length = int(example.turn_offsets[0]), len(example.input_ids)
    if config.max_length <= prefix:
        raise InputError(
            f"packing.max_length={config.max_length} leaves no room beside the system prompt, "
            f"which takes {prefix} tokens"
        )
    if length <= config.max_length:
        return 0
    if config.overflow == "error":
        raise InputError(
            f"dialogue {number} has {length} tokens, more than packing.max_length={config.max_length}; "
            "set packing.overflow=truncate or packing.overflow=drop"
        )
    if config.overflow == "truncate":
        # Turns alternate from the supporter's greeting on: customer turns have odd indices.
        for first in range(1, len(example.turn_offsets) - 1, 2):
            start = int(example.turn_offsets[first])
            if prefix + length - start <= config.max_length:
                return first if example.trained[start:].any() else None
    return None


def drop_leading_turns(example: TokenizedDialogue, first: int) -> TokenizedDialogue:
    """The example from turn `first` on, behind its prefix."""
    if first == 0:
        return example
    prefix, start = int(example.turn_offsets[0]), int(example.turn_offsets[first])
    kept = numpy.r_[0:prefix, start : len(example.input_ids)]
    return TokenizedDialogue(
        example.input_ids[kept],
        example.token_types[kept],
        example.turn_offsets[first:] - (start - prefix),
        example.strategies[first:],
    )
