"""The preflight report: results of the checks, and tables of memory by sharding, adapter and number of GPUs."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from csc_train.launching.preflight.size import JobEstimate
from csc_train.models.families import lora_parameter_count
from csc_train.training.memory import (
    GIB,
    MemoryPlan,
    MemoryScenario,
    estimate_memory,
    fitting_world_size,
    smallest_fit,
    world_sizes,
)

COLOURS = {"ok": "green", "not checked": "yellow", "failed": "red"}
DEFAULT_RANK = 16
"""Rank of the adapters in the tables if the configuration trains none."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. `status` is ok, not checked or failed."""

    name: str
    status: str
    message: str


@dataclass(frozen=True)
class PreflightReport:
    """Results of a preflight.

    Attributes:
        scenarios: the training under every ZeRO stage and offload, at the cluster's world size.
        chosen: the configured one of `scenarios`; None if the launcher brings its own DeepSpeed configuration.
        gpus_per_node: GPUs of one node.
        memory: bytes of one GPU; None if unknown.
        host_memory: bytes of one node; infinite if unknown.
        estimate: size of the job; None if neither data nor lengths are known.
    """

    checks: list[CheckResult]
    scenarios: list[MemoryScenario]
    chosen: MemoryScenario | None
    gpus_per_node: int
    memory: float | None
    host_memory: float
    estimate: JobEstimate | None

    @property
    def failed(self) -> list[CheckResult]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def fits(self, plan: MemoryPlan) -> bool:
        """Whether a plan fits into the memory of a GPU and of a node."""
        return self.memory is not None and plan.total <= self.memory and plan.host <= self.host_memory

    def show(self, console: Console | None = None) -> None:
        """Print the checks, the memory tables and the estimate."""
        console = console or Console(width=None if sys.stdout.isatty() else 150)
        rows = [(check.name, f"[{COLOURS[check.status]}]{check.status}[/]", check.message) for check in self.checks]
        console.print(_table("Preflight", ("check", "", ""), [rows]))
        if self.memory is not None:
            console.print(memory_table(self, self.memory))
            console.print(world_size_table(self))
        elif self.chosen is not None:
            console.print(f"memory of each process: {estimate_memory(self.chosen)}")
        console.print(f"estimate: {self.estimate or 'none (see the data check)'}")
        names = ", ".join(check.name for check in self.failed)
        console.print(f"{len(self.failed)} failed: {names}" if names else "nothing failed")


def memory_table(report: PreflightReport, memory: float) -> Table:
    """GiB per GPU by adapter and sharding for GPUs of `memory` bytes, and the smallest number of GPUs that fits.

    `>` marks the chosen row, `*` the first row of each adapter that fits; rows that fit are green.
    """
    first = report.scenarios[0]
    title = (
        f"Memory estimate: GiB on each of {first.processes} GPUs of {memory / GIB:.1f} GiB; {first.tokens:,} "
        f"tokens per forward pass, gradient checkpointing {'on' if first.checkpointing else 'off'}"
        f"{', dense attention mask' if first.mask_columns else ''} (> chosen, * smallest that fits)"
    )
    columns = ("", "adapter", "sharding", "weights", "gradients", "optimizer", "activations", "buffers", "reserve",
               "total", "host", "GPUs from")  # fmt: skip
    sections = []
    for adapter, scenarios in _by_adapter(report):
        smallest = smallest_fit(scenarios, memory, report.host_memory)
        sections.append([])
        for scenario in scenarios:
            plan = estimate_memory(scenario)
            parts = (plan.parameters, plan.gradients, plan.optimizer, plan.activations, plan.communication,
                     plan.reserve, plan.total)  # fmt: skip
            larger = fitting_world_size(scenario, report.gpus_per_node, memory, report.host_memory)
            row = (
                (">" if scenario == report.chosen else "") + ("*" if scenario == smallest else ""),
                adapter,
                _sharding(scenario),
                *(f"{part / GIB:.1f}" for part in parts),
                f"{plan.host / GIB:.0f}" if plan.host else "",
                str(larger.processes) if larger else "none",
            )
            sections[-1].append([f"[green]{cell}[/]" for cell in row] if report.fits(plan) else row)
    return _table(title, columns, sections, numbers_from=3)


def world_size_table(report: PreflightReport) -> Table:
    """Total GiB per GPU by adapter, sharding and number of GPUs; totals that fit are green."""
    sizes = [size for size in world_sizes(report.gpus_per_node) if size[0] <= 16 * report.gpus_per_node]
    sections = []
    for adapter, scenarios in _by_adapter(report):
        sections.append([])
        for scenario in scenarios:
            plans = [estimate_memory(replace(scenario, processes=gpus, nodes=nodes)) for gpus, nodes in sizes]
            totals = [
                ("[green]{:.0f}[/]" if report.fits(plan) else "{:.0f}").format(plan.total / GIB) for plan in plans
            ]
            sections[-1].append((adapter, _sharding(scenario), *totals))
    columns = ("adapter", "sharding", *(str(gpus) for gpus, _ in sizes))
    return _table("Total GiB per GPU by number of GPUs", columns, sections, numbers_from=2)


def _table(
    title: str, columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]], numbers_from: int | None = None
) -> Table:
    """A table of rows in sections, with columns of numbers to the right of `numbers_from`."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        number = numbers_from is not None and index >= numbers_from
        table.add_column(column, justify="right" if number else "left", no_wrap=number)
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _sharding(scenario: MemoryScenario) -> str:
    stage = "off (DDP)" if scenario.stage == "off" else f"ZeRO-{scenario.stage}"
    return stage + {"none": "", "optimizer": ", optimizer offloaded", "all": ", all offloaded"}[scenario.offload]


def _by_adapter(report: PreflightReport) -> Iterator[tuple[str, list[MemoryScenario]]]:
    """The scenarios of the chosen adapter, then of the other adapters."""
    scenarios, first = report.scenarios, report.scenarios[0]
    yield first.adapter, scenarios
    weights = first.adapter_parameters or lora_parameter_count(first.dims, DEFAULT_RANK)
    for adapter in ("full", "lora", "qlora"):
        if adapter != first.adapter:
            count = 0 if adapter == "full" else weights
            plain = {"adapter": adapter, "adapter_parameters": count, "dora": False}
            yield adapter, [replace(each, **plain) for each in scenarios]
