"""Try before the first optimizer step what the end of a training needs: names, files, positions and disk space."""

import copy
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from csc_train.checkpoints.manifest import prepare_to_save
from csc_train.checkpoints.reshard import parameter_name
from csc_train.errors import InputError
from csc_train.models.config import AdapterConfig
from csc_train.models.inspection import InspectedModel, silent_loading
from csc_train.models.loading import check_lora_targets, lora_config
from csc_train.models.sharded_parameters import unsharded
from csc_train.models.tokenizer import tokenizer_hash
from csc_train.packing.dataset import PackedDataset
from csc_train.training.memory import GIB, MemoryScenario, state_bytes


def rehearse_end(
    found: InspectedModel, adapter: AdapterConfig, tokenizer: PreTrainedTokenizerBase | None, chat_template: str
) -> None:
    """Do what makes the final model, without weights: adapters, their merge, the names of its files, all other files.

    Args:
        found: without refusals. Its model gets no weights and no adapters.
        tokenizer: None if the run has yet to train it.
        chat_template: text of the final model's template.

    Raises:
        InputError: the end would fail; says where.
    """
    config, build = found.model.config, cast(Any, type(found.model))
    try:
        with unsharded(), silent_loading(), tempfile.TemporaryDirectory() as scratch:
            with torch.device("meta"):
                model = build(config)
            model.generation_config = found.model.generation_config
            # so that the names are those of the base's files
            model._weight_conversions = getattr(found.model, "_weight_conversions", None)
            lost = set()
            if adapter.kind != "full":
                check_lora_targets(adapter, model)
                model = peft.get_peft_model(model, lora_config(adapter, model))
                trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
                lost = trained ^ {parameter_name(name) for name in peft.get_peft_model_state_dict(model)}
                model = model.merge_and_unload()
            written: Any = revert_weight_conversion(model, model.state_dict())
            _, info = build.from_pretrained(
                None, config=config, state_dict=written, device_map="meta", output_loading_info=True
            )
            if lost := [*lost, *info["missing_keys"], *info["unexpected_keys"]]:
                raise InputError(f"{found.place}: an export of {type(model).__name__} would lose {min(lost)}")
            if tokenizer is not None:
                _save_without_weights(model, copy.deepcopy(tokenizer), chat_template, Path(scratch))
    except InputError:
        raise
    except Exception as error:  # of any kind: here the libraries work on names and settings only
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{found.place}: its final model cannot be written: {reason}") from error


def _save_without_weights(model: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str, scratch: Path) -> None:
    prepare_to_save(model, tokenizer, chat_template)
    model.save_pretrained(scratch, state_dict={})
    tokenizer.save_pretrained(scratch)
    saved = PreTrainedTokenizerFast(tokenizer_file=str(scratch / "tokenizer.json"))
    if tokenizer_hash(saved) != tokenizer_hash(tokenizer):
        raise InputError(f"{tokenizer.name_or_path}: saved and read again, the tokenizer is another one")


def check_positions(found: InspectedModel, packs: PackedDataset) -> str:
    """Check that a model has a position for each token of the longest dialogue.

    Returns:
        The sizes, in words.

    Raises:
        InputError: it has fewer.
    """
    positions = getattr(found.model.config, "max_position_embeddings", None) or math.inf
    longest = int(packs.pack_items.values[:, 2].max())
    if longest > positions:
        raise InputError(
            f"{found.place}: the model has {positions} positions, but the longest dialogue has {longest} tokens: add "
            f"packing.max_length={positions}"
        )
    return f"{longest} tokens, the model has {positions} positions"


def run_bytes(scenario: MemoryScenario, kept: int, random: bool) -> float:
    """Bytes of a training on disk: one checkpoint more than are kept, since one is written before the oldest goes; the
    final model, and random base weights. Arguments as of `check_disk`."""
    return (kept + 1) * state_bytes(scenario) + (2 if random else 1) * scenario.compute * scenario.dims.parameters


def check_disk(scenario: MemoryScenario, directory: Path, kept: int, random: bool, free: int | None = None) -> str:
    """Check that the training checkpoints and the final model fit on the run directory's disk.

    Args:
        directory: of the run; it need not exist yet.
        kept: number of training checkpoints that are kept.
        random: whether random base weights are yet to be saved.
        free: free bytes; defaults to the file system's.

    Returns:
        The sizes, in words.

    Raises:
        InputError: they do not fit.
    """
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free if free is None else free
    held = sum(file.stat().st_size for file in (directory / "checkpoints").rglob("*") if file.is_file())
    need, each = run_bytes(scenario, kept, random), state_bytes(scenario)
    text = (
        f"{need / GIB:.1f} GiB for {kept + 1} checkpoints of {each / GIB:.1f} GiB and the final model, "
        f"{free / GIB:.1f} GiB free at {parent}"
    )
    if need > free + held:
        raise InputError(f"{text}: lower trainer.save_total_limit, or choose another run.directory")
    return text
