"""Start a rank of a training and end it before its first step, while strace writes what it asks of the file system.

RANK=N python traced_start.py LOG SCRIPT [ARGUMENT...]    # writes LOG.N
"""

import ctypes
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

from csc_train.training.trainer import PackTrainer

CALLS = "%file,getdents64,read,pread64,readv,write,pwrite64,writev,execve"
PR_SET_PTRACER, ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)


def end(*arguments, **options) -> None:
    """End this process when every rank has come here; at once, since gloo's destructors may wait for each other."""
    Path(f"{log}.started").touch()
    while len(list(Path(log).parent.glob(f"{Path(log).stem}.*.started"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    log, script = f"{sys.argv[1]}.{os.environ['RANK']}", sys.argv[2]
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
    command = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", f"trace={CALLS}", "-o", log, "-p", str(os.getpid())]
    tracer = subprocess.Popen(command)
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text(encoding="utf-8"):
        if tracer.poll() is not None:
            sys.exit(f"strace ended with status {tracer.returncode}")
        time.sleep(0.01)
    PackTrainer.training_step = end
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
