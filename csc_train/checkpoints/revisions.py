"""The commits of the models and data sets that a run takes from the hub: found when it starts, kept when it resumes."""

import contextlib
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from csc_train.data.records import is_hub_data
from csc_train.errors import InputError
from csc_train.hub_access import COMMIT, offline_without_hub, split_revision
from csc_train.models.config import ModelConfig
from csc_train.models.hub import check_available, hub_errors, is_local_path
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import read_config
from csc_train.runs.distributed import on_main, world_size

KINDS = {"path": "dataset", "also": "dataset"}
KINDS |= dict.fromkeys(("checkpoint", "bertscore_model", "bleurt_model"), "model")
"""What the settings of these names take from the hub, beside the base model of a training. That of an evaluation has
the commit that the manifest of its model records."""
logger = logging.getLogger(__name__)


def pin_revisions(config: Any) -> Any:
    """The configuration of a run with commits in the place of branches and tags: in `model.revision`, and as
    `OWNER/NAME@COMMIT` of data sets and other models. All processes call this; the main one asks the hub.

    A run that continues keeps its recorded commits where its configuration asks for no revision, with a note if the hub
    has another commit by now. What comes from a cache, without the hub, has no commit but a base model.

    Raises:
        InputError: there is no such model, data set or revision, or the base model cannot be had (see `hub_errors`).
    """
    return _pinned(config) if world_size() == 1 else on_main(lambda: _pinned(config))


def _pinned(config: Any) -> Any:
    file = Path(config.run.directory or "", RESOLVED_FILE)
    kept: dict[str, str] = {}
    if config.run.directory and config.run.if_exists in ("reuse", "resume", "extend") and file.is_file():
        model = read_config(file).get("model") or {}
        kept = dict(re.findall(rf"([\w.-]+/[\w.-]+)@({COMMIT})", file.read_text(encoding="utf-8")))
        kept |= {model["path"]: model["revision"]} if model.get("revision") else {}
    _pin(config, kept)
    return config


def _pin(owner: Any, kept: dict[str, str], kind: str = "") -> None:
    """Set the commits in a section or a list of the configuration, and what is inside."""
    for name, value in list(enumerate(owner) if isinstance(owner, list) else vars(owner).items()):
        kind = kind if isinstance(owner, list) else KINDS.get(str(name), "")
        if isinstance(value, ModelConfig):
            if value.revision is None and kept.get(str(value.path)):
                value.revision = _kept(str(value.path), "model", kept)
            value.revision = check_available(value) or value.revision
        elif isinstance(value, list) or dataclasses.is_dataclass(value):
            _pin(value, kept, kind)
        elif isinstance(value, str) and (
            is_hub_data(value) if kind == "dataset" else kind and not is_local_path(value)
        ):
            place, revision = split_revision(value)
            recorded = place in kept and revision is None
            commit = _kept(place, kind, kept) if recorded else _newest(place, kind, revision)
            pinned = f"{place}@{commit}" if commit else value
            owner.__setitem__(name, pinned) if isinstance(owner, list) else setattr(owner, name, pinned)


def _kept(place: str, kind: str, kept: dict[str, str]) -> str:
    """The recorded commit; a note says if the hub has another one."""
    with contextlib.suppress(InputError):
        if (newest := _newest(place, kind, None)) and newest != kept[place]:
            logger.info(f"note: {place} has the commit {newest[:12]} by now; the run keeps {kept[place][:12]}")
    return kept[place]


def _newest(place: str, kind: str, revision: str | None) -> str | None:
    """The commit that a revision names on the hub; None if the hub cannot be reached."""
    if re.fullmatch(COMMIT, revision or ""):
        return revision
    with hub_errors(place, "data set" if kind == "dataset" else kind), offline_without_hub() as offline:
        return None if offline else HfApi().repo_info(place, revision=revision, repo_type=kind).sha
