"""What a training is measured by beside its loss: figures of every log line, reduced over the processes once for each.

Nothing here enters the gradient: losses are bitwise those of a training that is not measured.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from csc_train.data.strategies import STRATEGIES
from csc_train.packing.token_groups import GROUP_SHAPE, NUM_GROUPS, REPLY_PARTS, TURN_BUCKETS

GIB = 1024**3
PEAK_TFLOPS = (
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H200 NVL", 835), ("H100", 989), ("H200", 989), ("H800", 989),
    ("A100", 312), ("A800", 312), ("L40S", 362), ("L4", 121), ("A10", 125), ("4090", 165),
)  # fmt: skip
"""Dense bf16 TFLOP/s by the data sheets, for the first part of a device's name that fits."""


class TrainMetrics:
    """The figures of the steps since they were last read, of this process.

    - `loss_*` and `accuracy_*`: mean negative log-likelihood, and share of tokens that are the model's first choice,
      over the trained tokens of a kind, unweighted: by part of the reply, strategy, and turns of the dialogue (both
      speakers counted).
    - `trained_tokens_per_second`, `tokens_per_second`: of all processes, over the wall time without evaluation and
      saving; padding does not count, a prefix that both parts of a cut pack repeat counts twice. `trained_share`: the
      former over the latter.
    - `step_seconds`: the same wall time by optimizer step; `data_wait_seconds`: how much of it the process that waited
      longest had no batch.
    - `rank_skew`: the time in forward passes of the slowest process over that of the mean process. Forward passes do
      not wait for the other processes, except under ZeRO stage 3.
    - `mfu`: FLOPs of the model by `training_flops` over what the GPUs could do at most (`PEAK_TFLOPS`); bf16 on a known
      GPU alone.
    - `memory_allocated_gib`, `memory_reserved_gib`: PyTorch's peaks since the start, on the process that has most; on
      a GPU alone.
    """

    def __init__(self, flops: tuple[float, float, float], device: torch.device, bf16: bool):
        """Begin with nothing.

        Args:
            flops: as `training_flops` returns them.
            device: of this process.
            bf16: whether matrices are multiplied in bf16.
        """
        self.flops, self.device = flops, device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        # By cell: tokens, sum of their negative log-likelihoods, and how many are the model's first choice.
        self._sums = torch.zeros(3, NUM_GROUPS, dtype=torch.float64, device=self.device)
        self._work = [0.0, 0.0]
        self._steps, self._waited, self._forward = 0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    def step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an optimizer step, with the time that they take to come."""
        self._steps += 1
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass: on a GPU by events, without waiting for it."""
        if self.device.type == "cuda":
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._forward += time.perf_counter() - start

    def count(self, outputs: Any, cells: torch.Tensor, work: tuple[float, float]) -> None:
        """Add a micro batch.

        Args:
            outputs: of TRL's fused head: `log_probs` and `is_top1`, [rows, length - 1].
            cells: uint8 [rows, length] (see `packing.cells`).
            work: its tokens, and pairs of tokens.
        """
        cell = cells[:, 1:].flatten().long()
        log_probs = outputs.log_probs.detach().flatten().double()
        counted = torch.stack([torch.ones_like(log_probs), -log_probs, outputs.is_top1.flatten().double()])
        self._sums.index_add_(1, cell, counted)
        self._work = [total + more for total, more in zip(self._work, work, strict=True)]

    def leave_out(self, start: float) -> None:
        """What was done since `start` (by `time.perf_counter`) and since the last reading is no training."""
        self._since += time.perf_counter() - max(start, self._since)

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The figures of all processes; then begin anew. Called on every process, after the same step.

        Args:
            gather: the rows [1, n] of all processes, as [processes, n].
        """
        seconds = time.perf_counter() - self._since
        forward = self._forward + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        cuda = self.device.type == "cuda"
        peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
        own = torch.tensor([*self._work, seconds, self._waited, forward, *peaks], dtype=torch.float64)
        rows = gather(torch.cat([self._sums.flatten(), own.to(self.device)])[None]).cpu()
        sums = rows[:, : 3 * NUM_GROUPS].sum(dim=0).view(3, NUM_GROUPS)[:, 1:].view(3, *GROUP_SHAPE)
        tokens, pairs, seconds_of, waited, forward, allocated, reserved = rows[:, 3 * NUM_GROUPS :].unbind(dim=1)
        seconds, steps, trained = seconds_of.max().item(), max(self._steps, 1), sums[0].sum().item()
        figures = token_metrics(sums)
        figures |= {
            "trained_tokens_per_second": trained / seconds,
            "tokens_per_second": tokens.sum().item() / seconds,
            "trained_share": trained / tokens.sum().item(),
            "step_seconds": seconds / steps,
            "data_wait_seconds": waited.max().item() / steps,
            "rank_skew": (forward.max() / forward.mean()).item(),
        }
        if self.peak:
            done = sum(flops * n for flops, n in zip(self.flops, (tokens.sum(), trained, pairs.sum()), strict=True))
            figures["mfu"] = float(done) / (seconds * len(rows) * self.peak)
        if cuda:
            figures["memory_allocated_gib"] = allocated.max().item() / GIB
            figures["memory_reserved_gib"] = reserved.max().item() / GIB
        self.forget()
        return figures


def token_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Mean losses and accuracies by name; those of kinds that did not occur are left out.

    Args:
        sums: [3, *packing.cells.SHAPE]; tokens, their summed negative log-likelihood, and how many of them are the
            model's first choice.
    """
    figures = {}

    def add(name: str, of: torch.Tensor, accuracy: bool = False) -> None:
        count, loss, first = of.flatten(1).sum(dim=1).tolist()
        if count:
            figures[f"loss_{name}"] = loss / count
            if accuracy:
                figures[f"accuracy_{name}"] = first / count

    for index, part in enumerate(REPLY_PARTS.values()):
        add(f"{part}_tokens", sums[:, index], accuracy=True)
    for strategy in STRATEGIES:
        add(f"by_strategy/{strategy.en}", sums[:, :, strategy.number - 1])
    for index, stretch in enumerate(TURN_BUCKETS):
        add(f"by_turn/{stretch}", sums[..., index])
    return figures


def peak_flops(device: str) -> float | None:
    """The most FLOP/s of a device in bf16, by its name; None for one that is not known."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS if name in device), None)
