#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. A vision-language Qwen3.5 whose outer configuration alone says
# tie_word_embeddings: true, as save_pretrained writes it when only that one was set; its file has no lm_head.weight.
# AutoModelForCausalLM takes the text configuration, where the default is false, and ties nothing.
# Seen: the vision-language class ties; Qwen3_5ForCausalLM lists lm_head.weight as missing, a warning, and makes it at
# random: logits 1.3 norms from the right ones, and other ones with another seed.
# Why it matters: a text model that is evaluated or fine-tuned so starts from a random head, without an error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import json

import torch
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
torch.manual_seed(0)
config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, tie_word_embeddings=True)
AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained("tied")
saved = json.load(open("tied/config.json"))
print("tie_word_embeddings:", saved["tie_word_embeddings"], "and in text_config:",
      saved["text_config"]["tie_word_embeddings"])  # fmt: skip
apart, right = {}, None
for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, facts = kind.from_pretrained("tied", output_loading_info=True)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        with torch.no_grad():
            logits = model.eval()(torch.arange(20)[None]).logits
        right = logits if right is None else right
        apart[kind, seed] = ((logits - right).norm() / right.norm()).item()
        print(f"{type(model).__name__}, seed {seed}: {'tied' if tied else 'not tied'}, missing "
              f"{sorted(facts['missing_keys'])}, logits apart by {apart[kind, seed]:.2f} norms")  # fmt: skip
        assert tied == (kind is AutoModelForImageTextToText)
assert apart[AutoModelForImageTextToText, 2] == 0
assert 0.5 < apart[AutoModelForCausalLM, 1] != apart[AutoModelForCausalLM, 2] > 0.5
PYTHON
"$place/venv/bin/python" try.py
