"""Optimizer steps of several trainers in turn: each runs its own `train` in a process and waits between its turns.

So what is measured is the trainer's own loop, of our trainer and of TRL's alike, and what else the machine does falls
on all of them. DeepSpeed, accelerate and torch.compile keep facts for a whole process, so trainers do not share one.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils
from transformers import Trainer, TrainerCallback

from csc_train.models.families import count_adapter_parameters, model_dims, training_flops
from csc_train.packing.collator import IGNORE_INDEX
from csc_train.training.memory import estimate_memory, scenario_of

CONTEXT = multiprocessing.get_context("fork")
"""Processes begin with all that is imported; CUDA must not be used before."""


def in_process(action: Callable[[], Any]) -> Any:
    """What an action returns in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send((action(), None))
        except Exception as error:
            sender.send((None, f"{type(error).__name__}: {error}"))

    process = CONTEXT.Process(target=run)
    process.start()
    sender.close()
    try:
        found, failure = receiver.recv()
    except EOFError:
        found, failure = None, "the process ended"
    process.join()
    if failure:
        raise RuntimeError(failure)
    return found


class Step(NamedTuple):
    """A measured optimizer step."""

    seconds: float
    """Logging of the step before, collation, forward and backward pass, clipping, update."""
    graphs: int
    """How many graphs torch.compile made."""
    trained: int
    """Trained tokens."""
    tokens: int
    """Tokens, without padding."""
    flops: float
    """See `training_flops`."""


class SideError(RuntimeError):
    """The training of a side failed."""


class _Ended(Exception):
    """No step is needed any more."""


class Side:
    """A trainer in a process of its own, whose steps are taken turn by turn.

    Attributes:
        facts: what the trainer says of itself: attention, gradient checkpointing, compilation, ZeRO stage; `plan` and
            `memory`, bytes of the planned peak and of the GPU (0 on a CPU, and the plan of TRL's trainer); after
            `close` also `peak`, bytes.
        steps: those that were measured.
        graphs: made by torch.compile in all steps.
    """

    def __init__(self, make: Callable[[str], Trainer], tokens: int):
        """Make the trainer; no step is taken yet.

        Args:
            make: the trainer, given a directory that lasts as long as it does. It trains as many steps as are taken.
            tokens: in a pack, for the memory plan.

        Raises:
            SideError: it cannot be made.
        """
        self.steps: list[Step] = []
        self.graphs = 0
        self._pipe, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(make, tokens, other), daemon=True)
        self._process.start()
        other.close()
        self.facts: dict[str, Any] = self._receive()

    def begin(self, unmeasured: int, measured: int) -> None:
        """Begin a turn: steps of which the first are not counted."""
        self._pipe.send((unmeasured, measured))
        self._unmeasured = unmeasured

    def end(self) -> None:
        """Wait for the end of the turn.

        Raises:
            SideError: the training failed.
        """
        steps = self._receive()
        self.graphs += sum(step.graphs for step in steps)
        self.steps += steps[self._unmeasured :]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(None)
            if self._pipe.poll(60) and isinstance(found := self._pipe.recv(), dict):
                self.facts |= found
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideError(f"the process ended with {self._process.exitcode}") from None
        if isinstance(found, str):
            raise SideError(found)
        return found


@contextlib.contextmanager
def sides_of(
    makers: dict[str, Callable[[str], Trainer]], tokens: int, sides: dict[str, Side] | None = None
) -> Iterator[dict[str, Side]]:
    """The sides by name; they are closed at the end.

    Args:
        tokens: in a pack.
        sides: is filled one by one, so that a maker finds those made before.
    """
    sides = {} if sides is None else sides
    try:
        for name, make in makers.items():
            sides[name] = Side(make, tokens)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def take_turns(sides: dict[str, Side], warm_up: int, turns: int, measured: int, end: float = float("inf")) -> None:
    """Let the sides warm up, together if their plans fit into memory, and then take turns.

    A side frees its cached memory at the end of a turn; the first step of the next one takes it again, uncounted.

    Args:
        warm_up: steps.
        measured: steps in a turn.
        end: by `time.monotonic`; behind it no turn but the first begins.
    """
    plans = [side.facts["plan"] for side in sides.values()]
    memory = max(side.facts["memory"] for side in sides.values())
    if len(plans) * max(plans) < 0.9 * memory:
        for side in sides.values():
            side.begin(warm_up, 0)
        for side in sides.values():
            side.end()
    else:
        for side in sides.values():
            side.begin(warm_up, 0)
            side.end()
    for turn in range(turns):
        if turn == 0 or time.monotonic() < end:
            for side in sides.values():
                side.begin(1, measured)
                side.end()


def _run(make: Callable[[str], Trainer], tokens: int, pipe: Any) -> None:
    """What a side's process does; sends facts, then the steps of each turn, or as text why it failed."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # for DeepSpeed, each side its own
        os.environ["MASTER_PORT"] = str(server.getsockname()[1])
    try:
        with tempfile.TemporaryDirectory() as directory:
            trainer: Any = make(directory)
            trainer.add_callback(_Turns(trainer, pipe))
            pipe.send(_facts(trainer, tokens))
            trainer.train()
    except _Ended:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        pipe.send({"peak": peak})
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _facts(trainer: Any, tokens: int) -> dict[str, Any]:
    arguments = trainer.args
    own = hasattr(arguments, "checkpointing")
    plugin = arguments.deepspeed_plugin
    return {
        "attention": trainer.model.config._attn_implementation,
        "gradient checkpointing": arguments.checkpointing if own else "full" if arguments.activation_checkpointing
        else "off",
        "compiled": arguments.compile if own else "off",
        "ZeRO stage": str(plugin.zero_stage) if plugin else "off",
        "plan": estimate_memory(scenario_of(trainer, tokens)).allocated if own else 0,
        "memory": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0,
    }  # fmt: skip


class _Turns(TrainerCallback):
    """Waits for turns, and records the steps."""

    def __init__(self, trainer: Any, pipe: Any):
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._flops = training_flops(model_dims(model.config), count_adapter_parameters(model))
        self._fetch, trainer.get_batch_samples = trainer.get_batch_samples, self._note_batches
        self._pipe = pipe
        self._batches: list[dict[str, Any]] = []
        self._steps: list[Step] = []
        self._left, self._graphs, self._started = 0, 0, 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Wait for the first turn."""
        self._wait()

    def on_step_end(self, args, state, control, **_) -> None:
        """Record the step; at the end of a turn, send its steps and wait for the next."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, graphs = time.perf_counter() - self._started, _graphs_made() - self._graphs
        self._steps.append(Step(seconds, graphs, *self._work()))
        self._left -= 1
        if not self._left:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._pipe.send(self._steps)
            self._wait()
        self._start()

    def _wait(self) -> None:
        if (turn := self._pipe.recv()) is None:
            raise _Ended
        self._left, self._steps = sum(turn), []
        self._start()

    def _start(self) -> None:
        self._graphs, self._started = _graphs_made(), time.perf_counter()

    def _note_batches(self, *arguments, **options):
        batches, total = self._fetch(*arguments, **options)
        kept = ("labels", "position_ids", "token_and_pair_counts", "attention_mask")
        self._batches = [{name: each[name] for name in kept if name in each} for each in batches]
        return batches, total

    def _work(self) -> tuple[int, int, float]:
        """Trained tokens, tokens and FLOPs of the step."""
        per_token, per_trained, per_pair = self._flops
        trained, tokens, flops = 0, 0, 0.0
        for batch in self._batches:
            scored = int((batch["labels"] != IGNORE_INDEX).sum())
            length, pairs = batch.get("token_and_pair_counts") or _plain_counts(**batch)
            trained, tokens = trained + scored, tokens + int(length)
            flops += per_token * length + per_trained * scored + per_pair * pairs
        return trained, tokens, float(flops)


def _plain_counts(
    labels: torch.Tensor, position_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
) -> tuple[int, float]:
    """Tokens of a batch, and pairs of tokens as `pack_cost` counts them: of documents that begin where positions do,
    else of padded rows."""
    if position_ids is None:
        lengths = (torch.ones_like(labels) if attention_mask is None else attention_mask).sum(1).cpu()
        return int(lengths.sum()), float((lengths.double() ** 2).sum())
    positions = position_ids.flatten().cpu()
    ends = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])])
    return len(positions), float((ends.diff().double() ** 2).sum())


def _graphs_made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
