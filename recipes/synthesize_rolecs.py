"""Generate RoleCS: personas, topics and moods -> five roles -> filters -> dialogues.

python recipes/synthesize_rolecs.py llm=mock target=2000                        # no model: the sample grammar
python recipes/synthesize_rolecs.py llm=deepseek_v3 target=11232 dry_run=true   # estimate only
python recipes/synthesize_rolecs.py llm=deepseek_v3 target=11232 budget.tokens=500000000
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.synthesis import SynthesizeRolecsRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.synthesize_rolecs")
OUTPUTS = (
    "dialogues.jsonl", "dialogues.parquet", "rejected.jsonl", "filter_funnel.json", "quality.json", "quality.html",
    "synthesis.json", "batch",
)  # fmt: skip
"""Files of the recipe in the run directory."""


def main(config: SynthesizeRolecsRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    import asyncio
    import sys
    from contextlib import closing

    from rich.console import Console

    from csc_train.config.compose import to_container
    from csc_train.data.readers import read_dialogues
    from csc_train.errors import ResumableError
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process
    from csc_train.synthesis.filters.funnel import funnel_table
    from csc_train.synthesis.rolecs.batch_api import BatchBackend
    from csc_train.synthesis.rolecs.estimate import estimate_table, estimate_usage
    from csc_train.synthesis.rolecs.mock_backend import MockBackend
    from csc_train.synthesis.rolecs.personas import generate_profiles, read_profiles
    from csc_train.synthesis.rolecs.progress import show_progress
    from csc_train.synthesis.rolecs.results import refuse_lost_store, write_synthesis
    from csc_train.synthesis.rolecs.runner import SynthesisRunner, generation_settings
    from csc_train.synthesis.rolecs.store import STORE_FILE, SynthesisStore

    settings, people, console = config.synthesis, config.synthesis.personas, Console()
    checks = config.rolecs_check, config.duplicates

    # Personas
    if people.path is None:
        profiles = generate_profiles(people.count, settings.seed, settings.language)
    else:
        profiles = read_profiles(people.path)
    if config.dry_run:
        console.print(estimate_table(estimate_usage(settings, checks[0], config.llm, config.target, len(profiles))))
        return
    require_single_process("synthesize_rolecs")
    run = Run("synthesize_rolecs", to_container(config), OUTPUTS)
    where = config.reference
    reference = read_dialogues(where.path, source=where.source) if where.path else []

    # Dialogues; every answer is stored at once
    if config.llm.backend == "mock":
        backend = MockBackend(settings.language)
    else:
        backend = BatchBackend(config.llm, settings.roles, config.batch)
    determining = generation_settings(settings, *checks, config.llm)
    with closing(SynthesisStore(run.directory / STORE_FILE, determining, config.new_run)) as store:
        runner = SynthesisRunner(settings, *checks, profiles, backend, store, config.target, config.budget)
        run.start({})
        if not config.new_run:
            refuse_lost_store(run.directory, store)

        async def generate() -> None:
            async with show_progress(runner.progress, console):
                await runner.run()

        asyncio.run(generate())

        # Result files
        rows = write_synthesis(run.directory, runner, store, backend, reference, settings.seed)
    progress = runner.progress
    console.print(funnel_table(rows, f"{progress.accepted} of {config.target} dialogues (source={backend.source})"))
    logger.info(
        f"dialogues: {run.directory}/dialogues.jsonl, .parquet; report: {run.directory}/quality.html, quality.json"
    )
    if progress.empty:
        logger.info(f"{progress.empty} quota slots stay empty after {settings.attempts} dialogues each")
    if isinstance(backend, BatchBackend) and backend.pending:
        files = ", ".join(map(str, backend.write_requests(run.directory / "batch")))
        logger.info(f"{len(backend.pending)} calls wait for the results of a batch: {files}")
        run.stop("batch.results=[FILE,...]")
    if progress.stopped:
        reason, message = progress.stopped
        if reason == "unusable":
            raise ResumableError(message, "")
        if reason == "interrupted":
            raise KeyboardInterrupt
        logger.info(f"stopped: {message}")
        run.stop(f"{message.partition('=')[0]}=MORE" if reason == "budget" else "")
    run.finish()
    if progress.empty:
        sys.exit(1)


if __name__ == "__main__":
    run_recipe("synthesize_rolecs", main)
