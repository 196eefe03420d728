"""How much each trained token counts in the loss."""

import numpy

from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError
from csc_train.packing.config import LossConfig
from csc_train.template.dialogue_template import TokenizedDialogue


class LossWeights:
    """The loss weight of every token of an example (issue 3, "Loss weights").

    A trained token's weight is `factor[strategy of its turn] * part`, where `part` is `LossConfig.strategy_weight` or
    `LossConfig.reply_weight`. The factor is 1 under `tokens`; under `turns` one over the sum of `part` in the turn, so that
    each turn's weights add up to 1; under `inverse_frequency` the mean number of trained turns a strategy has over the
    number that this one has, at most `max_factor`; under `by_strategy` its entry in `strategy_factors`, which defaults to 1.

    The loss of an optimizer step is `sum(weight * nll) / sum(weight)` over the whole global batch, so only the ratios
    of weights matter.

    Attributes:
        factors: float64 [13]; by number of strategy, index 0 unused.
    """

    def __init__(self, config: LossConfig, turns: numpy.ndarray):
        """Fit the factors.

        Args:
            turns: int64 [13]; how many trained turns of each strategy the training set has, index 0 unused.

        Raises:
            InputError: the table names an unknown strategy, or one of them twice.
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

    def __call__(self, example: TokenizedDialogue) -> numpy.ndarray:
        """float32 [length]: the weight of predicting each token, 0 where it is context only."""
        weights = numpy.array([0, self.config.strategy_weight, self.config.reply_weight])[example.token_types]
        lengths = numpy.diff(example.turn_offsets)
        if self.config.weighting == "turns":
            sums = numpy.add.reduceat(weights, example.turn_offsets[:-1]) if len(lengths) else numpy.empty(0)
            factors = numpy.divide(1, sums, out=numpy.zeros(len(sums)), where=sums > 0)
        else:
            factors = self.factors[example.strategies]
        weights[example.turn_offsets[0] :] *= factors.repeat(lengths)
        return weights.astype(numpy.float32)


def count_turns(example: TokenizedDialogue) -> numpy.ndarray:
    """int64 [13]: the trained turns of an example by number of strategy."""
    trained = numpy.logical_or.reduceat(example.trained, example.turn_offsets[:-1])
    return numpy.bincount(example.strategies[trained], minlength=len(STRATEGIES) + 1)


def _by_number(table: dict[str, float]) -> dict[int, float]:
    factors: dict[int, float] = {}
    for name, factor in table.items():
        try:
            number = parse_strategy(name).number
        except ValueError as error:
            raise InputError(f"loss.strategy_factors: {error}") from error
        if number in factors:
            raise InputError(f"loss.strategy_factors names strategy {number} twice, the second time as {name!r}")
        factors[number] = factor
    return factors
