"""Chat with a trained model as the customer: in a terminal, or on a web page of this machine.

python recipes/chat.py checkpoint=runs/demo/model
python recipes/chat.py checkpoint=runs/demo/model ui=web
"""

import tempfile
from pathlib import Path

try:
    from csc_train.chat.config import ChatConfig
    from csc_train.config.cli import run_recipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: ChatConfig) -> None:
    # What needs no model is checked before the imports that take seconds
    from csc_train.checkpoints.locate import check_source, open_source
    from csc_train.checkpoints.manifest import plain_manifest
    from csc_train.runs.imports import import_lean

    plain = config.template and plain_manifest(config.template, config.chat_template)
    check_source(config.checkpoint, plain)
    import_lean("peft")

    if config.ui == "web":
        from csc_train.chat.web import serve_page as chat
    else:
        from csc_train.chat.terminal import run_terminal as chat

    from transformers.utils import logging

    from csc_train.checkpoints.export import usable_model
    from csc_train.inference.config import InferenceConfig
    from csc_train.inference.hf import load_final_model
    from csc_train.runs.distributed import require_single_process

    require_single_process("chat")
    logging.disable_progress_bar()

    # Model: a training checkpoint is exported, and its directory is left as it is
    with tempfile.TemporaryDirectory(prefix="csc-chat-") as folder:
        model = usable_model(open_source(config.checkpoint, False, plain), Path(folder) / "model")
        settings = InferenceConfig(dtype=config.dtype, delta_kernel=config.delta_kernel)
        generator = load_final_model(model, settings, plain=plain)

    # Conversation
    chat(generator, config)


if __name__ == "__main__":
    run_recipe("chat", main)
