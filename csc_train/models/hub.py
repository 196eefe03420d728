"""Reading models and tokenizers from a directory or the hub, with errors that say what to do."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import huggingface_hub.errors
from safetensors import SafetensorError

from csc_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def hub_errors(path: str, what: str) -> Iterator[None]:
    """Turn the failures of reading `what` ("model", "tokenizer") at `path` into an InputError of one line."""
    local = Path(path)
    if is_local_path(path) and not local.is_dir():
        raise InputError(f"{path}: no such model directory")
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        causes = list(_causes(error))
        if any(isinstance(cause, huggingface_hub.errors.GatedRepoError) for cause in causes):
            advice = "accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`"
            raise InputError(f"{path} is gated: {advice}, or give a local directory") from error
        if any(isinstance(cause, huggingface_hub.errors.RepositoryNotFoundError) for cause in causes):
            raise InputError(f"{path}: no such model on the hub, or a private one without HF_TOKEN") from error
        if any(isinstance(cause, huggingface_hub.errors.RevisionNotFoundError) for cause in causes):
            raise InputError(f"{path}: its hub page has no such branch, tag or commit; check the revision") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local.is_dir():
            raise InputError(f"{path}: the directory holds no {what} that can be read ({first})") from error
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = f"the hub cannot be reached, or has none that can be read ({first})"
        if offline:
            why = "HF_HUB_OFFLINE is set and the cache has no copy"
        raise InputError(f"{path}: cannot load the {what}: {why}; give a local directory, or download it") from error


def load_causal_lm(path: str, **options: Any) -> "PreTrainedModel":
    """The causal model at a path or hub id; `options` are those of `from_pretrained`.

    Raises:
        InputError: it cannot be read (see `hub_errors`), or lacks weights, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM  # takes seconds

    with hub_errors(path, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{path}: lacks {len(missing)} of the model's tensors, the first is {missing[0]}")
    return model


def is_local_path(path: str) -> bool:
    """Whether `path` can only be meant as a directory: it exists, or no hub id is written like it."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1


@functools.cache
def snapshot(path: str, what: str) -> Path:
    """The directory of a model's files: `path` itself, or the cache that the hub's are downloaded to.

    Raises:
        InputError: there is no such directory, or the hub does not give the model; `what` is what the error calls it.
    """
    with hub_errors(path, what):
        if is_local_path(path):
            return Path(path)
        found = Path(huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            huggingface_hub.snapshot_download(path, allow_patterns=["*.bin"])
        return found


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
