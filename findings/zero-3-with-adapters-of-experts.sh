#!/usr/bin/env bash
# deepspeed 0.19.8 with peft 0.21.2, transformers 5.23.0 and torch 2.13.0, 2026-11-29. Stage 3 treats the MLP of a
# Qwen3-MoE as one unit by default, whose gradients it reduces in a full backward hook of that module. Where nothing
# before the module is trained, as nothing is before the first MLP with adapters of the experts alone, torch calls such
# a hook before the module's own backward pass, and there are no gradients yet.
# Seen: RuntimeError "The size of tensor a (0) must match the size of tensor b (16) at non-singleton dimension 1". Stage
# 2 trains it, as does stage 3 if adapters of q_proj are trained, too, or if only the experts are the unit.
# Why it matters: such a model cannot be trained by the defaults, and the message names neither module nor cause.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy setuptools wheel
"$place/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$place"
cat > try.py <<'PYTHON'
import os
import socket

import deepspeed
import peft
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoConfig, AutoModelForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
with socket.create_server(("127.0.0.1", 0)) as server:
    port = str(server.getsockname()[1])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
dims = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
ids = torch.arange(3, 67)[None]


def gradient(stage, modules=(), **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **dims), dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=list(modules), target_parameters=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, **more}}
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adam(trained, lr=0.0), config=config)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    return torch.cat([safe_get_full_grad(each).flatten() for each in trained])


def compare(name, modules, **more):
    right, found = gradient(2, modules), gradient(3, modules, **more)
    apart = ((found - right).norm() / right.norm()).item()
    print(f"stage 3, {name}: gradient {apart:.0e} apart from stage 2's")
    assert right.norm() > 0 and apart < 1e-4


compare("q_proj too", ["q_proj"])
compare("only the experts as a unit", (), leaf_module={"classes": ["Qwen3MoeExperts"]})
try:
    gradient(3)
except RuntimeError as error:
    print("stage 3:", error)
    assert "size of tensor a (0) must match" in str(error)
else:
    raise SystemExit("it trains")
PYTHON
OMP_NUM_THREADS=1 "$place/venv/bin/python" -W ignore try.py 2>&1 | grep -E "^stage|Error|it trains"
