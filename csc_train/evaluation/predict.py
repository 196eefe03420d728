"""Dialogues to predictions, in reference or generated context, whatever the system that replies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from csc_train.dialogue import Dialogue, Turn
from csc_train.evaluation.predictions import Prediction
from csc_train.template.reply import Reply


@dataclass(frozen=True)
class Said:
    """What a system said at a supporter turn. `ids` are the tokens of the turn, where it works on tokens: those it
    generated, after those of a strategy that was handed in."""

    raw_text: str
    reply: Reply
    prompt_hash: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """A supporter turn to predict: `turn` indexes `dialogue.turns`; `history` is all that was said before it.

    In generated context the supporter's turns in `history` are the system's own.
    """

    dialogue: Dialogue
    turn: int
    history: tuple[Turn | Said, ...]


class Policy(Protocol):
    """A system under evaluation."""

    batch_size: int
    """Requests that it likes to answer at a time."""
    strategies_apply: bool
    """Whether it chooses strategies itself, so that their accuracy means something."""

    def reply(self, requests: Sequence[Request]) -> list[Said]:
        """Answer each request, in order."""


def predict(dialogues: Sequence[Dialogue], policy: Policy, context: str, progress: str = "") -> list[Prediction]:
    """Predict every supporter turn of every dialogue.

    In context `reference` each turn is predicted from the gold history. In `generated` the system's own earlier
    strategies and replies replace the gold supporter's, while the customer's turns stay gold; dialogues then advance
    together, a supporter turn at a time.

    Returns:
        A prediction per supporter turn, ordered by dialogue and turn.
    """
    said: dict[tuple[int, int], Said] = {}
    total = sum(len(dialogue.supporter_turns) for dialogue in dialogues)
    with tqdm(total=total, desc=progress, unit="turn", disable=None) as bar:
        for wave in _waves(dialogues, context):
            requests = [(index, _request(dialogues[index], index, turn, context, said)) for index, turn in wave]
            # Long histories first: the prompts of a batch are then about equally long.
            requests.sort(key=lambda item: -len(item[1].history))
            for start in range(0, len(requests), policy.batch_size):
                batch = requests[start : start + policy.batch_size]
                answers = policy.reply([request for _, request in batch])
                for (index, request), words in zip(batch, answers, strict=True):
                    said[index, request.turn] = words
                bar.update(len(batch))
    return [
        Prediction(
            dialogue_id=dialogue.id,
            turn=turn,
            context=context,
            prompt_hash=words.prompt_hash,
            raw_text=words.raw_text,
            strategy=words.reply.strategy.number if words.reply.strategy else None,
            response=words.reply.response,
            reference_strategy=dialogue.turns[turn].strategy.number,
            reference_response=dialogue.turns[turn].text,
            predicts_strategy=policy.strategies_apply,
        )
        for index, dialogue in enumerate(dialogues)
        for turn in dialogue.supporter_turns
        for words in [said[index, turn]]
    ]


def _waves(dialogues: Sequence[Dialogue], context: str) -> Iterator[list[tuple[int, int]]]:
    """(dialogue index, turn) pairs that can be predicted at the same time, wave by wave."""
    if context == "reference":
        yield [(index, turn) for index, dialogue in enumerate(dialogues) for turn in dialogue.supporter_turns]
        return
    longest = max((len(dialogue.supporter_turns) for dialogue in dialogues), default=0)
    for step in range(longest):
        yield [
            (index, dialogue.supporter_turns[step])
            for index, dialogue in enumerate(dialogues)
            if step < len(dialogue.supporter_turns)
        ]


def _request(dialogue: Dialogue, index: int, turn: int, context: str, said: dict[tuple[int, int], Said]) -> Request:
    history: tuple[Turn | Said, ...] = dialogue.turns[:turn]
    if context == "generated":
        history = tuple(said.get((index, earlier), gold) for earlier, gold in enumerate(history))
    return Request(dialogue, turn, history)
