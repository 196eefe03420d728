#!/usr/bin/env bash
# transformers 5.23.0, 2026-11-29. With save_steps that logging_steps does not divide, the first loss that a resumed
# Trainer logs is the mean of the steps since the checkpoint, not of the steps since the last log.
# Seen: at step 4 the uninterrupted training logs the mean of steps 1 to 4, the one resumed at step 3 the loss of step 4.
# Why it matters: the loss curve of a resumed training differs though its weights are equal.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

def trained(logging_steps, checkpoint=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    rows = [{"input_ids": torch.arange(6) + row, "labels": torch.arange(6) + row} for row in range(8)]
    facts = {"max_steps": 4, "save_steps": 3, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    facts |= {"learning_rate": 0.01, "logging_steps": logging_steps, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(f"run{logging_steps}", **facts), train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], list(model.parameters())

each, _ = trained(1)
(whole,), weights = trained(4)
(resumed,), same = trained(4, "run4/checkpoint-3")
assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
print(f"losses of steps 1 to 4: {each}; logged at 4: {whole}; resumed at 3, logged at 4: {resumed}")
assert abs(whole - sum(each) / 4) < 1e-3 and abs(resumed - each[3]) < 1e-3 and abs(whole - resumed) > 1e-3
PYTHON
"$place/venv/bin/python" try.py 2>/dev/null
