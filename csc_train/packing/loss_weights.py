"""The loss weight of each trained token."""

import numpy

from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError
from csc_train.packing.config import LossConfig
from csc_train.template.dialogue_template import TokenizedDialogue, TokenType


class LossWeights:
    """Computes the loss weight of every token of a dialogue.

    A trained token's weight is `factor * part`, where `part` is `LossConfig.strategy_weight` or `reply_weight`, and
    the factor is that of its turn:

    - `tokens`: 1.
    - `turns`: 1 / the sum of `part` over the turn, so that each turn's weights add up to 1.
    - `inverse_frequency`: the mean number of trained turns per strategy / that of the turn's strategy, at most
      `max_factor`.
    - `by_strategy`: the strategy's entry in `strategy_factors`, which defaults to 1.

    The loss of an optimizer step is `sum(weight * nll) / sum(weight)` over the global batch, so only the ratios of
    weights matter.

    Attributes:
        factors: float64 [13]; by strategy number, index 0 unused.
    """

    def __init__(self, config: LossConfig, turns: numpy.ndarray):
        """Compute the factors.

        Args:
            turns: int64 [13]; trained turns in the training set by strategy number, index 0 unused.

        Raises:
            InputError: `strategy_factors` names an unknown strategy, or one strategy twice.
        """
        self.config = config
        self.factors = numpy.ones(len(STRATEGIES) + 1)
        if config.weighting == "inverse_frequency":
            present = turns[1:] > 0
            mean = turns[1:].sum() / max(present.sum(), 1)
            self.factors[1:][present] = numpy.minimum(mean / turns[1:][present], config.max_factor)
        elif config.weighting == "by_strategy":
            for number, factor in _by_number(config.strategy_factors).items():
                self.factors[number] = factor

    def __call__(self, dialogue: TokenizedDialogue) -> numpy.ndarray:
        """float32 [length]: the weight of predicting each token; 0 for context."""
        weights = self._parts[dialogue.token_types]
        sums = numpy.add.reduceat(weights, dialogue.turn_offsets[:-1])
        factors = self._turn_factors(sums, dialogue.strategies)
        weights[dialogue.turn_offsets[0] :] *= factors.repeat(numpy.diff(dialogue.turn_offsets))
        return weights.astype(numpy.float32)

    def by_turn(self, token_types: numpy.ndarray, strategies: numpy.ndarray) -> numpy.ndarray:
        """float64 [turns, 3]: the weight of a token of each `TokenType` in each turn.

        Args:
            token_types: int64 [turns, 3], as `count_token_types` returns them.
            strategies: uint8 [turns]; as in `TokenizedDialogue`.
        """
        return self._turn_factors(token_types @ self._parts, strategies)[:, None] * self._parts

    @property
    def _parts(self) -> numpy.ndarray:
        """float64 [3]: the weight by `TokenType`, without the factor of the turn."""
        return numpy.array([0, self.config.strategy_weight, self.config.reply_weight])

    def _turn_factors(self, sums: numpy.ndarray, strategies: numpy.ndarray) -> numpy.ndarray:
        if self.config.weighting == "turns":
            return numpy.divide(1, sums, out=numpy.zeros(len(sums)), where=sums > 0)
        return self.factors[strategies]


def count_token_types(dialogue: TokenizedDialogue) -> numpy.ndarray:
    """int64 [turns, 3]: the tokens of each `TokenType` in each turn."""
    types = dialogue.token_types[:, None] == numpy.arange(len(TokenType))
    return numpy.add.reduceat(types, dialogue.turn_offsets[:-1], axis=0, dtype=numpy.int64)


def count_trained_turns(dialogue: TokenizedDialogue) -> numpy.ndarray:
    """int64 [13]: the trained turns by strategy number."""
    trained = numpy.logical_or.reduceat(dialogue.trained, dialogue.turn_offsets[:-1])
    return numpy.bincount(dialogue.strategies[trained], minlength=len(STRATEGIES) + 1)


def _by_number(factors_by_name: dict[str, float]) -> dict[int, float]:
    factors: dict[int, float] = {}
    for name, factor in factors_by_name.items():
        try:
            number = parse_strategy(name).number
        except ValueError as error:
            raise InputError(f"loss.strategy_factors: {error}") from error
        if number in factors:
            raise InputError(f"loss.strategy_factors names strategy {number} twice, the second time as {name!r}")
        factors[number] = factor
    return factors
