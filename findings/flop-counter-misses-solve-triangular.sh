#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.23.0, 2026-11-29. FlopCounterMode has no formula for torch.linalg.solve_triangular
# and silently counts 0. transformers' torch_chunk_gated_delta_rule solves two such systems per chunk of 64
# tokens, so the count of a model with gated delta nets lacks them.
# Seen: with n(n - 1)m FLOPs for a unit triangle of n rows and m columns on its right, given as custom_mapping, 9.9 % of
# the rule's FLOPs are missing with heads of 128 (604 of 670 million), and 4.7 % of a tiny Qwen3.5's forward pass.
# Why it matters: a utilization (MFU) by this counter is too low for such models, and right for the others beside them.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import math

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

def solve(triangle, right, *args, **kwargs):
    *batch, rows, columns = right
    return math.prod(batch) * rows * (rows - 1) * columns

def count(call, **options):
    with FlopCounterMode(display=False, **options) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()

logging.set_verbosity_error()
system = torch.eye(64) + torch.randn(64, 64).tril(-1) / 64
q, k, v = torch.randn(3, 1, 1024, 4, 128)
decay, beta = -torch.rand(1, 1024, 4), torch.rand(1, 1024, 4)
config = AutoConfig.for_model(
    "qwen3_5_text", vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
calls = {
    "solve_triangular": lambda: torch.linalg.solve_triangular(system, system, upper=False, unitriangular=True),
    "matrix product of that size": lambda: system @ system,
    "torch_chunk_gated_delta_rule": lambda: torch_chunk_gated_delta_rule(q, k, v, decay, beta),
    "forward pass": lambda: model(torch.arange(1024)[None] % 128, use_cache=False),
}
missing = {}
for name, call in calls.items():
    counted = count(call)
    whole = count(call, custom_mapping={torch.ops.aten.linalg_solve_triangular: solve})
    missing[name] = 1 - counted / whole
    print(f"{name}: {counted:,} FLOPs counted, {whole:,} with the systems: {missing[name]:.1%} missing")
assert missing["solve_triangular"] == 1 and missing["matrix product of that size"] == 0
assert missing["torch_chunk_gated_delta_rule"] > 0.05 and missing["forward pass"] > 0.02
PYTHON
"$place/venv/bin/python" try.py
