"""Choose the attention implementation of a training, and the batch layout that keeps packed documents apart."""

import importlib.util

import torch
from transformers import AttentionInterface

from csc_train.errors import InputError
from csc_train.models.attention.flex import FLEX_ATTENTION, flex_document_attention
from csc_train.models.attention.varlen import VARLEN_ATTENTION, varlen_attention
from csc_train.models.families import get_family
from csc_train.models.precision import resolve_dtype

AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
AttentionInterface.register(FLEX_ATTENTION, flex_document_attention)

_PACKED = {VARLEN_ATTENTION: "varlen", FLEX_ATTENTION: "flex"}
_FLASH = ("flash_attention_2", "flash_attention_3")
_LAYOUTS = {
    "shared_prefix": _PACKED | {"sdpa": "dense_mask", "eager": "dense_mask"},
    "best_fit": _PACKED | {"sdpa": "position_ids", "eager": "position_ids"} | dict.fromkeys(_FLASH, "padding_free"),
    "off": dict.fromkeys(("sdpa", "eager", *_FLASH), "padded"),
}
"""The `PackCollator.layout` by packing strategy and attention implementation."""


def select_attention(name: str, packing: str, precision: str = "auto") -> str:
    """Resolve `ModelConfig.attn_implementation` for this machine and a `PackingConfig.strategy`.

    `auto` is sdpa without packs. With packs it is our varlen attention on a CPU, or on a GPU with flash-attention and
    bf16, and else our FlexAttention. `flex_attention` with packs is our FlexAttention. Other names are returned.

    Raises:
        InputError: the implementation is not known to keep documents apart.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        flash = importlib.util.find_spec("flash_attn") is not None and resolve_dtype(precision) is torch.bfloat16
        return "sdpa" if packing == "off" else VARLEN_ATTENTION if flash or not gpu else FLEX_ATTENTION
    if name == "flex_attention" and packing != "off":
        if not gpu:
            raise InputError("model.attn_implementation=flex_attention: it trains only on a GPU; use auto on a CPU")
        return FLEX_ATTENTION
    collator_layout(name, packing)
    return name


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
