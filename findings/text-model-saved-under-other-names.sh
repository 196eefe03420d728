#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. AutoModelForCausalLM loads the text part of a vision-language
# Qwen3.5. save_pretrained then writes a configuration of the text model, and the names of the vision-language one:
# model.language_model.layers... A model of the same class that was never loaded saves the names of its parameters.
# Trainer writes its checkpoints so too, and resumes by load_state_dict with strict=False.
# Seen: config.json names Qwen3_5ForCausalLM; the file lacks 55 of its 56 names, yet from_pretrained reads it. A resumed
# training warns of missing and unexpected keys and goes on with step and optimizer of the checkpoint, but 55 of 56
# tensors of the base; only lm_head.weight is the trained one.
# Why it matters: what reads weights by the names of the class (load_state_dict, a server) finds none of them; a job
# that is resumed loses its training without an error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, logging
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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

class Begin(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.step, self.weights = state.global_step, copy(model)

def copy(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}

def train(place, steps, checkpoint=None):
    model, begin = AutoModelForCausalLM.from_pretrained(place), Begin()
    facts = {"max_steps": steps, "save_steps": 6, "logging_steps": 1, "learning_rate": 0.01, "report_to": "none"}
    facts |= {"use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}] * 80
    trainer = Trainer(model, TrainingArguments(f"run-{place}", **facts), train_dataset=rows, callbacks=[begin])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return begin, copy(model), [each["loss"] for each in trainer.state.log_history if "loss" in each]

same = {}
for place in ("whole", "fresh"):
    base, trained, losses = train(place, 6)
    begin, _, resumed = train(place, 7, f"run-{place}/checkpoint-6")
    same[place] = [sum(torch.equal(begin.weights[n], each[n]) for n in own) for each in (base.weights, trained)]
    print(f"{place}: losses of steps 6 and 7 {losses[-1]:.2f}, {resumed[-1]:.2f}; resumed at step {begin.step}, with "
          f"{same[place][0]} tensors of the base and {same[place][1]} trained ones")  # fmt: skip
    assert begin.step == 6
assert same == {"whole": [55, 1], "fresh": [0, 56]}
PYTHON
"$place/venv/bin/python" try.py
