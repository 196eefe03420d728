#!/usr/bin/env bash
# deepspeed 0.19.8 with torch 2.13.0, 2026-11-30. A frozen output layer that shares its weight with the embeddings, as
# under LoRA on a small model, is written by save_checkpoint(exclude_frozen_parameters=True): frozen weights are left out
# by the names of named_parameters(), which names a shared weight once, while the state has it under both names.
# Seen: the checkpoint holds head.weight beside the trained weight, and not embedding.weight, which is the same memory.
# Why it matters: each training checkpoint of an adapter on a tied model of 1.5 B parameters is some 470 MB larger.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 setuptools wheel
"$place/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$place"
cat > try.py <<'PYTHON'
import glob

import deepspeed
import torch

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 8)
        self.adapter = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.embedding.weight.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.adapter(self.embedding(ids)))


model = Model()
optimizer = torch.optim.AdamW(model.adapter.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
engine.save_checkpoint("saved", tag="now", exclude_frozen_parameters=True)
(file,) = glob.glob("saved/now/*model_states.pt")
names = sorted(torch.load(file, weights_only=False)["module"])
print("trained:", [name for name, each in model.named_parameters() if each.requires_grad], "saved:", names)
assert names == ["adapter.bias", "adapter.weight", "head.weight"], names
PYTHON
export DS_ACCELERATOR=cpu LOCAL_RANK=0
"$place/venv/bin/python" try.py 2>&1 | grep "^trained"
