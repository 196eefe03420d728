"""Settings of generating replies, shared by evaluation and chat."""

from dataclasses import dataclass
from typing import ClassVar

from csc_train.errors import check_fields
from csc_train.models.config import DELTA_KERNELS

CONTEXTS = ("reference", "generated")
"""Histories of a predicted turn: the reference dialogue, or the system's own turns between the reference customer's."""
SHORT_CONTEXT = {"reference": "ref", "generated": "gen"}
"""Contexts in the names of columns."""
DTYPES = ("auto", "bf16", "fp32")
"""Precisions of a model's weights."""


@dataclass
class InferenceConfig:
    """How replies are generated."""

    _group: ClassVar[str] = "evaluation"

    batch_size: int = 32
    """Prompts in a batch of a local model. Of each, a model with gated delta nets keeps two states."""
    max_batch_length: int = 4096
    """Maximum tokens of a prompt in a batch, so that one long turn does not decide the memory of all. A longer prompt
    runs alone, by forward passes of that many tokens."""
    max_new_tokens: int = 256
    """Maximum tokens of a reply, strategy included."""
    dtype: str = "auto"
    """Precision of the weights: auto keeps that of the saved model. In bf16 a reply can depend on the other prompts of
    its batch, so a resumed or distributed evaluation may differ in a few turns."""
    delta_kernel: str = "auto"
    """As `model.delta_kernel`: on a GPU, a model with gated delta nets runs by flash-linear-attention, or by torch."""
    likelihoods: bool = True
    """Compute likelihoods of the 12 strategies at each turn, and of the reference turns in reference context. On a
    server that supports it (vLLM, SGLang) this adds up to 13 prompts per turn."""
    seed: int = 0
    """Seed of a served model that samples. Each turn derives a seed from it."""

    def __post_init__(self):
        check_fields(f"{self._group}.", self, "batch_size", "max_batch_length", "max_new_tokens", low=1)
        check_fields(f"{self._group}.", self, "dtype", choices=DTYPES)
        check_fields(f"{self._group}.", self, "delta_kernel", choices=DELTA_KERNELS)
