"""Fit a dialogue that is longer than a pack: drop it, or remove leading turns."""

import numpy

from csc_train.errors import InputError
from csc_train.packing.config import PackingConfig
from csc_train.template.dialogue_template import TokenizedDialogue


def num_turns_to_truncate(dialogue: TokenizedDialogue, config: PackingConfig, number: int) -> int | None:
    """The number of leading turns to remove so that a dialogue fits `config.max_length`; 0 if it fits.

    Whole turns are removed, as few as possible; the prefix stays. The rest starts with a customer turn, so that no
    supporter turn is trained without the turn that it answers.

    Args:
        number: the dialogue's number in the data, for error messages.

    Returns:
        None to drop the dialogue: by `config.overflow`, or because nothing trained would be left.

    Raises:
        InputError: `max_length` has no room beside our system prompt, or the dialogue is too long under `error`. A chat
            with a longer system prompt of its own is a dialogue that is too long.
    """
    prefix, length = int(dialogue.turn_offsets[0]), len(dialogue.input_ids)
    if config.max_length <= prefix and dialogue.strategies.any():
        raise InputError(
            f"packing.max_length={config.max_length} leaves no room beside the system prompt, "
            f"which takes {prefix} tokens"
        )
    if length <= config.max_length:
        return 0
    if config.overflow == "error":
        name = f"{number} ({dialogue.id})" if dialogue.id else number
        raise InputError(
            f"dialogue {name} has {length} tokens, more than packing.max_length={config.max_length}; "
            "set packing.overflow=truncate or packing.overflow=drop"
        )
    if config.overflow == "truncate":
        trained = numpy.logical_or.reduceat(dialogue.trained, dialogue.turn_offsets[:-1])
        # The customer's turns: those of a chat's supporter have no strategy either, but are trained.
        for first in ((dialogue.strategies == 0) & ~trained).nonzero()[0].tolist():
            start = int(dialogue.turn_offsets[first])
            if prefix + length - start <= config.max_length:
                return first if dialogue.trained[start:].any() else None
    return None


def drop_leading_turns(dialogue: TokenizedDialogue, first: int) -> TokenizedDialogue:
    """The dialogue's prefix, and its turns from `first` on."""
    if first == 0:
        return dialogue
    prefix, start = int(dialogue.turn_offsets[0]), int(dialogue.turn_offsets[first])
    kept = numpy.r_[0:prefix, start : len(dialogue.input_ids)]
    return TokenizedDialogue(
        dialogue.input_ids[kept],
        dialogue.token_types[kept],
        dialogue.turn_offsets[first:] - (start - prefix),
        dialogue.strategies[first:],
        dialogue.id,
    )
