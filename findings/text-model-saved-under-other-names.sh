#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. AutoModelForCausalLM loads the text part of a vision-language
# Qwen3.5. save_pretrained then writes a configuration of the text model, and the names of the vision-language one:
# model.language_model.layers... A model of the same class that was never loaded saves the names of its parameters.
# Seen: config.json names Qwen3_5ForCausalLM; the file lacks 54 of its 55 names, yet from_pretrained reads it.
# Why it matters: what reads weights by the names of the class (load_state_dict, a server) finds none of them.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, logging

logging.set_verbosity_error()
text = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
vision = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained("whole")
model = AutoModelForCausalLM.from_pretrained("whole")
model.save_pretrained("text")
AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).save_pretrained("fresh")
own = dict(model.named_parameters()).keys()
missing = {place: own - load_file(f"{place}/model.safetensors").keys() for place in ("text", "fresh")}
print("class in config.json:", AutoConfig.from_pretrained("text").architectures)
for place, names in missing.items():
    print(f"{place}: the file lacks {len(names)} of {len(own)} names of the class, such as {min(names, default=None)}")
again = dict(AutoModelForCausalLM.from_pretrained("text").named_parameters())
assert all(torch.equal(each, again[name]) for name, each in model.named_parameters())
assert missing["text"] and not missing["fresh"] - {"lm_head.weight"}
PYTHON
"$place/venv/bin/python" try.py
