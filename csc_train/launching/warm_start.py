"""Trials of an earlier sweep that teach the sampler of another one; they are no trials of its own."""

import math
from pathlib import Path
from typing import Any

import optuna
import pydantic
from optuna.trial import FrozenTrial, TrialState

from csc_train.config.cluster import SweepConfig
from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.launching.search_space import distributions

EARLIER = "earlier"
"""User attribute of a study: the number of earlier trials, which are its first; of such a trial: its directory."""
SUMMARY_FILE = "summary.json"


class _Trial(pydantic.BaseModel):
    """A trial of a summary."""

    directory: str
    state: str
    value: float | None
    parameters: dict[str, Any]


class _Summary(pydantic.BaseModel):
    """What is read of a summary."""

    metric: str
    direction: str
    trials: list[_Trial]
    earlier: list[_Trial] = []


def count_earlier(study: optuna.Study) -> int:
    """The number of earlier trials in a study: its own are numbered from there."""
    return study.user_attrs.get(EARLIER, 0)


def own_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials of a sweep without the earlier ones, in order; of these states if any are given."""
    trials = study.get_trials(deepcopy=False)[count_earlier(study) :]
    return [trial for trial in trials if not states or trial.state in states]


def read_earlier(config: SweepConfig) -> tuple[list[FrozenTrial], list[str]]:
    """The complete trials of `sweep.warm_start` in the search space, and why others are left out.

    They have no intermediate values and no marks of a pruner: with those, new trials would compete against trials that
    ran to their end.

    Raises:
        InputError: the directory holds no summary of a sweep, the metric or its direction differ, or no trial is left.
    """
    place, file = f"sweep.warm_start={config.warm_start}", Path(config.warm_start or "") / SUMMARY_FILE
    if not file.is_file():
        raise InputError(f"{place}: holds no {SUMMARY_FILE}: give the directory of a sweep that has ended a trial")
    try:
        summary = _Summary.model_validate(read_json(file))
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{file}: {where}: not as a sweep writes it: run that sweep's command again") from error
    for name in ("metric", "direction"):
        if (theirs := getattr(summary, name)) != getattr(config, name):
            raise InputError(
                f"{place}: that sweep has sweep.{name}={theirs}, not {getattr(config, name)}: take another"
            )
    taken, left_out = [], []
    complete = [each for each in (*summary.earlier, *summary.trials) if each.state == "complete"]
    for each in complete:
        try:
            taken.append(_make_trial(each, config))
        except (ValueError, TypeError):
            values = ", ".join(f"{key}={value}" for key, value in each.parameters.items())
            left_out.append(f"{each.directory} ({values})")
    if not taken:
        first = f", such as {left_out[0]}" if left_out else ""
        raise InputError(f"{place}: none of its {len(complete)} complete trials lies in sweep.space{first}")
    return taken, left_out


def _make_trial(each: _Trial, config: SweepConfig) -> FrozenTrial:
    """The trial with the names and distributions of the search space.

    Raises:
        ValueError, TypeError: it varied other settings, or a value lies outside.
    """
    space = distributions(config)
    names = {config.override_key(name): name for name in space}
    if names.keys() != each.parameters.keys() or each.value is None or not math.isfinite(each.value):
        raise ValueError("other parameters")
    params = {names[key]: value for key, value in each.parameters.items()}
    attributes = {EARLIER: each.directory}
    return optuna.trial.create_trial(value=each.value, params=params, distributions=space, user_attrs=attributes)


def add_earlier(study: optuna.Study, config: SweepConfig) -> None:
    """Give a new study the trials of `read_earlier`, once; a killed start is completed.

    Raises:
        InputError: as `read_earlier`.
    """
    if config.warm_start is None or EARLIER in study.user_attrs:
        return
    trials, left_out = read_earlier(config)
    known = {trial.user_attrs.get(EARLIER) for trial in study.trials}
    study.add_trials([trial for trial in trials if trial.user_attrs[EARLIER] not in known])
    study.set_user_attr(EARLIER, len(study.trials))
    print(f"warm start: {len(trials)} trials of {config.warm_start} teach the sampler", flush=True)
    if left_out:
        print(f"note: outside sweep.space, so left out: {'; '.join(left_out)}", flush=True)
