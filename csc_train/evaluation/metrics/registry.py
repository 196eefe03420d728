"""The metric registry: `@metric` adds a function to tables, comparison, HTML report, W&B and JSON."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from csc_train.data.languages import get_language
from csc_train.errors import InputError, check_choice
from csc_train.evaluation.config import PROFILES, MetricsConfig
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.table import PredictionTable
from csc_train.plugins import check_entry, note_registration, takes_fields_of
from csc_train.stats import mean

DIRECTIONS = ("higher", "lower", "none")
SECTIONS = ("strategy", "likelihood", "process", "reply")
"""Tables that every report has; `process` and `reply` also have a row for the reference dialogues."""


@dataclass(frozen=True, kw_only=True)
class MetricFields:
    """The fields of `@metric`."""

    name: str
    """The column; unique within a profile."""
    unit: str
    """What the metric counts; values are percentages unless the unit says otherwise."""
    direction: str
    """Which values are better: one of `DIRECTIONS`."""
    profiles: Sequence[str]
    """Tables with this column: profiles of `metrics.profiles`, or of `SECTIONS`."""
    compare: bool = True
    """Whether recipes/compare.py tests it."""
    by_position: bool = False
    """Whether it is also shown by supporter turn, with the difference between the contexts."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec(MetricFields):
    """A registered metric, and the function that computes it."""

    function: Callable[..., Metric]


METRICS: list[MetricSpec] = []
"""All registered metrics, in the order of table columns."""


@takes_fields_of(MetricFields)
def metric(**fields: Any) -> Callable[[Callable], Callable[..., Metric]]:
    """Register a function as a metric.

    The function takes a `PredictionTable`, and the `MetricsConfig` if it has a second parameter. It returns a
    `Statistic`, float [turns] (the metric is their mean), or a `Metric` to give a signature or a reason. The signature
    defaults to the first line of the docstring, the unit to `unit`.

    Args:
        fields: those of `MetricFields`.

    Raises:
        InputError: a field is unknown, missing or has an unknown value, or the name is taken.
    """

    def register(function: Callable) -> Callable[..., Metric]:
        place = f"@metric of {function.__module__}.{function.__qualname__}"
        check_entry(place, MetricFields, {key: value or None for key, value in fields.items()})
        name, direction = fields["name"], fields["direction"]
        check_choice(f"{place}: direction", direction, DIRECTIONS)
        for profile in fields["profiles"]:
            check_choice(f"{place}: profiles", profile, (*PROFILES, *SECTIONS))
            if taken := [spec for spec in metrics_in_profiles([profile]) if spec.name == name]:
                owner = f"{taken[0].function.__module__}.{taken[0].function.__qualname__}"
                raise InputError(
                    f"{place}: name {name!r} is taken in profile {profile} by {owner}: choose another name"
                )
        summary = (inspect.getdoc(function) or name).splitlines()[0].removesuffix(".")
        takes_config = len(inspect.signature(function).parameters) > 1

        @functools.wraps(function)
        def compute(table: PredictionTable, config: MetricsConfig | None = None) -> Metric:
            found = function(table, config) if takes_config else function(table)
            if isinstance(found, numpy.ndarray):
                found = mean(found)
            found = found if isinstance(found, Metric) else Metric(found)
            return replace(
                found, signature=found.signature or summary, unit=found.unit or fields["unit"], direction=direction
            )

        METRICS.append(MetricSpec(**fields | {"profiles": tuple(fields["profiles"]), "function": compute}))
        note_registration(function.__module__)
        return compute

    return register


def chosen_profiles(config: MetricsConfig, table: PredictionTable) -> Sequence[str]:
    """The profiles of `MetricsConfig.profiles`; by default those of the table's language.

    Raises:
        InputError: a language names an unknown profile.
    """
    if config.profiles is not None:
        return config.profiles
    profiles = get_language(table.language).profiles
    for profile in profiles:
        check_choice(f"language {table.language}: profiles", profile, PROFILES)
    return profiles


def metrics_in_profiles(profiles: Iterable[str]) -> list[MetricSpec]:
    """The metrics of any of these profiles or sections."""
    wanted = set(profiles)
    return [spec for spec in METRICS if wanted & set(spec.profiles)]


def compute_metrics(
    table: PredictionTable, config: MetricsConfig, profiles: Iterable[str]
) -> dict[str, dict[str, Metric]]:
    """The metrics of a table by profile or section and name; a metric of several profiles is computed once."""
    found = {spec: spec.function(table, config) for spec in metrics_in_profiles(profiles)}
    return {
        profile: {spec.name: value for spec, value in found.items() if profile in spec.profiles} for profile in profiles
    }
