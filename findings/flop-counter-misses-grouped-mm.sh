#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.23.0, 2026-11-29. FlopCounterMode has formulas for mm and bmm, and none for
# torch.nn.functional.grouped_mm, by which transformers multiplies the experts of a Qwen3-MoE unless told otherwise. It
# counts 0 for them, forward and backward, without a warning.
# Seen: a training step of a tiny Qwen3-MoE has 204 million FLOPs by the loop over experts (experts_implementation=
# "eager") and 53 million by the default: 74 % are missing.
# Why it matters: a utilization (MFU) by this counter is several times too low, and the choice between two
# implementations of the same sums changes it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


left, right = torch.randn(32, 64), torch.randn(1, 64, 128)
offsets = torch.tensor([32], dtype=torch.int32)
apart = (torch.nn.functional.grouped_mm(left, right, offs=offsets) - left @ right[0]).abs().max().item()
product = count(lambda: left @ right[0])
grouped = count(lambda: torch.nn.functional.grouped_mm(left, right, offs=offsets))
print(f"32 x 64 x 128: {product:,} FLOPs by matmul, {grouped:,} by grouped_mm, results {apart:.0e} apart")
assert apart < 1e-4 and product == 2 * 32 * 64 * 128 and grouped == 0

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=64,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
ids = torch.arange(256)[None] % 128
counted = {}
for experts in ("eager", "grouped_mm"):
    model.set_experts_implementation(experts)
    counted[experts] = count(lambda: model(ids, labels=ids).loss.backward())
    print(f"training step of a Qwen3-MoE, {experts}: {counted[experts]:,} FLOPs")
missing = 1 - counted["grouped_mm"] / counted["eager"]
print(f"missing: {missing:.0%}")
assert missing > 0.3
PYTHON
"$place/venv/bin/python" try.py
