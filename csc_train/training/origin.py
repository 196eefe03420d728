"""Where a checkpoint comes from: the weights it started from, and its manifest."""

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csc_train.checkpoint import Manifest, model_directory, tokenizer_hash
from csc_train.dialogue import Dialogue, data_digest
from csc_train.run import Run, provenance
from csc_train.strategies import STRATEGIES
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import ModelConfig


def keep_base(config: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> str:
    """Where the untrained model can be loaded from again, as `Manifest.base_model` wants it.

    Random weights stand nowhere else, so they are kept in the run directory.
    """
    if config.init == "pretrained":
        return os.path.abspath(config.path) if Path(config.path).is_dir() else config.path
    if run.main:
        with model_directory(run.directory / "base") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return os.path.join("..", "base")


def describe_origin(
    base: str, revision: str | None, template: DialogueTemplate, training: Iterable[Dialogue], run: Run
) -> Manifest:
    """The manifest of a checkpoint trained from `base`, at its hub commit `revision`, on the dialogues `training`."""
    return Manifest(
        base_model=base,
        base_revision=revision,
        chat_template=template.chat_template_name,
        mode=template.config.mode,
        language=template.config.language,
        template_hash=template.fingerprint,
        tokenizer_hash=tokenizer_hash(template.tokenizer),
        strategies=[strategy.label for strategy in STRATEGIES],
        data_hash=data_digest(training),
        config=run.config,
        provenance=provenance(),
    )
