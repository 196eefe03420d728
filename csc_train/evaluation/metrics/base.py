"""The types of a metric: `Metric` can compute its value and interval, `MetricResult` holds them."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy

from csc_train.stats import Statistic, bootstrap_interval


@dataclass(frozen=True)
class MetricResult:
    """A metric's value, as tables and `results.json` show it.

    Attributes:
        value: in percent unless `unit` says otherwise; None if there is none.
        unit: what the metric counts, such as words or characters.
        signature: the implementation and its settings.
        reason: why `value` is None.
        low, high: the 95 % interval; None if there is none, such as below `stats.MIN_DIALOGUES` dialogues.
        direction: "higher" or "lower" is better, or "none".
    """

    value: float | None
    unit: str = ""
    signature: str = ""
    reason: str | None = None
    low: float | None = None
    high: float | None = None
    direction: str = "none"


@dataclass(frozen=True)
class Items:
    """What a statistic is over, where that is no turns of a table, such as texts.

    Attributes:
        names: of each item; two metrics are paired only over the same names in the same order.
        clusters: int [items], the cluster of each, counted from 0; the bootstrap and the tests draw clusters.
    """

    names: tuple[Hashable, ...]
    clusters: numpy.ndarray


@dataclass(frozen=True)
class Metric:
    """A metric over the turns of a table, or over items of its own, not yet computed.

    Attributes:
        statistic: a number has no interval and no test; None if the metric is undefined.
        reason: why there is no value, if `statistic` is None or has no value.
        unit, signature, direction: see `MetricResult`.
        items: what `statistic` is over; None for the turns of the table, in clusters by dialogue.
        gold: what the turns are measured against, where runs may differ in it; only metrics of equal ones are paired.
        unpaired: the reason why others are not paired.
    """

    statistic: Statistic | float | None
    signature: str = ""
    reason: str = "no turns to score"
    unit: str = ""
    direction: str = "none"
    items: Items | None = None
    gold: Hashable = None
    unpaired: str = "the two are not over the same items, so they cannot be paired"

    def clusters(self, dialogues: numpy.ndarray) -> numpy.ndarray:
        """int [items or turns], the cluster of each; `dialogues`, int [turns], is the dialogue of each turn."""
        return dialogues if self.items is None else self.items.clusters

    @property
    def _missing(self) -> str | None:
        """Why there is no number; None if there is one."""
        value = self.statistic.value if isinstance(self.statistic, Statistic) else self.statistic
        if value is None or math.isnan(value):
            return self.reason
        return "it is infinite" if math.isinf(value) else None

    def _result(self, value: float | None, reason: str | None, bounds: tuple[float, float] | None) -> MetricResult:
        low, high = bounds or (None, None)
        return MetricResult(value, self.unit, self.signature, reason, low, high, self.direction)

    def compute(self, dialogues: numpy.ndarray, resamples: int) -> MetricResult:
        """The value and its interval; `dialogues`, int [turns], is the dialogue of each turn."""
        if (missing := self._missing) is not None:
            return self._result(None, missing, None)
        if not isinstance(self.statistic, Statistic):
            return self._result(float(self.statistic), None, None)
        bounds = bootstrap_interval(self.statistic, self.clusters(dialogues), resamples)
        return self._result(self.statistic.value, None, bounds)

    def restrict(self, where: numpy.ndarray) -> "Metric":
        """The metric over the turns that `where`, bool [turns], selects; one over items of its own stays as it is."""
        if self.items is not None:
            return self
        if not isinstance(self.statistic, Statistic) or not where.any():
            return replace(self, statistic=None)
        return replace(self, statistic=replace(self.statistic, terms=self.statistic.terms * where[:, None]))

    def difference(self, other: "Metric", dialogues: numpy.ndarray, resamples: int) -> MetricResult:
        """This metric minus that of another system or context on the same turns, or on the same items."""
        if None not in (self.gold, other.gold) and self.gold != other.gold:
            return self._result(None, self.unpaired, None)
        for each in (self, other):
            if (missing := each._missing) is not None:
                return self._result(None, missing, None)
        if not isinstance(self.statistic, Statistic) or not isinstance(other.statistic, Statistic):
            return self._result(None, "the metric has no statistic over turns to test", None)
        if (self.items and self.items.names) != (other.items and other.items.names):
            return self._result(None, self.unpaired, None)
        value, clusters = self.statistic.value - other.statistic.value, self.clusters(dialogues)
        return self._result(value, None, bootstrap_interval(self.statistic, clusters, resamples, other.statistic))
