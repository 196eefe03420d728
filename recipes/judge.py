"""Judge two evaluations of the same dialogues by a language model: pairwise in both orders, and by five criteria.

It also names the admissible strategies of one evaluation's reference turns.

python recipes/judge.py runs/one/evaluation runs/other/evaluation llm=gpt_4o
python recipes/judge.py runs/one/evaluation llm=gpt_4o judge.tasks=[accepted] judge.num_turns=null
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.evaluation import JudgeRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.judge")
OUTPUTS = ("judgements.jsonl", "judge.json", "judge.md", "accepted.jsonl")
"""Files that the recipe writes into the run directory."""


def main(config: JudgeRecipe) -> None:
    # Imported after the configuration is checked: these imports take seconds.
    from pathlib import Path

    from csc_train.config.compose import to_container
    from csc_train.data.readers import read_dialogues
    from csc_train.evaluation.comparison import align_reference_context
    from csc_train.evaluation.evaluated_model import read_language
    from csc_train.evaluation.judges.llm_judge import (
        accepted_rows,
        judge,
        judge_json,
        judge_markdown,
        judge_questions,
        reference_table,
        sample_turns,
        summarize,
    )
    from csc_train.files import digest, write_json, write_text
    from csc_train.inference.predictions import describe_kinds
    from csc_train.jsonl import write_jsonl
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process
    from csc_train.runs.provenance import provenance

    require_single_process("judge")
    run = Run("judge", to_container(config), OUTPUTS)

    # Dialogues, predictions
    dialogues = {dialogue.id: dialogue for dialogue in read_dialogues(Path(config.a) / "dialogues.jsonl")}
    if config.b is None:
        names, sides, left_out = [config.a], [reference_table(dialogues.values())] * 2, 0
    else:
        names, sides, left_out = align_reference_context((config.a, config.b), (config.system_a, config.system_b))
    sampled = sample_turns(sides[0], config.judge)
    a, b = ([side.predictions[index] for index in sampled] for side in sides)
    config.judge.language = config.judge.language or read_language(config.a)
    asked = judge_questions(a, b, dialogues, config.judge)

    # Answers
    status = run.start({"questions": digest([question.messages for question in asked])})
    if status == "finished":
        logger.info((run.directory / "judge.md").read_text(encoding="utf-8"))
        return
    logger.info(f"{len(a)} turns, {len(asked)} questions to {config.llm.model}")
    report = judge(asked, config.llm, config.judge, run.directory / "judgements.jsonl")

    # Table
    summary = summarize(a, b, report, config.judge)
    table = judge_markdown(summary, report, names, config.llm.model, left_out)
    facts = {"provenance": provenance(), **dict(zip("ab", names, strict=False)), "judge": config.llm.model}
    facts["left_out"] = left_out
    write_json(run.directory / "judge.json", facts | judge_json(summary, report))
    if rows := accepted_rows(report):
        write_jsonl(run.directory / "accepted.jsonl", rows)
        logger.info(f"admissible strategies of {len(rows)} turns: metrics.accepted={run.directory}/accepted.jsonl")
    write_text(run.directory / "judge.md", table)
    logger.info(f"{table}\nreport: {run.directory}/judge.md, {run.directory}/judge.json")
    if kinds := report.failed_kinds:
        reason = f"incomplete: {len(kinds)} of {len(asked)} questions failed ({describe_kinds(kinds)})"
        run.fail(reason, "incomplete", config.llm.larger_limit(kinds))
    run.finish()


if __name__ == "__main__":
    run_recipe("judge", main)
