"""What the parts of a suite share: the costs of a step, and a row of the table of results."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a step or a row costs; None where it is not known.

    Attributes:
        gpu_hours: hours of one GPU.
        tokens: of a training's steps, of a local model's replies, or of a served model's prompts and replies.
        money: of served models and, with `suite.price_per_gpu_hour`, of GPUs.
    """

    gpu_hours: float | None = None
    tokens: int | None = None
    money: float | None = None

    def __add__(self, other: "Cost") -> "Cost":
        """The sum of what is known."""
        return Cost(*(_sum(getattr(self, name), getattr(other, name)) for name in ("gpu_hours", "tokens", "money")))


def _sum(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other


@dataclass(frozen=True)
class RowResult:
    """A row of the table of results.

    Attributes:
        name, label: its name in the suite, and in the table.
        state: `done`, `running`, `waiting`, or `failed` with its `reason`; that of the first of its steps that is not
            done.
        evaluation: run directory of its evaluation, with a results.json if it is done.
        system: a system of that evaluation; None for the evaluated model.
        training: run directory of the training that made its model; None for a base model or a baseline, and if the
            suite trains none for it.
        published: the row of the published table.
        against: the name of the row over which its gain is tested.
        gain: run directory of that comparison (recipes/compare.py, A is this row); None without one.
        planned, spent: what its steps were estimated to cost, and have cost so far.
    """

    name: str
    label: str
    state: str
    reason: str | None
    evaluation: Path
    system: str | None
    training: Path | None
    published: str | None
    against: str | None
    gain: Path | None
    planned: Cost
    spent: Cost
