"""The layout of a model's files: names of tensors, and what a vision-language model has beside its text part."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightTransform,
    revert_weight_conversion,
)

from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.models.hub import weight_files


def is_vision_language(directory: Path) -> bool:
    """Whether a directory holds a model of text and images, whose text part is one of our models."""
    return "text_config" in read_json(directory / "config.json")


class _SplitExperts(ConversionOps):
    """Split the tensors of a layer's experts into views of each: transformers' own operations copy most of them."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_):
        ((tensor,),) = input_dict.values()
        parts = zip(target_patterns, tensor.chunk(len(target_patterns), dim=1), strict=True)
        return {name.replace("*", str(number)): each for name, part in parts for number, each in enumerate(part)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # it only takes part in saving


def _with_views(conversion: WeightTransform) -> WeightTransform:
    """A conversion that is reverted without copies, if it merges experts."""
    if isinstance(conversion, WeightConverter) and isinstance(conversion.operations[0], MergeModulelist):
        patterns = conversion._original_source_patterns, conversion._original_target_patterns
        return conversion.copy(*patterns, operations=[_SplitExperts()])
    return conversion


@contextlib.contextmanager
def parameter_names(
    model: PreTrainedModel, keep: Callable[[WeightTransform], bool] = lambda _: False
) -> Iterator[None]:
    """Let a model's weights be saved under the names of its parameters, not those of the files that it was loaded from.

    Args:
        keep: conversions that are still reverted.
    """
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [_with_views(each) for each in conversions if keep(each)]
    try:
        yield
    finally:
        if conversions is not None:
            model._weight_conversions = conversions


def stored_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of the files that it was loaded from, without tied copies."""
    tied = model.all_tied_weights_keys
    with parameter_names(model, lambda _: True):
        return revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in tied})


def other_tensors(model: PreTrainedModel, base: Path) -> dict[str, Path]:
    """The tensors of a vision-language base that its text model lacks, such as the vision tower, and their files.

    Args:
        model: as it was loaded from there; it may be on the meta device.
    """
    if not is_vision_language(base):
        return {}
    own, found = stored_weights(model).keys() | model.all_tied_weights_keys, {}
    for file in weight_files(base):
        if file.suffix != ".safetensors":
            raise InputError(f"{file}: no safetensors, as a vision-language model needs: convert it")
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(set(tensors.keys()) - own, file)
    return found


def _add_published_names(file: Path, renamed: dict[str, str]) -> None:
    """Give settings their published names, too: transformers 5 writes num_experts of Qwen3 as num_local_experts alone.

    Servers read the published name, and take another number of experts where it is missing.
    """
    if renamed and file.is_file():
        written = read_json(file)
        write_json(file, {name: written[other] for name, other in renamed.items() if other in written} | written)


def save_model(model: PreTrainedModel, directory: Path, shard_size: str, base: Path | None) -> None:
    """Write the weights and the configuration of a model.

    Args:
        shard_size: size limit of a weight file.
        base: a model directory; if it is a vision-language one, the model is written as it is: under its names, with
            its tensors that the text model lacks, and with its processors. None writes the text model alone.
    """
    if base is None or not is_vision_language(base):
        with parameter_names(model, lambda each: not isinstance(each, PrefixChange)):
            model.save_pretrained(directory, max_shard_size=shard_size)
        return _add_published_names(directory / "config.json", model.config.attribute_map)
    weights = stored_weights(model)
    for name, file in other_tensors(model, base).items():
        with safe_open(file, "pt") as tensors:
            weights[name] = tensors.get_tensor(name)
    model.save_pretrained(directory, state_dict=weights, save_original_format=False, max_shard_size=shard_size)
    whole: Any = AutoConfig.from_pretrained(base)
    whole.text_config, whole.dtype, whole.tie_word_embeddings = (
        model.config,
        model.dtype,
        model.config.tie_word_embeddings,
    )
    whole.save_pretrained(directory)
    for file in base.glob("*processor*.json"):
        shutil.copyfile(file, directory / file.name)
