"""Run a script on a disk that others fill: what it is told to be free is no longer free when it writes."""

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

shutil.disk_usage = lambda path: SimpleNamespace(free=2**40)
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
