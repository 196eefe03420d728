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
    from csc_train.evaluation.hf_policy import load_base_policy, load_policy
    from csc_train.evaluation.metrics import score
    from csc_train.evaluation.predict import predict
    from csc_train.evaluation.predictions import write_predictions
    from csc_train.evaluation.report import console_table, write_results
    from csc_train.files import file_digest
    from csc_train.run import Run, provenance, single_process
    from csc_train.splits import load_splits
    from csc_train.synthesis.sample import ceiling, ensure_sample

    single_process("evaluate")
    run = Run("evaluate", resolved(config))

    # Checkpoint
    trained, manifest = load_policy(config.checkpoint, config.evaluation)

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
    if run.begin(inputs) == "finished":
        run.say(f"reused {run.directory}: same checkpoint, configuration, data and code")
        run.say((run.directory / "table.md").read_text(encoding="utf-8"))
        return

    # Systems
    systems = {
        "most frequent strategy": StrategyBaseline(splits.train, order=0),
        "strategy bigram": StrategyBaseline(splits.train, order=1),
    }
    if config.evaluation.base:
        systems["base (untrained)"] = load_base_policy(config.checkpoint, manifest, trained, config.evaluation)
    systems["trained"] = trained

    # Predictions, metrics
    results = {}
    for name, policy in systems.items():
        results[name] = {}
        for context in config.evaluation.contexts:
            predictions = predict(splits.evaluation, policy, context, f"{name}, {context} context")
            write_predictions(run.directory / "predictions" / f"{name}-{context}.jsonl", predictions)
            results[name][context] = score(predictions, config.metrics, strategies_apply=policy.strategies_apply)

    # Table
    write_results(run.directory, results, provenance())
    run.finish()
    Console().print(console_table(results))
    if data.sample_dialogues:
        run.say(f"ceiling of ACC, by the rule that wrote the sample dialogues: {ceiling(splits.evaluation):.2f}")
    run.say(f"report: {run.directory}/table.md, {run.directory}/results.json; predictions: {run.directory}/predictions")


if __name__ == "__main__":
    run_recipe("evaluate", main)
