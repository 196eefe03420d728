"""Weights in float8, as compressed-tensors describes them for vLLM and transformers."""

import importlib.util
import warnings
from typing import Any

from transformers import CompressedTensorsConfig, PreTrainedModel

from csc_train.errors import InputError
from csc_train.models.families import get_family
from csc_train.models.hub import load_causal_lm
from csc_train.models.sharded_parameters import unsharded

SCHEME = "FP8_DYNAMIC"
"""Weights in float8 (e4m3) with a scale for each row; a server rounds activations too, with a scale for each token."""


def check_compression() -> None:
    """Raise an InputError if the library is missing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputError("format=fp8: compressed-tensors is not installed: run `pip install .[compressed]`")


def round_weights(model: PreTrainedModel) -> None:
    """Round the weights of the decoder's linear layers in place to what float8 can hold; the output layer stays."""
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationConfig,
        apply_quantization_config,
        disable_quantization,
        fake_quantize,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams  # pyright: ignore[reportMissingImports]

    kept = list(get_family(model.config.model_type).unquantized_modules)
    groups = {"linear": preset_name_to_scheme(SCHEME, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=kept))
    layer: Any
    for layer in model.modules():
        if scheme := getattr(layer, "quantization_scheme", None):
            weight = layer.weight.data
            low, high = weight.aminmax(dim=1, keepdim=True)
            scale, zero = calculate_qparams(low, high, scheme.weights)
            layer.weight_scale.data.copy_(scale)
            weight.copy_(fake_quantize(weight, scale, zero, scheme.weights))
            disable_quantization(layer)


def compress(model: PreTrainedModel) -> None:
    """Hold the rounded weights in float8, and say so in the model's configuration."""
    import compressed_tensors  # pyright: ignore[reportMissingImports]
    from compressed_tensors.compressors import ModelCompressor  # pyright: ignore[reportMissingImports]

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    facts = compressor.quantization_config.model_dump()
    model.config.quantization_config = facts | {"version": compressed_tensors.__version__}


def load_dequantized(directory: str) -> PreTrainedModel:
    """Load a written model with the rounded weights in its own dtype, and activations that nothing rounds.

    Raises:
        InputError: as `load_causal_lm`.
    """
    with unsharded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that the settings in the directory are used as well
        return load_causal_lm(directory, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True))
