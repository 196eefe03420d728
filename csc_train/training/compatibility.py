"""Which ways of training go together: the compatibility matrix, checked before anything is loaded."""

import os
from typing import NamedTuple

from csc_train.errors import InputError
from csc_train.training.config import ZeroConfig


class Refused(NamedTuple):
    """Settings that do not go together; None stands for any value.

    Attributes:
        stage: a `ZeroConfig.stage`.
        adapter: an `AdapterConfig.kind`.
        precision: of the computation, bf16 or fp32.
        offload: whether anything is kept in the memory of the CPU.
        why: the reason, as a user reads it.
    """

    stage: str | None
    adapter: str | None
    precision: str | None
    offload: bool | None
    why: str


REFUSED = (
    Refused("0", None, "bf16", None, "DeepSpeed's stage 0 cannot sum gradients in fp32 there; choose off"),
    Refused(None, "qlora", None, True, "offloading weights in 4 bits is untested; choose stage 3 without offloading"),
)
"""The compatibility matrix: what is not refused here, or by `ZeroConfig`, is supported."""

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP is not supported (on a CPU it falls back to DDP without a word, and its saved states "
    "cannot be read here): use zero=zero3",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism is not supported (it splits rows, and with them packs, into "
    "equal parts, and doubles the gradient norm under ZeRO 1 and 2): shorten packing.max_length",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism is not supported (it needs FSDP): shorten packing.max_length",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism is not supported: use zero=zero3",
}
"""What accelerate's launcher may ask for, by environment variable, and why it is refused."""


def check_supported(zero: ZeroConfig, adapter: str, precision: str) -> None:
    """Refuse settings that the stack cannot train with, or not as asked.

    Args:
        adapter: an `AdapterConfig.kind`.
        precision: of the computation, bf16 or fp32.

    Raises:
        InputError: `REFUSED` or `LAUNCHED` lists them; says why.
    """
    chosen = (zero.stage, adapter, precision, zero.offload_optimizer or zero.offload_parameters)
    for *settings, why in REFUSED:
        if all(value is None or value == mine for value, mine in zip(settings, chosen, strict=True)):
            raise InputError(f"zero.stage={zero.stage} with adapter.kind={adapter} in {precision}: {why}")
    for variable, why in LAUNCHED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "1", "false"):
            raise InputError(f"{variable}={os.environ[variable]}: {why}")
