#!/usr/bin/env bash
# omegaconf 2.3.1 with PyYAML 6.0.3, 2026-11-29. PyYAML writes the text 82e4718 without quotes, since YAML 1.1 reads it as
# text; OmegaConf's loader reads such a plain text as a number, here as infinity.
# Seen: "82e4718 -> '82e4718' by yaml.safe_load, inf by OmegaConf.load".
# Why it matters: the short hash of a commit in a configuration that one library froze is a number to the other.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet omegaconf==2.3.1 PyYAML==6.0.3
cd "$place"
cat > try.py <<'PYTHON'
import math
import yaml
from omegaconf import OmegaConf

written = yaml.safe_dump({"revision": "82e4718"})
open("config.yaml", "w").write(written)
one, other = yaml.safe_load(written)["revision"], OmegaConf.load("config.yaml").revision
print(written.strip(), "->", repr(one), "by yaml.safe_load,", repr(other), "by OmegaConf.load")
assert written == "revision: 82e4718\n" and one == "82e4718" and math.isinf(other)
PYTHON
"$place/venv/bin/python" try.py
