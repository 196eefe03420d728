"""The final model: a plain Hugging Face model directory with a manifest of what it was trained from and on."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.checkpoints.content import FileHashes, base_files, hash_files, remember
from csc_train.data.dialogue import Dialogue, data_digest
from csc_train.data.strategies import STRATEGIES
from csc_train.data.training_record import RECORD_FILE, write_training_record
from csc_train.errors import InputError
from csc_train.files import atomic_path, digest, read_json, write_json
from csc_train.models.config import ModelConfig
from csc_train.models.hub import snapshot
from csc_train.runs.directory import Run
from csc_train.runs.distributed import distributed_state
from csc_train.runs.provenance import provenance
from csc_train.template.config import TemplateConfig

if TYPE_CHECKING:  # a manifest is read before the imports that take seconds
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from csc_train.template.dialogue_template import DialogueTemplate

MANIFEST_FILE = "csc_manifest.json"
CARD_FILE = "README.md"
"""In a model directory: its model card, which is no part of its identity."""
BASE_FOLDER = "base"
"""In a run directory: the random weights that training started from."""


@dataclass(frozen=True)
class Manifest:
    """What a model was trained from and on. Hashes are SHA-256 (hex)."""

    base_model: str
    """Hub id or path of the base model; a relative path is relative to the model directory."""
    base_revision: str | None
    """Commit of the base model on the hub."""
    chat_template: str
    """Name of the chat template."""
    mode: str
    """The `TemplateConfig.mode`."""
    language: str
    """The `TemplateConfig.language`."""
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
    """Of the weight files by name; empty in the run directory, whose manifest is written before training."""
    files: FileHashes = field(default_factory=dict)
    """Of all files that the training or the export wrote into the model directory."""
    base_files: FileHashes = field(default_factory=dict)
    """Of the weights and the configuration of the base model; empty if they were not on disk."""
    wandb: dict[str, Any] = field(default_factory=dict)
    """The W&B run of the training (see `Tracker.identity`); empty if it was not tracked."""
    exported_from: str = ""
    """The training checkpoint or model that an export was made of; empty for the model of a run."""
    export: dict[str, Any] = field(default_factory=dict)
    """Of an export: its `format`, what it was merged into, the `step` of the training checkpoint, and the largest
    `difference` of logits."""

    @property
    def is_plain(self) -> bool:
        """Whether another program wrote the model: what it was trained from and on is unknown."""
        return not self.base_model

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes of data, template and tokenizer, by name."""
        return {name: getattr(self, name) for name in ("data_hash", "template_hash", "tokenizer_hash")}


def plain_manifest(template: TemplateConfig, chat_template: str | None) -> Manifest:
    """The manifest of a model that another program wrote, which claims nothing about its training.

    Args:
        template: how it is prompted.
        chat_template: as `ModelConfig.chat_template`; None takes that of its tokenizer.
    """
    labels = [strategy.label for strategy in STRATEGIES]
    return Manifest("", None, chat_template or "auto", template.mode, template.language, "", "", labels, "", {})


def build_manifest(
    base: ModelConfig, model: "PreTrainedModel", template: "DialogueTemplate", training: Iterable[Dialogue], run: Run
) -> Manifest:
    """The manifest of a model that is trained on the dialogues `training`.

    Args:
        base: the base model (see `save_base_model`).
        model: as it was loaded from there.
    """
    from csc_train.models.tokenizer import tokenizer_hash

    saved = Path(base.path) == run.directory / BASE_FOLDER
    path = os.path.join("..", BASE_FOLDER) if saved else str(base.path)
    revision = getattr(model.config, "_commit_hash", None) or base.revision
    return Manifest(
        base_model=os.path.abspath(path) if not saved and Path(path).is_dir() else path,
        base_revision=revision,
        chat_template=template.chat_template_name,
        mode=template.config.mode,
        language=template.config.language,
        template_hash=template.fingerprint,
        tokenizer_hash=tokenizer_hash(template.tokenizer),
        strategies=[strategy.label for strategy in STRATEGIES],
        data_hash=data_digest(training),
        # Without where and how it was started: a resumed training ends with the same model.
        config={group: values for group, values in run.config.items() if group != "run"},
        provenance=provenance(),
        base_files=base_files(str(base.path), revision) if run.is_main else {},
    )


def save_base_model(
    config: ModelConfig, tokenizer: "PreTrainedTokenizerBase", dtype: "torch.dtype", seed: int, run: Run
) -> ModelConfig:
    """Save random weights in `dtype` to the run directory, so that an export can load them again.

    Returns:
        The settings of a base model with weights on disk or on the hub.

    Raises:
        InputError: the weights cannot be written.
    """
    if config.init == "pretrained":
        return config
    if run.is_main:
        from csc_train.models.loading import load_model
        from csc_train.models.sharded_parameters import unsharded

        with unsharded(), model_directory(run.directory / BASE_FOLDER) as temporary:
            load_model(config, tokenizer, dtype, seed).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    distributed_state().wait_for_everyone()
    return replace(config, init="pretrained", path=str(run.directory / BASE_FOLDER), tokenizer=None)


@contextlib.contextmanager
def model_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory for model files; on success it takes the place of `path` (see `files.atomic_path`).

    Raises:
        InputError: the directory cannot be written.
    """
    stale = ["*.safetensors", "*.safetensors.index.json", MANIFEST_FILE, CARD_FILE]
    if (Path(path) / MANIFEST_FILE).is_file():
        stale += read_manifest(path).files
    with atomic_path(path, stale) as temporary:
        yield temporary
        for file in temporary.glob("*.safetensors"):
            file.chmod((temporary / "generation_config.json").stat().st_mode)  # safetensors lets only the owner read


def save_final_model(
    directory: str | os.PathLike,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str,
    manifest: Manifest,
    base: ModelConfig | None = None,
    shard_size: str = "50GB",
    record: str | os.PathLike | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory that plain `from_pretrained` loads: weights, tokenizer, chat template and manifest.

    The directory appears only when it is complete.

    Args:
        base: the base model; if it is a vision-language one, the directory is laid out as its own (see
            `layout.save_model`).
        shard_size: size limit of a weight file.
        record: a directory whose record of the training dialogues the model gets as well, if it has one.
        check: is called with the written directory before it is moved to `directory`; an error prevents the move.

    Raises:
        InputError: the directory cannot be written.
    """
    from csc_train.models.layout import save_model

    prepare_to_save(model, tokenizer, chat_template)
    with model_directory(directory) as temporary:
        save_model(model, temporary, shard_size, base and snapshot(str(base.path), "model", base.revision))
        model.generation_config.save_pretrained(temporary)  # an adapter's stops, for servers
        (temporary / CARD_FILE).unlink(missing_ok=True)  # PEFT's, without content
        tokenizer.save_pretrained(temporary)
        if record is not None and (Path(record) / RECORD_FILE).exists():
            shutil.copyfile(Path(record) / RECORD_FILE, temporary / RECORD_FILE)
        files = hash_files(temporary)
        write_manifest(temporary, replace(manifest, files=files, weights_hash=weights_hash(files)))
        if check is not None:
            check(temporary)
    for name, known in files.items():
        remember(Path(directory) / name, known["sha256"])


def prepare_to_save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> None:
    """Give a final model its chat template and its stops.

    Its generation configuration stops at the end of a turn, which a base model without chat training does not.
    """
    tokenizer.chat_template = chat_template
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    model.generation_config.eos_token_id = list(dict.fromkeys([_end_of_turn(tokenizer), *stops]))


def weights_hash(files: FileHashes) -> str:
    """SHA-256 (hex) over the hashes of weight files, by name."""
    return digest({name: known["sha256"] for name, known in files.items() if name.endswith(".safetensors")})


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The control token that ends a reply in the tokenizer's chat template."""
    chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "⟦reply⟧"}]
    text: Any = tokenizer.apply_chat_template(chat, tokenize=False)
    return tokenizer.encode(text.split("⟦reply⟧")[-1], add_special_tokens=False)[0]


def write_manifest(
    directory: str | os.PathLike, manifest: Manifest, training: Iterable[Dialogue] | None = None
) -> None:
    """Write a manifest into a directory, and the record of the training dialogues if they are given."""
    write_json(Path(directory) / MANIFEST_FILE, asdict(manifest))
    if training is not None:
        write_training_record(directory, training)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read the manifest of a model directory or a run directory.

    Raises:
        InputError: the directory or its manifest is missing or broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    if not (directory / MANIFEST_FILE).is_file():
        raise InputError(
            f"{directory}: no {MANIFEST_FILE}: choose a model that recipes/sft.py trained, or copy that file as well"
        )
    try:
        return Manifest(**read_json(directory / MANIFEST_FILE))
    except (TypeError, InputError) as error:
        reason = str(error).removeprefix(f"{directory / MANIFEST_FILE}: ")
        raise InputError(f"{directory / MANIFEST_FILE}: not a manifest ({reason}): copy it again") from error


def check_manifest(directory: str | os.PathLike, manifest: Manifest, template_hash: str, tokenizer: str) -> None:
    """Refuse a model whose template or tokenizer changed since training.

    Args:
        template_hash: of the present template.
        tokenizer: hash of the present tokenizer (see `tokenizer_hash`).

    Raises:
        InputError: a hash differs; names both.
    """
    for what, trained, now in (
        ("template", manifest.template_hash, template_hash),
        ("tokenizer", manifest.tokenizer_hash, tokenizer),
    ):
        if trained != now:
            raise InputError(
                f"{directory}: the model was trained with another {what} (trained {trained[:12]}, now {now[:12]}): "
                "use the code version that its manifest names, or train again"
            )
