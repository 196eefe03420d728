#!/usr/bin/env bash
# deepspeed 0.19.8 with torch 2.13.0, 2026-11-29. Stage 3 gathers weights inside the layers that torch's selective
# checkpointing records. After an evaluation between two steps, a layer finds its weights gathered in the forward pass,
# and not when it is recomputed: torch then meets an operator that it has not recorded, and refuses it.
# Seen: after an evaluation the next step raises RuntimeError "c10d._allgather_base_.default encountered during backward
# but not found in storage". Without an evaluation it trains, and with one where whole layers are recomputed.
# Why it matters: training stops after its first evaluation. Stage 3's limits are set so that they are small beside this
# net, as its defaults are beside a large model.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools wheel
"$place/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$place"
cat > try.py <<'PYTHON'
import functools
import os
import sys

import deepspeed
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

way, case = sys.argv[1:]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(4))
        options = {"use_reentrant": False}
        if way == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        self.run = functools.partial(checkpoint, **options)

    def forward(self, x):
        for layer in self.layers:
            x = self.run(layer, x)
        return x.square().sum()


torch.manual_seed(0)
net = Net()
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
zero |= {"stage3_max_reuse_distance": 300, "stage3_prefetch_bucket_size": 200}  # of 1024 parameters
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.Adam(net.parameters(), lr=1e-3), config=config)
x = torch.randn(2, 4, 8)
result = "trains"
try:
    for step in range(4):
        engine.backward(engine(x))
        engine.step()
        if case == "evaluation" and step == 1:
            engine.eval()
            with torch.no_grad():
                engine(x)
            engine.train()
except RuntimeError as error:
    result = str(error)
print(f"RESULT {result}", flush=True)
os._exit(0)  # no waiting for the other process
PYTHON
outcome() {
  OMP_NUM_THREADS=1 timeout 300 "$place/venv/bin/torchrun" --standalone --nproc-per-node 2 --log-dir "$place/logs" \
    --local-ranks-filter 0 try.py "$1" "$2" 2>&1 | sed -n 's/^RESULT //p'
}
for way in full selective; do
  for case in steps evaluation; do
    result=$(outcome $way $case)
    echo "$way, $case: $result"
    if [ "$way $case" = "selective evaluation" ]; then
      grep -q "not found in storage" <<< "$result"
    else
      [ "$result" = trains ]
    fi
  done
done
