#!/usr/bin/env bash
# hydra-core 1.3.8, 2026-11-29. A choice of a group whose file name is a number cannot be chosen: the override is read as
# a number, and the error is a ValueError that names neither the group nor the override, and no HydraException.
# Seen: "size=7: ValueError, Config group override must be a string or a list. Got int"; size='7' in quotes works.
# Why it matters: conf/size/7.yaml lists among the choices; code that explains Hydra's own errors shows a traceback.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet hydra-core==1.3.8
cd "$place"
mkdir -p conf/size
echo "layers: 28" > conf/size/7.yaml
printf 'defaults:\n  - size: null\n' > conf/config.yaml
cat > try.py <<'PYTHON'
import hydra
from hydra.errors import HydraException

with hydra.initialize(config_path="conf", version_base="1.3"):
    quoted = hydra.compose("config", ["size='7'"])
    try:
        hydra.compose("config", ["size=7"])
    except ValueError as error:
        print(f"size=7: {type(error).__name__}, {error}; size='7': {quoted}")
        assert not isinstance(error, HydraException) and "size" not in str(error) and quoted.size.layers == 28
    else:
        raise SystemExit("size=7 is taken")
PYTHON
"$place/venv/bin/python" try.py
