"""Start another recipe when a training ends: the evaluation of its final model."""

import os
import shlex
import sys
from pathlib import Path

import torch

from csc_train.config.cluster import OnFinishConfig
from csc_train.config.compose import compose
from csc_train.config.paths import script_of
from csc_train.overrides import argument
from csc_train.runs.claim import pass_on

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets for each rank; accelerate adds others that begin with ACCELERATE_."""


def on_finish_arguments(on_finish: OnFinishConfig, directory: Path) -> list[str]:
    """The command line of the next recipe, for the training in a run directory; empty if there is no next recipe.

    Raises:
        InputError: the next recipe refuses these arguments. Call this before the training to learn it early.
    """
    if on_finish.recipe is None:
        return []
    arguments = [argument("checkpoint", directory / "model"), argument("run.directory", directory / "evaluation")]
    arguments += ["run.if_exists=resume", *on_finish.overrides]
    compose(on_finish.recipe, arguments)
    return arguments


def run_on_finish(on_finish: OnFinishConfig, arguments: list[str]) -> None:
    """Replace this process by the next recipe. Call it last, on the main process.

    `exec` frees the training's memory, and the parent (a shell, torchrun, a launcher) gets the recipe's exit status.

    Args:
        arguments: the result of `on_finish_arguments`; nothing happens if it is empty.
    """
    if on_finish.recipe is None or not arguments:
        return
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    kept = (name for name in os.environ if name not in RANK_VARIABLES and not name.startswith("ACCELERATE_"))
    environment = {name: os.environ[name] for name in kept}
    pass_on(environment)
    script = str(script_of(on_finish.recipe))
    print(f"on_finish: {script} {shlex.join(arguments)}", flush=True)
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, script, *arguments], environment)
