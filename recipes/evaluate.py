"""Evaluate a model, its base model and two baselines on the evaluation set: predictions, metrics, report.

python recipes/evaluate.py checkpoint=runs/demo/model
torchrun --nproc_per_node 8 recipes/evaluate.py checkpoint=runs/rolecs/model data=rolecs
python recipes/evaluate.py run=runs/demo/evaluation score_only=true
python recipes/evaluate.py predictions=replies.jsonl data=rolecs evaluation.contexts=[reference]
python recipes/evaluate.py llm=gpt_4o data=rolecs
"""

import logging
from dataclasses import replace
from pathlib import Path

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import EvaluateRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.evaluate")
OUTPUTS = (
    "predictions", "general", "dialogues.jsonl", "contamination.json", "evaluated_model.json", "exported",
    "results.json", "table.md", "report.html", "report_dialogues.js", "tracking.json", "usage.jsonl", "wandb",
)  # fmt: skip
"""Files that the recipe writes into the run directory."""


def main(config: EvaluateRecipe) -> None:
    # What needs no model is checked before the imports that take seconds
    from csc_train.checkpoints.locate import check_source
    from csc_train.checkpoints.manifest import plain_manifest
    from csc_train.checkpoints.revisions import pin_revisions
    from csc_train.evaluation.general import encode_texts, read_texts, texts_hash
    from csc_train.runs.imports import import_lean

    texts = [] if config.score_only else read_texts(config.evaluation.general)
    plain = config.template and plain_manifest(config.template, config.chat_template)
    if config.checkpoint and not config.score_only:
        check_source(config.checkpoint, plain)
    import_lean("peft")
    from csc_train.checkpoints.export import usable_model
    from csc_train.config.compose import from_container, to_container
    from csc_train.data.config import DataConfig
    from csc_train.data.readers import write_dialogues
    from csc_train.data.sample_grammar import accuracy_ceiling, provide_sample
    from csc_train.data.splits import read_and_check_splits
    from csc_train.evaluation import systems
    from csc_train.evaluation.contamination import find_contamination, write_contamination
    from csc_train.evaluation.evaluated_model import find_trained, open_evaluated, write_evaluated
    from csc_train.evaluation.scoring import data_inputs, prepare_metrics
    from csc_train.inference.hf import read_template
    from csc_train.inference.predictions import describe_kinds
    from csc_train.runs.directory import Run, claim_run
    from csc_train.runs.distributed import distributed_state, on_main, require_single_process
    from csc_train.template.config import TemplateConfig
    from csc_train.template.system_prompt import prompt_language
    from csc_train.tracking.wandb import attach_evaluation

    if config.score_only or config.llm:
        require_single_process("evaluate")
    if config.score_only:
        with claim_run("evaluate", Path(config.run.directory)):
            score_and_show(Path(config.run.directory), config)
        return
    config, state = pin_revisions(config), distributed_state()
    run = Run("evaluate", to_container(config), OUTPUTS)
    # Checkpoint, dialogues
    template, data, model, base = config.template, config.data, None, None
    if config.checkpoint:
        model = on_main(lambda: open_evaluated(config.checkpoint, not config.llm and config.evaluation.base, plain))
        template, source = read_template(model.source)
        model, base = replace(model, source=source), model.base
        texts = [] if config.llm else encode_texts(texts, template)
        data = data or from_container(DataConfig, source.manifest.config["data"])
    if run.is_main:
        prepare_metrics(config.metrics)
        provide_sample(data)
    state.wait_for_everyone()
    splits = read_and_check_splits(data, run.directory if run.is_main else None)
    language = prompt_language(splits.evaluation, getattr(template, "config", template))
    trained = find_trained(model, splits, data) if model else []
    hashes = model.hashes if model else {"system": systems.system_hash(config.predictions, config.llm)}
    inputs = data_inputs(splits, config.metrics) | hashes
    status = run.start(inputs | ({"general": texts_hash(texts)} if texts else {}))

    # Predictions
    local = model and not config.llm
    directory = usable_model(source, run.directory / "exported", base) if local else config.checkpoint
    evaluated = systems.build_systems(
        splits.train, config.evaluation, hashes["system"], template or TemplateConfig(language=language), state,
        directory, base, config.llm, model.name if model else "", run.directory,
    )  # fmt: skip
    place = run.directory, evaluated, config.evaluation.contexts, splits.evaluation, texts if local else []
    if status == "finished" and not systems.any_missing(*place):
        table = (run.directory / "table.md").read_text(encoding="utf-8")
        logger.info(f"reused {run.directory}: same checkpoint, configuration, data and code\n{table}")
        return
    if run.is_main:
        write_dialogues(run.directory / "dialogues.jsonl", splits.evaluation)
        write_contamination(run.directory, find_contamination(splits, data.overlap_threshold, trained, language))
        write_evaluated(run.directory, model, language, config.plugins)
    systems.predict_missing(*place, state)
    if not run.is_main:
        return
    if config.predictions:
        systems.import_replies(config.predictions, run.directory, config.evaluation.contexts[0], splits.evaluation)

    # Metrics, report
    scored = score_and_show(run.directory, config)
    if model and not scored.incomplete:
        attach_evaluation(model.source.manifest.wandb, model.source.manifest.config.get("tracking", {}), run.directory)
    if data.sample_dialogues:
        ceiling = accuracy_ceiling(splits.evaluation, data.sample_language)
        logger.info(f"ceiling of ACC, by the rule that wrote the sample dialogues: {ceiling:.2f}")
    if scored.incomplete:
        kinds, limit = scored.run.failed_kinds, config.evaluation.max_new_tokens
        needs = config.llm.larger_limit(kinds, limit) if config.llm else ""
        run.fail(f"incomplete: {len(kinds)} turns failed ({describe_kinds(kinds)})", "incomplete", needs)
    run.finish()


def score_and_show(directory: Path, config: EvaluateRecipe):
    """Score the predictions in a run directory, write and print the report, and return the `ScoredRun`."""
    from rich.console import Console

    from csc_train.checkpoints.model_card import write_own_card
    from csc_train.config.compose import to_container
    from csc_train.evaluation.report.html import write_html
    from csc_train.evaluation.report.tables import console_table, turn_counts, write_results
    from csc_train.evaluation.scoring import score_run
    from csc_train.llm.usage import read_usage
    from csc_train.runs.directory import read_run_record
    from csc_train.runs.provenance import provenance

    scored, settings = score_run(directory, config.metrics, config.evaluation.max_failed), to_container(config)
    facts = provenance() | {"metrics": settings["metrics"]}
    write_results(directory, scored.results, scored.drifts, facts, scored.contamination)
    write_html(directory, scored, settings, read_run_record(directory))
    Console().print(*(console_table(scored.results, profile) for profile in scored.profiles))
    for counts in turn_counts(scored.results, brief=True):
        logger.info(f"turns: {counts}")
    if config.llm:
        logger.info(f"usage: {read_usage(directory).describe(config.llm)}")
    logger.info(f"report: {directory}/report.html (also table.md, results.json); predictions: {directory}/predictions")
    write_own_card(directory)
    return scored


if __name__ == "__main__":
    run_recipe("evaluate", main)
