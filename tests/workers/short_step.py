"""A stand-in for a recipe: it finishes its run at once, fails if a file `fail-NAME` lies here, and waits for `hold`."""

import json
import sys
import time
from pathlib import Path

import yaml

directory = Path(sys.argv[1])
name = directory.name.rpartition("-")[0]
with open("order.txt", "a") as order:
    order.write(f"{name}\n")
while Path(f"hold-{name}").exists():
    time.sleep(0.02)
record = {"recipe": sys.argv[2], "finished": None, "status": "failed", "error": "no room"}
if not Path(f"fail-{name}").exists():
    record |= {"finished": "now", "status": "finished", "error": None}
if sys.argv[2] == "evaluate":
    metrics = yaml.safe_load((directory / "resolved.yaml").read_text())["metrics"]
    (directory / "results.json").write_text(json.dumps({"provenance": {"metrics": metrics}, "mode": sys.argv[3]}))
(directory / "run.json").write_text(json.dumps(record))
