"""The model to train: loaded, or built with random weights from its dimensions."""

import importlib.util
from dataclasses import asdict

import peft
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import set_seed as set_all_seeds

from csc_train.errors import InputError
from csc_train.models.attention.flex import FLEX_ATTENTION, flex_document_attention
from csc_train.models.attention.varlen import VARLEN_ATTENTION as DOCUMENT_ATTENTION
from csc_train.models.attention.varlen import varlen_attention
from csc_train.models.hub import hub_errors, load_causal_lm
from csc_train.training.config import AdapterConfig, ArchitectureConfig, ModelConfig

AttentionInterface.register(DOCUMENT_ATTENTION, varlen_attention)
AttentionInterface.register(FLEX_ATTENTION, flex_document_attention)


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    seed: int,
    attention: str = "sdpa",
    in_4_bits: bool = False,
) -> PreTrainedModel:
    """The model that `config` names, in `dtype`; random weights depend on `seed` alone.

    Args:
        attention: the attention implementation (see `select_attention`).
        in_4_bits: hold the weights of linear layers in 4 bits (NF4, their scales quantized as well) and compute in
            `dtype`, as in Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023).

    Raises:
        InputError: it cannot be found or read, is gated, or has fewer embeddings than the tokenizer has tokens.
    """
    options = {"dtype": dtype, "attn_implementation": attention}
    if in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if config.init == "random":
        set_all_seeds(seed)
        model = AutoModelForCausalLM.from_config(build_model_config(config.architecture, tokenizer), **options)
    else:
        model = load_causal_lm(config.path, revision=config.revision, **options)
    if in_4_bits:
        _compute_as_trained(model)
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise InputError(f"{config.name}: the model embeds {rows} tokens, the tokenizer has {len(tokenizer)}")
    return model


def _compute_as_trained(model: PreTrainedModel) -> None:
    """Keep layers in 4 bits in training mode: out of it, some CPUs repack their weights for a kernel in bf16."""
    import bitsandbytes

    def stay(layer: torch.nn.Module, _) -> None:
        layer.train()

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.register_forward_pre_hook(stay)


def check_base_available(config: ModelConfig) -> None:
    """Refuse a gated, misspelt or missing model by its smallest file, before any work is done for it.

    Raises:
        InputError: its configuration cannot be read (see `hub.hub_errors`).
    """
    if config.init == "pretrained":
        with hub_errors(config.path, "model"):
            AutoConfig.from_pretrained(config.path, revision=config.revision)


def build_model_config(architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    """The transformers configuration of an architecture; the tokenizer gives the vocabulary size where it is open."""
    dimensions = {name: value for name, value in asdict(architecture).items() if value is not None}
    dimensions["rope_parameters"] = dimensions.pop("rope")
    if tokenizer is not None:
        dimensions.setdefault("vocab_size", len(tokenizer))
        dimensions |= {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return AutoConfig.for_model(dimensions.pop("model_type"), **dimensions)


def select_attention(name: str, packing: str, precision: str = "auto") -> str:
    """The attention that `name` stands for on this machine under a `PackingConfig.strategy`.

    `auto`: with packs our own attention, document by document on a CPU, and on a GPU by flash-attention where that is
    installed and the precision is bf16, else by FlexAttention; without packs sdpa. `flex_attention` with packs is our
    call of it. Other names are themselves.

    Raises:
        InputError: it is not known to keep documents apart.
    """
    if name == "auto":
        flash = importlib.util.find_spec("flash_attn") is not None and resolve_dtype(precision) is torch.bfloat16
        name = DOCUMENT_ATTENTION if flash or not torch.cuda.is_available() else FLEX_ATTENTION
        return name if packing != "off" else "sdpa"
    if name == "flex_attention" and packing != "off":
        if not torch.cuda.is_available():
            raise InputError("model.attn_implementation=flex_attention: it trains on a GPU alone; use auto on a CPU")
        return FLEX_ATTENTION
    batch_layout(name, packing)
    return name


def batch_layout(attention: str, packing: str) -> str:
    """The `PackCollator.layout` in which `attention` keeps the documents of a row apart.

    Raises:
        InputError: it is not known to keep them apart, so that training would leak in silence.
    """
    flash = ("flash_attention_2", "flash_attention_3")
    own = {DOCUMENT_ATTENTION: "varlen", FLEX_ATTENTION: "flex"}
    layouts = {
        "shared_prefix": own | {"sdpa": "dense_mask", "eager": "dense_mask"},
        "best_fit": own | {"sdpa": "position_ids", "eager": "position_ids"} | dict.fromkeys(flash, "padding_free"),
        "off": dict.fromkeys(("sdpa", "eager", *flash), "padded"),
    }[packing]
    if attention not in layouts:
        raise InputError(
            f"model.attn_implementation={attention} is not known to keep documents apart under packing.strategy="
            f"{packing}; use auto or one of {', '.join(layouts)}"
        )
    return layouts[attention]


def lora_config(adapter: AdapterConfig) -> peft.LoraConfig:
    """PEFT's configuration of a LoRA adapter."""
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
    )


def weight_dtype(precision: str, adapter: str) -> torch.dtype:
    """The dtype in which the weights are held while training.

    Weights that are trained are held in fp32 whatever the precision of the computation: at learning rate 1e-5 most
    updates would round to nothing in bf16. Weights under an adapter are only read.
    """
    return torch.float32 if adapter == "full" else resolve_dtype(precision)


def resolve_precision(precision: str) -> str:
    """bf16 or fp32: what a `TrainerConfig.precision` stands for on this machine."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def resolve_dtype(precision: str) -> torch.dtype:
    """The dtype of the computation that a `TrainerConfig.precision` stands for on this machine."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve_precision(precision)]
