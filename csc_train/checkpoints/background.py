"""Write training checkpoints in a thread while training goes on: the state is copied first.

The libraries' own writers make the files, so a checkpoint has the same form and bytes whether training waits or not,
and appears whole or not at all. torch.distributed.checkpoint writes another form, which neither a resume under another
ZeRO stage nor an export reads; DeepSpeed's decoupled engine leaves out the weights that the Trainer writes.
"""

import contextlib
import copy
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers.modeling_utils
from torch.utils._pytree import tree_leaves

from csc_train.checkpoints.training_checkpoint import FileStamp, files_written_by, remove_partial, stamp_files
from csc_train.errors import InputError
from csc_train.files import os_errors
from csc_train.runs.distributed import tell_main

WRITERS = (
    (torch, "save"), (transformers.modeling_utils, "safe_save_file"), (peft.peft_model, "safe_save_file"),
)  # fmt: skip
"""Functions (state, path, ...) by which the Trainer, DeepSpeed and PEFT write tensors."""
logger = logging.getLogger(__name__)
_numbers = itertools.count()  # of saves, the same on all ranks


class HostCopies:
    """Copies of states in host memory, which each save uses again: memory is slow when it is new."""

    def __init__(self):
        self._kept: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, name: str, state: Any) -> Any:
        """A copy of a state, which lasts until the next of this name: nested lists and mappings with tensors."""
        memo, kept = {}, {}
        for each in tree_leaves(state):
            if isinstance(each, torch.Tensor):
                # Tied weights are several tensors of one memory, which a file has once.
                place = (each.data_ptr() or id(each), each.dtype, each.shape, each.stride())
                if place not in kept:
                    kept[place] = self._copy((name, len(kept)), each.detach())
                memo[id(each)] = kept[place]
        return copy.deepcopy(state, memo)

    def _copy(self, key: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            kept = self._kept[key] = torch.empty_like(tensor, device="cpu")
        return kept.copy_(tensor)


@contextlib.contextmanager
def deferred_writes(copies: HostCopies | None) -> Iterator[list[Callable[[], None]]]:
    """Collect what would be written with tensors, as calls that write them; all else is written at once.

    Args:
        copies: keeps copies for the calls to write; None lets them write the tensors themselves.
    """
    writes: list[Callable[[], None]] = []

    def defer(write: Callable[..., None], state: Any, path: Any, *arguments: Any, **options: Any) -> None:
        if any(isinstance(each, torch.Tensor) for each in tree_leaves(state)):
            held = copies.take(Path(path).name, state) if copies else state
            writes.append(partial(write, held, path, *arguments, **options))
        else:
            write(state, path, *arguments, **options)

    originals = [getattr(module, name) for module, name in WRITERS]
    try:
        for (module, name), write in zip(WRITERS, originals, strict=True):
            setattr(module, name, partial(defer, write))
        yield writes
    finally:
        for (module, name), write in zip(WRITERS, originals, strict=True):
            setattr(module, name, write)


def reason_of(error: BaseException) -> str:
    """The message of an error; one out of memory has none, and gives its name."""
    return str(error) or repr(error)


class CheckpointWriter:
    """Writes the checkpoints of a training, one at a time, in a thread of each rank.

    The thread takes part in no collective call, since those of the training go on: the ranks tell the main one through
    their store that they have written their files, and it commits the checkpoint.

    Attributes:
        step: of the checkpoint that is being written; None if there is none.
    """

    def __init__(self, rank: int, ranks: int):
        self.step: int | None = None
        self._rank, self._ranks = rank, ranks
        self._copies, self._pool = HostCopies(), ThreadPoolExecutor(1, "checkpoint")
        self._future: Future[None] = Future()
        self._held = False
        self._writes: list[Callable[[], None]] = []
        self._ending = threading.Event()

    @contextlib.contextmanager
    def hold(self, copied: bool) -> Iterator[None]:
        """Keep the tensors that are saved here for `start` to write, or a copy, if training does not wait for it."""
        self._held = copied
        with deferred_writes(self._copies if copied else None) as self._writes:
            yield

    def start(self, step: int, written: Path, finish: Callable[[dict[str, FileStamp]], None]) -> None:
        """Begin to write what was held, and to hash the files.

        Args:
            written: the directory of the checkpoint in `PARTIAL_FOLDER`.
            finish: commits the checkpoint; the main process calls it with the files of all.
        """
        writes, self._writes = self._writes, []
        self.step = step
        self._future = self._pool.submit(self._write, f"checkpoint/{next(_numbers)}", writes, written, finish)

    def _write(self, key: str, writes: list[Callable[[], None]], written: Path, finish: Callable[[Any], None]) -> None:
        directory, stamps, failed = written.parent.parent, {}, None
        try:
            with os_errors(directory, "cannot write"):
                for write in writes:
                    write()
                stamps = stamp_files(written, files_written_by(self._rank, written, self._ranks))
        except Exception as error:
            failed = error
        reports = tell_main(key, pickle.dumps((stamps, failed and reason_of(failed))), self._ending)
        try:
            if failed:
                raise failed
            for rank, (stamped, message) in enumerate(map(pickle.loads, reports)):
                if message:
                    raise InputError(f"rank {rank}: {message}")
                stamps |= stamped
            if self._rank == 0:
                with os_errors(directory, "cannot write"):
                    finish(stamps)
        except Exception:
            if self._rank == 0:
                remove_partial(directory)  # makes room on a full disk
            raise

    def done(self) -> bool:
        """Whether this rank has written its files; the main one, whether the checkpoint is there."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until `done`."""
        if self._held and not self.done():
            logger.info(f"waiting for the checkpoint of step {self.step}, which is still being written")
        wait([self._future])

    def error(self) -> BaseException | None:
        """Why the checkpoint was not written; None if it was, or is not `done`."""
        return self._future.exception() if self.done() else None

    def end(self) -> None:
        """Free the copies; after an error, which other ranks may lack, wait for the checkpoint in progress."""
        self._copies = HostCopies()
        if self.step is not None:
            self._ending.set()
            self.wait()
            if error := self.error():
                logger.info(f"note: the checkpoint of step {self.step} was not saved: {reason_of(error)}")
