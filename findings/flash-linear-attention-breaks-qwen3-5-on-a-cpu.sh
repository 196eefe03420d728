#!/usr/bin/env bash
# transformers 5.23.0 with flash-linear-attention 0.6.0, torch 2.13.0 and Triton, 2026-11-29. transformers takes the
# gated delta rule of flash-linear-attention wherever it can be imported, and does not ask where the tensors are. On a
# CPU its kernels do not run.
# Seen: a forward pass of a Qwen3.5 on a CPU raises RuntimeError, 0 active drivers; in a process that cannot import the
# package, the same call works by transformers' torch functions.
# Why it matters: an environment for GPUs, on a login node, a build machine or for a merge on a CPU, cannot run the model.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 flash-linear-attention==0.6.0 triton
cd "$place"
cat > try.py <<'PYTHON'
import sys

if "without" in sys.argv:
    sys.modules["fla"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "qwen3_5_text", vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
try:
    print("logits:", tuple(model(torch.arange(20)[None]).logits.shape))
    works = True
except RuntimeError as error:
    print("RuntimeError:", str(error).splitlines()[0])
    works = False
assert works == ("without" in sys.argv)
PYTHON
export CUDA_VISIBLE_DEVICES=
"$place/venv/bin/python" try.py without
"$place/venv/bin/python" try.py
