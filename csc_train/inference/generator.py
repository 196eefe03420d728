"""The interface of systems that reply to customers, and the queue of supporter turns that they reply to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from csc_train.data.dialogue import Dialogue, Turn
from csc_train.data.strategies import Strategy
from csc_train.errors import InputError
from csc_train.inference.predictions import (
    FailedTurn,
    Prediction,
    PredictionStore,
    TurnOutcome,
    build_prediction,
    expected_turns,
)
from csc_train.progress import ProgressBar
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply

EARLIER_TURN_FAILED = "earlier_turn_failed"
"""`FailedTurn.kind` of turns in generated context whose history could not be generated."""
CONTEXT_LENGTH = "context_length"
"""`FailedTurn.kind` of turns whose history and reply have more tokens than the model has positions."""


@dataclass(frozen=True)
class TurnRequest:
    """A supporter turn to predict.

    Attributes:
        turn: index into `dialogue.turns`.
        context: one of `CONTEXTS`.
        history: all earlier turns. In generated context the supporter's are the generator's own predictions.
    """

    dialogue: Dialogue
    turn: int
    context: str
    history: tuple[Turn | Prediction, ...]

    def given_strategy(self, mode: str) -> Strategy | None:
        """The reference strategy in mode `given`, else None."""
        return self.dialogue.turns[self.turn].strategy if mode == "given" else None

    def prompt_ids(self, template: DialogueTemplate) -> list[int]:
        """Token ids of the prompt, the given strategy included."""
        history = [turn if isinstance(turn, Turn) else turn.token_ids for turn in self.history]
        return template.prompt_ids(history, self.given_strategy(template.config.mode))

    def prediction(self, raw_text: str, reply: Reply, prompt_hash: str, **details: Any) -> Prediction:
        """The outcome of a turn that got a reply; `details` are further fields of `Prediction`."""
        return build_prediction(self.dialogue, self.turn, self.context, raw_text, reply, prompt_hash, **details)

    def failure(self, kind: str, message: str) -> FailedTurn:
        """The outcome of a turn that got no reply; `kind` is the class of the error."""
        return FailedTurn(self.dialogue.id, self.turn, self.context, kind, message)


class TurnQueue:
    """Hands out supporter turns to a generator and collects the outcomes.

    In reference context all turns are ready at once: each is predicted from the reference history. In generated context
    the generator's own turns replace the reference supporter's, so a turn is ready once the one before is complete. If
    a turn fails, the rest of its dialogue fails too.

    Attributes:
        dialogues: all dialogues, complete ones included.
        context: one of `CONTEXTS`.

    Args:
        config_hash: `Generator.config_hash`; becomes part of each outcome.
        predicts_strategy: `Generator.predicts_strategy`; becomes part of each prediction.
        store: writes outcomes as they come and provides those of an earlier run; None writes nothing.
        progress_bar: advances with each outcome.

    Raises:
        InputError: two dialogues have the same id.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        context: str,
        config_hash: str,
        predicts_strategy: bool,
        store: PredictionStore | None = None,
        progress_bar: ProgressBar | None = None,
    ):
        self.dialogues, self.context = dialogues, context
        self._config_hash, self._predicts_strategy = config_hash, predicts_strategy
        self._store, self._progress_bar = store, progress_bar
        self._by_id = {dialogue.id: dialogue for dialogue in dialogues}
        if len(self._by_id) < len(dialogues):
            raise InputError(f"dialogues: {len(dialogues) - len(self._by_id)} have the id of another one: rename them")
        self._outcomes: dict[tuple[str, int], TurnOutcome] = {}
        for key, prediction in (store.earlier if store else {}).items():
            if key[0] in self._by_id:
                self._record(prediction)
        # Ids of dialogues with ready turns, in the order to pop them. A generator that caches dialogues should continue
        # the started ones, and have one turn of each in flight. Long dialogues start first.
        self._in_flight: dict[str, set[int]] = {dialogue.id: set() for dialogue in dialogues}
        self._started: dict[str, None] = {}
        self._fresh: dict[str, None] = {}
        self._busy: dict[str, None] = {}
        for dialogue in sorted(dialogues, key=lambda each: -len(each.supporter_turns)):
            self._enqueue(dialogue)

    @property
    def finished(self) -> bool:
        """Whether every turn has an outcome."""
        return not any(map(self._remaining, self.dialogues))

    def pop(self, count: int, last_first: bool = True) -> list[TurnRequest]:
        """Up to `count` ready turns; an empty list if all others are in flight or wait for an earlier turn.

        Started dialogues come first, and each has one turn in flight before any has two. In reference context the last
        turns of a dialogue come first: their prompts begin with those of the earlier turns.

        Args:
            last_first: False begins with the first turns, for a model whose state cannot be cut back to their prompts.
        """
        requests = []
        while len(requests) < count:
            ready = self._started or self._fresh or self._busy
            if not ready:
                break
            dialogue = self._by_id[next(iter(ready))]
            turn = self._ready_turns(dialogue)[0 if last_first else -1]
            history: tuple[Turn | Prediction, ...] = dialogue.turns[:turn]
            if self.context == "generated":
                own = self.predictions_so_far(dialogue)
                history = tuple(own.get(earlier, reference) for earlier, reference in enumerate(history))
            requests.append(TurnRequest(dialogue, turn, self.context, history))
            self._in_flight[dialogue.id].add(turn)
            self._enqueue(dialogue)
        return requests

    def complete(self, request: TurnRequest, outcome: TurnOutcome) -> None:
        """Record the outcome of a popped turn."""
        dialogue = request.dialogue
        self._in_flight[dialogue.id].remove(request.turn)
        outcome = replace(outcome, config_hash=self._config_hash)
        if isinstance(outcome, Prediction):
            outcome = replace(outcome, predicts_strategy=self._predicts_strategy)
        self._record(outcome, new=True)
        if isinstance(outcome, FailedTurn) and self.context == "generated":
            message = f"turn {outcome.turn} failed: {outcome.kind}"
            for later in self._remaining(dialogue):
                self._record(replace(outcome, turn=later, kind=EARLIER_TURN_FAILED, message=message), new=True)
        self._enqueue(dialogue)

    def predictions_so_far(self, dialogue: Dialogue) -> dict[int, Prediction]:
        """The predictions of a dialogue so far, by turn."""
        found = {turn: self._outcomes.get((dialogue.id, turn)) for turn in dialogue.supporter_turns}
        return {turn: outcome for turn, outcome in found.items() if isinstance(outcome, Prediction)}

    def update(self, prediction: Prediction) -> None:
        """Replace a recorded prediction by one with more details, such as likelihoods."""
        self._outcomes[prediction.key] = prediction
        if self._store:
            self._store.add(prediction)

    def outcomes(self) -> list[TurnOutcome]:
        """One outcome per supporter turn, ordered by dialogue and turn.

        Raises:
            RuntimeError: the generator left turns without an outcome.
        """
        expected = expected_turns(self.dialogues)
        if missing := len(expected) - len(self._outcomes):
            raise RuntimeError(f"{missing} of {len(expected)} turns are neither predicted nor failed")
        return [self._outcomes[key] for key in expected]

    def _remaining(self, dialogue: Dialogue) -> list[int]:
        """Turns without an outcome."""
        return [turn for turn in dialogue.supporter_turns if (dialogue.id, turn) not in self._outcomes]

    def _ready_turns(self, dialogue: Dialogue) -> list[int]:
        in_flight, remaining = self._in_flight[dialogue.id], self._remaining(dialogue)
        if self.context == "generated":
            return [] if in_flight else remaining[:1]
        return [turn for turn in reversed(remaining) if turn not in in_flight]

    def _enqueue(self, dialogue: Dialogue) -> None:
        """Move a dialogue to the end of the queue for its present state."""
        for ready in (self._started, self._fresh, self._busy):
            ready.pop(dialogue.id, None)
        if self._ready_turns(dialogue):
            started = len(self._remaining(dialogue)) < len(dialogue.supporter_turns)
            ready = self._busy if self._in_flight[dialogue.id] else self._started if started else self._fresh
            ready[dialogue.id] = None

    def _record(self, outcome: TurnOutcome, new: bool = False) -> None:
        self._outcomes[outcome.key] = outcome
        if self._store and new:
            self._store.add(outcome)
        if self._progress_bar is not None:
            self._progress_bar.update(1)


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
    with ProgressBar(total=total, desc=progress, unit="turn", disable=progress is None) as bar:
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
