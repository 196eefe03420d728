#!/usr/bin/env bash
# torch 2.13.0, 2026-11-29. Where a file cannot grow (a full disk; here a limit on the size of a file), torch.save raises
# no OSError: it raises a RuntimeError that names a line of torch's own source and neither the file nor the reason.
# Seen: RuntimeError, "[enforce fail at inline_container.cc:...] . unexpected pos ... vs ...", errno absent.
# Why it matters: `except OSError` around the save of a checkpoint does not see a full disk.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$place"
cat > try.py <<'PYTHON'
import resource
import signal
import torch

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    torch.save(torch.zeros(1_000_000), "weights.pt")
except Exception as error:
    line = str(error).splitlines()[0]
    print(type(error).__name__, line)
    assert type(error) is RuntimeError and "inline_container.cc" in line and "unexpected pos" in line
    assert "weights.pt" not in str(error) and not hasattr(error, "errno")
else:
    raise SystemExit("no error")
PYTHON
"$place/venv/bin/python" try.py
