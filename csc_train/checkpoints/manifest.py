"""The hand-off between training and evaluation: a Hugging Face model directory with a manifest of its origin."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csc_train.errors import InputError
from csc_train.files import atomic_path, digest, file_digest, read_json, write_json

MANIFEST_FILE = "csc_manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint was made of. Hashes are SHA-256 (hex)."""

    base_model: str
    """Hub id or path of the weights that training started from; a relative path is relative to the checkpoint."""
    base_revision: str | None
    chat_template: str
    """Name of the chat template."""
    mode: str
    language: str
    template_hash: str
    tokenizer_hash: str
    strategies: list[str]
    """The labels of the taxonomy, in order."""
    data_hash: str
    """Of the training dialogues."""
    config: dict[str, Any]
    """The resolved configuration of the training run."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Commit, whether the tree had changes, package versions."""
    weights_hash: str = ""
    """Of the checkpoint's files of weights, by name; empty where there are none yet, as in the run that makes them."""


@contextlib.contextmanager
def model_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory for model files; on success it takes the place of `path` (see `files.atomic_path`).

    Raises:
        InputError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
            for file in temporary.glob("*.safetensors"):
                file.chmod((temporary / "config.json").stat().st_mode)  # safetensors lets only the owner read
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def save_final_model(
    directory: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    manifest: Manifest,
    shard_size: str = "50GB",
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory that plain `from_pretrained` loads, with the tokenizer, its chat template and the manifest.

    The directory is whole or not there. Its generation configuration stops at the end of a turn: a base model that was
    never taught to chat stops elsewhere, and would talk on wherever it is served.

    Args:
        shard_size: the largest file of weights.
        check: gets the written directory before it takes its place; what it raises keeps it from doing so.

    Raises:
        InputError: it cannot be written.
    """
    tokenizer.chat_template = chat_template
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    model.generation_config.eos_token_id = list(dict.fromkeys([_end_of_turn(tokenizer), *stops]))
    with model_directory(directory) as temporary:
        model.save_pretrained(temporary, max_shard_size=shard_size)
        tokenizer.save_pretrained(temporary)
        weights = {file.name: file_digest(file) for file in temporary.glob("*.safetensors")}
        write_manifest(temporary, replace(manifest, weights_hash=digest(weights)))
        if check is not None:
            check(temporary)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The control token that ends a reply, by the tokenizer's chat template."""
    chat = [{"role": "system", "content": "-"}, {"role": "assistant", "content": "-"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    return next(token for token in reversed(ids) if token in tokenizer.added_tokens_decoder)


def write_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Write a manifest into a directory."""
    write_json(Path(directory) / MANIFEST_FILE, asdict(manifest))


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        InputError: the directory does not exist or is no checkpoint of this project.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such checkpoint directory")
    if not (directory / MANIFEST_FILE).is_file():
        raise InputError(f"{directory}: no {MANIFEST_FILE}, so not a checkpoint that recipes/sft.py wrote")
    try:
        return Manifest(**read_json(directory / MANIFEST_FILE))
    except TypeError as error:
        raise InputError(f"{directory / MANIFEST_FILE}: {error}") from error


def check_manifest(directory: str | os.PathLike, manifest: Manifest, template_hash: str, tokenizer: str) -> None:
    """Refuse a checkpoint whose template or tokenizer is not the one it was trained with.

    Args:
        template_hash: of the template that would be used now.
        tokenizer: hash of the tokenizer that would be used now (see `tokenizer_hash`).

    Raises:
        InputError: a hash differs; names both.
    """
    for what, trained, now in (
        ("template", manifest.template_hash, template_hash),
        ("tokenizer", manifest.tokenizer_hash, tokenizer),
    ):
        if trained != now:
            raise InputError(
                f"{directory}: the {what} is not the one the checkpoint was trained with "
                f"(trained {trained[:12]}, now {now[:12]})"
            )
