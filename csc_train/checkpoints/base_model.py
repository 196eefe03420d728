"""Find the base model that a model was trained from: by its content, never by its name or place alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from csc_train.checkpoints.content import base_files, first_difference
from csc_train.checkpoints.manifest import Manifest
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.hub_access import split_revision
from csc_train.models.hub import is_local_path


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be loaded.

    Attributes:
        path: a directory or a hub id.
        revision: of the hub repository.
        content_hash: SHA-256 (hex) over its files, or over its name if they are not on disk yet.
        note: what could not be verified; empty if the content or the commit is the recorded one.
    """

    path: str
    revision: str | None
    content_hash: str
    note: str


def _described(path: str, revision: str | None, difference: str | None) -> BaseModel:
    note = f"the base model {path}: {difference}" if difference else ""
    return BaseModel(path, revision, digest(base_files(path, revision) or [path, revision]), note)


def find_base(directory: Path, manifest: Manifest, advice: str, given: str | None = None) -> BaseModel:
    """Find the base model of a trained model.

    Looks in the recorded place, then for a directory of that name in, beside and above the model's. Only a directory
    with the recorded hashes counts. Without recorded hashes, only the recorded place counts.

    Args:
        directory: of the final model, or of its run.
        advice: what to do if the base is not found.
        given: a directory or hub id to take instead; a difference from the recorded base is noted.

    Raises:
        InputError: it is not found; says where it was looked for.
    """
    base, revision = given or recorded_base(directory, manifest), manifest.base_revision
    places = [Path(base)] if given else _places(directory, manifest)
    differences = []
    for place in filter(Path.is_dir, places):
        difference = _difference(str(place), None, manifest)
        if difference is None or given or not manifest.base_files:
            return _described(str(place), None, difference)
        differences.append(f"{place}: {difference}")
    if is_local_path(base):
        found = "; ".join(differences) or f"no {base}"
        raise InputError(f"{directory}: its base model is not found ({found}): {advice}")
    if given and given != manifest.base_model:
        base, revision = split_revision(given)
    if constants.HF_HUB_OFFLINE and not base_files(base, revision):
        raise InputError(f"{base}: HF_HUB_OFFLINE is set and the cache has no copy of this base model: {advice}")
    return _described(base, revision, _difference(base, revision, manifest))


def recorded_base(directory: Path, manifest: Manifest) -> str:
    """The recorded place of the base model, as an absolute path or a hub id."""
    relative = manifest.base_model.startswith(".")
    return os.path.abspath(directory / manifest.base_model) if relative else manifest.base_model


def _places(directory: Path, manifest: Manifest) -> list[Path]:
    """Where the base model may be, the likeliest place first."""
    recorded, model = Path(recorded_base(directory, manifest)), directory.absolute()
    near = (model, *model.parents[:2]) if manifest.base_files else ()
    return list(dict.fromkeys([recorded, *(place / recorded.name for place in near)]))


def _difference(path: str, revision: str | None, manifest: Manifest) -> str | None:
    """Why a model is not, or may not be, the recorded base; None if its files or its commit are the recorded ones."""
    if not manifest.base_files:
        return None if revision else "not verified, since the manifest has no hash of it"
    if Path(path).is_dir():
        return first_difference(Path(path), manifest.base_files)
    if not (now := base_files(path, revision)):
        return None if revision else "not verified, since it is not in the hub's cache"
    return None if now == manifest.base_files else "its files differ from those that the manifest records"
