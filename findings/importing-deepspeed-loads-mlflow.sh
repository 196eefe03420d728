#!/usr/bin/env bash
# deepspeed 0.19.8 with mlflow-skinny 3.17.2 and torch 2.13.0, 2026-11-30. Where MLflow is installed, `import deepspeed`
# imports it, by way of its autotuning, whether or not anything is tracked there.
# Seen: MLflow among the loaded modules, some 900 modules and 0.6 s of CPU time more, in each process.
# Why it matters: every rank of a job pays for it, and what a program sets for MLflow before it imports it comes too late.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 setuptools wheel
"$place/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8 mlflow-skinny==3.17.2
cd "$place"
cat > try.py <<'PYTHON'
import sys
import time

if sys.argv[1:] == ["without"]:
    sys.modules["mlflow"] = None  # as if it were not installed
start = time.process_time()
import deepspeed  # noqa: F401

loaded = sys.modules.get("mlflow") is not None
print(sys.argv[1:], "mlflow:", loaded, "modules:", len(sys.modules), f"CPU: {time.process_time() - start:.1f} s")
assert loaded == (sys.argv[1:] == [])
PYTHON
"$place/venv/bin/python" try.py
"$place/venv/bin/python" try.py without
