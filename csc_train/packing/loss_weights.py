"""The loss weight of each trained token, by a registered weighting."""

from collections.abc import Callable

import numpy

from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError
from csc_train.packing.config import WEIGHTINGS, LossConfig
from csc_train.plugins import note_registration
from csc_train.template.dialogue_template import TokenizedDialogue, TokenType

FactorFunction = Callable[[LossConfig, numpy.ndarray], numpy.ndarray]
_REGISTRY: dict[str, tuple[FactorFunction, bool]] = {}


def loss_weighting(name: str, normalize_turns: bool = False) -> Callable[[FactorFunction], FactorFunction]:
    """Register a function as the loss weighting `name`, for `loss.weighting=<name>`.

    The function takes the settings, and the trained turns in the training set by strategy number (int64 [13], index 0:
    those of chats). It returns the factor of a turn by strategy number (float64 [13]); that of chats is 1.

    Args:
        normalize_turns: divide a turn's factor by the sum of its token weights.

    Raises:
        InputError: the name is taken.
    """

    def register(function: FactorFunction) -> FactorFunction:
        if name in _REGISTRY:
            raise InputError(f"loss weighting {name}: the name is taken: choose another")
        _REGISTRY[name] = function, normalize_turns
        if name not in WEIGHTINGS:
            WEIGHTINGS.append(name)
        note_registration(function.__module__)
        return function

    return register


@loss_weighting("turns", normalize_turns=True)
@loss_weighting("tokens")
def equal_factors(config: LossConfig, turns: numpy.ndarray) -> numpy.ndarray:
    """The factor 1 for every strategy."""
    return numpy.ones(len(STRATEGIES) + 1)


@loss_weighting("inverse_frequency")
def inverse_frequency_factors(config: LossConfig, turns: numpy.ndarray) -> numpy.ndarray:
    """The mean number of trained turns per strategy / that of the strategy, at most `max_factor`."""
    factors, present = numpy.ones(len(STRATEGIES) + 1), turns[1:] > 0
    mean = turns[1:].sum() / max(present.sum(), 1)
    factors[1:][present] = numpy.minimum(mean / turns[1:][present], config.max_factor)
    return factors


@loss_weighting("by_strategy")
def configured_factors(config: LossConfig, turns: numpy.ndarray) -> numpy.ndarray:
    """The strategy's entry in `strategy_factors`, which defaults to 1."""
    factors, named = numpy.ones(len(STRATEGIES) + 1), set()
    for name, factor in config.strategy_factors.items():
        try:
            number = parse_strategy(name).number
        except ValueError as error:
            raise InputError(f"loss.strategy_factors: {error}") from error
        if number in named:
            raise InputError(f"loss.strategy_factors names strategy {number} twice, the second time as {name!r}")
        named.add(number)
        factors[number] = factor
    return factors


class LossWeights:
    """Computes the loss weight of every token of a dialogue.

    A trained token's weight is `factor * part`, where `part` is `LossConfig.strategy_weight` or `reply_weight`, and
    the factor is that of its turn:

    `loss.weighting` names the function that computes the factors, by strategy (see `loss_weighting`). With
    `normalize_turns`, a factor is divided by the sum of `part` over the turn: turns of any length weigh the same.

    The loss of an optimizer step is `sum(weight * nll) / sum(weight)` over the global batch, so only the ratios of
    weights matter.

    Attributes:
        factors: float64 [13]; by strategy number, 1 for the turns of chats (index 0).
    """

    def __init__(self, config: LossConfig, turns: numpy.ndarray):
        """Compute the factors.

        Args:
            turns: int64 [13]; trained turns in the training set by strategy number, index 0: those of chats.

        Raises:
            InputError: `strategy_factors` names an unknown strategy, or one strategy twice.
        """
        self.config = config
        compute_factors, self.normalize_turns = _REGISTRY[config.weighting]
        self.factors = numpy.array(compute_factors(config, turns))
        self.factors[0] = 1

    def __call__(self, dialogue: TokenizedDialogue) -> numpy.ndarray:
        """float32 [length]: the weight of predicting each token; 0 for context."""
        weights = self._parts[dialogue.token_types]
        sums = numpy.add.reduceat(weights, dialogue.turn_offsets[:-1])
        factors = self._turn_factors(sums, dialogue.strategies)
        weights[dialogue.turn_offsets[0] :] *= factors.repeat(numpy.diff(dialogue.turn_offsets))
        return weights.astype(numpy.float32)

    def token_weights_by_turn(self, token_types: numpy.ndarray, strategies: numpy.ndarray) -> numpy.ndarray:
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
        factors = self.factors[strategies]
        if self.normalize_turns:
            return numpy.divide(factors, sums, out=numpy.zeros(len(sums)), where=sums > 0)
        return factors


def count_token_types(dialogue: TokenizedDialogue) -> numpy.ndarray:
    """int64 [turns, 3]: the tokens of each `TokenType` in each turn."""
    types = dialogue.token_types[:, None] == numpy.arange(len(TokenType))
    return numpy.add.reduceat(types, dialogue.turn_offsets[:-1], axis=0, dtype=numpy.int64)


def count_trained_turns(token_types: numpy.ndarray, strategies: numpy.ndarray) -> numpy.ndarray:
    """int64 [13]: the trained turns by strategy number, of a dialogue's `count_token_types` and strategies."""
    trained = token_types[:, TokenType.CONTEXT + 1 :].any(axis=1)
    return numpy.bincount(strategies[trained], minlength=len(STRATEGIES) + 1)
