#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.23.0, 2026-11-29. Under autocast to bf16, the experts of a Qwen3-MoE with fp32 weights
# multiply in fp32: transformers' default is torch's grouped product, which autocast does not know. By the loop over
# experts (experts_implementation="eager") all products are in bf16, as in every other layer. There is no warning.
# Seen: aten._grouped_mm of float32 operands beside aten.mm of bfloat16.
# Why it matters: on a GPU nearly all FLOPs of such a training are fp32's, many times slower, and activations of experts
# are twice as wide; bf16 looks as if it were on.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
default = AutoModelForCausalLM.from_config(config).config._experts_implementation
assert default == "grouped_mm", default
products = (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)


class Dtypes(TorchDispatchMode):
    """The dtypes of all products."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in products:
            self.found.add(f"{func} {args[0].dtype}")
        return func(*args, **(kwargs or {}))


seen = {}
for experts in ("eager", "grouped_mm"):
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts, dtype=torch.float32)
    with Dtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        model.model.layers[0].mlp(torch.randn(1, 40, 32))
    seen[experts] = dtypes.found
    print(f"{experts}: {', '.join(sorted(dtypes.found))}")
assert seen["eager"] == {"aten.mm.default torch.bfloat16"}
assert "aten._grouped_mm.default torch.float32" in seen["grouped_mm"]
PYTHON
"$place/venv/bin/python" try.py
