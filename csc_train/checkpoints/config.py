"""Settings of recipes/export.py."""

import re
from dataclasses import dataclass, fields

from omegaconf import MISSING

from csc_train.errors import InputError, check_fields
from csc_train.models.config import MERGE_INTO

HUB_NAME = r"(?![-.])[\w.-]{1,96}(?<![-.])/(?![-.])(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![-.])(?<!\.git)"
"""OWNER/NAME of a hub repository."""


@dataclass
class ExportConfig:
    """What recipes/export.py exports, and how."""

    source: str = MISSING
    """A training checkpoint, a run directory (its latest checkpoint), a final model or an exported directory."""
    output: str | None = None
    """The directory to write; not needed to upload a final model or an exported directory as it is (`push_to`)."""
    if_exists: str = "error"
    """What to do if `output` holds an earlier export. error: stop. replace: export again. Any other directory with
    files in it is refused."""
    format: str = "merged"
    """merged: a whole model. adapter: the LoRA adapter alone, in PEFT's form, which names its base model. fp8: a whole
    model without experts, with weights in float8 (compressed-tensors), for vLLM on a GPU."""
    layout: str = "hub"
    """The files of a whole model whose base is a vision-language one, as Qwen3.5 on the hub. hub: as those of the base,
    whose vision and MTP tensors are copied unchanged. text: those of a text model."""
    merge_into: str | None = None
    """The weights that a QLoRA adapter is merged into (see `adapter.merge_into`); defaults to those of the training."""
    dtype: str = "auto"
    """Dtype of the weights: bf16 or fp32. auto: the base model's for merged adapters, fp32 for an adapter alone, else
    the run's precision."""
    shard_size: str = "5GB"
    """Size limit of a weight file."""
    push_to: str | None = None
    """The hub repository OWNER/NAME to upload to when the export is written; it is created if need be. The environment
    variable HF_TOKEN holds the token."""
    push_private: bool = True
    """Create a private repository, and refuse a public one."""

    def __post_init__(self):
        check_fields("", self, "if_exists", choices=("error", "replace"))
        check_fields("", self, "format", choices=("merged", "adapter", "fp8"))
        check_fields("", self, "layout", choices=("hub", "text"))
        check_fields("", self, "merge_into", choices=MERGE_INTO)
        if self.format == "adapter" and self.merge_into is not None:
            raise InputError(f"merge_into={self.merge_into}: format=adapter merges nothing: leave it out")
        check_fields("", self, "dtype", choices=("auto", "bf16", "fp32"))
        if self.push_to is not None and not re.fullmatch(HUB_NAME, self.push_to):
            raise InputError(f"push_to={self.push_to}: no name of a hub repository: write OWNER/NAME")
        if self.output is None:
            if self.push_to is None:
                raise InputError("output is required: give output=...")
            kept = ("source", "output", "push_to", "push_private")
            for item in fields(self):
                if item.name not in kept and (value := getattr(self, item.name)) != item.default:
                    raise InputError(f"{item.name}={value}: changes an export: add output=DIR, where to write it")
