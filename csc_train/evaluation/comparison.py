"""Paired comparison of two systems on the same turns, metric by metric, with significance tests."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import read_accept_sets, read_dialogues
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.general import TextScore
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.registry import SECTIONS, MetricSpec, chosen_profiles, metrics_in_profiles
from csc_train.evaluation.table import PredictionTable, align_tables
from csc_train.inference.predictions import Prediction, read_run_predictions
from csc_train.stats import CONFIDENCE_LEVEL, Statistic, holm_correction, mcnemar_test, sign_flip_test

NOT_SIGNIFICANT = "not significant"
Dialogues = Mapping[str, Dialogue] | None
"""Those of a run, by id; None if they are not known."""


def _require_turns(found: Iterable[tuple[PredictionTable, PredictionTable]], names: Sequence[str]) -> None:
    if not any(len(sides[0]) for sides in found):
        raise InputError(f"{names[0]} and {names[1]} have no turn in common: evaluate the same dialogues")


def read_run_dialogues(directory: str | os.PathLike, config: MetricsConfig) -> Dialogues:
    """The evaluation dialogues in a run directory, with `metrics.accepted`; None if it has none.

    Raises:
        InputError: a file cannot be read.
    """
    path = Path(directory) / "dialogues.jsonl"
    found = read_accept_sets(config.accepted, read_dialogues(path)) if path.exists() else None
    return None if found is None else {dialogue.id: dialogue for dialogue in found}


def left_out_note(count: int) -> str:
    """A note on turns that were left out; empty for none."""
    return f"Left out: {count} turns that only one of the two systems has." if count else ""


def align_reference_context(
    directories: tuple[str, str], systems: tuple[str | None, str | None]
) -> tuple[tuple[str, str], tuple[PredictionTable, PredictionTable], int]:
    """Names of the systems of two runs, their tables of the same turns in reference context, and the number of turns
    that only one of them has.

    Args:
        systems: names of systems; None selects the evaluated system of the run.

    Raises:
        InputError: a run cannot be read, lacks the system or the context, or the two share no turn or differ in a
            reference.
    """
    names, predictions = [], []
    for directory, name in zip(directories, systems, strict=True):
        run = read_run_predictions(directory)
        system = run.select_system(name)
        if "reference" not in run.predictions[system]:
            raise InputError(f"{directory}: {system} was not evaluated in reference context: evaluate it there")
        names.append(f"{system} of {directory}")
        predictions.append(run.predictions[system]["reference"])
    sides, left_out = align_tables(*predictions, *names)
    _require_turns([sides], names)
    return tuple(names), sides, left_out


@dataclass(frozen=True)
class Difference:
    """One metric of two systems A and B in one context.

    Attributes:
        turns: turns that both systems have, or items of another kind, over which the metric is taken.
        left_out: turns that only one of them has.
        a, b, difference: the values, and `a` - `b`.
        low, high: the 95 % interval of the difference; None for too few dialogues.
        p_value: of the sign-flip test over dialogues, or over clusters of such items; None if the metric is n/a for
            the `reason`.
        adjusted: `p_value` after Holm's correction over all compared metrics and contexts.
        mcnemar: p-value of McNemar's test, for ACC only; it ignores dialogues and decides nothing.
        verdict: `A is higher`, `B is higher` or `not significant`, by `adjusted`.
    """

    context: str
    metric: str
    unit: str
    signature: str
    turns: int
    left_out: int
    a: float | None = None
    b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    adjusted: float | None = None
    mcnemar: float | None = None
    verdict: str | None = None
    reason: str | None = None
    direction: str = "none"


def compare(
    a: dict[str, Sequence[Prediction]],
    b: dict[str, Sequence[Prediction]],
    config: MetricsConfig,
    permutations: int,
    names: tuple[str, str] = ("A", "B"),
    language: str = "zh",
    texts: tuple[Sequence[TextScore], Sequence[TextScore]] = ((), ()),
    dialogues: tuple[Dialogues, Dialogues] = (None, None),
) -> list[Difference]:
    """Compare two systems in every metric and context that both have.

    Args:
        a, b: their predictions by context.
        permutations: permutations of the sign-flip test.
        names: what errors call the two.
        language: of the dialogues.
        texts: their scores of general texts, which are compared once, whatever the contexts.
        dialogues: of each system, without which some metrics are n/a.

    Raises:
        InputError: the two have no context or no turn in common, or differ in a reference.
    """
    contexts = [each for each in a if each in b]
    if not contexts:
        has = [
            f"{name} was evaluated in {' and '.join(each)} context" for name, each in zip(names, (a, b), strict=True)
        ]
        raise InputError(f"no context in common: {', '.join(has)}")
    shared = {context: align_tables(a[context], b[context], *names, dialogues, language) for context in contexts}
    _require_turns((sides for sides, _ in shared.values()), names)
    rows = []
    for context, (sides, left_out) in shared.items():
        for table, own in zip(sides, texts, strict=True):
            table.texts = None if rows else own
        profiles = chosen_profiles(config, sides[0])
        for spec in metrics_in_profiles((*profiles, *SECTIONS)):
            if spec.compare:
                row = {"context": context, "metric": _metric_name(spec, profiles)}
                a_metric, b_metric = (spec.function(table, config) for table in sides)
                items = a_metric.items  # such as texts, which both have
                row |= {"turns": len(items.names if items else sides[0]), "left_out": 0 if items else left_out}
                resamples = config.bootstrap_resamples
                rows.append(row | _difference(spec.name, a_metric, b_metric, sides, resamples, permutations))
    tested = [row for row in rows if row["p_value"] is not None]
    for row, adjusted in zip(tested, holm_correction([row["p_value"] for row in tested]), strict=True):
        higher = "A is higher" if row["difference"] > 0 else "B is higher"
        row |= {"adjusted": adjusted, "verdict": higher if adjusted < 1 - CONFIDENCE_LEVEL else NOT_SIGNIFICANT}
    return [Difference(**row) for row in rows]


def _metric_name(spec: MetricSpec, profiles: Sequence[str]) -> str:
    """The metric's name, after its profile if it is of one of several only: names are unique within a profile."""
    own = [profile for profile in profiles if profile in spec.profiles]
    return f"{own[0]} {spec.name}" if len(own) == 1 < len(profiles) else spec.name


def _difference(
    name: str, a: Metric, b: Metric, sides: tuple[PredictionTable, PredictionTable], resamples: int, permutations: int
) -> dict:
    dialogues = sides[0].dialogue
    row = asdict(a.difference(b, dialogues, resamples)) | {"p_value": None}
    row["difference"] = row.pop("value")
    if row["difference"] is not None and isinstance(a.statistic, Statistic) and isinstance(b.statistic, Statistic):
        row |= {"a": a.statistic.value, "b": b.statistic.value}
        row["p_value"] = sign_flip_test(a.statistic, b.statistic, a.clusters(dialogues), permutations)
        if name == "ACC":
            row["mcnemar"] = mcnemar_test(sides[0].correct, sides[1].correct)
    return row
