#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0 and torch 2.13.0, 2026-11-30. New adapters change nothing until they are trained,
# but DoRA's do if the weights are in bf16: PEFT rounds the magnitudes to bf16, then keeps them in fp32, and divides by
# row norms in fp32 in each forward pass.
# Seen: logits 1.6 % of the largest away from those of the base model; in fp32 and with LoRA none is.
# Why it matters: training starts from another model, and disabled adapters are no longer its reference.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
cat > try.py <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


def difference(dtype, dora):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    ).to(dtype)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        before = model(ids).logits.float()
        adapted = get_peft_model(model.eval(), LoraConfig(use_dora=dora, target_modules=["q_proj", "down_proj"]))
        magnitudes = {each.dtype for name, each in adapted.named_parameters() if "magnitude" in name}
        after = adapted.eval()(ids).logits.float()
    return float((after - before).abs().max() / before.abs().max()), magnitudes


for dtype in (torch.float32, torch.bfloat16):
    for dora in (False, True):
        change, magnitudes = difference(dtype, dora)
        print(dtype, "DoRA" if dora else "LoRA", "magnitudes in", magnitudes or "none:", f"logits {change:.1e} away")
        assert (change > 1e-3) == (dora and dtype == torch.bfloat16)
PYTHON
"$place/venv/bin/python" try.py
