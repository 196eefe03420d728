"""Dialogues to predictions, in reference or generated context, whatever the system that replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from csc_train.data.dialogue import Dialogue, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.inference.prediction_store import PredictionStore
from csc_train.inference.predictions import FailedTurn, Prediction, TurnOutcome, expected_turns
from csc_train.template.reply import Reply

EARLIER_TURN_FAILED = "earlier_turn_failed"
"""The `GenerationError.kind` of turns in generated context whose history could not be generated."""


@dataclass(frozen=True)
class Generation:
    """What a system said at a supporter turn; fields as in `Prediction`."""

    raw_text: str
    reply: Reply
    prompt_hash: str
    ids: tuple[int, ...] = ()
    label_log_likelihoods: tuple[float, ...] | None = None
    reference_nll: float | None = None
    reference_tokens: int | None = None
    prompt_format: str | None = None
    served_model: str | None = None


@dataclass(frozen=True)
class GenerationError:
    """That a system did not answer at a supporter turn: `kind` is the class of what went wrong, for counting."""

    kind: str
    message: str


@dataclass(frozen=True)
class TurnRequest:
    """A supporter turn to predict: `turn` indexes `dialogue.turns`; `history` is all that was said before it.

    In generated context the supporter's turns in `history` are the system's own.
    """

    dialogue: Dialogue
    turn: int
    history: tuple[Turn | Generation, ...]


class Generator(Protocol):
    """A system under evaluation."""

    predicts_strategy: bool
    """Whether it chooses strategies itself, so that their accuracy means something."""
    config_hash: str
    """SHA-256 (hex) of all that decides what it says: model, template, decoding settings."""

    def run(self, queue: "TurnQueue") -> None:
        """Answer every turn of a queue: take requests until it is finished, and answer each."""


class TurnQueue:
    """The supporter turns that a system has yet to answer, and where its answers go.

    In context `reference` each turn is predicted from the gold history, so that all are ready from the start. In
    `generated` the system's own earlier strategies and replies replace the gold supporter's, while the customer's turns
    stay gold: a turn is ready once the one before it is answered. Where it failed, the rest of the dialogue fails too.

    Attributes:
        dialogues: all dialogues, also those that are answered.
        context: one of `CONTEXTS`.

    Args:
        generator: the system.
        store: where outcomes are kept as they come, and taken from if they are there already; None keeps none.
        bar: moves on with each outcome.

    Raises:
        InputError: two dialogues have the same id.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        generator: Generator,
        context: str,
        store: PredictionStore | None = None,
        bar: tqdm | None = None,
    ):
        self.dialogues, self.context = dialogues, context
        self._generator, self._store, self._bar = generator, store, bar
        self._by_id = {dialogue.id: dialogue for dialogue in dialogues}
        if len(self._by_id) < len(dialogues):
            raise InputError(f"{len(dialogues) - len(self._by_id)} dialogues have the id of another one")
        self._outcomes: dict[tuple[str, int], TurnOutcome] = {}
        self._out: dict[str, set[int]] = {dialogue.id: set() for dialogue in dialogues}
        for key, prediction in (store.earlier if store else {}).items():
            if key[0] in self._by_id:
                self._keep(key, prediction, written=True)
        # Dialogues with turns that are ready, by how good it is to take one: a system that keeps what it computed of a
        # dialogue goes on with those it began, and has one turn of each at a time. Long ones begin first.
        self._begun: dict[str, None] = {}
        self._fresh: dict[str, None] = {}
        self._busy: dict[str, None] = {}
        for dialogue in sorted(dialogues, key=lambda each: -len(each.supporter_turns)):
            self._queue(dialogue.id)

    @property
    def finished(self) -> bool:
        """Whether every turn is predicted or failed."""
        return all(self._remaining(dialogue) == [] for dialogue in self.dialogues)

    def pop(self, count: int) -> list[TurnRequest]:
        """Up to `count` turns that are ready now and not yet taken; none when all are taken or wait for answers.

        Dialogues that were begun come first, and each has a turn out before any has two. In reference context the last
        turns of a dialogue come first: the history of an earlier one is the beginning of theirs.
        """
        requests = []
        while len(requests) < count:
            ready = next(filter(None, (self._begun, self._fresh, self._busy)), None)
            if ready is None:
                break
            dialogue = self._by_id[next(iter(ready))]
            turn = self._ready(dialogue)[0]
            self._out[dialogue.id].add(turn)
            self._queue(dialogue.id)
            requests.append(self._request(dialogue, turn))
        return requests

    def complete(self, request: TurnRequest, outcome: Generation | GenerationError) -> None:
        """Keep what the system said to a request that it took, or that it failed."""
        dialogue, turn = request.dialogue, request.turn
        self._out[dialogue.id].remove(turn)
        if isinstance(outcome, Generation):
            self._keep((dialogue.id, turn), self._prediction(dialogue, turn, outcome))
        else:
            self._fail(dialogue, turn, outcome)
            if self.context == "generated":
                after = GenerationError(EARLIER_TURN_FAILED, f"turn {turn} failed: {outcome.kind}")
                for later in self._remaining(dialogue):
                    self._fail(dialogue, later, after)
        self._queue(dialogue.id)

    def completed(self, dialogue: Dialogue) -> dict[int, Generation]:
        """By turn, what the system has said in a dialogue so far."""
        found = {turn: self._outcomes.get((dialogue.id, turn)) for turn in dialogue.supporter_turns}
        return {turn: _said(outcome) for turn, outcome in found.items() if isinstance(outcome, Prediction)}

    def update(self, dialogue: Dialogue, turn: int, said: Generation) -> None:
        """Replace what is kept of an answer by the same answer of which more is known, such as likelihoods."""
        self._outcomes.pop((dialogue.id, turn))
        self._keep((dialogue.id, turn), self._prediction(dialogue, turn, said), moves=0)

    def outcomes(self) -> list[TurnOutcome]:
        """An outcome per supporter turn, ordered by dialogue and turn.

        Raises:
            RuntimeError: the system has left turns unanswered.
        """
        expected = expected_turns(self.dialogues)
        if unanswered := len(expected) - len(self._outcomes):
            raise RuntimeError(f"{unanswered} of {len(expected)} turns are neither predicted nor failed")
        return [self._outcomes[key] for key in expected]

    def _remaining(self, dialogue: Dialogue) -> list[int]:
        return [turn for turn in dialogue.supporter_turns if (dialogue.id, turn) not in self._outcomes]

    def _ready(self, dialogue: Dialogue) -> list[int]:
        out, remaining = self._out[dialogue.id], self._remaining(dialogue)
        if self.context == "generated":
            return [] if out else remaining[:1]
        return [turn for turn in reversed(remaining) if turn not in out]

    def _queue(self, name: str) -> None:
        """Put a dialogue where it belongs now."""
        for ready in (self._begun, self._fresh, self._busy):
            ready.pop(name, None)
        dialogue = self._by_id[name]
        if self._ready(dialogue):
            begun = len(self._remaining(dialogue)) < len(dialogue.supporter_turns)
            ready = self._busy if self._out[name] else self._begun if begun else self._fresh
            ready[name] = None

    def _request(self, dialogue: Dialogue, turn: int) -> TurnRequest:
        history: tuple[Turn | Generation, ...] = dialogue.turns[:turn]
        if self.context == "generated":
            own = self.completed(dialogue)
            history = tuple(own.get(earlier, gold) for earlier, gold in enumerate(history))
        return TurnRequest(dialogue, turn, history)

    def _fail(self, dialogue: Dialogue, turn: int, failed: GenerationError) -> None:
        failure = FailedTurn(dialogue.id, turn, self.context, failed.kind, failed.message, self._generator.config_hash)
        self._keep((dialogue.id, turn), failure)

    def _keep(self, key: tuple[str, int], outcome: TurnOutcome, written: bool = False, moves: int = 1) -> None:
        self._outcomes[key] = outcome
        if self._store and not written:
            self._store.add(outcome)
        if self._bar is not None:
            self._bar.update(moves)

    def _prediction(self, dialogue: Dialogue, turn: int, said: Generation) -> Prediction:
        return Prediction(
            dialogue_id=dialogue.id,
            turn=turn,
            context=self.context,
            prompt_hash=said.prompt_hash,
            raw_text=said.raw_text,
            strategy=said.reply.strategy.number if said.reply.strategy else None,
            response=said.reply.response,
            reference_strategy=dialogue.turns[turn].strategy.number,
            reference_response=dialogue.turns[turn].text,
            predicts_strategy=self._generator.predicts_strategy,
            config_hash=self._generator.config_hash,
            ids=said.ids,
            label_log_likelihoods=said.label_log_likelihoods,
            reference_nll=said.reference_nll,
            reference_tokens=said.reference_tokens,
            prompt_format=said.prompt_format,
            served_model=said.served_model,
        )


def _said(prediction: Prediction) -> Generation:
    """The inverse of `TurnQueue._prediction`."""
    strategy = STRATEGIES[prediction.strategy - 1] if prediction.strategy else None
    return Generation(
        raw_text=prediction.raw_text,
        reply=Reply(strategy, prediction.response),
        prompt_hash=prediction.prompt_hash,
        ids=prediction.ids,
        label_log_likelihoods=prediction.label_log_likelihoods,
        reference_nll=prediction.reference_nll,
        reference_tokens=prediction.reference_tokens,
        prompt_format=prediction.prompt_format,
        served_model=prediction.served_model,
    )


def generate_predictions(
    dialogues: Sequence[Dialogue],
    generator: Generator,
    context: str,
    store: PredictionStore | None = None,
    progress: str | None = None,
) -> list[TurnOutcome]:
    """Let a system predict every supporter turn of every dialogue (see `TurnQueue`).

    Args:
        progress: what a progress bar says; None shows none.

    Returns:
        An outcome per supporter turn, ordered by dialogue and turn.
    """
    total = sum(len(dialogue.supporter_turns) for dialogue in dialogues)
    with tqdm(total=total, desc=progress, unit="turn", disable=True if progress is None else None) as bar:
        queue = TurnQueue(dialogues, generator, context, store, bar)
        generator.run(queue)
    return queue.outcomes()


def shard_dialogues(dialogues: Sequence[Dialogue], process: int, processes: int) -> list[Dialogue]:
    """The dialogues that are one process's to predict: every process has about as many supporter turns."""
    shares: list[list[Dialogue]] = [[] for _ in range(processes)]
    turns = [0] * processes
    for dialogue in sorted(dialogues, key=lambda each: -len(each.supporter_turns)):
        lightest = turns.index(min(turns))
        shares[lightest].append(dialogue)
        turns[lightest] += len(dialogue.supporter_turns)
    return shares[process]
