#!/usr/bin/env bash
# transformers 5.23.0, 2026-11-30. Two models that are built from one configuration object keep that object, and with it
# the choice of the attention implementation: building or switching the second one switches the first one, too.
# Seen: a model built with "eager" calls "sdpa" after another one was built with "sdpa" from the same configuration.
# Why it matters: a comparison of two implementations side by side compares one of them with itself, and passes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import copy

from transformers import AutoModelForCausalLM, Qwen2Config

config = Qwen2Config(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


def chosen(model):
    return model.model.layers[0].self_attn.config._attn_implementation


def build(config, attention):
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


first = build(config, "eager")
before = chosen(first)
second = build(config, "sdpa")
print("one object:", before, "->", chosen(first), "beside", chosen(second))
assert before == "eager" and chosen(first) == "sdpa"
first = build(copy.deepcopy(config), "eager")
build(copy.deepcopy(config), "sdpa")
print("two objects:", chosen(first))
assert chosen(first) == "eager"
PYTHON
"$place/venv/bin/python" try.py
