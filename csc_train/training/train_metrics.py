"""Metrics of training steps: losses and accuracies by group of tokens, speed, rank skew, MFU, memory.

They are reduced over the processes once for each log entry. None of them enters the gradient.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from csc_train.data.strategies import STRATEGIES
from csc_train.packing.token_groups import GROUP_SHAPE, NUM_GROUPS, REPLY_PARTS, TURN_BUCKETS
from csc_train.templates import read_yaml
from csc_train.training.loss import TokenScores

GIB = 1024**3
PEAK_TFLOPS = read_yaml(__package__, "peak_tflops.yaml")
"""Dense bf16 TFLOP/s by device name, from the data sheets; the first name that is part of the device's counts."""


class TrainMetrics:
    """The metrics of the steps since the last `compute`, on this process.

    - `loss_*`, `accuracy_*`: mean negative log-likelihood and top-1 accuracy of the trained tokens of a group,
      unweighted. Groups: part of the reply, strategy, turns of the dialogue so far (of both speakers), source of a mix.
    - `entropy`, `mean_token_accuracy`: mean entropy of the predictions, and top-1 accuracy, of all trained tokens,
      unweighted.
    - `aux_loss`: the auxiliary loss of routers (see `training.loss.score_routers`), without its coefficient.
      `expert_load`: choices of the most chosen expert / of the mean expert. `unused_experts`: share of the experts that
      no token chose. Means over the layers; by layer `aux_loss_by_layer/N`, `expert_load/N` and `unused_experts/N`.
      A token of a shared prefix counts for each dialogue behind it.
    - `trained_tokens_per_second`, `tokens_per_second`: of all processes, over the wall time without validation and
      saving. Padding does not count; a prefix that both slices of a split pack repeat counts twice.
    - `trained_share`: trained tokens / tokens.
    - `step_seconds`: wall time per optimizer step. `data_wait_seconds`: the part of it in which the slowest loader had
      no batch.
    - `rank_skew`: time in forward passes, of the slowest process / of the mean process. Forward passes do not wait for
      other processes, except under ZeRO stage 3.
    - `mfu`: the model's FLOPs (see `models.families.training_flops`) / `PEAK_TFLOPS`; only in bf16 on a known GPU.
    - `memory_allocated_gib`, `memory_reserved_gib`: PyTorch's peak since the start, the largest of all GPUs.
    """

    def __init__(
        self, flops: tuple[float, float, float], device: torch.device, bf16: bool, sources: Sequence[str] = ("",)
    ):
        """Start without steps.

        Args:
            flops: per token, trained token and token pair, as `models.families.training_flops` returns them.
            device: of this process.
            bf16: whether matrices are multiplied in bf16.
            sources: the names of the sources of a mix of data.
        """
        self.flops, self.device, self.sources = flops, device, sources
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        # By token group: tokens, sum of their negative log-likelihoods, number of top-1 hits, sum of entropies.
        self._sums = torch.zeros(4, len(self.sources) * NUM_GROUPS, dtype=torch.float64, device=self.device)
        # By layer with experts: sum of the weighted balance losses, of their weights, choices of each expert.
        self._routers: torch.Tensor | None = None
        self._counts = [0.0, 0.0]  # tokens, token pairs
        self._steps, self._waited, self._forward = 0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    def start_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of an optimizer step, and measure the waiting time."""
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
    def time_forward(self) -> Iterator[None]:
        """Time a forward pass: on a GPU by events, without synchronizing."""
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

    def update(self, scores: TokenScores, groups: torch.Tensor, counts: tuple[float, float]) -> None:
        """Add a micro batch, without waiting for the device.

        Args:
            scores: of its n trained tokens.
            groups: int16 [n] (see `packing.token_groups`).
            counts: its tokens and token pairs.
        """
        ones = torch.ones_like(scores.log_probs)
        values = torch.stack([ones, -scores.log_probs, scores.is_top1.to(ones), scores.entropy])
        self._sums.index_add_(1, groups.long(), values.double())
        if router := scores.router:
            weights = router.weight.expand_as(router.losses)
            more = torch.cat([torch.stack([router.losses.detach(), weights], dim=1), router.choices], dim=1).double()
            self._routers = more if self._routers is None else self._routers + more
        self._counts = [total + more for total, more in zip(self._counts, counts, strict=True)]

    def exclude(self, start: float) -> None:
        """Exclude the time since `start` (by `time.perf_counter`), or since the last `compute` if that was later."""
        self._since += time.perf_counter() - max(start, self._since)

    def compute(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The metrics of all processes, then `reset`; every process calls this after the same step.

        Args:
            gather: maps [1, n] of this process to [processes, n].
        """
        seconds = time.perf_counter() - self._since
        forward = self._forward + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        cuda = self.device.type == "cuda"
        peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
        own = torch.tensor([*self._counts, seconds, self._waited, forward, *peaks], dtype=torch.float64)
        routers = self._sums.new_empty(0, 0) if self._routers is None else self._routers
        rows = gather(torch.cat([self._sums.flatten(), own.to(self.device), routers.flatten()])[None]).cpu()
        grouped, measured, routed = rows.split([self._sums.numel(), len(own), routers.numel()], dim=1)
        by_source = grouped.sum(dim=0).view(4, -1, NUM_GROUPS)[..., 1:]
        sums = by_source.sum(dim=1).view(4, *GROUP_SHAPE)
        tokens, pairs, all_seconds, waited, forward, allocated, reserved = measured.unbind(dim=1)
        seconds, steps = all_seconds.max().item(), max(self._steps, 1)
        trained, _, hits, entropy = sums.flatten(1).sum(dim=1).tolist()
        metrics = token_metrics(sums[:3])
        if len(self.sources) > 1:
            metrics |= source_metrics(by_source[:3].sum(dim=-1), self.sources)
        metrics |= {
            "entropy": entropy / trained,
            "mean_token_accuracy": hits / trained,
            "trained_tokens_per_second": trained / seconds,
            "tokens_per_second": tokens.sum().item() / seconds,
            "trained_share": trained / tokens.sum().item(),
            "step_seconds": seconds / steps,
            "data_wait_seconds": waited.max().item() / steps,
            "rank_skew": (forward.max() / forward.mean()).item(),
        }
        if routers.numel():
            metrics |= router_metrics(routed.sum(dim=0).view(routers.shape))
        if self.peak:
            done = sum(flops * n for flops, n in zip(self.flops, (tokens.sum(), trained, pairs.sum()), strict=True))
            metrics["mfu"] = float(done) / (seconds * len(rows) * self.peak)
        if cuda:
            metrics["memory_allocated_gib"] = allocated.max().item() / GIB
            metrics["memory_reserved_gib"] = reserved.max().item() / GIB
        self.reset()
        return metrics


def token_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Mean losses and accuracies by group; groups without tokens are left out.

    Args:
        sums: [3, *GROUP_SHAPE]; tokens, sum of their negative log-likelihoods, number of top-1 hits.
    """
    metrics = {}

    def add(name: str, group: torch.Tensor, accuracy: bool = False) -> None:
        count, loss, hits = group.flatten(1).sum(dim=1).tolist()
        if count:
            metrics[f"loss_{name}"] = loss / count
            if accuracy:
                metrics[f"accuracy_{name}"] = hits / count

    for index, part in enumerate(REPLY_PARTS.values()):
        add(f"{part}_tokens", sums[:, index], accuracy=True)
    for strategy in STRATEGIES:
        add(f"by_strategy/{strategy.en}", sums[:, :, strategy.number])
    for index, bucket in enumerate(TURN_BUCKETS):
        add(f"by_turn/{bucket}", sums[..., index])
    return metrics


def source_metrics(sums: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean losses and accuracies by source of a mix, and its share of the trained tokens; as in `token_metrics`.

    Args:
        sums: [3, sources].
    """
    metrics = {}
    for name, (count, loss, hits) in zip(names, sums.T.tolist(), strict=True):
        metrics[f"token_share_by_source/{name}"] = count / sums[0].sum().item()
        if count:
            metrics |= {f"loss_by_source/{name}": loss / count, f"accuracy_by_source/{name}": hits / count}
    return metrics


def router_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Auxiliary loss, expert load and share of unused experts, the means over the layers first.

    Args:
        sums: [layers, 2 + experts]; of the weighted balance losses, of their weights, choices of each expert.
    """
    choices = sums[:, 2:]
    by_layer = {
        ("aux_loss", "aux_loss_by_layer"): sums[:, 0] / sums[:, 1],
        ("expert_load",) * 2: choices.amax(dim=1) / choices.mean(dim=1),
        ("unused_experts",) * 2: (choices == 0).double().mean(dim=1),
    }
    metrics = {name: values.mean().item() for (name, _), values in by_layer.items()}
    for (_, name), values in by_layer.items():
        metrics |= {f"{name}/{layer}": value for layer, value in enumerate(values.tolist())}
    return metrics


def peak_flops(device: str) -> float | None:
    """Peak FLOP/s of a device in bf16, by its name; None if it is unknown."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device), None)
