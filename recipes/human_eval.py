"""Compare two evaluations of the same dialogues by human raters: a blinded annotation form, and its results.

python recipes/human_eval.py export runs/one/evaluation runs/other/evaluation
python recipes/human_eval.py import ratings-anna.json ratings-ben.json key=runs/human_eval-20260102-030405/key.json
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import HumanEvalRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.human_eval")
OUTPUTS = ("form.html", "key.json", "human.json", "human.md")
"""Files that the recipe writes into the run directory."""


def main(config: HumanEvalRecipe) -> None:
    # Imported after the configuration is checked: these imports take seconds.
    from csc_train.config.compose import to_container
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process

    require_single_process("human_eval")
    run = Run("human_eval", to_container(config), OUTPUTS)
    {"export": export_form, "import": import_ratings}[config.action](config, run)
    run.finish()


def export_form(config: HumanEvalRecipe, run) -> None:
    """Write the annotation form and its unblinding key."""
    from pathlib import Path

    from csc_train.data.readers import read_dialogues
    from csc_train.evaluation.comparison import align_reference_context, left_out_note
    from csc_train.evaluation.evaluated_model import read_language
    from csc_train.evaluation.judges.annotation_form import FORM_FILE, KEY_FILE, draw_annotation_form
    from csc_train.files import file_digest, write_json, write_text

    names, sides, left_out = align_reference_context(tuple(config.inputs), (config.system_a, config.system_b))
    dialogues = Path(config.inputs[0]) / "dialogues.jsonl"
    by_id = {dialogue.id: dialogue for dialogue in read_dialogues(dialogues)}
    config.human.language = config.human.language or read_language(config.inputs[0])
    page, key = draw_annotation_form(sides, by_id, names, config.human, left_out)

    run.start({"dialogues": file_digest(dialogues), "form": key.form})
    write_text(run.directory / FORM_FILE, page)
    write_json(run.directory / KEY_FILE, key.model_dump())
    logger.info(f"A: {names[0]}\nB: {names[1]}")
    logger.info(f"{len(key.items)} items of the {key.differing} of {key.turns} turns with different replies")
    if left_out:
        logger.info(left_out_note(left_out))
    logger.info(f"annotation form, for the raters: {run.directory / FORM_FILE}")
    logger.info(f"unblinding key, not for the raters: {run.directory / KEY_FILE}")


def import_ratings(config: HumanEvalRecipe, run) -> None:
    """Read the ratings, and report preferences and agreement."""
    from dataclasses import asdict

    from rich.console import Console

    from csc_train.evaluation.judges.annotation_form import read_key
    from csc_train.evaluation.judges.human_ratings import (
        rater_results,
        rating_tables,
        read_judge_preferences,
        read_ratings,
    )
    from csc_train.evaluation.report.tables import markdown_tables, rich_table
    from csc_train.files import file_digest, write_json, write_text
    from csc_train.runs.provenance import provenance

    key = read_key(config.key)
    ratings, comments = read_ratings(config.inputs, key)
    judge = read_judge_preferences(config.judge, key) if config.judge else None
    found = rater_results(ratings, key, config.human, judge)

    run.start({path: file_digest(path) for path in (config.key, *config.inputs)})
    tables = rating_tables(found, key)
    names = f"A: {key.a}  \nB: {key.b}"
    questions = {question: asdict(each) for question, each in found.items()}
    facts = {"provenance": provenance(), "a": key.a, "b": key.b, "form": key.form}
    write_json(run.directory / "human.json", facts | {"questions": questions, "comments": comments})
    write_text(run.directory / "human.md", markdown_tables([names, *tables]))
    logger.info(names)
    for table in tables:
        Console().print(rich_table(table))
    logger.info(f"report: {run.directory}/human.md, {run.directory}/human.json ({len(comments)} comments)")


if __name__ == "__main__":
    run_recipe("human_eval", main)
