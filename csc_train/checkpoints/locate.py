"""Find the model that a path means: a run directory, a final model, an exported directory or a training checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from csc_train.checkpoints.content import base_files, check_recorded_files, first_difference, hash_files
from csc_train.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest, weights_hash
from csc_train.checkpoints.training_checkpoint import (
    CHECKPOINT_FILE,
    TRAINER_STATE,
    check_whole,
    newest_whole,
    read_record,
)
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.models.hub import adapter_base, is_local_path, snapshot
from csc_train.runs.directory import read_run_record

MODEL_FOLDER, CHECKPOINTS_FOLDER = "model", "checkpoints"
EVALUATED_FILE = "evaluated_model.json"
"""In a run directory of an evaluation: what was evaluated."""
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja")
"""The files of a model that decide its replies, and its manifest."""
MODEL_CONFIGS = ("config.json", "adapter_config.json")
"""One of them is in the directory of every model or PEFT adapter."""
CHECKPOINT_FILES = ("*.safetensors", "*_config.json", "tokenizer.json", "*.jinja", "global_step*/**/*")
"""The files of a training checkpoint that an export reads, for one whose record has no hashes."""


@dataclass(frozen=True)
class ModelSource:
    """A final model or a training checkpoint, with the manifest of its training.

    Attributes:
        path: its directory.
        finished: whether it is a final model, whose adapter is merged.
    """

    path: Path
    manifest: Manifest
    finished: bool = False

    @property
    def home(self) -> Path:
        """The directory that holds the manifest and the record of the training dialogues."""
        return self.path if self.finished else self.path.absolute().parent.parent

    def content_hash(self) -> str:
        """SHA-256 (hex) over the present content of the files, whatever their place.

        Raises:
            InputError: a file cannot be read.
        """
        if self.finished:
            files, base = hash_files(self.path, MODEL_FILES), adapter_base(str(self.path))
            return digest([files, base_files(*base)] if base else files)
        stamps = {name: asdict(stamp) for name, stamp in read_record(self.path).files.items()}
        return digest([stamps or hash_files(self.path, CHECKPOINT_FILES), self.manifest.template_hash])

    def unverified(self) -> str:
        """What differs from the files that the training wrote, or cannot be verified, in words; empty if nothing."""
        manifest = self.manifest
        if not self.finished:
            return ""
        if manifest.is_plain:
            return f"{self.path}: another program wrote this model: what it was trained from and on is unknown"
        if manifest.files:
            difference = first_difference(self.path, manifest.files)
        elif not manifest.weights_hash:
            return f"{self.path}: the files are not verified, since the manifest has no hash of them"
        else:
            now = weights_hash(hash_files(self.path, MODEL_FILES[:1]))
            difference = None if now == manifest.weights_hash else f"the weights have the hash {now[:12]}"
        advice = "is not as it was written: what the manifest says of its base and its data may not hold"
        return f"{self.path} {advice} ({difference})" if difference else ""


def is_model(directory: Path) -> bool:
    """Whether a directory is a final model or an exported one, or a part of one."""
    held = (directory / "config.json").is_file() or any(directory.glob("*.safetensors"))
    return held and (directory / MANIFEST_FILE).is_file()


def open_source(path: str, training: bool = True, plain: Manifest | None = None) -> ModelSource:
    """Find a model or a training checkpoint, and read its manifest.

    Args:
        path, training, plain: as of `locate_checkpoint`.

    Raises:
        InputError: as `locate_checkpoint`; there is no manifest, or a file of the model is missing or cut.
    """
    found = locate_checkpoint(path, training, plain)
    if plain:
        check_recorded_files(found, {})
        return ModelSource(found, plain, finished=True)
    if is_model(found):
        manifest = read_manifest(found)
        check_recorded_files(found, manifest.files)
        return ModelSource(found, manifest, finished=True)
    run = found.absolute().parent.parent
    if not (run / MANIFEST_FILE).is_file():
        raise InputError(f"{run}: no {MANIFEST_FILE}: choose a run of recipes/sft.py")
    run_id = read_record(found).run_ids.get("wandb")  # the manifest was written before the training
    return ModelSource(found, replace(read_manifest(run), wandb={"id": run_id} if run_id else {}))


def locate_checkpoint(path: str, training: bool = False, plain: Manifest | None = None) -> Path:
    """The model directory or the training checkpoint that `path` means.

    Args:
        path: one of them, or a run directory: its final model, or its newest whole training checkpoint. With `plain`
            also a hub id, whose files are downloaded to the hub's cache.
        training: prefer the training checkpoint of a run directory.
        plain: the manifest of a model that another program wrote (see `plain_manifest`); None takes none of those.

    Raises:
        InputError: there is none, which says what the path holds; or a training checkpoint is damaged.
    """
    check_source(path, plain)
    directory = snapshot(path, "model") if plain else Path(path)
    if plain or is_model(directory):
        return directory
    if _is_checkpoint(directory):
        check_whole(directory)
        return directory
    has_model = is_model(directory / MODEL_FOLDER)
    if (training or not has_model) and (latest := newest_whole(directory / CHECKPOINTS_FOLDER)):
        return latest
    if has_model:
        return directory / MODEL_FOLDER
    raise _unusable(directory)


def check_source(path: str, plain: Manifest | None = None) -> None:
    """Check what takes no time of a path that `locate_checkpoint` gets, before the imports that take seconds.

    Raises:
        InputError: there is no such directory, or it holds neither a model nor training checkpoints; or `plain` is
            given for a model that has its own manifest, or missing for one that has none.
    """
    directory = Path(path)
    if plain and not is_local_path(path):
        return
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory")
    if _is_plain(directory):
        if plain is None:
            raise InputError(
                f"{directory}: no {MANIFEST_FILE}: copy that file as well; or, to evaluate or chat with a model that "
                "another program wrote, say how to prompt it, such as template=joint template.language=en"
            )
        return
    found = is_model(directory) or is_model(directory / MODEL_FOLDER) or _is_checkpoint(directory)
    if not found and not (directory / CHECKPOINTS_FOLDER).is_dir():
        raise _unusable(directory)
    if plain:
        raise InputError(f"template: {path} knows its own; leave it out")


def _is_plain(directory: Path) -> bool:
    """Whether a directory is a model, or an adapter, that another program wrote."""
    run = directory.absolute().parent.parent if _is_checkpoint(directory) else directory
    ours = (directory / CHECKPOINT_FILE, directory / MANIFEST_FILE, run / MANIFEST_FILE)
    return any((directory / name).is_file() for name in MODEL_CONFIGS) and not any(map(Path.is_file, ours))


def _is_checkpoint(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (CHECKPOINT_FILE, TRAINER_STATE))


def _unusable(directory: Path) -> InputError:
    if reason := read_run_record(directory).get("removed"):
        return InputError(f"{directory}: its model and checkpoints were removed by {reason}: train it again")
    held = sorted(entry.name for entry in directory.iterdir())
    listed = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    return InputError(
        f"{directory}: neither a model, nor a training checkpoint, nor a run directory with one; "
        f"it holds {listed or 'nothing'}"
    )
