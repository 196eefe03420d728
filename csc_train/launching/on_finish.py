"""What follows a training, in a process of its own: the evaluation of its checkpoint."""

import os
import sys
from pathlib import Path

import torch

from csc_train.config.cluster import OnFinishConfig
from csc_train.config.compose import compose
from csc_train.config.paths import script_of

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""By which torchrun tells a process that it is one of several; what accelerate adds begins with ACCELERATE_."""


def on_finish_arguments(on_finish: OnFinishConfig, directory: Path) -> list[str]:
    """The arguments of the recipe that follows the training in a run directory; none where nothing follows.

    Raises:
        InputError: the recipe refuses them. So that it is known before the training, ask there.
    """
    if on_finish.recipe is None:
        return []
    arguments = [f"checkpoint={directory}/model", f"run.directory={directory}/evaluation"]
    arguments += ["run.if_exists=reuse", *on_finish.overrides]
    compose(on_finish.recipe, arguments)
    return arguments


def run_on_finish(on_finish: OnFinishConfig, arguments: list[str]) -> None:
    """Become the process of the recipe that follows; called on the main process when nothing is left to do.

    The program is replaced, not started beside this one: so the memory of the training is free, and whoever waits for
    this process (a shell, torchrun, the launcher) gets the recipe's exit status and sends it his signals.

    Args:
        arguments: as `on_finish_arguments` returns them; nothing happens where there are none.
    """
    if not arguments:
        return
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith("ACCELERATE_")
    }
    script = str(script_of(on_finish.recipe))
    print(f"on_finish: {script} {' '.join(arguments)}", flush=True)
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, script, *arguments], environment)
