"""Convert a data set of another shape to a dialogue file, with a report of what could not be mapped.

python recipes/convert.py from=esconv input=ESConv.json output=data/esconv.jsonl
python recipes/convert.py from=sharegpt input=chats.json output=data/chats.jsonl kind=chat
python recipes/convert.py from=abcd input=abcd_sample.json output=data/abcd.jsonl label=fill llm=vllm llm.model=NAME
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.conversion.config import ConvertConfig
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.convert")


def main(config: ConvertConfig) -> None:
    # After the configuration is checked: these imports take seconds.
    from rich.console import Console

    from csc_train.conversion.convert import convert_records
    from csc_train.conversion.labelling import describe_agreement, predict_labels
    from csc_train.conversion.output import open_output
    from csc_train.runs.distributed import require_single_process

    require_single_process("convert")
    output = open_output(config)
    converted, report = convert_records(config)
    dialogues = predict_labels(converted, report, config, output.answers)
    output.write(dialogues, report)
    Console().print(report.table(f"{config.output}: {len(dialogues)} dialogues of {report.records} records"))
    if report.agreement:
        logger.info(f"agreement with {config.label_sample}: {describe_agreement(report.agreement)}")
    if report.rejected:
        logger.info(f"left out: {output.rejected}")


if __name__ == "__main__":
    run_recipe("convert", main)
