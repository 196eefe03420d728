"""The compatibility matrix: refuse combinations of settings that cannot train, before the model is loaded."""

import logging
import os
from typing import NamedTuple

from csc_train.errors import InputError
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.models.families import ModelDims
from csc_train.models.layers import missing_compiler
from csc_train.templates import read_yaml
from csc_train.training.config import ZeroConfig, launcher_config

logger = logging.getLogger(__name__)


class Refused(NamedTuple):
    """A combination of settings that is refused: one of each list; None matches any value.

    Attributes:
        why: the reason for the user, and a remedy.
        stage: of `ZeroConfig.stage`.
        adapter: of `AdapterConfig.kind`.
        precision: of the computation, bf16, fp32 or fp8.
        offload: whether optimizer states or weights are kept in CPU memory.
        dora: `AdapterConfig.use_dora`.
        optimizer: of `TrainerConfig.optimizer`.
    """

    why: str
    stage: list[str] | None = None
    adapter: list[str] | None = None
    precision: list[str] | None = None
    offload: list[bool] | None = None
    dora: list[bool] | None = None
    optimizer: list[str] | None = None


_TABLES = read_yaml(__package__, "compatibility.yaml")
REFUSED = tuple(Refused(**row) for row in _TABLES["settings"])
"""All other combinations that `ZeroConfig` accepts are supported."""
LAUNCHED = _TABLES["environment"]
"""Environment variables of accelerate's launcher that are refused, and why."""
_FLOAT8 = "trainer.precision=fp8: float8 gains in compiled layers only"


def check_supported(zero: ZeroConfig, adapter: AdapterConfig, optimizer: str, precision: str) -> None:
    """Refuse settings that the libraries cannot train with, or not as requested.

    Args:
        optimizer: a `TrainerConfig.optimizer`.
        precision: of the computation, bf16, fp32 or fp8.

    Raises:
        InputError: `REFUSED` or `LAUNCHED` lists the settings, or accelerate's launcher configures another optimizer
            for DeepSpeed; says why.
    """
    stage, offload = zero.stage, zero.offload_optimizer or zero.offload_parameters
    if (launched := launcher_config()) is not None:
        if "optimizer" in launched:
            raise InputError(
                f"the launcher's DeepSpeed configuration has an optimizer beside trainer.optimizer={optimizer}: remove "
                "it there"
            )
        sharding = launched["zero_optimization"]
        stage = str(sharding.get("stage", 0)) if stage in ("auto", "from_launcher") else stage
        kept = [sharding.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        offload |= any(each.get("device", "none") != "none" for each in kept)
    chosen = (stage, adapter.kind, precision, offload, adapter.use_dora, optimizer)
    for why, *settings in REFUSED:
        if all(values is None or mine in values for values, mine in zip(settings, chosen, strict=True)):
            raise InputError(f"zero.stage={stage} with adapter.kind={adapter.kind} in {precision}: {why}")
    for variable, why in LAUNCHED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "1", "false"):
            raise InputError(f"{variable}={os.environ[variable]}: {why}")


def check_router_loss(coefficient: float | None, dims: ModelDims) -> None:
    """Raise an InputError if `TrainerConfig.router_aux_loss_coef` weights a loss of experts that a model has not."""
    if coefficient and not dims.experts:
        raise InputError(f"trainer.router_aux_loss_coef={coefficient}: {dims.model_type} has no experts: leave it out")


def resolve_compile(
    mode: str, stage: str, attention: str, device: str, dims: ModelDims | None = None, float8: bool = False
) -> str:
    """Resolve `TrainerConfig.compile`: layers or off. Where layers cannot be compiled, auto is off; a note says why.

    Args:
        stage: a `ZeroConfig.stage`.
        attention: the attention implementation.
        device: cpu or cuda.
        dims: of the model.
        float8: whether the layers multiply in float8, which gains in compiled ones only.

    Raises:
        InputError: `mode` is layers, or they multiply in float8, and they are not compiled.
    """
    if mode == "off" or (mode == "auto" and device == "cpu"):
        if float8:
            raise InputError(f"{_FLOAT8}: set trainer.compile=layers, or trainer.precision=bf16")
        return "off"
    if stage == "3":
        refusal = "zero.stage=3: DeepSpeed gathers weights inside a layer, which one graph cannot hold"
    elif attention != VARLEN_ATTENTION:
        refusal = f"attention {attention}: only packs with {VARLEN_ATTENTION} attention have rows of one length"
    elif dims and dims.delta:
        refusal = "gated delta nets: their tensors have other shapes for the documents of each row"
    elif dims and dims.experts:
        refusal = "experts: transformers records the router logits by hooks, which one graph cannot hold"
    else:
        refusal = missing_compiler()
    if refusal and float8:
        raise InputError(f"{_FLOAT8} ({refusal}): set trainer.precision=bf16")
    if refusal and mode == "layers":
        raise InputError(f"trainer.compile=layers with {refusal}; or set trainer.compile=off")
    if refusal:
        logger.info(f"note: the layers are not compiled with {refusal}")
    return "off" if refusal else "layers"
