"""Settings of a suite: the runs behind a table of results, and the rows of the table (the `suite` group)."""

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from csc_train.errors import InputError, check_choice, check_fields, suggestion

STEP_RECIPES = ("sft", "evaluate", "compare")
"""Recipes that a suite can run."""
PLACEMENTS = ("gpus", "node", "local")


@dataclass
class StepConfig:
    """A run of a recipe."""

    recipe: str = "evaluate"
    """sft, evaluate or compare."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the recipe. `{NAME}` stands for the run directory of another step, which then runs first."""
    placement: str = "gpus"
    """gpus: a process per GPU of the cluster. node: one process that sees all GPUs of a node, for a model that one GPU
    does not hold. local: one process on this machine, without a GPU, for a served model; a comparison always is."""
    nodes: int | None = None
    """Nodes of the cluster that it takes; defaults to all."""

    def check(self, name: str) -> None:
        """Raise an InputError for a value that is not allowed; `name` is the place of the step."""
        check_fields(f"{name}.", self, "recipe", choices=STEP_RECIPES)
        check_fields(f"{name}.", self, "placement", choices=PLACEMENTS)
        check_fields(f"{name}.", self, "nodes", low=1)


@dataclass
class RowConfig:
    """A row of the table of results."""

    step: str = MISSING
    """The step that evaluates it."""
    label: str | None = None
    """What the table calls it; defaults to its name."""
    system: str | None = None
    """A system of that evaluation; defaults to the evaluated model."""
    published: str | None = None
    """The row of the published table."""
    against: str | None = None
    """Another row: the gain over it is tested."""


@dataclass
class SuiteConfig:
    """The steps of a suite, and the table that they fill (the `suite` group)."""

    name: str = "suite"
    """Name of the suite."""
    directory: str | None = None
    """Directory of the ledger, the results and the steps' run directories; defaults to runs/suites/<name>. A suite that
    it holds goes on."""
    published: str | None = None
    """The published table, a CSV file: a column `row`, then one column per figure, such as `ref B-2` and `gen ACC`.
    paper: the table of the paper."""
    overrides: dict[str, list[str]] = field(default_factory=dict)
    """By recipe, overrides of all its steps, before their own. `sft.KEY=VALUE` and `evaluate.KEY=VALUE` on the command
    line add to them."""
    steps: dict[str, StepConfig] = field(default_factory=dict)
    """The steps, by name."""
    rows: dict[str, RowConfig] = field(default_factory=dict)
    """The rows of the table, by name, in order."""
    parallel: int | None = None
    """Number of steps at the same time, or of SLURM jobs in the queue; defaults to as many as fit on the free GPUs,
    else 1."""
    poll: float = 5.0
    """Seconds between checks of the running steps."""
    price_per_gpu_hour: float | None = None
    """Price of an hour of one GPU, in the currency of `llm.price_per_million_input`; null: costs count tokens only."""

    def __post_init__(self):
        check_fields("suite.", self, "parallel", low=1)
        check_fields("suite.", self, "poll", low=0.1)
        check_fields("suite.", self, "price_per_gpu_hour", low=0)
        if not self.rows:
            raise InputError("suite.rows is required: name the rows of the table")
        for recipe in self.overrides:
            check_choice("suite.overrides", recipe, STEP_RECIPES)
        for group, names in (("steps", self.steps), ("rows", self.rows)):
            if odd := [name for name in names if not re.fullmatch(r"\w+", name)]:
                raise InputError(f"suite.{group}.{odd[0]}: write a name of letters, digits and _")
        for name, step in self.steps.items():
            step.check(f"suite.steps.{name}")
        for name, row in self.rows.items():
            for key, known in (("step", self.steps), ("against", self.rows)):
                value = getattr(row, key)
                if value is not None and value not in known:
                    raise InputError(f"suite.rows.{name}.{key}={value}: no such {key}.{suggestion(value, known)}")
            if self.steps[row.step].recipe != "evaluate":
                raise InputError(f"suite.rows.{name}.step={row.step}: is no evaluation: name one of evaluate")
