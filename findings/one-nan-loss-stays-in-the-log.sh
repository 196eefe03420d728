#!/usr/bin/env bash
# transformers 5.23.0, 2026-11-29. With logging_nan_inf_filter=False, one loss that is NaN makes every later logged loss
# NaN though the later losses are finite: the Trainer resets its running sum by subtracting it from itself.
# Seen: losses of six steps, the second NaN: logged [3.4.., nan, nan, nan, nan, nan].
# Why it matters: who switches the filter off to see such losses sees them at every step, and train_loss is NaN.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
cat > try.py <<'PYTHON'
import math
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

real = []

class OnceNaN(Trainer):
    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        real.append(loss.item())
        return loss * math.nan if self.state.global_step == 1 else loss

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
rows = [{"input_ids": torch.arange(6) + row, "labels": torch.arange(6) + row} for row in range(6)]
facts = {"max_steps": 6, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none", "logging_steps": 1}
arguments = TrainingArguments("run", disable_tqdm=True, logging_nan_inf_filter=False, save_strategy="no", **facts)
trainer = OnceNaN(model, arguments, train_dataset=rows)
trainer.train()
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses:", [round(loss, 2) for loss in real], "logged:", [round(loss, 2) for loss in logged])
assert all(map(math.isfinite, real)) and math.isfinite(logged[0]) and all(map(math.isnan, logged[1:]))
PYTHON
"$place/venv/bin/python" try.py 2>/dev/null | tail -1
