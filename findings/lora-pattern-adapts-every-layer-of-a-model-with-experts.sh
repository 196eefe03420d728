#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0, 2026-11-29. A regular expression in `target_modules` that matches the full name of
# one layer adapts that one in a Qwen3, and all of its kind in a Qwen3-MoE: for families whose experts transformers 5
# fuses, PEFT replaces the expression by the last names of what it matches. There is no warning.
# Seen: of two layers, Qwen3 has an adapter on layer 0's q_proj, Qwen3-MoE on both.
# Why it matters: layers that were to stay frozen are trained.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
cat > try.py <<'PYTHON'
import peft
from transformers import AutoConfig, AutoModelForCausalLM

dims = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
adapted = {}
for kind, more in (("qwen3", {}), ("qwen3_moe", experts)):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **dims, **more))
    config = peft.LoraConfig(r=2, target_modules=r".*\.0\.self_attn\.q_proj", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    adapted[kind] = sum(hasattr(module, "lora_A") for module in model.modules())
    print(f"{kind}: {adapted[kind]} layers adapted")
assert adapted == {"qwen3": 1, "qwen3_moe": 2}
PYTHON
"$place/venv/bin/python" try.py
