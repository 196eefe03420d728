"""Which figures a trained token counts in: part of the reply, strategy, and place in the dialogue."""

import itertools

import numpy

from csc_train.data.strategies import STRATEGIES
from csc_train.template.dialogue_template import TokenizedDialogue, TokenType

REPLY_PARTS = {TokenType.STRATEGY: "strategy", TokenType.REPLY: "reply"}
"""The trained parts of a supporter's turn, by what they are called in figures."""
FIRST_TURNS = (1, 5, 9, 17, 33)
"""The first turn of each stretch of a dialogue, counted from 1 over both speakers."""
TURN_BUCKETS = (
    *(f"{first}-{after - 1}" for first, after in itertools.pairwise(FIRST_TURNS)),
    f"{FIRST_TURNS[-1]}+",
)
GROUP_SHAPE = (len(REPLY_PARTS), len(STRATEGIES), len(TURN_BUCKETS))
"""The cells by part, strategy and stretch, once the one of what is not trained is left out."""
NUM_GROUPS = 1 + len(REPLY_PARTS) * len(STRATEGIES) * len(TURN_BUCKETS)
"""How many there are; 0 is that of what is not trained."""


def token_group_ids(example: TokenizedDialogue, first_turn: int = 0) -> numpy.ndarray:
    """uint8 [length]: the cell of each token.

    Args:
        example: without its turns before `first_turn`, which count for the place of the others.
    """
    turns = first_turn + 1 + numpy.arange(len(example.strategies))
    stretches = numpy.searchsorted(FIRST_TURNS, turns, side="right") - 1
    lengths = numpy.diff(example.turn_offsets)
    cells = numpy.zeros(len(example.token_types), numpy.uint8)
    body = slice(int(example.turn_offsets[0]), None)
    place = ((example.strategies.astype(int) - 1) * len(TURN_BUCKETS) + stretches).repeat(lengths)
    token_types = example.token_types[body].astype(int)
    part = (token_types - min(REPLY_PARTS)) * len(STRATEGIES) * len(TURN_BUCKETS)
    cells[body] = numpy.where(token_types == TokenType.CONTEXT, 0, 1 + part + place)
    return cells
