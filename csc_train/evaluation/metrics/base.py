"""A figure of a table: what it is computed from, and what is shown of it."""

import math
from dataclasses import dataclass, replace

import numpy

from csc_train.stats import Statistic, bootstrap_interval, paired_bootstrap_interval


@dataclass(frozen=True)
class MetricResult:
    """One cell of a table, and what its number means.

    `value` is in percent unless `unit` says otherwise, or None where there is none, and then `reason` says why.
    `unit` is what the metric counts (words, characters, ...); `signature` names the implementation and its settings.
    `low` and `high` bound the 95 % interval, and are None where there is none, such as for fewer than
    `uncertainty.FEWEST` dialogues.
    """

    value: float | None
    unit: str
    signature: str
    reason: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Metric:
    """A figure before it is computed; `statistic` is None where it is not defined, and then `reason` says why.

    `reason` also stands for a statistic without a value, such as a mean over no turns.
    """

    statistic: Statistic | None
    unit: str
    signature: str
    reason: str = "no turns to score"

    @property
    def _missing(self) -> str | None:
        """Why there is no number; None where there is one."""
        if self.statistic is None or math.isnan(self.statistic.value):
            return self.reason
        return "it is infinite" if math.isinf(self.statistic.value) else None

    def score(self, dialogues: numpy.ndarray, resamples: int) -> MetricResult:
        """The figure's value and interval; `dialogues`, int [turns], is the dialogue of each turn."""
        if (missing := self._missing) is not None:
            return MetricResult(None, self.unit, self.signature, missing)
        value = self.statistic.value
        bounds = bootstrap_interval(self.statistic, dialogues, resamples) or (None, None)
        return MetricResult(value, self.unit, self.signature, None, *bounds)

    def only(self, where: numpy.ndarray) -> "Metric":
        """The figure over the turns that `where`, bool [turns], selects."""
        if self.statistic is None or not where.any():
            return replace(self, statistic=None)
        return replace(self, statistic=replace(self.statistic, terms=self.statistic.terms * where[:, None]))

    def minus(self, other: "Metric", dialogues: numpy.ndarray, resamples: int) -> MetricResult:
        """The difference to the same figure of another system, or another context, on the same turns."""
        for each in (self, other):
            if (missing := each._missing) is not None:
                return MetricResult(None, self.unit, self.signature, missing)
        value = self.statistic.value - other.statistic.value
        bounds = paired_bootstrap_interval(self.statistic, other.statistic, dialogues, resamples) or (None, None)
        return MetricResult(value, self.unit, self.signature, None, *bounds)
