"""Let people compare two evaluations of the same dialogues: a blinded sheet for the browser, and what its answers say.

python recipes/human_eval.py export runs/one/evaluation runs/other/evaluation
python recipes/human_eval.py import answers-anna.json answers-ben.json key=runs/human_eval-20260102-030405/key.json
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import HumanEvalRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.human_eval")
OUTPUTS = ("sheet.html", "key.json", "human.json", "human.md")
"""What the recipe writes into the run directory."""


def main(config: HumanEvalRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from csc_train.config.compose import to_container
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process

    require_single_process("human_eval")
    run = Run("human_eval", to_container(config), OUTPUTS)
    {"export": export_sheet, "import": import_answers}[config.action](config, run)
    run.finish()


def export_sheet(config: HumanEvalRecipe, run) -> None:
    """Write the sheet, and its key beside it."""
    from pathlib import Path

    from csc_train.data.readers import read_dialogues
    from csc_train.evaluation.comparison import left_out_note, reference_sides
    from csc_train.evaluation.judges.human import KEY, SHEET, draw_annotation_form
    from csc_train.files import file_digest, write_json, write_text

    names, sides, left_out = reference_sides(tuple(config.inputs), (config.system_a, config.system_b))
    dialogues = Path(config.inputs[0]) / "dialogues.jsonl"
    by_id = {dialogue.id: dialogue for dialogue in read_dialogues(dialogues)}
    page, key = draw_annotation_form(sides, by_id, names, config.human, left_out)

    run.start({"dialogues": file_digest(dialogues), "sheet": key.sheet})
    write_text(run.directory / SHEET, page)
    write_json(run.directory / KEY, key.model_dump())
    logger.info(f"A: {names[0]}\nB: {names[1]}")
    logger.info(f"{len(key.items)} items of the {key.differing} of {key.turns} turns where the replies differ")
    if left_out:
        logger.info(left_out_note(left_out))
    logger.info(f"for the raters: {run.directory / SHEET}")
    logger.info(f"keep from them: {run.directory / KEY}, which tells the systems apart")


def import_answers(config: HumanEvalRecipe, run) -> None:
    """Read the raters' answers, and say which system they prefer and how far they agree."""
    from rich.console import Console

    from csc_train.evaluation.judges.human import as_json, rater_results, read_judge, read_key, read_ratings, sections
    from csc_train.evaluation.report.tables import section_table, sections_markdown
    from csc_train.files import file_digest, write_json, write_text
    from csc_train.runs.provenance import provenance

    key = read_key(config.key)
    votes, comments = read_ratings(config.inputs, key)
    judge = read_judge(config.judge, key) if config.judge else None
    found = rater_results(votes, key, config.human, judge)

    run.start({path: file_digest(path) for path in (config.key, *config.inputs)})
    tables = sections(found, key)
    names = f"A: {key.a}  \nB: {key.b}"
    facts = {"provenance": provenance(), "a": key.a, "b": key.b, "sheet": key.sheet}
    write_json(run.directory / "human.json", facts | as_json(found, comments))
    write_text(run.directory / "human.md", f"{names}\n\n{sections_markdown(tables)}")
    logger.info(names)
    for table in tables:
        Console().print(section_table(table))
    logger.info(f"report: {run.directory}/human.md, {run.directory}/human.json ({len(comments)} comments)")


if __name__ == "__main__":
    run_recipe("human_eval", main)
