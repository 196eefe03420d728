#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. The decoder layers of a Qwen3-MoE can each be compiled as one graph.
# With output_router_logits=True, which its balancing loss needs, they cannot: transformers records the logits by hooks
# inside the layers, and these read a context variable, which dynamo does not trace.
# Seen: torch._dynamo.exc.Unsupported "Dynamo does not know how to trace method `get` of class `ContextVar`".
# Why it matters: training compiles without the balancing loss and fails with it; once installed, the hooks stay, so a
# later pass that records nothing fails too.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
ids = torch.arange(9)[None]


def compiled() -> torch.nn.Module:
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    return model


print("without:", compiled()(ids, use_cache=False).logits.shape)
for records in ((True,), (True, False)):
    model = compiled()
    for record in records:
        try:
            model(ids, use_cache=False, output_router_logits=record)
        except torch._dynamo.exc.Unsupported as error:
            last = str(error)
        else:
            raise SystemExit(f"records={records}: no error")
    print(f"records={records}: {last.splitlines()[1].strip()}")
    assert "ContextVar" in last
PYTHON
"$place/venv/bin/python" try.py
