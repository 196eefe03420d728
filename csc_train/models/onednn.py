"""Linear layers that oneDNN multiplies: on a CPU in float32, torch itself takes another library."""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> None:
    """Let oneDNN multiply in the float32 linear layers of a model on a CPU; weights and state dict stay as they are.

    It uses AVX-512 also on an AMD CPU, where torch's default, MKL, does not (see "evaluation in fp32" in
    benchmarks/results/pretrained.md). On an Intel CPU MKL is the faster one, so nothing is changed. There is no
    backward pass: with gradients on, a layer multiplies as before.
    """
    if not torch.backends.mkldnn.is_available() or _is_intel():
        return
    for module in model.modules():
        # Not those of subclasses: quantized layers, adapters.
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.__class__ = _OneDNNLinear


@functools.cache
def _is_intel() -> bool:
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and "GenuineIntel" in facts.read_text()
