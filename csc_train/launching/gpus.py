"""The GPUs of this machine, as nvidia-smi reports them."""

import os
import subprocess
from dataclasses import dataclass

MAX_USED_FRACTION = 0.05
"""A GPU counts as free if at most this fraction of its memory is in use."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory` and `used` are bytes."""

    name: str
    memory: int
    used: int
    driver: str

    @property
    def free(self) -> bool:
        """Whether no process uses the GPU."""
        return self.used <= MAX_USED_FRACTION * self.memory


def probe_gpus() -> list[Gpu] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES shows, without taking any of their memory; None without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in answer.splitlines() if line.count(", ") == 3]
    gpus = [Gpu(name, int(total) * 2**20, int(used) * 2**20, driver) for name, total, used, driver in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpus[int(number)] for number in visible.split(",") if number.isdigit() and int(number) < len(gpus)]
    return gpus


def free_gpus() -> list[str]:
    """Numbers of the free GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    gpus = probe_gpus() or []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.isdigit()]
    names = visible or [str(number) for number in range(len(gpus))]
    return [name for name, gpu in zip(names, gpus, strict=False) if gpu.free]
