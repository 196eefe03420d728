"""The GPUs of this machine, as nvidia-smi reports them."""

import os
import subprocess
from dataclasses import dataclass

MAX_USED_FRACTION = 0.05
"""A GPU counts as free if at most this fraction of its memory is in use."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: its number, as CUDA_VISIBLE_DEVICES takes it; `memory` and `used` are bytes."""

    number: str
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
    fields = "name,memory.total,memory.used,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in answer.splitlines() if line.count(", ") == 3]
    gpus = {
        str(number): Gpu(str(number), name, int(total) * 2**20, int(used) * 2**20, driver)
        for number, (name, total, used, driver) in enumerate(rows)
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
    return [gpus[number] for number in visible if number in gpus]


def free_gpus() -> list[str]:
    """Numbers of the free GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    return [gpu.number for gpu in probe_gpus() or [] if gpu.free]
