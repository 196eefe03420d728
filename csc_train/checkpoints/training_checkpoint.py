"""Saved states of training: written whole, kept for a while, and gone on from only with the same steps."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints

from csc_train.errors import InputError
from csc_train.files import flush_to_disk, read_json, write_json

RECORD_FILE = "csc_state.json"
PARTIAL_FOLDER = "writing"
"""Where a state stands until it is whole, beside the others."""
TRAINER_STATE = "trainer_state.json"
RESUME_FILES = ("scheduler.pt", "optimizer.pt", "scaler.pt", "rng_state*.pth", "latest", "global_step*")
"""What only going on needs: everything but the weights, of which DeepSpeed has a copy of its own. The first one's
absence says that a state cannot be gone on from."""


@dataclass(frozen=True)
class CheckpointRecord:
    """How a state of training was saved."""

    packs_per_step: int
    processes: int
    stage: int | None
    """DeepSpeed's ZeRO stage; None for DDP or one process."""
    tracked: str | None = None
    """The id of the run in the tracker; None where it was not tracked."""


def build_record(trainer: Trainer) -> CheckpointRecord:
    """What a state that `trainer` saves says of itself."""
    arguments = trainer.args
    each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    plugin = arguments.deepspeed_plugin
    stage = plugin.zero_stage if plugin else None
    return CheckpointRecord(each * arguments.world_size, arguments.world_size, stage, getattr(trainer, "tracked", None))


def read_record(state: Path) -> CheckpointRecord:
    """The record of a saved state.

    Raises:
        InputError: there is none, so the state was not saved by this project.
    """
    try:
        return CheckpointRecord(**read_json(state / RECORD_FILE))
    except TypeError as error:
        raise InputError(f"{state / RECORD_FILE}: {error}") from error


def check_steps(state: Path, saved: CheckpointRecord, now: CheckpointRecord) -> None:
    """Refuse to go on with other steps: which packs are done would be undefined.

    Raises:
        InputError: the packs of an optimizer step are not as many as they were; names both numbers.
    """
    if saved.packs_per_step != now.packs_per_step:
        raise InputError(
            f"{state} was saved with trainer.packs_per_step={saved.packs_per_step}, this run has "
            f"{now.packs_per_step}: go on with {saved.packs_per_step}, or start a new run"
        )


def start_save(trainer: Trainer, directory: Path) -> None:
    """Clear away what a killed process left half written."""
    if trainer.is_world_process_zero():
        shutil.rmtree(directory / PARTIAL_FOLDER, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def checkpoint_dir(directory: Path, step: int) -> Path:
    """Where the state after an optimizer step is saved."""
    return directory / f"checkpoint-{step}"


def commit(trainer: Trainer, directory: Path, best: int | None = None) -> None:
    """Give the state that all processes have written its name, in one step, and retire older ones.

    Args:
        best: the step of a state that is kept as well, however old it is.

    Raises:
        OSError: it cannot be written.
    """
    trainer.accelerator.wait_for_everyone()
    # The Trainer has looked for it where this one was written.
    trainer.state.best_model_checkpoint = str(checkpoint_dir(directory, best)) if best else None
    if trainer.is_world_process_zero():
        whole = checkpoint_dir(directory, trainer.state.global_step)
        written = directory / PARTIAL_FOLDER / whole.name
        trainer.state.save_to_json(str(written / TRAINER_STATE))
        write_json(written / RECORD_FILE, asdict(build_record(trainer)))
        flush_to_disk(written)
        shutil.rmtree(whole, ignore_errors=True)
        written.rename(whole)
        written.parent.rmdir()
        prune(directory, trainer.args.save_total_limit, best)
    trainer.accelerator.wait_for_everyone()


def prune(directory: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the last `keep` states and the one after step `best`, of which the weights are kept if it is
    older than these."""
    for state in map(Path, sort_checkpoints(str(directory))[:-keep]):
        if best and state == checkpoint_dir(directory, best):
            for each in (path for pattern in RESUME_FILES for path in state.glob(pattern)):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        else:
            shutil.rmtree(state, ignore_errors=True)


def can_resume(state: Path) -> bool:
    """Whether a saved state is more than weights."""
    return (state / RESUME_FILES[0]).exists()
