"""Training checkpoints: weights, optimizer and data order of a step, to resume from; complete or absent on disk.

The record of a checkpoint holds the size and the hash of each of its files, which are checked before it is used.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from csc_train.errors import InputError
from csc_train.files import flush_to_disk, os_errors, read_json, write_json
from csc_train.runs.distributed import on_main

if TYPE_CHECKING:
    from transformers import Trainer

CHECKPOINT_FILE = "csc_checkpoint.json"
PARTIAL_FOLDER = "writing"
"""Where a checkpoint is written until it is complete, beside the others."""
TRAINER_STATE = "trainer_state.json"
RESUME_FILES = ("scheduler.pt", "optimizer.pt", "scaler.pt", "rng_state*.pth", "latest", "global_step*")
"""Files that are needed only to resume: all but the weights, of which DeepSpeed writes a second copy. A checkpoint
without the first of them holds weights only."""
HASH = "xxh3_128"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileStamp:
    """What a file held when it was written."""

    size: int
    """In bytes."""
    xxh3_128: str
    """XXH3 of 128 bits (hex); it finds damage, not forgery."""


@dataclass(frozen=True)
class CheckpointRecord:
    """How a training checkpoint was saved."""

    packs_per_step: int
    processes: int
    stage: int | None
    """DeepSpeed's ZeRO stage; None for DDP or one process."""
    run_ids: dict[str, str] = field(default_factory=dict)
    """The id of the training's run, by tracker."""
    optimizer: str = "adamw"
    """`TrainerConfig.optimizer`."""
    seconds: float = 0.0
    """Training time until then, that before earlier resumes included."""
    files: dict[str, FileStamp] = field(default_factory=dict)
    """The other files by path in the checkpoint; empty in a checkpoint of an earlier version."""

    def resharded(self, now: "CheckpointRecord") -> bool:
        """Whether a training that saves as `now` has its weights and moments on other processes, or otherwise."""
        return self.stage != now.stage or (self.stage in (1, 2, 3) and self.processes != now.processes)


def build_record(trainer: "Trainer", seconds: float = 0.0) -> CheckpointRecord:
    """The record of a checkpoint that `trainer` saves after `seconds` of training, as yet without its files."""
    args: Any = trainer.args
    packs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    run_ids = getattr(trainer, "run_ids", {})
    return CheckpointRecord(packs_per_step, args.world_size, stage, run_ids, args.optimizer, seconds)


def write_record(checkpoint: Path, record: CheckpointRecord) -> None:
    """Write the record of a training checkpoint, with a hash of itself.

    Raises:
        InputError: it cannot be written.
    """
    content = asdict(record)
    write_json(checkpoint / CHECKPOINT_FILE, content | {HASH: _content_hash(content)})


def read_record(checkpoint: Path) -> CheckpointRecord:
    """The record of a training checkpoint.

    Raises:
        InputError: there is none, it is damaged, or it is not by this project.
    """
    path = checkpoint / CHECKPOINT_FILE
    content = read_json(path)
    try:
        recorded = content.pop(HASH, None)
        intact = recorded == (_content_hash(content) if "files" in content else None)
        if "wandb_run_id" in content:  # of an earlier version
            content["run_ids"] = {"wandb": run_id} if (run_id := content.pop("wandb_run_id")) else {}
        files = {name: FileStamp(**stamp) for name, stamp in content.pop("files", {}).items()}
        record = CheckpointRecord(**content, files=files)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: {error}") from error
    if not intact:
        raise InputError(f"{path}: changed since it was saved")
    return record


def _content_hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# What a file held


def files_written_by(rank: int, directory: Path, processes: int) -> list[str]:
    """The files of a written checkpoint that a process wrote, by path in it; the main process has written the rest."""
    names = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    own = [name for name in names if _writer(name) % processes == rank]
    return sorted(name for name in own if (directory / name).is_file())


def _writer(name: str) -> int:
    found = re.search(r"(?:rng_state|zero_pp_rank)_(\d+)", name)
    return int(found[1]) if found else 0


def stamp_files(directory: Path, names: Iterable[str]) -> dict[str, FileStamp]:
    """Hash files that were just written, and flush them to disk meanwhile.

    Raises:
        OSError: a file cannot be read or flushed.
    """
    names = list(names)
    with ThreadPoolExecutor() as pool:
        stamps = pool.map(_stamp, (directory / name for name in names))  # in the background
        for name in names:
            flush_to_disk(directory / name)
        return dict(zip(names, stamps, strict=True))


def _stamp(path: Path) -> FileStamp:
    facts = path.stat()
    return FileStamp(facts.st_size, _file_hash(path, facts.st_size, facts.st_mtime_ns))


@functools.cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """The hash of a file, which a process computes once unless the file changes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def check_whole(checkpoint: Path) -> CheckpointRecord:
    """Check that a training checkpoint holds what was saved; one of an earlier version, that no file is missing.

    Returns:
        Its record.

    Raises:
        InputError: a file is missing or differs; names it.
    """
    record = read_record(checkpoint)
    if not record.files:
        _check_unhashed(checkpoint, record)
    for name, stamp in record.files.items():  # before the hashes: this takes no time
        with os_errors(checkpoint / name, "cannot read"):
            size = (checkpoint / name).stat().st_size
        if size != stamp.size:
            raise InputError(f"{checkpoint / name}: holds {size:,} of the {stamp.size:,} bytes that were saved")
    with ThreadPoolExecutor() as pool, os_errors(checkpoint, "cannot read"):
        for name, found in zip(record.files, pool.map(_stamp, map(checkpoint.joinpath, record.files)), strict=True):
            if found != record.files[name]:
                raise InputError(f"{checkpoint / name}: changed since it was saved")
    return record


def _check_unhashed(checkpoint: Path, record: CheckpointRecord) -> None:
    read_json(checkpoint / TRAINER_STATE)
    ranks = [f"_{rank}" for rank in range(record.processes)] if record.processes > 1 else [""]
    needed = ["optimizer.pt" if record.stage is None else "latest", *(f"rng_state{rank}.pth" for rank in ranks)]
    for name in needed if can_resume(checkpoint) else ():
        if not (checkpoint / name).is_file():
            raise InputError(f"{checkpoint / name}: no such file")


def can_resume(checkpoint: Path) -> bool:
    """Whether a training checkpoint was saved to resume from, and not left with weights only (see `prune`)."""
    record = read_record(checkpoint)
    return RESUME_FILES[0] in record.files if record.files else (checkpoint / RESUME_FILES[0]).exists()


def check_resumable(checkpoint: Path, now: CheckpointRecord) -> CheckpointRecord:
    """Check that a training can resume from a checkpoint with the same packs in each step.

    Returns:
        The checkpoint's record.

    Raises:
        InputError: the checkpoint holds weights only, or its packs per step or optimizer differ; names both. Or its
            moments are in 8 bits, and the processes or ZeRO stage differ.
    """
    if not can_resume(checkpoint):
        raise InputError(f"{checkpoint} holds weights only: resume from a later checkpoint")
    saved = read_record(checkpoint)
    for setting in ("packs_per_step", "optimizer"):
        before, here = getattr(saved, setting), getattr(now, setting)
        if before != here:
            raise InputError(
                f"{checkpoint} was saved with trainer.{setting}={before}, this run has {here}: resume with {before}, "
                "or start a new run"
            )
    if saved.optimizer == "adamw_8bit" and saved.resharded(now):
        raise InputError(
            f"{checkpoint} has moments in 8 bits of {saved.processes} processes under ZeRO stage {saved.stage}, which "
            "are not resharded: resume with as many processes and that stage, or start a new run"
        )
    return saved


# The checkpoints of a run


def checkpoint_dir(directory: Path, step: int) -> Path:
    """The directory of the checkpoint after an optimizer step."""
    return directory / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by step."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of)


def newest_whole(directory: Path, resume: bool = False) -> Path | None:
    """The newest checkpoint that is whole; says what is wrong with newer ones. None if there is no checkpoint.

    Args:
        directory: of the training checkpoints.
        resume: leave out those that hold weights only.

    Raises:
        InputError: there are checkpoints, but none to use.
    """
    skipped = []
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            record = check_whole(checkpoint)
            if resume and not can_resume(checkpoint):
                raise InputError(f"{checkpoint}: holds weights only")
        except InputError as error:
            skipped.append(str(error).removeprefix(f"{directory}/"))
            continue
        if skipped:
            logger.info(f"note: using {checkpoint}; skipped {'; '.join(skipped)}")
        if not record.files:
            logger.info(f"note: {checkpoint} has no hashes of its files, so damage to them would not be noticed")
        return checkpoint
    if skipped:
        raise InputError(
            f"{directory}: no checkpoint can be used ({'; '.join(skipped)}): restore one from a copy, or move the "
            "folder away to train from the start"
        )
    return None


def checkpoint_to_resume(directory: Path) -> str | None:
    """The path of the checkpoint to resume from, on every process; None if there is no checkpoint.

    Raises:
        InputError: as `newest_whole`, on every process.
    """
    found = on_main(lambda: newest_whole(directory, resume=True))
    return found and str(found)


def commit(written: Path, record: CheckpointRecord, destination: Path) -> None:
    """Give a written checkpoint its record and its final name; an earlier checkpoint there is replaced.

    Args:
        written: its directory in `PARTIAL_FOLDER`.
        record: with all files that it holds (see `stamp_files`).

    Raises:
        OSError: the checkpoint cannot be written.
        InputError: its record cannot be written.
    """
    write_record(written, record)
    flush_to_disk(written)
    if destination.exists():
        destination.rename(written.with_name(f"{destination.name}.replaced"))
    written.rename(destination)
    remove_partial(written.parent.parent)


def remove_partial(directory: Path) -> None:
    """Remove what is left of checkpoints that were being written or removed."""
    shutil.rmtree(directory / PARTIAL_FOLDER, ignore_errors=True)


def prune(directory: Path, save_total_limit: int, best_step: int | None = None, step: int | None = None) -> None:
    """Remove all but the latest `save_total_limit` checkpoints; of an older best one, keep the weights.

    Args:
        directory: of the training checkpoints.
        step: leave out those of later steps, which the training will replace.
    """
    kept = [checkpoint for checkpoint in list_checkpoints(directory) if step is None or step_of(checkpoint) <= step]
    for checkpoint in kept[:-save_total_limit]:
        if best_step == step_of(checkpoint):
            with contextlib.suppress(InputError):  # a damaged one is left as it is, and named when it is needed
                _keep_weights(checkpoint)
        else:  # renamed first: no name of a checkpoint ever stands for a part of it
            (directory / PARTIAL_FOLDER).mkdir(exist_ok=True)
            checkpoint.rename(directory / PARTIAL_FOLDER / checkpoint.name)
    remove_partial(directory)


def _keep_weights(checkpoint: Path) -> None:
    removed = [path for pattern in RESUME_FILES for path in checkpoint.glob(pattern)]
    record = read_record(checkpoint)
    if record.files and removed:  # first: a record never names a file that this removes
        names = {path.name for path in removed}
        files = {name: stamp for name, stamp in record.files.items() if Path(name).parts[0] not in names}
        write_record(checkpoint, replace(record, files=files))
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
