"""Groups of trained tokens for metrics: by part of the reply, strategy, and place in the dialogue."""

import itertools
import math

import numpy

from csc_train.data.strategies import STRATEGIES
from csc_train.template.dialogue_template import TokenizedDialogue, TokenType

REPLY_PARTS = {TokenType.STRATEGY: "strategy", TokenType.REPLY: "reply"}
"""The trained parts of a supporter turn, by their names in metrics."""
FIRST_TURNS = (1, 5, 9, 17, 33)
"""The first turn of each bucket, counted from 1 over both speakers."""
TURN_BUCKETS = (
    *(f"{first}-{after - 1}" for first, after in itertools.pairwise(FIRST_TURNS)),
    f"{FIRST_TURNS[-1]}+",
)
GROUP_SHAPE = (len(REPLY_PARTS), 1 + len(STRATEGIES), len(TURN_BUCKETS))
"""The groups of trained tokens of a source: part, strategy number (0 for the turns of chats), turn bucket."""
NUM_GROUPS = 1 + math.prod(GROUP_SHAPE)
"""All groups of a source; group 0 holds the tokens that are not trained."""


def token_group_ids(dialogue: TokenizedDialogue, first_turn: int = 0, source: int = 0) -> numpy.ndarray:
    """int16 [length]: the group of each token, behind those of the sources before its own.

    Args:
        dialogue: without its turns before `first_turn`, which still count for the position of the others.
        source: of a mix of data, the number of the dialogue's.
    """
    turns = first_turn + 1 + numpy.arange(len(dialogue.strategies))
    buckets = numpy.searchsorted(FIRST_TURNS, turns, side="right") - 1
    by_turn = dialogue.strategies.astype(int) * len(TURN_BUCKETS) + buckets
    groups = numpy.zeros(len(dialogue.token_types), numpy.int16)
    body = slice(int(dialogue.turn_offsets[0]), None)
    types = dialogue.token_types[body].astype(int)
    part = (types - min(REPLY_PARTS)) * math.prod(GROUP_SHAPE[1:])
    trained = source * NUM_GROUPS + 1 + part + by_turn.repeat(numpy.diff(dialogue.turn_offsets))
    groups[body] = numpy.where(types == TokenType.CONTEXT, 0, trained)
    return groups
