"""Where a checkpoint comes from: the weights it started from, and its manifest."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csc_train.checkpoints.manifest import Manifest, model_directory
from csc_train.data.dialogue import Dialogue, data_digest
from csc_train.data.strategies import STRATEGIES
from csc_train.models.config import ModelConfig
from csc_train.models.loading import load_model
from csc_train.models.tokenizer import tokenizer_hash
from csc_train.runs.directory import Run
from csc_train.runs.distributed import distributed_state
from csc_train.runs.provenance import provenance
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.deepspeed import unsharded

BASE_FOLDER = "base"
"""Where in a run directory random weights are kept."""


def save_base_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int, run: Run
) -> ModelConfig:
    """The model to start from, as one whose weights can be loaded, now and again.

    Random weights stand nowhere else, so they are kept in the run directory, in `dtype`.

    Raises:
        InputError: they cannot be written.
    """
    if config.init == "pretrained":
        return config
    if run.is_main:
        with unsharded(), model_directory(run.directory / BASE_FOLDER) as temporary:
            load_model(config, tokenizer, dtype, seed).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    distributed_state().wait_for_everyone()
    return dataclasses.replace(config, init="pretrained", path=str(run.directory / BASE_FOLDER))


def build_manifest(
    config: ModelConfig, model: PreTrainedModel, template: DialogueTemplate, training: Iterable[Dialogue], run: Run
) -> Manifest:
    """The manifest of a checkpoint trained on the dialogues `training`.

    Args:
        config: where its training started from (see `save_base_model`).
        model: as it was loaded from there.
    """
    kept = Path(config.path) == run.directory / BASE_FOLDER
    base = os.path.join("..", BASE_FOLDER) if kept else config.path
    return Manifest(
        base_model=os.path.abspath(base) if not kept and Path(base).is_dir() else base,
        base_revision=getattr(model.config, "_commit_hash", None) or config.revision,
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
