"""The evaluated model by content: its hash, its base model, its training dialogues, and what is not verified."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csc_train.checkpoints.base_model import BaseModel, find_base
from csc_train.checkpoints.locate import EVALUATED_FILE, MODEL_FOLDER, ModelSource, open_source
from csc_train.checkpoints.manifest import Manifest
from csc_train.data.config import DataConfig
from csc_train.data.dialogue import data_digest
from csc_train.data.languages import get_language
from csc_train.data.overlap import Overlap
from csc_train.data.splits import Splits
from csc_train.data.training_record import find_recorded, read_training_record
from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.inference.predictions import PLAIN_MODEL, TRAINED_MODEL
from csc_train.plugins import load_recorded_plugins

logger = logging.getLogger(__name__)
_ADVICE = "give it by evaluation.base=PATH, or leave it out by evaluation.base=false"


@dataclass(frozen=True)
class EvaluatedModel:
    """The model of an evaluation.

    Attributes:
        content_hash: of the model's files, whatever their place.
        base: None if it is not evaluated.
        unverified: what differs from the manifest, or cannot be verified, in words.
    """

    source: ModelSource
    content_hash: str
    base: BaseModel | None
    unverified: list[str]

    @property
    def name(self) -> str:
        """The name of the system."""
        return PLAIN_MODEL if self.source.manifest.is_plain else TRAINED_MODEL

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of what is evaluated, by name."""
        return {"system": self.content_hash} | ({"base": self.base.content_hash} if self.base else {})


def open_evaluated(path: str, base: bool | str, plain: Manifest | None = None) -> EvaluatedModel:
    """Open and verify the model of an evaluation, and log what could not be verified. It reads all weights.

    Args:
        path, plain: as of `locate_checkpoint`.
        base: an `EvaluationConfig.base`; a plain model has none but a given one.

    Raises:
        InputError: as `open_source` and `find_base`.
    """
    source = open_source(path, training=False, plain=plain)
    directory = source.path if source.finished else source.home / MODEL_FOLDER
    given = base if isinstance(base, str) else None
    found = find_base(directory, source.manifest, _ADVICE, given) if given or (base and not plain) else None
    unverified = [text for text in (source.unverified(), found.note if found else "") if text]
    for text in unverified:
        logger.info(f"note: {text}")
    return EvaluatedModel(source, source.content_hash(), found, unverified)


def find_trained(model: EvaluatedModel, splits: Splits, data: DataConfig) -> list[Overlap]:
    """The evaluation dialogues that the model was trained on, by its own record; logs their number.

    An unchanged training set needs no record: `read_and_check_splits` compared it. A plain model has none.

    Raises:
        InputError: there are some, and `data.on_overlap` is "error".
    """
    if model.source.manifest.is_plain or model.source.manifest.data_hash == data_digest(splits.train):
        return []
    note = "the baselines are fitted on other training data than the checkpoint"
    if (record := read_training_record(model.source.home)) is None:
        logger.info(f"note: {note}; the checkpoint has no record of its training dialogues, so overlap is not counted")
        return []
    found = find_recorded(record, splits.evaluation, data.overlap_threshold)
    kinds = [overlap.kind for overlap in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    trained = f"the checkpoint was trained on {len(found)} of {len(splits.evaluation)} evaluation dialogues"
    trained += f" ({counts})" if found else ""
    if found and data.on_overlap == "error":
        raise InputError(f"data.on_overlap=error: {trained}; the first: {found[0]}")
    logger.info(f"note: {note}; {trained}, by its record of {len(record)} training dialogues")
    return found


def write_evaluated(directory: Path, model: EvaluatedModel | None, language: str, plugins: Sequence[str]) -> None:
    """Write what was evaluated into the run directory: the model, if any, the language, and the plugins.

    Raises:
        InputError: it cannot be written.
    """
    facts = model and {
        "path": str(model.source.path),
        "content_hash": model.content_hash,
        "base": model.base and asdict(model.base),
        "unverified": model.unverified,
        "manifest": asdict(model.source.manifest),
    }
    plugins = [*plugins, *(model.source.manifest.config.get("plugins", ()) if model else ())]
    write_json(directory / EVALUATED_FILE, {"language": language, "plugins": plugins, **(facts or {})})


def read_evaluated(directory: str | os.PathLike) -> tuple[Manifest | None, Sequence[str]]:
    """The manifest of the model of an evaluation, and what was not verified; None without a model.

    Raises:
        InputError: the file cannot be read.
    """
    facts = _read_facts(directory)
    return (Manifest(**facts["manifest"]), facts["unverified"]) if "manifest" in facts else (None, ())


def read_language(directory: str | os.PathLike) -> str:
    """The language of an evaluation; its plugins, of which one may have registered it, are loaded.

    Raises:
        InputError: the file cannot be read, or the language is not known.
    """
    facts = _read_facts(directory)
    load_recorded_plugins(facts.get("plugins", ()))
    # An earlier version of this project wrote the manifest only, and that of a model only.
    return get_language(facts.get("language") or facts.get("manifest", {}).get("language", "zh")).code


def _read_facts(directory: str | os.PathLike) -> dict[str, Any]:
    path = Path(directory) / EVALUATED_FILE
    return read_json(path) if path.exists() else {}
