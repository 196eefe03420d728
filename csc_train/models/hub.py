"""Read models and tokenizers from a directory or the hub, with errors that say what to do."""

import contextlib
import functools
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, errors
from safetensors import SafetensorError

from csc_train.errors import InputError, causes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LOG_IN = "accept its licence on its hub page, and set HF_TOKEN or run `hf auth login`, or give a local directory"
_REFUSALS = {
    errors.GatedRepoError: f"the model is gated: {_LOG_IN}",
    errors.RepositoryNotFoundError: "no such model on the hub: check the name; a private model needs HF_TOKEN",
    errors.RevisionNotFoundError: "the hub repository has no such branch, tag or commit: check the revision",
}


@contextlib.contextmanager
def hub_errors(path: str, what: str) -> Iterator[None]:
    """Turn failures to read `what` ("model", "tokenizer") at `path` into an InputError of one line."""
    local = Path(path)
    if is_local_path(path) and not local.is_dir():
        raise InputError(f"{path}: no such model directory")
    offline = constants.HF_HUB_OFFLINE
    absent = not (local.is_dir() or offline or _hub_answers())
    # Offline, the libraries read the cache; else they would ask a hub that does not answer for 45 s.
    constants.HF_HUB_OFFLINE = offline or absent
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        found = list(causes(error))
        for kind, advice in _REFUSALS.items():
            if any(isinstance(cause, kind) for cause in found):
                raise InputError(f"{path}: {advice}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local.is_dir():
            raise InputError(f"{path}: the directory has no readable {what} ({reason})") from error
        why = f"the hub has no readable one ({reason})"
        if absent or offline:
            why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
            why += " and the cache has no copy"
        advice = "check the name, give a local directory, or download it"
        raise InputError(f"{path}: cannot load the {what}: {why}: {advice}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub, or a proxy on the way to it, can be connected to."""
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        if not urllib.request.getproxies():
            socket.create_connection((hub.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True


def load_causal_lm(path: str, **options: Any) -> "PreTrainedModel":
    """Load the causal language model at a path or hub id.

    Args:
        options: those of `from_pretrained`.

    Raises:
        InputError: it cannot be read (see `hub_errors`), or lacks weights, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM  # takes seconds

    with hub_errors(path, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{path}: {len(missing)} tensors of the model are missing, the first is {missing[0]}")
    return model


def is_local_path(path: str) -> bool:
    """Whether `path` means a directory: it exists, or it does not look like a hub id (owner/name)."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1


@functools.cache
def snapshot(path: str, what: str) -> Path:
    """The directory of a model's files: `path` itself, or the cache to which the hub's files are downloaded.

    Args:
        what: the name of the model in error messages.

    Raises:
        InputError: there is no such directory, or the hub does not give the model.
    """
    with hub_errors(path, what):
        if is_local_path(path):
            return Path(path)
        found = Path(huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            huggingface_hub.snapshot_download(path, allow_patterns=["*.bin"])
        return found
