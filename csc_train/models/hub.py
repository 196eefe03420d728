"""Read models and tokenizers from a directory or the hub, with errors that say what to do."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from csc_train.errors import InputError, causes
from csc_train.files import read_json
from csc_train.hub_access import offline_without_hub, split_revision
from csc_train.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


OUTPUT_AND_INPUT = {"lm_head.weight", "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"}
"""Names in weight files of the output layer and of the input embeddings, the last in vision-language models."""
_LOG_IN = "accept its licence on its hub page, and set HF_TOKEN or run `hf auth login`, or give a local directory"
_REFUSALS = {
    errors.GatedRepoError: f"the model is gated: {_LOG_IN}",
    errors.RepositoryNotFoundError: "no such {kind} on the hub: check the name; a private {kind} needs HF_TOKEN",
    errors.RevisionNotFoundError: "the hub repository has no such branch, tag or commit: check the revision",
}


@contextlib.contextmanager
def hub_errors(
    path: str,
    what: str,
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, SafetensorError, errors.HTTPError),
) -> Iterator[None]:
    """Turn failures to read `what` ("model", "tokenizer", "data set") at `path` into an InputError of one line.

    Args:
        kinds: the errors that mean such a failure: all kinds where only a library runs that reads a user's files.
    """
    local = Path(path)
    if is_local_path(path) and not local.is_dir():
        raise InputError(f"{path}: no such model directory")
    with contextlib.nullcontext("") if local.is_dir() else offline_without_hub() as offline:
        try:
            yield
        except InputError:
            raise
        except kinds as error:
            found = list(causes(error))
            for kind, advice in _REFUSALS.items():
                if any(isinstance(cause, kind) for cause in found):
                    repository = "data set" if what == "data set" else "model"
                    raise InputError(f"{path}: {advice.format(kind=repository)}") from error
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
            if local.is_dir():
                raise InputError(f"{path}: the directory has no readable {what} ({reason})") from error
            why = f"{offline} and the cache has no copy" if offline else f"the hub has no readable one ({reason})"
            advice = "check the name, give a local directory, or download it"
            raise InputError(f"{path}: cannot load the {what}: {why}: {advice}") from error


def base_model_type(config: ModelConfig) -> str:
    """The model family of the base: that of its config.json, which may be another than `model.architecture` says.

    Raises:
        InputError: its configuration cannot be read (see `hub_errors`).
    """
    if config.init == "random":
        return config.architecture.model_type
    with hub_errors(config.path, "model"):
        return read_model_config(config.path, config.revision).model_type


def load_causal_lm(path: str, **options: Any) -> "PreTrainedModel":
    """Load the causal language model at a path or hub id, with the repairs that `inspect_model` says.

    An adapter in a directory is merged into its base model.

    Args:
        options: those of `from_pretrained`.

    Raises:
        InputError: it cannot be read (see `hub_errors`), or lacks weights, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM  # takes seconds

    from csc_train.models.attention.gated_delta_net import prepare_delta_nets
    from csc_train.models.experts import leave_out_router_logits

    if base := adapter_base(path):
        return _merge_adapter(load_causal_lm(base[0], **options | {"revision": base[1]}), path)
    with hub_errors(path, "model"):
        config: Any = read_model_config(path, options.get("revision"))
        file = find_file(path, "config.json", options.get("revision"))
        if file and config.tie_word_embeddings and has_own_head(file.parent):
            config.tie_word_embeddings = False  # transformers goes by the weights, too, but keeps what the file says
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **options)
        model, found = loaded
        repair_generation_config(model)
        prepare_delta_nets(model)
        if getattr(model.config, "output_router_logits", False):
            leave_out_router_logits(model)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{path}: {len(missing)} tensors of the model are missing, the first is {missing[0]}")
    return model


def read_model_config(path: str, revision: str | None = None) -> "PretrainedConfig":
    """The settings of the language model at a path or hub id: of a vision-language model, those of its text part.

    Raises:
        OSError: it cannot be read (call this under `hub_errors`).
    """
    from transformers import AutoConfig  # takes seconds

    whole = AutoConfig.from_pretrained(path, revision=revision)
    config: Any = whole.get_text_config()
    if config is not whole:  # what both may say, as the whole model takes it
        config.tie_word_embeddings |= whole.tie_word_embeddings
        config.dtype = config.dtype or whole.dtype
        config._commit_hash = getattr(whole, "_commit_hash", None)
    return config


def adapter_base(path: str) -> tuple[str, str | None] | None:
    """The base model of a PEFT adapter in a directory, and its revision; None for a whole model or a hub id.

    Raises:
        InputError: the adapter names none.
    """
    if not (file := Path(path, "adapter_config.json")).is_file():
        return None
    settings = read_json(file)
    if not isinstance(base := settings.get("base_model_name_or_path"), str):
        raise InputError(f"{file}: base_model_name_or_path names no base model: write its directory there")
    return base, settings.get("revision")


def _merge_adapter(model: "PreTrainedModel", path: str) -> "PreTrainedModel":
    import peft  # takes seconds

    with hub_errors(path, "adapter", (Exception,)), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT would leave those untrained
        merged: Any = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
    merged.name_or_path = path
    return merged


def repair_generation_config(model: "PreTrainedModel") -> str | None:
    """Turn sampling on where a generation configuration has parameters of sampling without it, as some are published.

    Such a configuration cannot be saved.

    Returns:
        What was wrong and what was done; None if nothing was.

    Raises:
        ValueError: it cannot be saved for another reason.
    """
    config: Any = model.generation_config
    try:
        config.validate(strict=True)
        return None
    except ValueError as error:
        lines = [line.strip("- ").partition(". ")[0] for line in str(error).splitlines() if line.startswith("- ")]
    config.do_sample = True
    config.validate(strict=True)
    return f"{', '.join(lines)}: do_sample is taken as true"


def find_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """A file of the model at a path, or of a hub id in the hub's cache; None if it is not there."""
    if is_local_path(path):
        return Path(path, name) if Path(path, name).is_file() else None
    found = huggingface_hub.try_to_load_from_cache(path, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory that transformers reads.

    Raises:
        InputError: there are none, or shards are missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        shards = [name]
        if not (directory / name).is_file() and index.is_file():
            with hub_errors(str(directory), index.name, (Exception,)):
                shards = sorted(set(read_json(index)["weight_map"].values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing and index.is_file():
            raise InputError(f"{directory}: {len(missing)} of {len(shards)} shards are missing, the first {missing[0]}")
        if not missing:
            return [directory / shard for shard in shards]
    raise InputError(f"{directory}: neither model.safetensors nor an index of its shards: copy the weights")


def has_own_head(directory: Path) -> bool:
    """Whether the weight files hold an output layer of other values than the input embeddings.

    Reads headers, and the two tensors only if both are there, by rows.
    """
    where: dict[str, Any] = {}
    with contextlib.suppress(InputError, SafetensorError), contextlib.ExitStack() as stack:
        for file in weight_files(directory):
            tensors = stack.enter_context(safe_open(file, "pt"))
            where |= dict.fromkeys(OUTPUT_AND_INPUT.intersection(tensors.keys()), tensors)
        if len(where) == 2:
            head, embedding = (tensors.get_slice(name) for name, tensors in where.items())
            rows = range(0, head.get_shape()[0], 4096)
            return any(not head[row : row + 4096].equal(embedding[row : row + 4096]) for row in rows)
    return False


def is_local_path(path: str) -> bool:
    """Whether `path` means a directory: it exists, or it does not look like a hub id (owner/name)."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") != 1


def check_available(config: ModelConfig) -> str | None:
    """Check that the base model has a directory or can be had from the hub, before the imports that take seconds.

    Returns:
        Its commit on the hub; None for a directory.

    Raises:
        InputError: neither; see `hub_errors`.
    """
    if config.init == "pretrained":
        with hub_errors(config.path, "model"):
            if not is_local_path(config.path):
                found = huggingface_hub.hf_hub_download(str(config.path), "config.json", revision=config.revision)
                return Path(found).parent.name
    return None


@functools.cache
def snapshot(path: str, what: str, revision: str | None = None, cached: bool = False) -> Path:
    """The directory of a model's files: `path` itself, or the cache to which the hub's files are downloaded.

    Args:
        path: a directory, a hub id, or one with a revision, OWNER/NAME@REVISION.
        what: the name of the model in error messages.
        cached: download nothing.

    Raises:
        InputError: there is no such directory, or the hub, or its cache, does not give the model.
    """
    with hub_errors(path, what):
        if is_local_path(path):
            return Path(path)
        path, given = split_revision(path)
        revision = revision or given
        download = functools.partial(huggingface_hub.snapshot_download, revision=revision, local_files_only=cached)
        found = Path(download(path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors", "README.md"]))
        if not any(found.glob("*.safetensors")):
            download(path, allow_patterns=["*.bin"])
        return found
