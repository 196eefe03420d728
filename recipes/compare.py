"""Compare two evaluations of the same dialogues with paired significance tests.

python recipes/compare.py runs/one/evaluation runs/other/evaluation
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import CompareRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.compare")
OUTPUTS = ("comparison.json", "comparison.md")
"""Files that the recipe writes into the run directory."""


def main(config: CompareRecipe) -> None:
    # Imported after the configuration is checked: these imports take seconds.
    from dataclasses import asdict

    from rich.console import Console

    from csc_train.config.compose import to_container
    from csc_train.evaluation.comparison import compare, read_run_dialogues
    from csc_train.evaluation.evaluated_model import read_language
    from csc_train.evaluation.general import run_scores
    from csc_train.evaluation.report.tables import comparison_table, markdown_tables, rich_table
    from csc_train.files import write_json, write_text
    from csc_train.inference.predictions import read_run_predictions
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process
    from csc_train.runs.provenance import provenance

    require_single_process("compare")
    run = Run("compare", to_container(config), OUTPUTS)

    # Predictions, dialogues
    runs = read_run_predictions(config.a), read_run_predictions(config.b)
    systems = runs[0].select_system(config.system_a), runs[1].select_system(config.system_b)
    names = [f"{name} of {directory}" for name, directory in zip(systems, (config.a, config.b), strict=True)]
    dialogues = read_run_dialogues(config.a, config.metrics), read_run_dialogues(config.b, config.metrics)

    # Differences
    a, b = (run.predictions[system] for run, system in zip(runs, systems, strict=True))
    texts = run_scores(config.a, systems[0]), run_scores(config.b, systems[1])
    language = read_language(config.a)
    rows = compare(a, b, config.metrics, config.permutations, names, language, texts, dialogues)

    # Table
    run.start({})
    write_json(
        run.directory / "comparison.json",
        {"provenance": provenance(), "a": names[0], "b": names[1], "permutations": config.permutations,
         "differences": [asdict(row) for row in rows]},
    )  # fmt: skip
    write_text(
        run.directory / "comparison.md", markdown_tables([f"A: {names[0]}  \nB: {names[1]}", comparison_table(rows)])
    )
    run.finish()
    logger.info(f"A: {names[0]}\nB: {names[1]}")
    Console().print(rich_table(comparison_table(rows, brief=True)))
    logger.info(f"report: {run.directory}/comparison.md, {run.directory}/comparison.json")


if __name__ == "__main__":
    run_recipe("compare", main)
