"""Training checkpoints: weights, optimizer and data order of a step, to resume from; complete or absent on disk."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints

from csc_train.errors import InputError
from csc_train.files import flush_to_disk, read_json, write_json

CHECKPOINT_FILE = "csc_checkpoint.json"
PARTIAL_FOLDER = "writing"
"""Where a checkpoint is written until it is complete, beside the others."""
TRAINER_STATE = "trainer_state.json"
RESUME_FILES = ("scheduler.pt", "optimizer.pt", "scaler.pt", "rng_state*.pth", "latest", "global_step*")
"""Files that are needed only to resume: all but the weights, of which DeepSpeed writes a second copy. A checkpoint
without the first of them holds weights only."""


@dataclass(frozen=True)
class CheckpointRecord:
    """How a training checkpoint was saved."""

    packs_per_step: int
    processes: int
    stage: int | None
    """DeepSpeed's ZeRO stage; None for DDP or one process."""
    wandb_run_id: str | None = None
    """The W&B run; None if the training was not tracked."""


def build_record(trainer: Trainer) -> CheckpointRecord:
    """The record of a checkpoint that `trainer` saves."""
    args = trainer.args
    packs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    return CheckpointRecord(packs_per_step, args.world_size, stage, getattr(trainer, "wandb_run_id", None))


def read_record(checkpoint: Path) -> CheckpointRecord:
    """The record of a training checkpoint.

    Raises:
        InputError: there is none, or it is not by this project.
    """
    try:
        return CheckpointRecord(**read_json(checkpoint / CHECKPOINT_FILE))
    except TypeError as error:
        raise InputError(f"{checkpoint / CHECKPOINT_FILE}: {error}") from error


def check_resumable(checkpoint: Path, now: CheckpointRecord) -> CheckpointRecord:
    """Check that a training can resume from a checkpoint with the same packs in each step.

    Returns:
        The checkpoint's record.

    Raises:
        InputError: the checkpoint holds weights only, or its packs per step differ; names both numbers.
    """
    if not can_resume(checkpoint):
        raise InputError(f"{checkpoint} holds weights only: resume from a later checkpoint")
    saved = read_record(checkpoint)
    if saved.packs_per_step != now.packs_per_step:
        raise InputError(
            f"{checkpoint} was saved with trainer.packs_per_step={saved.packs_per_step}, this run has "
            f"{now.packs_per_step}: resume with {saved.packs_per_step}, or start a new run"
        )
    return saved


def can_resume(checkpoint: Path) -> bool:
    """Whether a training checkpoint holds more than weights."""
    return (checkpoint / RESUME_FILES[0]).exists()


def checkpoint_dir(directory: Path, step: int) -> Path:
    """The directory of the checkpoint after an optimizer step."""
    return directory / f"checkpoint-{step}"


def start_save(trainer: Trainer, directory: Path) -> None:
    """Remove what a killed process left of an incomplete checkpoint."""
    if trainer.is_world_process_zero():
        shutil.rmtree(directory / PARTIAL_FOLDER, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def commit(trainer: Trainer, directory: Path, best_step: int | None = None) -> None:
    """Move a checkpoint that all processes have written to its final name, and prune older ones.

    Args:
        best_step: the step of the best checkpoint, whose weights are kept at any age.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    trainer.accelerator.wait_for_everyone()
    # The Trainer looked for the best checkpoint in the folder of incomplete ones.
    trainer.state.best_model_checkpoint = str(checkpoint_dir(directory, best_step)) if best_step else None
    if trainer.is_world_process_zero():
        final = checkpoint_dir(directory, trainer.state.global_step)
        written = directory / PARTIAL_FOLDER / final.name
        trainer.state.save_to_json(str(written / TRAINER_STATE))
        write_json(written / CHECKPOINT_FILE, asdict(build_record(trainer)))
        flush_to_disk(written)
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
        written.parent.rmdir()
        prune(directory, trainer.args.save_total_limit, best_step)
    trainer.accelerator.wait_for_everyone()


def prune(directory: Path, save_total_limit: int, best_step: int | None = None) -> None:
    """Remove all but the latest `save_total_limit` checkpoints; of an older best one, keep the weights."""
    for checkpoint in map(Path, sort_checkpoints(str(directory))[:-save_total_limit]):
        if best_step and checkpoint == checkpoint_dir(directory, best_step):
            for path in (path for pattern in RESUME_FILES for path in checkpoint.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
