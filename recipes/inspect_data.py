"""Look at dialogues before a training: counts, repeats, broken texts, private data, overlap, tokens by loss weight.

python recipes/inspect_data.py path=my_dialogues.jsonl
python recipes/inspect_data.py path=my_dialogues.jsonl evaluation_path=my_tests.jsonl experiment=qwen2_5_7b_lora
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import InspectDataRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.inspect_data")
OUTPUTS = ("inspection.html", "inspection.json", "rejected.jsonl")
"""What the recipe writes into the run directory."""


def main(config: InspectDataRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from rich.console import Console

    from csc_train.config.compose import to_container
    from csc_train.data.config import DialogueSourceConfig
    from csc_train.data.sample_grammar import provide_sample
    from csc_train.evaluation.report.tables import rich_table
    from csc_train.inspection import content
    from csc_train.inspection.page import REJECTED_FILE, summary_lines, summary_tables, write_inspection
    from csc_train.inspection.tokens import describe_tokens
    from csc_train.models.hub import base_model_type
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import distributed_state, require_single_process
    from csc_train.template.chat_templates import chat_template_name
    from csc_train.template.dialogue_template import DialogueTemplate
    from csc_train.template.tokenizer_training import get_tokenizer

    require_single_process("inspect_data")
    run = Run("inspect_data", to_container(config), OUTPUTS)

    # Dialogues
    provide_sample(config.data)
    data = config.data
    read = content.read_numbered_mix(data) if data.mix else content.read_numbered(data.train, data, config.kind)
    sides = {"set": [dialogue for dialogue in read.dialogues if dialogue.kind == "csc"]}
    if config.reference_path is not None:
        reference = DialogueSourceConfig(config.reference_path, config.reference_source)
        sides["reference"] = content.read_numbered(reference, config.data).dialogues

    # Template
    with tempfile.TemporaryDirectory() as directory:  # the training trains the same tokenizer again
        tokenizer = get_tokenizer(config.model, config.template, read.dialogues, Path(directory), distributed_state())
    name = chat_template_name(config.model.chat_template, tokenizer, base_model_type(config.model))
    template = DialogueTemplate(tokenizer, name, config.template)

    # Content, tokens
    overlap = None
    if config.data.evaluation.path is not None:
        overlap = content.find_overlap(read, config.data, config.template.language)
    tokens, samples = describe_tokens(read, template, config)
    report = {
        "path": read.report.path,
        "language": config.template.language,
        "tokenizer": config.model.tokenizer or config.model.path,
        "chat_template": template.chat_template_name,
        "reading": content.describe_reading(read.report),
        "turns": content.describe_lengths([len(dialogue.turns) for dialogue in read.dialogues]),
        "supporter_turns": sum(len(dialogue.supporter_turns) for dialogue in read.dialogues),
        "strategies": content.describe_strategies(sides) if config.kind == "csc" else None,
        "tokens": tokens,
        "repeats": content.find_repeats(read, config.data.overlap_threshold, config.data.seed),
        **content.find_findings(read),
        "overlap": overlap and asdict(overlap),
    }

    # Page
    run.start({})
    if read.report.rejected:
        read.report.write_rejected(run.directory / REJECTED_FILE)
    write_inspection(run.directory, report, samples, overlap)
    run.finish()
    for table in summary_tables(report):
        Console().print(rich_table(table))
    for line in summary_lines(report):
        logger.info(line)
    logger.info(f"report: {run.directory}/inspection.html, {run.directory}/inspection.json")


if __name__ == "__main__":
    run_recipe("inspect_data", main)
