#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, 2026-11-29. SFTTrainer turns on the router logits of a Qwen3-MoE, and the saved
# config.json says so. transformers then computes the balancing loss in each forward pass, also while generating, with a
# mask of all tokens and the logits of the new ones: `generate` raises for a batch with padding, and a forward pass for a
# mask of four dimensions. The same model before training does both.
# Seen: RuntimeError "The size of tensor a (2) must match the size of tensor b (76) at non-singleton dimension 0".
# Why it matters: the trained model is saved and loads, and then no batch of prompts can be generated with it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$place"
cat > try.py <<'PYTHON'
import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
words = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="1", eos_token="2")
ids = torch.arange(3, 40).repeat(2, 1)
mask = torch.ones_like(ids)
mask[0, :9] = 0
model = AutoModelForCausalLM.from_config(config)
print("before:", model.generate(ids, attention_mask=mask, max_new_tokens=3).shape)
rows = datasets.Dataset.from_dict({"input_ids": [list(range(3, 40))] * 8})
arguments = SFTConfig(output_dir="run", use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True)
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model("trained")
trained = AutoModelForCausalLM.from_pretrained("trained")
assert trained.config.output_router_logits
try:
    trained.generate(ids, attention_mask=mask, max_new_tokens=3)
except RuntimeError as error:
    print("trained:", error)
    assert "must match" in str(error)
else:
    raise SystemExit("it generates")
PYTHON
"$place/venv/bin/python" try.py
