"""The compatibility matrix: refuse combinations of settings that cannot train, before the model is loaded."""

import os
from typing import NamedTuple

from csc_train.errors import InputError
from csc_train.training.config import ZeroConfig


class Refused(NamedTuple):
    """A combination of settings that is refused; None matches any value.

    Attributes:
        stage: a `ZeroConfig.stage`.
        adapter: an `AdapterConfig.kind`.
        precision: of the computation, bf16 or fp32.
        offload: whether optimizer states or weights are kept in CPU memory.
        why: the reason for the user, and a remedy.
    """

    stage: str | None
    adapter: str | None
    precision: str | None
    offload: bool | None
    why: str


REFUSED = (
    Refused("0", None, "bf16", None, "DeepSpeed's stage 0 cannot sum gradients in fp32; choose zero=off"),
    Refused(None, "qlora", None, True, "offloading 4-bit weights is untested; choose zero=zero3"),
)
"""All other combinations that `ZeroConfig` accepts are supported."""

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP is not supported (on a CPU it silently falls back to DDP, and its checkpoints cannot "
    "be resharded): use zero=zero3",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism is not supported (it splits packs into equal parts, and "
    "doubles the gradient norm under ZeRO 1 and 2): lower packing.max_length",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism is not supported (it needs FSDP): lower packing.max_length",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism is not supported: use zero=zero3",
}
"""Environment variables of accelerate's launcher that are refused, and why."""


def check_supported(zero: ZeroConfig, adapter: str, precision: str) -> None:
    """Refuse settings that the libraries cannot train with, or not as requested.

    Args:
        adapter: an `AdapterConfig.kind`.
        precision: of the computation, bf16 or fp32.

    Raises:
        InputError: `REFUSED` or `LAUNCHED` lists the settings; says why.
    """
    chosen = (zero.stage, adapter, precision, zero.offload_optimizer or zero.offload_parameters)
    for *settings, why in REFUSED:
        if all(value is None or value == mine for value, mine in zip(settings, chosen, strict=True)):
            raise InputError(f"zero.stage={zero.stage} with adapter.kind={adapter} in {precision}: {why}")
    for variable, why in LAUNCHED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "1", "false"):
            raise InputError(f"{variable}={os.environ[variable]}: {why}")
