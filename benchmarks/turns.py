"""Optimizer steps of several trainers in turn: each runs its own `train` in a thread and waits after each step.

So what is measured is the trainer's own loop, of our trainer and of TRL's alike, and what else the machine does falls
on all of them. At any time one thread works and the others wait.
"""

import contextlib
import contextvars
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from csc_train.models.families import count_adapter_parameters, model_dims, training_flops
from csc_train.packing.collator import IGNORE_INDEX


class _Cancelled(Exception):
    """The training is not needed any more."""


class Side(TrainerCallback):
    """A trainer whose steps are taken one by one.

    Attributes:
        seconds: of each step: logging of the one before (of the first: preparing), collation, forward and backward
            pass, clipping, update.
        graphs: of each step, how many graphs torch.compile made.
    """

    def __init__(self, make: Callable[[str], Trainer]):
        """Make the trainer; no step is taken yet.

        Args:
            make: the trainer, given a directory that lasts as long as it does. It trains as many steps as are taken.
        """
        self._directory = tempfile.TemporaryDirectory()
        self.trainer: Any = make(self._directory.name)
        self.trainer.add_callback(self)
        self._batches: list[dict[str, torch.Tensor]] = []
        self._fetch, self.trainer.get_batch_samples = self.trainer.get_batch_samples, self._record_batches
        self.seconds: list[float] = []
        self.graphs: list[int] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        # With the settings of torch's compilers as they are here: each thread has its own.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._train,), daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Take one step.

        Raises:
            whatever the training raised.
        """
        graphs, started = graphs_made(), time.perf_counter()
        self._go.release()
        self._done.acquire()
        self.seconds.append(time.perf_counter() - started)
        self.graphs.append(graphs_made() - graphs)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the training, and let go of the model."""
        self._cancelled = True
        self._go.release()
        self._thread.join()
        del self.trainer, self._fetch
        self._directory.cleanup()

    def work(self) -> list[tuple[int, int, float]]:
        """Of each step: trained tokens, tokens, and FLOPs (see `training_flops`; each row of a batch is one pack)."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        per_token, per_trained, per_pair = training_flops(model_dims(model.config), count_adapter_parameters(model))
        done = []
        for batch in self._batches[: len(self.seconds)]:
            trained = int((batch["labels"] != IGNORE_INDEX).sum())
            tokens, pairs = batch.get("token_and_pair_counts") or _plain_counts(batch)
            done.append((trained, int(tokens), per_token * tokens + per_trained * trained + per_pair * pairs))
        return done

    def on_step_end(self, args, state, control, **_) -> None:
        """End the turn, and wait for the next one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def _train(self) -> None:
        try:
            self._wait()
            self.trainer.train()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _record_batches(self, *arguments, **options):
        batches, total = self._fetch(*arguments, **options)
        kept = ("labels", "position_ids", "token_and_pair_counts")
        self._batches += [{name: batch[name] for name in kept if name in batch} for batch in batches]
        return batches, total


def _plain_counts(batch: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Tokens of a row, and pairs of tokens as `pack_cost` counts them, from the starts of its documents."""
    positions = batch["position_ids"].flatten().cpu()
    ends = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])])
    return len(positions), float((ends.diff().double() ** 2).sum())


@contextlib.contextmanager
def sides_of(makers: dict[str, Callable[[str], Trainer]]) -> Iterator[dict[str, Side]]:
    """The sides by name; they are closed at the end."""
    sides: dict[str, Side] = {}
    try:
        for name, make in makers.items():
            sides[name] = Side(make)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def graphs_made() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
