#!/usr/bin/env bash
# torch 2.13.0 (2.11.0 too), 2026-11-29. The backward pass of torch.nn.functional.grouped_mm raises where the gradient of
# its output is expanded, as that of a sum or of a mean is. A loop of matrix products over the groups has a gradient.
# Seen: "Invalid strides/sizes, got [0, 0] for strides and [20, 16] for sizes".
# Why it matters: a test or a loss that sums what experts give fails in the backward pass, in words about strides.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$place"
cat > try.py <<'PYTHON'
import torch
from torch.nn.functional import grouped_mm

inputs, weights = torch.randn(20, 8, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
ends = torch.tensor([5, 5, 12, 20], dtype=torch.int32)
torch.cat([part @ each for part, each in zip(inputs.split([5, 0, 7, 8]), weights, strict=True)]).sum().backward()
output = grouped_mm(inputs, weights, offs=ends)
(output * torch.ones_like(output)).sum().backward()  # the same sum, with a gradient that is not expanded
try:
    grouped_mm(inputs, weights, offs=ends).sum().backward()
except RuntimeError as error:
    print(error)
    assert "strides" in str(error)
else:
    raise SystemExit("the sum has a gradient")
PYTHON
"$place/venv/bin/python" try.py
