"""The compatibility matrix: refuse combinations of settings that cannot train, before the model is loaded."""

import os
from typing import NamedTuple

from csc_train.errors import InputError
from csc_train.templates import read_yaml
from csc_train.training.config import ZeroConfig


class Refused(NamedTuple):
    """A combination of settings that is refused; None matches any value.

    Attributes:
        why: the reason for the user, and a remedy.
        stage: a `ZeroConfig.stage`.
        adapter: an `AdapterConfig.kind`.
        precision: of the computation, bf16 or fp32.
        offload: whether optimizer states or weights are kept in CPU memory.
    """

    why: str
    stage: str | None = None
    adapter: str | None = None
    precision: str | None = None
    offload: bool | None = None


_TABLES = read_yaml(__package__, "compatibility.yaml")
REFUSED = tuple(Refused(**row) for row in _TABLES["settings"])
"""All other combinations that `ZeroConfig` accepts are supported."""
LAUNCHED = _TABLES["environment"]
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
    for why, *settings in REFUSED:
        if all(value is None or value == mine for value, mine in zip(settings, chosen, strict=True)):
            raise InputError(f"zero.stage={zero.stage} with adapter.kind={adapter} in {precision}: {why}")
    for variable, why in LAUNCHED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "1", "false"):
            raise InputError(f"{variable}={os.environ[variable]}: {why}")
