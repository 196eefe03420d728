"""Export a training checkpoint or a final model to a plain Hugging Face directory, verify it, and upload it.

python recipes/export.py source=runs/demo output=exported/demo
python recipes/export.py source=runs/demo output=exported/demo push_to=OWNER/NAME
python recipes/export.py source=exported/demo push_to=OWNER/NAME
"""

from pathlib import Path

try:
    from csc_train.checkpoints.config import ExportConfig
    from csc_train.config.cli import run_recipe
    from csc_train.errors import InputError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: ExportConfig) -> None:
    # What needs no model is checked before the imports that take seconds
    from csc_train.checkpoints.locate import check_source, open_source
    from csc_train.checkpoints.upload import check_push, push
    from csc_train.runs.distributed import require_single_process
    from csc_train.runs.imports import import_lean

    check_source(config.source)
    hub = check_push(config) if config.push_to else None
    require_single_process("export")
    source = open_source(config.source, training=config.output is not None)
    if config.output is None:
        if not source.finished:
            raise InputError(f"{source.path}: a training checkpoint: add output=DIR, to export it first")
        push(hub, source.path, config)
        return

    import_lean("peft")
    from csc_train.checkpoints.export import claim_output, export

    with claim_output(source, config):
        export(source, config)
        if hub:
            push(hub, Path(config.output), config)


if __name__ == "__main__":
    run_recipe("export", main)
