#!/usr/bin/env bash
# peft 0.21.2 with bitsandbytes 0.50.2, transformers 5.23.0 and torch 2.13.0, 2026-11-30. Where bitsandbytes is installed,
# `import peft` imports it, whatever the adapter, and bitsandbytes imports torch's compiler, torch._inductor.compile_fx.
# Seen: some 560 modules more than without it, and more than a second of CPU time, in each process of each job.
# Why it matters: the ranks of a job start together and read all these files from one file system.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$place"
cat > try.py <<'PYTHON'
import sys
import time

if sys.argv[1:] == ["without"]:
    sys.modules["bitsandbytes"] = None  # as if it were not installed
start = time.process_time()
import peft  # noqa: F401

compiler = "torch._inductor.compile_fx" in sys.modules
print(sys.argv[1:], "modules:", len(sys.modules), "compiler:", compiler, f"CPU: {time.process_time() - start:.1f} s")
assert compiler == (sys.argv[1:] == [])
PYTHON
"$place/venv/bin/python" try.py
"$place/venv/bin/python" try.py without
