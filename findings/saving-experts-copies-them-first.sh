#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, 2026-11-29. `save_pretrained` splits the fused experts of a Qwen3-MoE into the
# published tensors before it writes the first shard, and copies all gate and up projections: the copies are in memory
# at once, whatever `max_shard_size`. Under the model's own names (save_original_format=False) it needs none.
# Seen: for a model of 416 MB in files of 20 MB and more, 268 MB of copies before the first file, peak memory +65 %.
# Why it matters: a model that fits, and that was trained for days, may not be saved.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
cat > try.py <<'PYTHON'
import pathlib
import resource
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM


class Copies(TorchDispatchMode):
    """The bytes of copied tensors, before the first file of weights and after."""

    before = after = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            if any(folder.glob("*.safetensors")):
                self.after += result.nbytes
            else:
                self.before += result.nbytes
        return result


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_of(layers, width):
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=width,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


published = sys.argv[1] == "published"
options = {"max_shard_size": "20MB", "save_original_format": published}
folder = pathlib.Path("small")
model_of(1, 8).save_pretrained(folder, **options)  # imports what saving needs
model = model_of(4, 512)
size = sum(each.nbytes for each in model.state_dict().values())
folder, start = pathlib.Path(sys.argv[1]), peak()
with Copies() as copies:
    model.save_pretrained(folder, **options)
more = peak() - start
files = len(list(folder.glob("*.safetensors")))
print(
    f"{sys.argv[1]} names: {size / 1e6:.0f} MB in {files} files; copied {copies.before / 1e6:.0f} MB before the first "
    f"file, {copies.after / 1e6:.0f} MB later; peak memory {more / size:+.0%} of the model"
)
assert files > 5 and copies.after == 0
assert copies.before > 0.6 * size and more > 0.5 * size if published else copies.before == 0 and more < 0.2 * size
PYTHON
"$place/venv/bin/python" try.py own 2> errors || { cat errors; exit 1; }
"$place/venv/bin/python" try.py published 2> errors || { cat errors; exit 1; }
