"""Baselines without a model: the most frequent strategy, and a strategy bigram."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from csc_train.data.dialogue import Dialogue, Speaker, Turn, data_digest
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.files import digest
from csc_train.inference.generator import TurnQueue, TurnRequest
from csc_train.inference.predictions import Prediction
from csc_train.template.reply import Reply, format_reply


class StrategyBaseline:
    """Predicts the strategy that most often follows the supporter's previous one in the training dialogues.

    The reply is the most frequent training reply of the strategy.

    Args:
        training: dialogues to count in; chats are left out.
        order: 0 ignores the previous strategy; 1 is a strategy bigram.
        language: of the labels in the texts of the replies.
    """

    predicts_strategy = True

    def __init__(self, training: Sequence[Dialogue], order: int, language: str = "zh"):
        self.order, self.language = order, language
        training = [dialogue for dialogue in training if dialogue.kind == "csc"]
        self.config_hash = digest([data_digest(training), order, language])
        counts: dict[Strategy | None, Counter[Strategy]] = defaultdict(Counter)
        replies: dict[Strategy, Counter[str]] = defaultdict(Counter)
        for dialogue in training:
            previous = None
            for turn in (dialogue.turns[index] for index in dialogue.supporter_turns):
                counts[previous][turn.strategy] += 1
                replies[turn.strategy][turn.text] += 1
                previous = turn.strategy if order else None
        self._most_frequent = _most_frequent(sum(counts.values(), Counter()))
        self._next = {previous: _most_frequent(counter) for previous, counter in counts.items()}
        self._replies = {
            strategy: min(counter, key=lambda text, counter=counter: (-counter[text], text))
            for strategy, counter in replies.items()
        }

    def run(self, queue: TurnQueue) -> None:
        """Reply at every turn."""
        while requests := queue.pop(1000):
            for request in requests:
                queue.complete(request, self.predict(request))

    def predict(self, request: TurnRequest) -> Prediction:
        """Predict one turn; an unseen previous strategy falls back to the most frequent strategy."""
        previous = _previous_strategy(request) if self.order else None
        strategy = self._next.get(previous, self._most_frequent)
        reply = Reply(strategy, self._replies[strategy])
        return request.prediction(
            format_reply(reply, self.language), reply, digest(previous.number if previous else None)
        )


def _previous_strategy(request: TurnRequest) -> Strategy | None:
    for turn in reversed(request.history):
        if isinstance(turn, Prediction):
            return STRATEGIES[turn.strategy - 1] if turn.strategy else None
        if isinstance(turn, Turn) and turn.speaker is Speaker.SUPPORTER:
            return turn.strategy
    return None


def _most_frequent(counter: Counter[Strategy]) -> Strategy:
    return max(STRATEGIES, key=lambda strategy: (counter[strategy], -strategy.number))
