"""Choose the attention implementation of a training, and the batch layout that keeps packed documents apart."""

import importlib.metadata
import logging
from collections.abc import Collection

import torch
from packaging.version import Version
from transformers import AttentionInterface

from csc_train.errors import InputError
from csc_train.models.attention.varlen import VARLEN_ATTENTION, varlen_attention
from csc_train.models.families import LINEAR_ATTENTION, get_family
from csc_train.models.precision import resolve_dtype

logger = logging.getLogger(__name__)

AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)

FLASH_ATTENTION_3 = "varlen_fa3"
"""The value of `model.attn_implementation` that runs our attention by FlashAttention-3's kernels."""

_GROUPED_HEADS = Version("0.5.0")
"""The first flash-linear-attention whose chunked rule takes key heads that value heads share; others do not check."""

_LAYOUTS = {
    "shared_prefix": {VARLEN_ATTENTION: "varlen", "sdpa": "dense_mask", "eager": "dense_mask"},
    "best_fit": {VARLEN_ATTENTION: "varlen", "sdpa": "position_ids", "eager": "position_ids"},
    "off": {"sdpa": "padded", "eager": "padded"},
}
"""The `PackCollator.layout` by packing strategy and attention implementation."""


def select_attention(name: str, packing: str, precision: str = "auto", head_dim: int | None = None) -> str:
    """Resolve `ModelConfig.attn_implementation` for this machine and a `PackingConfig.strategy`.

    `auto` is sdpa without packs, and our varlen attention with packs. If this GPU's kernel cannot run that, `auto` is
    sdpa, and a note says why. Other names are returned.

    Args:
        head_dim: of the model; None if it is unknown.

    Raises:
        InputError: the implementation is not known to keep documents apart, or cannot run here.
    """
    asked = f"model.attn_implementation={name}"
    refusal = kernel_refusal(resolve_dtype(precision), head_dim)
    if name == "auto" and (packing == "off" or refusal):
        if packing != "off":
            logger.info(f"note: attention by sdpa, which masks every pair of tokens of a row: {refusal}")
        return "sdpa"
    ours = name in ("auto", VARLEN_ATTENTION, FLASH_ATTENTION_3)
    attention = VARLEN_ATTENTION if ours else name
    collator_layout(attention, packing)
    if ours and refusal:
        raise InputError(f"{asked}: {refusal}: choose auto")
    if name == FLASH_ATTENTION_3:
        try:
            from torch.nn.attention import activate_flash_attention_impl

            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{asked}: {reason}: install FlashAttention-3, or choose auto") from error
    return attention


def check_delta_kernel(
    name: str, layer_kinds: Collection[str], device: str | None = None, setting: str = "model.delta_kernel"
) -> str:
    """Check that `ModelConfig.delta_kernel` can run the gated delta nets of a model.

    Args:
        layer_kinds: as in `ModelDims`.
        device: cpu or cuda; defaults to that of this machine.
        setting: the name of the setting, for messages.

    Returns:
        What runs them.

    Raises:
        InputError: on a GPU, and its kernel is not installed, or too old.
    """
    if LINEAR_ATTENTION not in layer_kinds:
        return "none in this model"
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu" or name == "torch":
        return "functions of torch"
    try:
        version = importlib.metadata.version("flash-linear-attention")
        lack = f" {version} takes no key heads that value heads share" if Version(version) < _GROUPED_HEADS else ""
    except importlib.metadata.PackageNotFoundError:
        version, lack = None, ", the GPU's kernel of gated delta nets, is not installed"
    if lack:
        raise InputError(
            f"{setting}=auto: flash-linear-attention{lack}: run pip install -U flash-linear-attention, or set "
            f"{setting}=torch, which is much slower"
        )
    return f"flash-linear-attention {version}"


def kernel_refusal(dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why torch's variable-length kernel cannot serve on this GPU; None if it can, or on a CPU, which needs none.

    Args:
        dtype: of the computation.
        head_dim: of the model; None if it is unknown.
    """
    if not torch.cuda.is_available():
        return None
    if dtype is not torch.bfloat16:
        return "the GPU's variable-length kernel computes in bf16 only"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"the variable-length kernel needs compute capability 8.0, which {torch.cuda.get_device_name()} lacks"
    if head_dim and (head_dim % 8 or head_dim > 256):
        return f"heads of {head_dim}: the variable-length kernel takes multiples of 8 up to 256"
    return None


def collator_layout(attention: str, packing: str, model_type: str | None = None) -> str:
    """The `PackCollator.layout` in which an attention implementation keeps the documents of a pack apart.

    Args:
        packing: a `PackingConfig.strategy`.
        model_type: the model family, whose `packing_layouts` must contain the layout.

    Raises:
        InputError: documents could see each other.
    """
    layouts = _LAYOUTS[packing]
    if attention not in layouts:
        raise InputError(
            f"model.attn_implementation={attention} is not known to keep documents apart under packing.strategy="
            f"{packing}; use auto or one of {', '.join(layouts)}"
        )
    layout = layouts[attention]
    if model_type is not None and layout not in (known := get_family(model_type).packing_layouts):
        raise InputError(
            f"model family {model_type} does not keep documents apart in layout {layout} (packing.strategy={packing}, "
            f"attention {attention}); its layouts are {', '.join(known)}"
        )
    return layout
