"""Two ranks of which one is slow, then both step until the test stops them: `slow_ranks.py TIMEOUT_S`.

Rank 0 prepares for longer than the time-out. After SIGUSR1 a rank hangs in its next step.
"""

import os
import signal
import sys
import threading
import time

import torch

from csc_train.runs.distributed import distributed_state
from csc_train.runs.heartbeat import this_rank

if __name__ == "__main__":
    this_rank.timeout_s = timeout_s = float(sys.argv[1])
    state, hangs = distributed_state(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: hangs.set())
    if state.is_main_process:
        time.sleep(1.6 * timeout_s)
    state.wait_for_everyone()
    step = 0
    while True:
        step += 1
        this_rank.note(f"step {step}", timed=True)
        if hangs.is_set():
            threading.Event().wait()
        torch.distributed.all_reduce(torch.ones(1))
        this_rank.note(f"after step {step}")
        print(f"rank {os.environ['RANK']} did step {step}", flush=True)
        time.sleep(0.2)
