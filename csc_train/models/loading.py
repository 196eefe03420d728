"""Load the model to train, or build it with random weights; the configuration of its LoRA adapters."""

from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import set_seed as set_all_seeds

from csc_train.errors import InputError
from csc_train.models.attention import select  # noqa: F401  registers our attention implementations
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from csc_train.models.config import ALL_LINEAR, AdapterConfig, ModelConfig
from csc_train.models.families import (
    adapted_experts,
    build_model_config,
    get_family,
    is_lora_target,
    lora_targets,
    model_dims,
)
from csc_train.models.hub import base_model_type, load_causal_lm


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    seed: int,
    attention: str = "sdpa",
    load_in_4bit: bool = False,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load or build the model of `config` in `dtype`.

    Args:
        seed: of random weights.
        attention: the attention implementation (see `select_attention`).
        load_in_4bit: hold the weights of linear layers in 4 bits (NF4, double quantization) and compute in `dtype`.
            Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023).
        device_map: where to load weights in 4 bits; defaults to the GPU if there is one.

    Raises:
        InputError: the model cannot be read (see `hub.hub_errors`), or its family is unknown.
    """
    options = {"dtype": dtype, "attn_implementation": attention}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(get_family(base_model_type(config)).unquantized_modules),
        )
    if config.init == "random":
        set_all_seeds(seed)
        model = AutoModelForCausalLM.from_config(build_model_config(config.architecture, tokenizer), **options)
    else:
        model = load_causal_lm(config.path, revision=config.revision, device_map=device_map, **options)
    prepare_delta_nets(model, config.delta_kernel)
    if load_in_4bit:
        _keep_training_mode(model)
    return model


def _keep_training_mode(model: PreTrainedModel) -> None:
    """Keep 4-bit layers in training mode: in evaluation mode, some CPUs repack their weights for a bf16 kernel."""
    import bitsandbytes

    def keep(layer: torch.nn.Module, _) -> None:
        layer.train()

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.register_forward_pre_hook(keep)


def check_lora_targets(adapter: AdapterConfig, model: PreTrainedModel) -> None:
    """Raise an InputError for a target of LoRA adapters that a model has not; it names what the model has."""
    linear = _linear_layers(model)
    for target in adapter.target_modules:
        targets = lora_targets(model.config.model_type, [target])
        if not any(is_lora_target(name, targets) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"adapter.target_modules={target}: matches no linear layer of the model; choose {ALL_LINEAR}, some of "
                f"{', '.join(known)}, or a regular expression on full names such as {linear[0]}"
            )
    adapted_experts(model_dims(model.config), adapter.target_parameters)


def lora_config(adapter: AdapterConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """PEFT's configuration of LoRA adapters on a model.

    Regular expressions are resolved to full names: PEFT reads them as names of layers if a model has experts.
    """
    targets = lora_targets(model.config.model_type, adapter.target_modules)
    if isinstance(targets, str) and model_dims(model.config).experts:
        targets = [name for name in _linear_layers(model) if is_lora_target(name, targets)]
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=targets,
        target_parameters=[*adapted_experts(model_dims(model.config), adapter.target_parameters)] or None,
        task_type="CAUSAL_LM",
    )


def set_magnitudes(model: PreTrainedModel) -> None:
    """Set the magnitudes of new DoRA adapters to the lengths of the weights' rows in fp32, so that they change nothing.

    PEFT's are rounded to the dtype of the weights: in bf16 the logits differ by 0.4 % of the largest.
    """
    module: Any
    for module in model.modules():
        for name, magnitudes in getattr(module, "lora_magnitude_vector", {}).items():
            lora_a, lora_b = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
            magnitudes.update_layer(base_layer=module.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=1)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
