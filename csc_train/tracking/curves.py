"""The curves of a training as one picture."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from csc_train.files import atomic_path

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("loss by strategy, nats per token", "loss_by_strategy/"),
    ("loss by turn of the dialogue, nats per token", "loss_by_turn/"),
    ("share of tokens that are the first choice", ("accuracy_strategy_tokens", "accuracy_reply_tokens")),
    ("gradient norm", ("grad_norm",)),
    ("trained tokens a second", ("trained_tokens_per_second",)),
)
"""Title, and the figures of a history that it shows, or what their names begin with."""


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw the figures of a history over the optimizer steps.

    Args:
        path: the picture to write; its suffix chooses the format.
        history: a mapping of figures for each log line, with its `step`.

    Raises:
        InputError: it cannot be written.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    names = list(dict.fromkeys(name for line in history for name in line))
    colours = matplotlib.colormaps["tab20"].colors
    for axes, (title, chosen) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        family = isinstance(chosen, str)
        shown = [name for name in names if name.startswith(chosen)] if family else [n for n in chosen if n in names]
        for name, colour in zip(shown, colours, strict=False):
            points = [(line["step"], line[name]) for line in history if name in line]
            axes.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], color=colour, linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        if len(shown) > 1:
            axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
