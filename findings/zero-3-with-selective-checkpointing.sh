#!/usr/bin/env bash
# deepspeed 0.19.8 with torch 2.13.0, 2026-11-29. Stage 3 puts its own function in the place of
# torch.nn.functional.linear: a product, to which the bias is added in place. Selective checkpointing that keeps
# products gives the recomputation the kept one, and the bias is added to it a second time; torch's check for changed
# tensors does not notice.
# Seen: under stage 3 the gradients are a quarter off, without an error; under stage 2 they are equal.
# Why it matters: the loss is right and falls, so nothing shows that the gradients are wrong.
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
import socket

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
with socket.create_server(("127.0.0.1", 0)) as server:
    port = str(server.getsockname()[1])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

class Net(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        options = {"use_reentrant": False}
        if keep:
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        self.run = functools.partial(checkpoint, lambda x: self.second(torch.tanh(self.first(x))), **options)

    def forward(self, x):
        return self.run(x).square().sum()

def step(keep, stage):
    torch.manual_seed(0)
    net = Net(keep)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.Adam(net.parameters(), lr=0.0), config=config)
    torch.manual_seed(1)
    loss = engine(torch.randn(2, 4, 8))
    engine.backward(loss)
    return loss.item(), torch.cat([safe_get_full_grad(each).flatten() for each in net.parameters()])

apart = {}
for stage in (2, 3):
    (loss, whole), (again, kept) = step(False, stage), step(True, stage)
    apart[stage] = ((whole - kept).norm() / whole.norm()).item()
    print(f"stage {stage}: losses {loss:.6f} and {again:.6f}, gradients apart by {apart[stage]:.4f} of their norm")
    assert loss == again
assert apart[2] < 1e-6 and apart[3] > 0.01
PYTHON
OMP_NUM_THREADS=1 "$place/venv/bin/python" -W ignore try.py 2>&1 | grep "^stage"
