"""Settings of packing and of the loss weights."""

import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range

PACKING_STRATEGIES = ("shared_prefix", "best_fit", "off")
OVERFLOW_POLICIES = ("drop", "truncate", "error")
WEIGHTINGS = ["tokens", "turns", "inverse_frequency", "by_strategy"]
"""Names of the loss weightings; `loss_weights.loss_weighting` adds others."""


def load_loss_plugin(path: str) -> None:
    """Import a Python file that registers a loss weighting, once per process.

    Raises:
        InputError: there is no such file, or it cannot be imported.
    """
    name = f"loss_plugin_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path) if os.path.isfile(path) else None
    if spec is None or spec.loader is None:
        raise InputError(f"loss.plugins={path}: no such Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"loss.plugins={path}: cannot be imported: {type(error).__name__}: {error}") from error


@dataclass
class PackingConfig:
    """How dialogues are packed into sequences."""

    strategy: str = "shared_prefix"
    """shared_prefix: several dialogues a pack, which share one copy of their system prompt. best_fit: several dialogues
    a pack, each with its own system prompt. off: one dialogue a row, padded."""
    max_length: int = 8192
    """The longest pack, and the longest dialogue, in tokens."""
    overflow: str = "truncate"
    """A dialogue longer than max_length: drop it; truncate it (remove whole leading turns, keep the system prompt); or
    stop with an error."""

    def __post_init__(self):
        check_choice("packing.strategy", self.strategy, PACKING_STRATEGIES)
        check_choice("packing.overflow", self.overflow, OVERFLOW_POLICIES)
        check_range("packing.max_length", self.max_length, 1)


@dataclass
class LossConfig:
    """The weight of each trained token in the loss."""

    weighting: str = "tokens"
    """tokens: all trained tokens weigh the same. turns: all supporter turns weigh the same. inverse_frequency: turns of
    rare strategies weigh more. by_strategy: turns weigh as `strategy_factors` says. Or a name from `plugins`."""
    max_factor: float = 5.0
    """The largest factor of a strategy under inverse_frequency."""
    strategy_factors: dict[str, float] = field(default_factory=dict)
    """Factors under by_strategy, by the strategy's name, code or number; each defaults to 1. 0: context only."""
    strategy_weight: float = 1.0
    """Weight of the tokens of `[strategy]`; multiplied by the factor of the turn."""
    reply_weight: float = 1.0
    """Weight of the tokens of the reply and its end-of-turn token; multiplied by the factor of the turn."""
    plugins: list[str] = field(default_factory=list)
    """Python files that register other weightings by `@loss_weighting`."""

    def __post_init__(self):
        for path in self.plugins:
            load_loss_plugin(path)
        check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        check_range("loss.max_factor", self.max_factor, 1)
        for name, factor in self.strategy_factors.items():
            check_range(f"loss.strategy_factors.{name}", factor, 0)
        check_range("loss.strategy_weight", self.strategy_weight, 0)
        check_range("loss.reply_weight", self.reply_weight, 0)
        if self.strategy_factors and self.weighting != "by_strategy":
            raise InputError(f"loss.strategy_factors is set, but loss.weighting={self.weighting}: set loss=by_strategy")
        if not (self.strategy_weight or self.reply_weight):
            raise InputError("loss.strategy_weight and loss.reply_weight are both 0: nothing would be trained")
