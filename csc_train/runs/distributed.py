"""The processes (ranks) of a run: their state, the exchange of objects, and the end with their parent."""

import ctypes
import datetime
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError
from csc_train.runs.heartbeat import this_rank
from csc_train.runs.imports import import_lean

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)
LONGEST_WAIT_S = 7200
"""Seconds that ranks wait for each other: the main one writes up to hundreds of gigabytes."""
LAST_WAIT_S = 30
"""Seconds that a rank which ends waits for the others."""
NCCL_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process when a collective call fails or takes too long
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",  # then also if NCCL's own thread hangs
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # what each rank last called, for torch's flight recorder
    "TORCH_FR_BUFFER_SIZE": "2000",
}
"""How NCCL ends a job that hangs. The user's environment goes first."""


def distributed_state() -> "PartialState":
    """Rank and world size of this process; the first call starts the process group."""
    import_lean("accelerate", "transformers")
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:
        return PartialState()
    gpu = torch.cuda.is_available()
    _quiet_libraries(gpu)
    os.environ.update(NCCL_VARIABLES | os.environ)
    # Without `cpu`, ranks on a machine without a GPU would not find each other and would train apart.
    longest = max(LONGEST_WAIT_S, this_rank.timeout_s)
    state = PartialState(cpu=not gpu, timeout=datetime.timedelta(seconds=longest))
    if state.num_processes > 1:
        default: Any = torch.distributed.distributed_c10d._get_default_store()
        this_rank.start(state.process_index, state.num_processes, default.clone())
        nccl = ", ".join(f"{name}={os.environ[name]}" for name in NCCL_VARIABLES) if gpu else "none for gloo"
        ends = f"one that does not answer for {this_rank.timeout_s} s ends the job, or one call of {longest} s"
        logger.info(f"{state.num_processes} ranks: {ends}; NCCL's own: {nccl}")
    return state


def _quiet_libraries(gpu: bool) -> None:
    """Silence start-up warnings of libraries that need no action (see also `config.cli.run_recipe`)."""
    from transformers.utils import logging as transformers_logging

    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def world_size() -> int:
    """Number of processes that torchrun or accelerate started; starts no process group and imports nothing."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_single_process(recipe: str) -> None:
    """Raise an InputError if torchrun or accelerate started the recipe with more than one process."""
    if distributed_state().num_processes > 1:
        raise InputError(f"recipes/{recipe}.py runs as one process: start it with python")


def broadcast_object(value: Any) -> Any:
    """The main process's `value`, on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if distributed_state().num_processes > 1 else value


def tell_main(key: str, value: bytes, ending: threading.Event) -> list[bytes]:
    """The values that all ranks tell the main one, in a thread: through the store in which they have met.

    Args:
        key: of all ranks; used once.
        ending: set when this rank ends, so that others may never answer.

    Returns:
        The values by rank on the main process, else none.

    Raises:
        InputError: a rank has not answered in `LONGEST_WAIT_S`, or in `LAST_WAIT_S` once this one ends.
    """
    state = distributed_state()
    if state.num_processes == 1:
        return [value]
    import torch

    default: Any = torch.distributed.distributed_c10d._get_default_store()
    store = default.clone()  # which a thread may block
    keys = [f"{key}/{rank}" for rank in range(state.num_processes)]
    store.set(keys[state.process_index], value)
    if not state.is_main_process:
        return []
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not store.check(keys):
        if ending.wait(0.05):
            deadline = min(deadline, time.monotonic() + LAST_WAIT_S)
            time.sleep(0.05)
        if time.monotonic() > deadline:
            raise InputError(f"{key}: a rank has not answered: look at its machine")
    values = [store.get(each) for each in keys]
    for each in keys:
        store.delete_key(each)
    return values


def on_main(function: Callable[[], Any]) -> Any:
    """The result of a function that the main process calls, on every process.

    Raises:
        InputError: the function raised it; every process ends with it, and none waits for the main one.
    """
    result: Any = None
    if distributed_state().is_main_process:
        try:
            result = function()
        except InputError as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, InputError):
        raise result
    return result


def set_parent_death_signal(signum: int = signal.SIGTERM) -> None:
    """Let the system send this process `signum` when its parent process ends, for any reason (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


def exit_with_launcher() -> None:
    """End this process when the torchrun that started it ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


def record_failure(error: Exception) -> None:
    """Pass the traceback to the torchrun that started this process; it reports the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
