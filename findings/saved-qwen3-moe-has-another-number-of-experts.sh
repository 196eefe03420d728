#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. `save_pretrained` writes the tensors of a Qwen3-MoE as earlier
# versions name them, one per expert, so that they can read them. But config.json has the number of experts as
# num_local_experts alone, which they do not know; the parameter of the configuration is num_experts in both.
# Seen: of 24 experts, transformers 4.57.6 reads 128, its default, and raises a RuntimeError, "size mismatch for weight:
# copying a param with shape torch.Size([24, 32])"; told num_experts=24, it loads the model. 5.23.0 reads 24.
# Why it matters: what still has an earlier version cannot load the model; 128 experts, the default, hide it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
python3 -m venv "$place/old"
"$place/old/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6
cd "$place"
cat > save.py <<'PYTHON'
import json

from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

config = Qwen3MoeConfig(
    vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_experts=24, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
AutoModelForCausalLM.from_config(config).save_pretrained("model")
with open("model/config.json") as file:
    written = {name: value for name, value in json.load(file).items() if name.endswith("_experts")}
with safe_open("model/model.safetensors", "pt") as tensors:
    names = [name for name in tensors.keys() if "experts." in name]
print(f"5.23.0 wrote: {written}, {len(names)} tensors of experts such as {names[0]}")
assert written == {"num_local_experts": 24} and len(names) == 3 * 24
assert AutoModelForCausalLM.from_pretrained("model").config.num_experts == 24
PYTHON
cat > read.py <<'PYTHON'
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("model")
print(f"4.57.6 reads: num_experts={config.num_experts}")
assert config.num_experts == 128
try:
    AutoModelForCausalLM.from_pretrained("model")
except RuntimeError as error:
    message = str(error)
    print(f"4.57.6 raises: {message}")
    assert "size mismatch" in message or "ignore_mismatched_sizes" in message
else:
    raise SystemExit("it loads")
AutoModelForCausalLM.from_pretrained("model", num_experts=24)
print("4.57.6 loads it with num_experts=24")
PYTHON
"$place/venv/bin/python" save.py
"$place/old/bin/python" read.py
