"""Find the model that a path means: a run directory, a final model, an exported directory or a training checkpoint."""

from pathlib import Path

from csc_train.checkpoints.manifest import MANIFEST_FILE
from csc_train.checkpoints.training_checkpoint import CHECKPOINT_FILE, TRAINER_STATE, check_whole, newest_whole
from csc_train.errors import InputError

MODEL_FOLDER, CHECKPOINTS_FOLDER = "model", "checkpoints"


def is_model(directory: Path) -> bool:
    """Whether a directory is a final model or an exported one."""
    return (directory / MANIFEST_FILE).is_file() and (directory / "config.json").is_file()


def locate_checkpoint(path: str, training: bool = False) -> Path:
    """The model directory or the training checkpoint that `path` means.

    Args:
        path: one of them, or a run directory: its final model, or its newest whole training checkpoint.
        training: prefer the training checkpoint of a run directory.

    Raises:
        InputError: there is none, which says what the path holds; or a training checkpoint is damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory")
    if is_model(directory):
        return directory
    if any((directory / name).is_file() for name in (CHECKPOINT_FILE, TRAINER_STATE)):
        check_whole(directory)
        return directory
    has_model = is_model(directory / MODEL_FOLDER)
    if (training or not has_model) and (latest := newest_whole(directory / CHECKPOINTS_FOLDER)):
        return latest
    if has_model:
        return directory / MODEL_FOLDER
    held = sorted(entry.name for entry in directory.iterdir())
    if "config.json" in held:
        raise InputError(f"{path}: no {MANIFEST_FILE}: choose a model that recipes/sft.py trained")
    listed = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    raise InputError(
        f"{path}: neither a model, nor a training checkpoint, nor a run directory with one; "
        f"it holds {listed or 'nothing'}"
    )
