"""The search space of a sweep: extreme points for checks, and Optuna distributions."""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from csc_train.config.cluster import ParameterConfig, SweepConfig
from csc_train.overrides import quote


def to_override(key: str, value: Any) -> str:
    """A value as a command line override, such as `trainer.epochs=2` or `adapter=null`."""
    return f"{key}={value if isinstance(value, str) else quote(value)}"


def extreme_points(config: SweepConfig) -> list[dict[str, Any]]:
    """Points that together hold every bound and every choice of every parameter; all points of a list."""
    if config.kind == "list":
        return config.points
    values = {name: _extremes(parameter) for name, parameter in config.space.items()}
    first = {name: each[0] for name, each in values.items()}
    return [first, *(first | {name: value} for name, each in values.items() for value in each[1:])]


def distributions(config: SweepConfig) -> dict[str, BaseDistribution]:
    """The Optuna distribution of each parameter."""
    if config.kind == "list":
        names = dict.fromkeys(name for point in config.points for name in point)
        values = {name: [point[name] for point in config.points if name in point] for name in names}
        return {name: CategoricalDistribution(list(dict.fromkeys(each))) for name, each in values.items()}
    return {name: _distribution(parameter) for name, parameter in config.space.items()}


def _extremes(parameter: ParameterConfig) -> list[Any]:
    """The choices of a parameter, or the bounds of its range."""
    if parameter.type == "categorical":
        return parameter.choices
    assert parameter.low is not None and parameter.high is not None  # `ParameterConfig.check` requires them
    kind = int if parameter.type == "int" else float
    return [kind(parameter.low), kind(parameter.high)]


def _distribution(parameter: ParameterConfig) -> BaseDistribution:
    extremes = _extremes(parameter)
    if parameter.type == "categorical":
        return CategoricalDistribution(extremes)
    if parameter.type == "int":
        return IntDistribution(*extremes, log=parameter.log, step=int(parameter.step or 1))
    return FloatDistribution(*extremes, log=parameter.log, step=parameter.step)
