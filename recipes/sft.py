"""Train a model to choose a strategy and reply with it: dialogues -> template -> packs -> final model.

python recipes/sft.py experiment=demo
torchrun --nproc_per_node 8 recipes/sft.py experiment=qwen2_5_7b_lora
"""

import logging
from dataclasses import replace

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import SftRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.sft")
OUTPUTS = (  # in the run directory
    "checkpoints", "base", "tokenizer", "csc_manifest.json", "model", "metrics.json", "samples.jsonl",
    "generated.jsonl", "training_dialogues.jsonl", "history.*", "curves.html", "tracking.json", "profile",
    "wandb", "tensorboard", "mlflow.db",
)  # fmt: skip


def main(config: SftRecipe) -> None:
    # What needs no model is checked before the imports that take seconds
    from csc_train.checkpoints.revisions import pin_revisions
    from csc_train.runs.distributed import distributed_state, on_main, world_size
    from csc_train.runs.imports import import_lean

    config.trainer.accumulation(world_size())
    config = pin_revisions(config)
    import_lean("trl.trainer.sft_trainer", "peft")
    from csc_train.checkpoints.export import trained_model
    from csc_train.checkpoints.manifest import build_manifest, save_base_model, save_final_model, write_manifest
    from csc_train.checkpoints.model_card import write_model_card
    from csc_train.checkpoints.training_checkpoint import checkpoint_to_resume
    from csc_train.config.compose import to_container
    from csc_train.data.dialogue import data_digest
    from csc_train.data.sample_grammar import provide_sample
    from csc_train.data.splits import read_and_check_splits
    from csc_train.launching.on_finish import on_finish_arguments, run_on_finish
    from csc_train.models.attention.select import check_delta_kernel, select_attention
    from csc_train.models.inspection import check_tokenizer, inspect_model
    from csc_train.models.loading import load_model
    from csc_train.models.precision import resolve_dtype, resolve_precision, weight_dtype
    from csc_train.packing.dataset import pack_dialogues
    from csc_train.runs.directory import Run
    from csc_train.template.chat_templates import chat_template_name
    from csc_train.template.dialogue_template import DialogueTemplate
    from csc_train.template.system_prompt import language_note
    from csc_train.template.tokenizer_training import get_tokenizer
    from csc_train.tokenized_cache import tokenize
    from csc_train.tracking.tracker import Tracker, check_trackers
    from csc_train.training.callbacks import StopOnSignal, track
    from csc_train.training.compatibility import check_router_loss, check_supported, resolve_compile
    from csc_train.training.leak_check import dropout_warning
    from csc_train.training.memory import scenario_of
    from csc_train.training.profiling import ProfilerCallback
    from csc_train.training.rehearsal import check_disk, check_positions, rehearse_end
    from csc_train.training.trainer import build_trainer, training_arguments
    from csc_train.training.validation import Validator

    # Checks
    job, precision, seed = distributed_state(), config.trainer.precision, config.trainer.seed
    zero = config.zero.resolved(config.adapter.kind, resolve_precision(precision))
    check_supported(zero, config.adapter, config.trainer.optimizer, resolve_precision(precision))
    inspected = on_main(lambda: inspect_model(config.model, download=True).require())
    dims = inspected.dims
    attention = select_attention(config.model.attn_implementation, config.packing.strategy, precision, dims.head_dim)
    check_delta_kernel(config.model.delta_kernel, dims.layer_kinds)
    check_router_loss(config.trainer.router_aux_loss_coef, dims)
    if (float8 := precision == "fp8") or config.trainer.compile == "layers":
        resolve_compile(config.trainer.compile, zero.stage, attention, job.device.type, dims, float8)
    on_main(lambda: check_trackers(config.tracking))
    run = Run("sft", to_container(config), [*OUTPUTS, *(["evaluation"] if config.on_finish.recipe else [])])
    on_finish = on_finish_arguments(config.on_finish, run.directory)

    # Dialogues
    on_main(lambda: provide_sample(config.data))
    splits = read_and_check_splits(config.data, run.directory if run.is_main else None)
    status = run.start({"train": data_digest(splits.train)})
    if status == "finished":
        logger.info(f"reused {run.directory}/model: same configuration, data and code")
        return run_on_finish(config.on_finish, on_finish) if run.is_main else None

    # Template and packs
    tokenizer = get_tokenizer(config.model, config.template, splits.train, run.directory / "tokenizer", job)
    on_main(lambda: check_tokenizer(config.model, inspected, tokenizer))
    name = chat_template_name(config.model.chat_template, tokenizer, inspected.model.config.model_type)
    template = DialogueTemplate(tokenizer, name, config.template)
    on_main(lambda: rehearse_end(inspected, config.adapter, tokenizer, template.chat_template))
    examples = tokenize(splits.train, template, config.tokenization)
    packs, report = pack_dialogues(examples, config.packing, config.loss, config.template.language, splits.mixture)
    logger.info(f"training on {report}")
    check_positions(inspected, packs)

    # Validation
    tracker, validator = Tracker(config.tracking, run.directory), None
    if config.validation.interval(config.trainer):
        validation = splits.validation_dialogues, tokenize(splits.validation_dialogues, template, config.tokenization)
        validator = Validator(
            *validation, template, config.validation, config.packing, packs.loss_weights, tracker.log_table
        )

    # Model: after the arguments, since ZeRO stage 3 shards it while it is loaded
    arguments = training_arguments(config.trainer, run.checkpoints, job.num_processes, zero, config.validation)
    dtype = weight_dtype(precision, config.adapter.kind)
    base = save_base_model(config.model, tokenizer, dtype, seed, run)
    model = load_model(base, tokenizer, dtype, seed, attention, load_in_4bit=config.adapter.kind == "qlora")
    manifest = on_main(lambda: build_manifest(base, model, template, splits.train, run))
    if run.is_main:
        write_manifest(run.directory, manifest, splits.train)
    dropout = dropout_warning(model.config, config.adapter, config.packing.strategy)
    notes = dropout, config.validation.selection_warning(splits.validation), config.trainer.few_steps_note(len(packs))
    for note in filter(None, (*notes, language_note(splits.train, config.template.language))):
        logger.info(note)

    # Training
    trainer = build_trainer(model, tokenizer, packs, arguments, config.packing.strategy, config.adapter, validator)
    logger.info(f"steps: {on_main(trainer.batch_sampler().load_balance)}")
    disk = scenario_of(trainer, 0), run.directory, config.trainer.save_total_limit
    on_main(lambda: check_disk(*disk, random=False))
    trainer.add_callback(stop := StopOnSignal())
    if config.trainer.profile:
        trainer.add_callback(ProfilerCallback(run.directory / "profile"))
    checkpoint = checkpoint_to_resume(run.checkpoints) if status == "unfinished" else None
    with tracker:
        track(trainer, tracker, run.config, manifest, report, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.interrupted:
            run.stop()
        # Final model
        best = trainer.best_checkpoint()
        accuracy = validator.accuracy if validator and validator.turns else None
        trained = trained_model(trainer, base, resolve_dtype(precision), best, config.adapter.merge_into, accuracy)
        if run.is_main:
            trainer.write_results(run.directory / "metrics.json", report, best)
            tracked = replace(manifest, wandb=tracker.identity)
            save_final_model(
                run.directory / "model", trained, tokenizer, template.chat_template, tracked, base, record=run.directory
            )
            write_model_card(run.directory / "model", template=template)
            tracker.log_model(run.directory / "model", manifest.hashes, run.config["data"])
    run.finish()
    logger.info(f"model: {run.directory}/model" + (f", from {best.name}" if best else ""))
    return run_on_finish(config.on_finish, on_finish) if run.is_main else None


if __name__ == "__main__":
    run_recipe("sft", main)
