"""Evaluate a checkpoint on held-out dialogues, beside its base model and two trivial baselines.

python recipes/evaluate.py checkpoint=runs/demo/checkpoint
"""

from csc_train.config import EvaluateRecipe, data_of, resolved, run_recipe


def main(config: EvaluateRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from rich.console import Console

    from csc_train.checkpoint import MANIFEST
    from csc_train.dialogue import data_digest
    from csc_train.evaluation.baselines import StrategyBaseline
    from csc_train.evaluation.hf_policy import base_of, load_policy, open_checkpoint
    from csc_train.evaluation.metrics import score
    from csc_train.evaluation.predict import predict
    from csc_train.evaluation.predictions import read_predictions, write_predictions
    from csc_train.evaluation.report import console_table, write_results
    from csc_train.files import file_digest
    from csc_train.run import Run, provenance, single_process
    from csc_train.splits import load_splits
    from csc_train.synthesis.sample import ceiling, ensure_sample

    single_process("evaluate")
    run = Run("evaluate", resolved(config))

    # Checkpoint
    template, manifest = open_checkpoint(config.checkpoint)

    # Dialogues
    data = config.data or data_of(manifest.config)
    if data.sample_dialogues:
        ensure_sample(data.train.path, data.sample_dialogues, data.sample_seed)
    splits = load_splits(data, run.directory)
    inputs = {
        "train": data_digest(splits.train),
        "evaluation": data_digest(splits.evaluation),
        "checkpoint": file_digest(f"{config.checkpoint}/{MANIFEST}"),
    }
    if manifest.data_hash != inputs["train"]:
        run.say("note: the baselines are fitted on other training data than the checkpoint's")
    status = run.begin(inputs)
    if status == "finished":
        run.say(f"reused {run.directory}: same checkpoint, configuration, data and code")
        run.say((run.directory / "table.md").read_text(encoding="utf-8"))
        return

    # Systems
    base = base_of(config.checkpoint, manifest)
    systems = {
        "most frequent strategy": lambda: StrategyBaseline(splits.train, order=0),
        "strategy bigram": lambda: StrategyBaseline(splits.train, order=1),
        "base (untrained)": lambda: load_policy(base, template, config.evaluation, manifest.base_revision),
        "trained": lambda: load_policy(config.checkpoint, template, config.evaluation),
    }
    if not config.evaluation.base:
        del systems["base (untrained)"]

    # Predictions, metrics
    results = {}
    for name, load in systems.items():
        policy = load()
        results[name] = {}
        for context in config.evaluation.contexts:
            path = run.directory / "predictions" / f"{name}-{context}.jsonl"
            if status == "unfinished" and path.exists():
                predictions = read_predictions(path)
            else:
                predictions = predict(splits.evaluation, policy, context, f"{name}, {context} context")
                write_predictions(path, predictions)
            results[name][context] = score(predictions, config.metrics, strategies_apply=policy.strategies_apply)
        del policy  # one model in memory at a time

    # Table
    write_results(run.directory, results, provenance())
    run.finish()
    Console().print(console_table(results, config.metrics.profiles[0]))
    if data.sample_dialogues:
        run.say(f"ceiling of ACC, by the rule that wrote the sample dialogues: {ceiling(splits.evaluation):.2f}")
    run.say(f"report: {run.directory}/table.md, {run.directory}/results.json; predictions: {run.directory}/predictions")


if __name__ == "__main__":
    run_recipe("evaluate", main)
