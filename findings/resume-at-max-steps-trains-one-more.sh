#!/usr/bin/env bash
# transformers 5.23.0, 2026-11-29. A Trainer that resumes from the checkpoint of its last step trains one step more when
# max_steps lies inside an epoch; at the end of an epoch it does not.
# Seen: "inside an epoch: 4 steps, resumed at 4: 5 steps, other weights" and "at its end: 4 steps, resumed at 4: 4 steps".
# Why it matters: a job killed between its last checkpoint and its final model ends with other weights.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
cat > try.py <<'PYTHON'
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

def trainer(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    rows = [{"input_ids": torch.arange(6) + row, "labels": torch.arange(6) + row} for row in range(int(sys.argv[1]))]
    facts = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    facts |= {"lr_scheduler_type": "constant"}  # else the step too many has a learning rate of 0
    return Trainer(model, TrainingArguments(folder, disable_tqdm=True, **facts), train_dataset=rows)

whole = trainer("run")
whole.train()
again = trainer("run")
again.train(resume_from_checkpoint="run/checkpoint-4")
pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
equal = all(torch.equal(one, other) for one, other in pairs)
print(whole.state.global_step, again.state.global_step, "same weights" if equal else "other weights")
PYTHON
inside=$("$place/venv/bin/python" try.py 6 2>/dev/null | tail -1)
at_end=$("$place/venv/bin/python" try.py 4 2>/dev/null | tail -1)
echo "inside an epoch of 6 steps: $inside; at the end of one of 4: $at_end"
[ "$inside" = "4 5 other weights" ] && [ "$at_end" = "4 4 same weights" ]
