#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. A Qwen3-MoE in float64 raises on a CPU: the default for experts is
# torch's grouped product, which takes no float64, and transformers does not fall back to its own product, as it does
# for an old torch. A Qwen3 runs in float64, and so does the Qwen3-MoE with experts_implementation="eager".
# Seen: RuntimeError "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double".
# Why it matters: comparisons in float64, by which one tells an error from rounding, fail for such models only.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

dims = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def logits(kind: str, more: dict, **options) -> torch.Tensor:
    config = AutoConfig.for_model(kind, **dims, **more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, **options)(torch.arange(9)[None]).logits


assert logits("qwen3", {}).dtype == torch.float64
assert logits("qwen3_moe", experts, experts_implementation="eager").dtype == torch.float64
try:
    logits("qwen3_moe", experts)
except RuntimeError as error:
    print(error)
    assert "got Double" in str(error)
else:
    raise SystemExit("it runs in float64")
PYTHON
"$place/venv/bin/python" try.py
