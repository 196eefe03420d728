"""The plan of a suite as tables: its steps by row, with machines, memory, hours, disk and costs."""

from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from csc_train.suites.base import Cost
from csc_train.suites.estimate import StepEstimate
from csc_train.suites.plan import Step, SuitePlan, gain_name
from csc_train.terminal_tables import result_table

_COLUMNS = ("row", "step", "recipe", "state", "GPUs", "GiB on each", "fits", "hours", "GPU hours", "tokens", "price",
            "disk GiB")  # fmt: skip
_TEXTS = 4


def plan_tables(plan: SuitePlan, estimates: Mapping[str, StepEstimate]) -> list[Table | Text]:
    """The steps of each row and what they are estimated to cost, the totals, and what the estimates rest on."""
    cluster, config = plan.launch.cluster, plan.config
    title = f"Suite {config.name}: {len(config.rows)} rows, {len(plan.steps)} steps, in {plan.directory}"
    shown: set[str] = set()
    rows = []
    for name, row in config.rows.items():
        steps = [*plan.all_needs(row.step), *(plan.steps[each] for each in [gain_name(name)] if row.against)]
        for label, step in zip([row.label or name, *[""] * len(steps)], steps, strict=False):
            rows.append([label, *_cells(step, estimates[step.name], step.name in shown)])
            shown.add(step.name)
    rest = [step for step in plan.steps.values() if step.name not in shown]
    rows += [["", *_cells(step, estimates[step.name], False)] for step in rest]
    table = result_table(title, _COLUMNS, rows, numbers=range(_TEXTS, len(_COLUMNS)))
    left = [each.name for each in plan.steps.values() if not each.finished]
    total, left_cost = (_total(estimates, names) for names in (plan.steps, left))
    lines = [f"All steps: {_in_words(total)}. Not done yet: {len(left)} steps, {_in_words(left_cost)}."]
    if cluster.gpu:
        lines.append(f"Machines: {cluster.name}, {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}.")
    lines += [f"{step.name}: cannot start, {step.missing}" for step in plan.steps.values() if step.missing]
    bases: dict[str, list[str]] = {}
    for name, estimate in estimates.items():
        bases.setdefault(estimate.basis, []).append(name)
    lines += [f"{', '.join(names)}: {basis}" for basis, names in bases.items() if basis]
    return [table, Text("\n".join(lines))]


def _cells(step: Step, estimate: StepEstimate, again: bool) -> list[str]:
    """The cells of a step; one that an earlier row has shows no figures again."""
    state = "done" if step.finished else "blocked" if step.missing else "to run"
    if again:
        return [step.name, step.job.launch.recipe, "see above", *[""] * (len(_COLUMNS) - _TEXTS)]
    memory = f"{estimate.memory_gib:.0f} of {estimate.gpu_memory_gib or 0:.0f}" if estimate.memory_gib else ""
    fits = {None: "", True: "yes", False: f"from {estimate.gpus_from} GPUs" if estimate.gpus_from else "no"}
    cost = estimate.cost
    return [
        step.name,
        step.job.launch.recipe,
        state,
        str(estimate.gpus or ""),
        memory,
        fits[estimate.fits],
        _number(estimate.hours),
        _number(cost.gpu_hours),
        "" if cost.tokens is None else f"{cost.tokens:,}",
        _number(cost.money, 2),
        _number(estimate.disk_gib),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _total(estimates: Mapping[str, StepEstimate], names: Iterable[str]) -> tuple[Cost, float]:
    """The costs and the disk space in GiB of some steps."""
    chosen = [estimates[name] for name in names]
    return sum((each.cost for each in chosen), Cost()), sum(each.disk_gib or 0 for each in chosen)


def _in_words(total: tuple[Cost, float]) -> str:
    cost, disk = total
    parts = [
        cost.gpu_hours is not None and f"{cost.gpu_hours:,.1f} GPU hours",
        cost.tokens is not None and f"{cost.tokens:,} tokens",
        cost.money is not None and f"price {cost.money:,.2f}",
        f"{disk:,.1f} GiB on disk",
    ]
    return ", ".join(part for part in parts if part)
