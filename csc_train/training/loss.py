"""The training loss: the weighted mean of the token losses over the global batch.

loss = sum(weight * nll) / sum(weight), both sums over the trained tokens of all micro batches and processes of an
optimizer step. So neither the micro batch size nor the number of processes changes the gradient. The weights are those
of a registered `loss.weighting` (see `packing.loss_weights`).
"""

from collections.abc import Iterable
from typing import Any

import torch


def weight_log_probs(outputs: Any, loss_weights: torch.Tensor) -> Any:
    """Scale the token losses of TRL's fused head, which sums them into the loss.

    Args:
        outputs: with `log_probs`, float [rows, length - 1].
        loss_weights: float [rows, length]; of predicting each token, 0 for context.
    """
    outputs.log_probs = outputs.log_probs * loss_weights[:, 1:]
    return outputs


def normalize_loss(loss: torch.Tensor, total_weight: torch.Tensor) -> torch.Tensor:
    """Undo TRL's division by at least one: it expects a token count, while weights may sum to less."""
    return loss * (total_weight.clamp(min=1) / total_weight)


def sum_weights(batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The sum of the loss weights of batches, summed in float64; float32 scalar on `device`."""
    total: Any = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in batches)
    return total.to(device, torch.float32)
