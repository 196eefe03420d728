"""Write the sample dialogues of our own grammar and print how predictable their strategies are.

python recipes/write_sample.py data.sample_dialogues=900 data.sample_seed=0
python recipes/write_sample.py data.sample_language=en
"""

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import WriteSampleRecipe
    from csc_train.data.sample_grammar import accuracy_ceiling, ensure_sample
    from csc_train.data.splits import read_and_check_splits
    from csc_train.errors import InputError
    from csc_train.inference.baselines import StrategyBaseline
    from csc_train.inference.generator import generate_predictions
    from csc_train.inference.predictions import Prediction
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: WriteSampleRecipe) -> None:
    path, count, seed = config.data.train.path, config.data.sample_dialogues, config.data.sample_seed
    if not count:
        raise InputError("data.sample_dialogues is not set: use data=sample")
    language = config.data.sample_language
    written = "wrote" if ensure_sample(path, count, seed, language) else "reused"
    print(f"{written} {path}: {count} dialogues, seed {seed}, language {language}, source=synthetic-sample")
    splits = read_and_check_splits(config.data)
    bigram = generate_predictions(splits.evaluation, StrategyBaseline(splits.train, order=1), "reference")
    hits = sum(each.strategy == each.reference_strategy for each in bigram if isinstance(each, Prediction))
    print(
        f"strategy accuracy on the {len(splits.evaluation)} evaluation dialogues: ceiling (the generating rule) "
        f"{accuracy_ceiling(splits.evaluation, language):.2f}, strategy bigram {100 * hits / len(bigram):.2f}"
    )


if __name__ == "__main__":
    run_recipe("write_sample", main)
