"""Export a training checkpoint or a final model to a plain Hugging Face directory, and verify it.

python recipes/export.py source=runs/demo output=exported/demo
"""

try:
    from csc_train.checkpoints.config import ExportConfig
    from csc_train.config.cli import run_recipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: ExportConfig) -> None:
    # What needs no model is checked before the imports that take seconds
    from csc_train.checkpoints.locate import check_source, open_source

    check_source(config.source)

    from csc_train.checkpoints.export import claim_output, export, push
    from csc_train.runs.distributed import require_single_process

    require_single_process("export")
    source = open_source(config.source)
    with claim_output(source, config):
        export(source, config)
        if config.push_to_hub:
            push(config)
            print(f"uploaded to {config.push_to_hub}")


if __name__ == "__main__":
    run_recipe("export", main)
