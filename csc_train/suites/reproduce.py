"""Reproduce a table of results: plan the steps of a suite, run those that are not done, and show the table.

The suite's directory holds the ledger, the results and the run directories of its steps. The same command goes on with
an interrupted suite, and tries failed steps again.
"""

import os
import sys
from collections.abc import Mapping

import optuna
from rich.console import Console

from csc_train.checkpoints.locate import MODEL_FOLDER
from csc_train.checkpoints.model_card import add_figures
from csc_train.config.cli import show_help
from csc_train.config.cluster import ClusterConfig
from csc_train.config.compose import from_container
from csc_train.errors import InputError
from csc_train.inference.predictions import BASE_MODEL, BASELINE_NAMES
from csc_train.launching.job import LAUNCH_FILE, TRAINING
from csc_train.launching.journal import open_journal
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.trial_runner import Interrupted
from csc_train.runs.claim import claim
from csc_train.runs.directory import read_config, refuse_other_files
from csc_train.runs.provenance import provenance
from csc_train.suites.base import Cost, RowResult
from csc_train.suites.estimate import StepEstimate, estimate_step, measure_cost
from csc_train.suites.plan import Step, SuitePlan, gain_name, plan_suite
from csc_train.suites.plan_table import plan_tables
from csc_train.suites.published import PublishedTable, read_published
from csc_train.suites.results import console_results, write_suite_results
from csc_train.suites.runner import DONE, FAILED, SuiteRunner, read_planned, spent_seconds

LEDGER_FILE = "ledger.log"
"""The journal of the steps' trials, in the suite's directory."""
STUDY = "suite"


def reproduce(arguments: list[str]) -> int:
    """Run launch/reproduce.py.

    Returns:
        The exit status: 0 if every step is done, 1 if one has failed, 2 after an InputError, 128 + signal number after
        a signal.
    """
    if show_help("reproduce", arguments):
        return 0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        plan = plan_suite(arguments)
        published = read_published(plan.config.published) if plan.config.published else None
        for name, row in plan.config.rows.items():
            if row.published is not None and (published is None or row.published not in published.rows):
                advice = published.unknown(row.published) if published else "name the table by suite.published"
                raise InputError(f"suite.rows.{name}.published={row.published}: {advice}")
        estimates = estimate_steps(plan)
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(*plan_tables(plan, estimates))
        return 0 if plan.launch.dry_run else _run(plan, estimates, published, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def estimate_steps(plan: SuitePlan) -> dict[str, StepEstimate]:
    """What each step is estimated to take, by name.

    Raises:
        InputError: an input cannot be read; names the step.
    """
    found = {}
    for name, step in plan.steps.items():
        launch, price = step.job.launch, plan.config.price_per_gpu_hour
        trained = next((each.job.config for each in plan.all_needs(name) if each.job.launch.recipe == TRAINING), None)
        try:
            found[name] = estimate_step(
                launch.recipe, step.job.config, launch.cluster, launch.preflight, price, trained
            )
        except InputError as error:
            raise InputError(f"suite.steps.{name}: {error}") from error
    return found


def _run(
    plan: SuitePlan, estimates: Mapping[str, StepEstimate], published: PublishedTable | None, console: Console
) -> int:
    directory, config, cluster = plan.directory, plan.config, plan.launch.cluster
    ledger = directory / LEDGER_FILE
    for name in ("WANDB_RUN_ID", "MLFLOW_RUN_ID"):  # the id of one run; each step has its own
        os.environ.pop(name, None)
    if not ledger.exists():
        refuse_other_files(directory, f"no {LEDGER_FILE}")
    with claim(directory, f"suite {config.name}") as claimed:
        placed = any(not step.finished and step.placement != "local" for step in plan.steps.values())
        try:
            free = launcher_class(cluster).slots(cluster, config.parallel) if placed else []
        except InputError as error:  # what runs on this machine goes on
            free = str(error)
        slots = {"gpus": free, "node": free, "local": [{} for _ in range(config.parallel or 1)]}
        study = optuna.create_study(study_name=STUDY, storage=open_journal(ledger), load_if_exists=True)

        def finished(step: Step) -> None:
            for training in plan.all_needs(step.name) if step.job.launch.recipe == "evaluate" else ():
                if training.job.launch.recipe == TRAINING:
                    add_figures(training.directory / MODEL_FOLDER, step.directory)

        counted: dict[str, Cost] = {}

        def changed(runner: SuiteRunner) -> None:
            rows = row_results(plan, runner, estimates, counted)
            write_suite_results(directory, config.name, rows, published, facts)

        source = provenance()
        commit = f"{source['commit']}{', with uncommitted changes' if source['dirty'] else ''}"
        machines = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu or 'CPU processes'}"
        facts = {"machines of the last start": machines, "commit of the last start": commit}
        planned = {name: each.cost for name, each in estimates.items()}
        runner = SuiteRunner(plan, study, slots, claimed.descriptor, planned, finished, changed)
        changed(runner)
        try:
            runner.run()
        except Interrupted as interrupt:
            runner.release()
            done = sum(state == DONE for state in runner.states.values())
            print(f"interrupted after {done} of {len(plan.steps)} steps; the same command goes on", flush=True)
            return 128 + interrupt.args[0]
        console.print(console_results(config.name, row_results(plan, runner, estimates, counted), published))
        print(f"results: {directory}/results.html (also results.md, results.json)")
        for name, reason in runner.reasons.items():
            print(f"failed: step {name}: {reason}; the same command tries it again")
        return 1 if FAILED in runner.states.values() else 0


def row_results(
    plan: SuitePlan, runner: SuiteRunner, estimates: Mapping[str, StepEstimate], counted: dict[str, Cost]
) -> list[RowResult]:
    """The rows of the table as they stand; `counted` remembers what steps that are done have taken, by name."""
    seconds, earlier = spent_seconds(runner.study), read_planned(runner.study)
    rows = []
    for name, row in plan.config.rows.items():
        needed = plan.all_needs(row.step)
        if row.system in (*BASELINE_NAMES, BASE_MODEL):  # it is none that the suite trains
            needed = [plan.steps[row.step]]
        gain = plan.steps.get(gain_name(name))
        state, reason, planned, cost = DONE, None, Cost(), Cost()
        for step in [*needed, *([gain] if gain else [])]:
            if state == DONE and (state := runner.states[step.name]) != DONE:
                reason = f"step {step.name}: {runner.reasons[step.name]}" if state == FAILED else None
            key, launch = str(step.directory), step.job.launch
            planned += earlier.get(key, estimates[step.name].cost)
            if (taken := counted.get(step.name)) is None:  # it takes seconds to read the predictions of a whole run
                llm = getattr(step.job.config, "llm", None)
                used = step.directory, launch.recipe, _cluster_of(step), seconds.get(key)
                taken = measure_cost(*used, plan.config.price_per_gpu_hour, llm)
                counted |= {step.name: taken} if runner.states[step.name] == DONE else {}
            cost += taken
        training = [step.directory for step in needed if step.job.launch.recipe == TRAINING]
        evaluation = plan.steps[row.step].directory
        rows.append(
            RowResult(
                name, row.label or name, state, reason, evaluation, row.system, training[-1] if training else None,
                row.published, row.against, gain and gain.directory, planned, cost,
            )
        )  # fmt: skip
    return rows


def _cluster_of(step: Step) -> ClusterConfig:
    """The machines of the last start of a step, which may be others than the suite's now."""
    file = step.directory / LAUNCH_FILE
    return from_container(ClusterConfig, read_config(file)["cluster"]) if file.is_file() else step.job.launch.cluster
