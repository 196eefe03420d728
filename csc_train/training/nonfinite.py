"""Losses, gradients and weights that are not finite: found by all ranks alike, named by pack and dialogue.

A loss that is not finite on any rank makes the gradient norm of all ranks not finite. So every rank knows of it before
the optimizer step without further communication.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from csc_train.packing.dataset import PackedDataset
from csc_train.packing.pack_cost import PackSlice

MAX_IN_A_ROW = 10
"""So many steps in a row without a finite gradient norm end a training in any case."""
MAX_NAMED = 8
"""Packs, and dialogues of a pack, that a message names."""


def spread_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, unchanged if it is finite; else NaN, with gradients of NaN."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def describe_step(trainer: Any, losses: Sequence[torch.Tensor]) -> str:
    """What is not finite in the present optimizer step of a `PackTrainer`, and in which packs.

    Every process calls this.

    Args:
        losses: of this process's forward passes in the step.

    Returns:
        The packs with such a loss; if there are none, the gradient norm and all packs of the step.
    """
    broken = gather_object([not math.isfinite(loss) for loss in losses])
    packs, in_loss = trainer.packs, any(broken)
    epoch, step = divmod(trainer.state.global_step, math.ceil(len(packs) / trainer.args.packs_per_step))
    _, ranks = next(itertools.islice(trainer.batch_sampler().assigned(epoch), step, None))
    passes = zip(itertools.chain(*ranks), broken, strict=True)
    parts = [part for slices, flag in passes for part in slices if flag or not in_loss]
    named = _some([_named(packs, part) for part in sorted(parts, key=lambda part: (part.pack, part.start))])
    what = "the loss is" if in_loss else "the gradient norm, not the loss, is"
    return f"step {trainer.state.global_step + 1}: {what} not finite in {named}"


def _named(packs: PackedDataset, part: PackSlice) -> str:
    dialogues = [packs.dialogues[item.dialogue].id for item in packs.pack_items[part.pack][part.start : part.stop]]
    return f"pack {part.pack} (dialogues {_some(dialogues)})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def weights_are_finite(trainer: Any) -> bool:
    """Whether all trained weights of all processes are finite; every process calls this.

    Under ZeRO stage 3 each process looks at its shards.
    """
    weights = [getattr(each, "ds_tensor", each) for each in trainer.model.parameters() if each.requires_grad]
    broken = sum((~weight.detach().isfinite()).any().to(trainer.args.device, torch.float32) for weight in weights)
    total: Any = trainer.accelerator.reduce(broken)
    return total.item() == 0
