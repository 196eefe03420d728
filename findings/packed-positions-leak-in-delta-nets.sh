#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. Packed documents whose position ids start again are kept apart in a
# Qwen3, whose attention mask follows from the positions. In a Qwen3.5 the same call keeps them apart in the layers of
# full attention only: the gated delta nets run on through all documents. There is no error and no warning of it.
# Seen: Qwen3 differs from the document alone by 1e-6 of the largest logit, Qwen3.5 by far more than a hundredth.
# Why it matters: packs made for other models train a Qwen3.5 on documents that see each other; the loss looks right.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

logging.set_verbosity_error()
dense = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
linear = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
apart = {}
for kind, more in (("qwen3", {}), ("qwen3_5_text", linear)):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **dense, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    first, second = torch.randint(3, 128, (2, 1, 30))
    positions = torch.arange(30).repeat(2)[None]
    with torch.no_grad():
        alone = model(second, use_cache=False).logits
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[:, 30:]
    apart[kind] = ((packed - alone).abs().max() / alone.abs().max()).item()
    print(f"{kind}: the second document differs by {apart[kind]:.1e} of the largest logit")
assert apart["qwen3"] < 1e-5 and apart["qwen3_5_text"] > 0.01
PYTHON
"$place/venv/bin/python" try.py
