"""Plot the history of a training: loss, accuracy, gradient norm and speed over the optimizer steps."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from csc_train.files import atomic_path

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("loss by strategy, nats per token", "loss_by_strategy/"),
    ("loss by turn of the dialogue, nats per token", "loss_by_turn/"),
    ("top-1 accuracy of tokens", ("accuracy_strategy_tokens", "accuracy_reply_tokens")),
    ("gradient norm", ("grad_norm",)),
    ("trained tokens per second", ("trained_tokens_per_second",)),
)
"""Title of each panel, and the names of its metrics or their common prefix."""


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Plot the metrics of a history over the optimizer steps.

    Args:
        path: the image to write; its suffix chooses the format.
        history: rows of metrics, each with its `step`.

    Raises:
        InputError: the image cannot be written.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    names = list(dict.fromkeys(name for row in history for name in row))
    colors = matplotlib.colormaps["tab20"](range(20))
    for axes, (title, chosen) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        shown = [name for name in names if name.startswith(chosen)] if isinstance(chosen, str) else chosen
        for name, color in zip(shown, colors, strict=False):
            if points := [(row["step"], row[name]) for row in history if name in row]:
                axes.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], color=color, linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
