"""Build CSConv: recorded calls -> filters -> rewriting by a model -> filters -> dialogues.

python recipes/build_csconv.py                                                  # bundled sample calls, no model
python recipes/build_csconv.py calls=calls.jsonl llm=deepseek_r1
python recipes/build_csconv.py run=runs/build_csconv-20260101-120000 resume=true    # resumes
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.synthesis import BuildCsconvRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.build_csconv")
OUTPUTS = (
    "answers.jsonl", "dialogues.jsonl", "dialogues.parquet", "rejected.jsonl", "rejected-calls.jsonl",
    "filter_funnel.json", "quality.json", "quality.html",
)  # fmt: skip
"""Files of the recipe in the run directory."""


def main(config: BuildCsconvRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    import asyncio

    from rich.console import Console

    from csc_train.config.compose import to_container
    from csc_train.data.readers import read_dialogues, write_dialogues
    from csc_train.data.sample_grammar import SAMPLE_SOURCE
    from csc_train.files import file_digest, write_json
    from csc_train.jsonl import write_jsonl
    from csc_train.llm.answer_log import AnswerLog, ask_model
    from csc_train.llm.client import Client, UnusableServerError
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process
    from csc_train.synthesis.csconv.build import (
        BUNDLED_CALLS,
        CSCONV_RULES,
        ask_mock,
        build_csconv,
        read_calls,
    )
    from csc_train.synthesis.filters.funnel import filter_funnel, funnel_table
    from csc_train.synthesis.quality_report import quality_report, write_quality_report

    require_single_process("build_csconv")
    run = Run("build_csconv", to_container(config), OUTPUTS)

    # Calls
    path = config.calls or BUNDLED_CALLS[config.language]
    calls = read_calls(
        path,
        max_rejected=config.max_rejected,
        encoding=config.encoding if config.calls else None,
        rejected_path=run.directory / "rejected-calls.jsonl",
    )
    where = config.reference
    reference = read_dialogues(where.path, source=where.source) if where.path else []
    if run.start({"calls": file_digest(path)}) == "finished":
        logger.info(f"{run.directory} is finished; nothing to do")
        return

    # Filters and rewriting; every answer is stored at once
    log = AnswerLog(run.directory / "answers.jsonl")

    async def build():
        settings = {"call": config.call, "rewrite": config.rewrite, "duplicates": config.duplicates}
        settings |= {"language": config.language, "concurrency": config.llm.concurrency}
        if config.llm.backend == "mock":
            return await build_csconv(calls, log.cached(ask_mock(config.language)), **settings)
        async with Client(config.llm) as client:
            await client.check()
            return await build_csconv(calls, log.cached(ask_model(client, config.seed)), **settings)

    try:
        outcomes = asyncio.run(build())
    except UnusableServerError as error:
        run.fail(f"stopped: {error}")

    # Result files
    source = "CSConv" if config.calls else SAMPLE_SOURCE
    dialogues = [outcome.dialogue(source) for outcome in outcomes if outcome.accepted]
    failed = [outcome for outcome in outcomes if outcome.failure]
    rejected = [outcome.row() for outcome in outcomes if not outcome.accepted and not outcome.failure]
    rows = filter_funnel((outcome.verdicts for outcome in outcomes), CSCONV_RULES)
    for name in ("dialogues.jsonl", "dialogues.parquet"):
        write_dialogues(run.directory / name, dialogues)
    write_jsonl(run.directory / "rejected.jsonl", rejected, ascii_only=True)
    write_json(run.directory / "filter_funnel.json", rows)
    usage = log.usage | {"cost": config.llm.cost(log.usage["prompt_tokens"], log.usage["completion_tokens"])}
    usage = {name: value for name, value in usage.items() if value is not None} if log.usage["requests"] else None
    report = quality_report(dialogues, reference=reference, funnel=rows, usage=usage, seed=config.seed)
    write_quality_report(run.directory, report, f"Dialogues from {len(calls)} calls ({source})", config.language)
    Console().print(funnel_table(rows, f"{len(dialogues)} of {len(calls)} calls are kept"))
    logger.info(f"dialogues: {run.directory}/dialogues.jsonl, .parquet (source={source})")
    logger.info(f"dropped calls: {run.directory}/rejected.jsonl; report: {run.directory}/quality.html, quality.json")
    if failed:
        run.fail(f"{len(failed)} calls got no answer, the first: {failed[0].id}: {failed[0].failure}")
    run.finish()


if __name__ == "__main__":
    run_recipe("build_csconv", main)
