#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. torch_chunk_gated_delta_rule casts its inputs to fp32, "Make sure
# all tensors are fp32", but then multiplies matrices with @, which torch.autocast casts to bf16 again. Its recurrent
# form, of sums and products of elements, stays in fp32.
# Seen: 66 fp32 products without autocast, 66 bf16 ones under it; outputs move by 4e-3 of their norm, final states by
# 3e-3, those of the recurrent form by 0. Without autocast the two forms agree to 1e-6.
# Why it matters: Trainer's bf16=True trains under autocast, by this function where flash-linear-attention is missing;
# what is written as fp32 for exactness is not.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import logging
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.types = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.types[args[0].dtype] += 1
        return function(*args, **(kwargs or {}))

def run(rule, autocast):
    with Products() as products, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = rule(q, k, v, g=decay, beta=beta, initial_state=None, output_final_state=True,
                             use_qk_l2norm_in_kernel=True)  # fmt: skip
    return output, state, dict(products.types)

def apart(one, other):
    return ((one - other).norm() / one.norm()).item()

logging.set_verbosity_error()
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1024, 4, 128)
decay, beta = -0.1 * torch.rand(1, 1024, 4), torch.rand(1, 1024, 4)
off, on = run(torch_chunk_gated_delta_rule, False), run(torch_chunk_gated_delta_rule, True)
single_off, single_on = run(torch_recurrent_gated_delta_rule, False), run(torch_recurrent_gated_delta_rule, True)
print("chunked: products", off[2], "without autocast,", on[2], "under it")
print(f"chunked: output apart by {apart(off[0], on[0]):.1e} of its norm, state by {apart(off[1], on[1]):.1e}")
print(f"recurrent: output apart by {apart(single_off[0], single_on[0]):.1e}")
print(f"the two forms: apart by {apart(single_off[0], off[0]):.1e}, under autocast by {apart(single_on[0], on[0]):.1e}")
assert off[2].keys() == {torch.float32} and on[2].keys() == {torch.bfloat16}
assert apart(off[0], on[0]) > 1e-3 and apart(off[1], on[1]) > 1e-3 and apart(single_off[0], single_on[0]) == 0
assert apart(single_off[0], off[0]) < 1e-5 and apart(single_on[0], on[0]) > 1e-3
PYTHON
"$place/venv/bin/python" try.py
