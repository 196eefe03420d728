"""The interface of systems that reply to customers, and the loop that lets one predict all turns of dialogues."""

from collections.abc import Sequence
from typing import Protocol

from tqdm import tqdm

from csc_train.data.dialogue import Dialogue
from csc_train.inference.prediction_store import PredictionStore
from csc_train.inference.predictions import TurnOutcome
from csc_train.inference.turn_queue import TurnQueue


class Generator(Protocol):
    """A system that replies at supporter turns: a model or a baseline."""

    predicts_strategy: bool
    """Whether it chooses strategies itself, so that their accuracy has a meaning."""
    config_hash: str
    """SHA-256 (hex) of everything that decides its replies: model, template, decoding settings."""

    def run(self, queue: TurnQueue) -> None:
        """Pop requests until the queue is finished, and complete each."""


def generate_predictions(
    dialogues: Sequence[Dialogue],
    generator: Generator,
    context: str,
    store: PredictionStore | None = None,
    progress: str | None = None,
) -> list[TurnOutcome]:
    """Let a generator predict every supporter turn of every dialogue (see `TurnQueue`).

    Args:
        progress: label of a progress bar; None shows none.

    Returns:
        One outcome per supporter turn, ordered by dialogue and turn.
    """
    total = sum(len(dialogue.supporter_turns) for dialogue in dialogues)
    with tqdm(total=total, desc=progress, unit="turn", disable=True if progress is None else None) as bar:
        queue = TurnQueue(dialogues, context, generator.config_hash, generator.predicts_strategy, store, bar)
        generator.run(queue)
    return queue.outcomes()


def shard_dialogues(dialogues: Sequence[Dialogue], rank: int, world_size: int) -> list[Dialogue]:
    """The dialogues of one rank; all ranks get about the same number of supporter turns."""
    shards: list[list[Dialogue]] = [[] for _ in range(world_size)]
    turns = [0] * world_size
    for dialogue in sorted(dialogues, key=lambda each: -len(each.supporter_turns)):
        lightest = turns.index(min(turns))
        shards[lightest].append(dialogue)
        turns[lightest] += len(dialogue.supporter_turns)
    return shards[rank]
