#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0 and torch 2.13.0, 2026-11-30. unwrap_model_for_generation turns gradient
# checkpointing off and, behind the generation, on again; behind an error it does not. disable_gradient_checkpointing of
# the same module does.
# Seen: a training that catches an error of a generation, as one of a sample logged for a look, goes on without
# gradient checkpointing.
# Why it matters: nothing says so, and the next steps need the memory of all activations.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$place"
cat > try.py <<'PYTHON'
import contextlib

import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation

config = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
accelerator = Accelerator(cpu=True)


def after(context, ids):
    """Whether gradient checkpointing is on behind a generation, and whether that ended by an error."""
    model = accelerator.prepare(Qwen2ForCausalLM(config))
    model.gradient_checkpointing_enable()
    failed = True
    with contextlib.suppress(IndexError), context(model):
        model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
        failed = False
    return model.is_gradient_checkpointing, failed


contexts = {
    "unwrap_model_for_generation": lambda model: unwrap_model_for_generation(model, accelerator),
    "disable_gradient_checkpointing": disable_gradient_checkpointing,
}
for name, context in contexts.items():
    for ids in ([1, 2, 3], [1, 2, 64]):  # the vocabulary ends at 63
        on, failed = after(context, ids)
        print(f"{name}, {'with an error' if failed else 'without error'}: gradient checkpointing on: {on}")
        assert failed == (64 in ids)
        assert on == (not failed or name == "disable_gradient_checkpointing")
PYTHON
"$place/venv/bin/python" -W ignore try.py
