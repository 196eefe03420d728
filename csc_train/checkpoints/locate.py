"""Find the model that a path means: a run directory, a final model, an exported directory or a training checkpoint."""

from pathlib import Path

from csc_train.checkpoints.manifest import MANIFEST_FILE
from csc_train.errors import InputError

MODEL_FOLDER, CHECKPOINTS_FOLDER = "model", "checkpoints"


def is_model(directory: Path) -> bool:
    """Whether a directory is a final model or an exported one."""
    return (directory / MANIFEST_FILE).is_file() and (directory / "config.json").is_file()


def locate_checkpoint(path: str, training: bool = False) -> Path:
    """The model directory or the training checkpoint that `path` means.

    Args:
        path: one of them, or a run directory: its final model, or its latest training checkpoint.
        training: prefer the training checkpoint of a run directory.

    Raises:
        InputError: there is none; says what the path holds.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory")
    if is_model(directory) or (directory / "trainer_state.json").is_file():
        return directory
    # A checkpoint gets its name when it is whole.
    whole = [file.parent for file in directory.glob(f"{CHECKPOINTS_FOLDER}/checkpoint-*/trainer_state.json")]
    latest = sorted(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]))[-1:]
    model = [directory / MODEL_FOLDER] if is_model(directory / MODEL_FOLDER) else []
    if found := latest + model if training else model + latest:
        return found[0]
    held = sorted(entry.name for entry in directory.iterdir())
    if "config.json" in held:
        raise InputError(f"{path}: no {MANIFEST_FILE}: choose a model that recipes/sft.py trained")
    listed = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    raise InputError(
        f"{path}: neither a model, nor a training checkpoint, nor a run directory with one; "
        f"it holds {listed or 'nothing'}"
    )
