"""Two systems on the same turns: which differences are more than chance."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics import strategy as strategy_metrics
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.profiles import compute_metrics, same_turns
from csc_train.evaluation.table import PredictionTable
from csc_train.inference.predictions import Prediction, read_run_predictions
from csc_train.stats import CONFIDENCE_LEVEL, holm_correction, mcnemar_test, sign_flip_test

ALIKE = "cannot be told apart"


def _require_turns(found: Iterable[tuple[PredictionTable, PredictionTable]], names: Sequence[str]) -> None:
    if not any(len(sides[0]) for sides in found):
        raise InputError(f"{names[0]} and {names[1]} have no turn in common")


def left_out_note(count: int) -> str:
    """What a reader is told of turns that were left out; nothing where there are none."""
    return f"Left out: {count} turns that only one of the two systems has." if count else ""


def reference_sides(
    directories: tuple[str, str], systems: tuple[str | None, str | None]
) -> tuple[tuple[str, str], tuple[PredictionTable, PredictionTable], int]:
    """What to call the systems of two runs, their predictions in reference context, row by row of the same turns, and
    how many turns are left out because only one of the two has them.

    Args:
        systems: names of systems; those that the runs evaluated where None.

    Raises:
        InputError: a run cannot be read, lacks the system or the context, or the two share no turn or differ in a
            reference.
    """
    names, predictions = [], []
    for directory, name in zip(directories, systems, strict=True):
        run = read_run_predictions(directory)
        system = run.select_system(name)
        if "reference" not in run.predictions[system]:
            raise InputError(f"{directory}: {system} was not evaluated in reference context")
        names.append(f"{system} of {directory}")
        predictions.append(run.predictions[system]["reference"])
    sides, left_out = same_turns(*predictions, *names)
    _require_turns([sides], names)
    return tuple(names), sides, left_out


@dataclass(frozen=True)
class Difference:
    """One metric of two systems A and B in one context.

    Attributes:
        turns, left_out: turns that both systems have, over which it is taken, and those that only one has.
        a, b: its values; `difference` is `a` - `b`, and `low` and `high` are its 95 % interval,
            None for too few dialogues.
        p_value: of the sign-flip test over dialogues; None where the metric is n/a, and then `reason` says why.
        adjusted: Holm's adjustment of it over all metrics and contexts that were compared.
        mcnemar: of accuracies only, for comparison: it ignores that turns cluster in dialogues, and decides nothing.
        verdict: `A is higher`, `B is higher` or `cannot be told apart`, by `adjusted`.
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


def compare(
    a: dict[str, Sequence[Prediction]],
    b: dict[str, Sequence[Prediction]],
    config: MetricsConfig,
    permutations: int,
    names: tuple[str, str] = ("A", "B"),
) -> list[Difference]:
    """Every metric in every context that both systems have.

    Args:
        a, b: their predictions by context.
        permutations: random exchanges of the two systems for each p-value.
        names: what to call them in errors.

    Raises:
        InputError: the two have no context in common, or no turn in any of those, or differ in a reference.
    """
    contexts = [each for each in a if each in b]
    if not contexts:
        has = [
            f"{name} was evaluated in {' and '.join(each)} context" for name, each in zip(names, (a, b), strict=True)
        ]
        raise InputError(f"there is nothing to compare: {', '.join(has)}")
    shared = {context: same_turns(a[context], b[context], *names) for context in contexts}
    _require_turns((sides for sides, _ in shared.values()), names)
    rows = []
    for context, (sides, left_out) in shared.items():
        metrics = [_metrics(turns, config) for turns in sides]
        for name, figure in metrics[0].items():
            row = _difference(name, figure, metrics[1][name], sides, config.bootstrap_resamples, permutations)
            rows.append({"context": context, "turns": len(sides[0]), "left_out": left_out} | row)
    tested = [row for row in rows if row["p_value"] is not None]
    for row, adjusted in zip(tested, holm_correction([row["p_value"] for row in tested]), strict=True):
        higher = "A is higher" if row["difference"] > 0 else "B is higher"
        row |= {"adjusted": adjusted, "verdict": higher if adjusted < 1 - CONFIDENCE_LEVEL else ALIKE}
    return [Difference(**row) for row in rows]


def _metrics(turns: PredictionTable, config: MetricsConfig) -> dict[str, Metric]:
    """Each metric once, whichever profiles have it, and on one scale: to test it rescaled would be to test it twice."""
    found = {
        "ACC": strategy_metrics.accuracy(turns),
        "macro-F1": strategy_metrics.macro_f1(turns),
        "stage ACC": strategy_metrics.stage_accuracy(turns),
    }
    for profile, cells in compute_metrics(turns, config).items():
        shared = ("ACC", "BS")
        found |= {
            name if name in shared else f"{profile} {name}": figure
            for name, figure in cells.items()
            if name != "BS rescaled"
        }
    return found


def _difference(
    name: str, a: Metric, b: Metric, sides: tuple[PredictionTable, PredictionTable], resamples: int, permutations: int
) -> dict:
    dialogues = sides[0].dialogue
    row = {"metric": name, "unit": a.unit, "signature": a.signature, "p_value": None}
    score = a.minus(b, dialogues, resamples)
    if score.value is None:
        return row | {"reason": score.reason}
    row |= {"a": a.statistic.value, "b": b.statistic.value, "difference": score.value}
    row |= {"low": score.low, "high": score.high}
    row["p_value"] = sign_flip_test(a.statistic, b.statistic, dialogues, permutations)
    if name == "ACC":
        row["mcnemar"] = mcnemar_test(sides[0].correct, sides[1].correct)
    return row
