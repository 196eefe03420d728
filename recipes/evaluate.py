"""Evaluate a model on held-out dialogues, beside its base model and two baselines: predictions, scores, report.

python recipes/evaluate.py checkpoint=runs/demo/model
torchrun --nproc_per_node 8 recipes/evaluate.py checkpoint=runs/rolecs/model data=rolecs
python recipes/evaluate.py run=runs/demo/evaluation score_only=true
python recipes/evaluate.py predictions=replies.jsonl data=rolecs evaluation.contexts=[reference]
python recipes/evaluate.py llm=gpt_4o data=rolecs
"""

import logging
from pathlib import Path

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import EvaluateRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.evaluate")
OUTPUTS = ("predictions", "dialogues.jsonl", "contamination.json", "results.json", "table.md", "report.html")
"""Files that the recipe writes into the run directory."""


def main(config: EvaluateRecipe) -> None:
    # Imported after the configuration is checked: these imports take seconds.
    from csc_train.checkpoints.export import usable_model
    from csc_train.checkpoints.manifest import MANIFEST_FILE
    from csc_train.config.compose import from_container, to_container
    from csc_train.data.config import DataConfig
    from csc_train.data.dialogue import data_digest
    from csc_train.data.readers import write_dialogues
    from csc_train.data.sample_grammar import accuracy_ceiling, ensure_sample
    from csc_train.data.splits import load_splits
    from csc_train.evaluation import systems
    from csc_train.evaluation.contamination import find_contamination, write_contamination
    from csc_train.evaluation.metrics.model_based import fetch_models
    from csc_train.evaluation.metrics.registry import load_plugins
    from csc_train.files import digest, file_digest
    from csc_train.inference.hf import open_final_model
    from csc_train.inference.predictions import read_external_replies, write_predictions
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import distributed_state, require_single_process
    from csc_train.template.config import TemplateConfig
    from csc_train.tracking.wandb import attach_evaluation

    if config.score_only or config.llm:
        require_single_process("evaluate")
    if config.score_only:
        score_and_show(Path(config.run.directory), config)
        return
    state = distributed_state()
    if config.checkpoint:
        config.checkpoint = usable_model(config.checkpoint)
    run = Run("evaluate", to_container(config), OUTPUTS)

    # Metrics, checkpoint
    if run.is_main:
        load_plugins(config.metrics)
        fetch_models(config.metrics)
    template, manifest = open_final_model(config.checkpoint) if config.checkpoint else (None, None)

    # Dialogues
    data = config.data or from_container(DataConfig, manifest.config["data"])
    if data.sample_dialogues and run.is_main:
        ensure_sample(data.train.path, data.sample_dialogues, data.sample_seed)
    state.wait_for_everyone()
    splits = load_splits(data, run.directory if run.is_main else None)
    system = f"{config.checkpoint}/{MANIFEST_FILE}" if config.checkpoint else config.predictions
    inputs = {
        "train": data_digest(splits.train),
        "evaluation": data_digest(splits.evaluation),
        "system": file_digest(system) if system else digest(config.llm.model),
    }
    if manifest and manifest.data_hash != inputs["train"]:
        logger.info("note: the baselines are fitted on other training data than the checkpoint")
    status = run.start(inputs)

    # Systems
    evaluated = systems.baseline_systems(splits.train)
    if config.llm:
        asked = template or config.template or TemplateConfig()
        served = bool(config.checkpoint)
        evaluated |= systems.served_system(config.llm, config.evaluation, asked, inputs["system"], trained=served)
    elif config.checkpoint:
        device = state.device if state.num_processes > 1 else None
        evaluated |= systems.local_systems(
            config.checkpoint, template, manifest, config.evaluation, inputs["system"], device
        )

    # Predictions
    place = run.directory, evaluated, config.evaluation.contexts, splits.evaluation
    if status == "finished" and not systems.any_missing(*place):
        logger.info(f"reused {run.directory}: same checkpoint, configuration, data and code")
        logger.info((run.directory / "table.md").read_text(encoding="utf-8"))
        logger.info(f"report: {run.directory}/report.html")
        return
    if run.is_main:
        write_dialogues(run.directory / "dialogues.jsonl", splits.evaluation)
        write_contamination(run.directory, find_contamination(splits, data.overlap_threshold))
    systems.predict_missing(*place, state)
    if not run.is_main:
        return
    if config.predictions:
        (context,) = config.evaluation.contexts
        replies = read_external_replies(config.predictions, splits.evaluation, context)
        write_predictions(systems.predictions_path(run.directory, Path(config.predictions).stem, context), replies)

    # Scores, report
    failures = score_and_show(run.directory, config)
    if config.checkpoint:
        attach_evaluation(Path(config.checkpoint).parent, run.directory)
    if data.sample_dialogues:
        logger.info(f"ceiling of ACC by the rule of the sample dialogues: {accuracy_ceiling(splits.evaluation):.2f}")
    if failures:
        run.fail(failures)
    run.finish()


def score_and_show(directory: Path, config: EvaluateRecipe) -> str:
    """Score the predictions in a run directory, write and print the report, and return a summary of failed turns."""
    from rich.console import Console

    from csc_train.config.compose import to_container
    from csc_train.evaluation.report.html import write_html
    from csc_train.evaluation.report.tables import console_table, write_results
    from csc_train.evaluation.scoring import score_run
    from csc_train.files import read_json
    from csc_train.runs.directory import RECORD_FILE
    from csc_train.runs.provenance import provenance

    scored, settings = score_run(directory, config.metrics), to_container(config)
    facts = provenance() | {"metrics": settings["metrics"]}
    write_results(directory, scored.results, scored.drifts, facts, scored.contamination)
    write_html(directory, scored, settings, read_json(directory / RECORD_FILE))
    for profile in config.metrics.profiles:
        Console().print(console_table(scored.results, profile))
    print(
        f"report: {directory}/report.html (also table.md, results.json); predictions: {directory}/predictions",
        flush=True,
    )
    return scored.run.failure_summary()


if __name__ == "__main__":
    run_recipe("evaluate", main)
