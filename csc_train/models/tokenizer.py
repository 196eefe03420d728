"""Load a tokenizer, and hash the parts that decide its token ids."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.models.hub import find_file, hub_errors

logger = logging.getLogger(__name__)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or the hub, and set its padding token if it has none.

    Raises:
        InputError: there is none at `path`, or it cannot be reached (see `hub.hub_errors`).
    """
    with hub_errors(path, "tokenizer", (Exception,)):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{path}: the tokenizer has no fast version (tokenizer.json), which the template needs")
    if len(tokenizer) < 256:
        # For some model types, transformers makes up an empty tokenizer where a directory has none.
        raise InputError(
            f"{path}: there is no tokenizer (or one of {len(tokenizer)} tokens, too few to spell any text)"
        )
    if file := find_file(path, "tokenizer.json", revision):
        _take_rules(tokenizer, file)
    if tokenizer.pad_token is None:
        # Llama 3.1 has a token for padding but does not set it.
        named = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = named if named in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def _take_rules(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer the rules of its own file, where those of the class that transformers chose differ.

    transformers chooses the class by the model's family, and some classes bring their own rules.
    """
    fast: Any = tokenizer.backend_tokenizer
    own = tokenizers.Tokenizer.from_file(str(file))
    differing = [name for name in ("normalizer", "pre_tokenizer", "model") if _rules(fast, name) != _rules(own, name)]
    for name in differing:
        setattr(fast, name, getattr(own, name))
    known = fast.get_added_tokens_decoder()
    tokens = [
        token for number, token in own.get_added_tokens_decoder().items() if repr(known.get(number)) != repr(token)
    ]
    fast.add_tokens(tokens)
    if differing := ", ".join([*differing, *(["added tokens"] if tokens else [])]):
        logger.info(
            f"note: {file}: transformers' {type(tokenizer).__name__} has another {differing}: the file's are used; "
            "other programs that load the model may not do so"
        )


def _rules(tokenizer: tokenizers.Tokenizer, name: str) -> str:
    """A part of a tokenizer as text, without what decides no ids; of a model only the options."""
    part: Any = getattr(tokenizer, name)
    return re.sub(r" vocab=.*|trim_offsets=\w+", "", repr(part)).replace('""', "None")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the parts that decide a tokenizer's ids: vocabulary, merges, normalization, added tokens.

    Padding and truncation settings depend on the last caller and are ignored. So is the difference between an option
    that is off and one that is absent, which depends on the class that loaded the tokenizer.
    """
    fast: Any = tokenizer.backend_tokenizer
    backend = json.loads(fast.to_str())
    parts = {name: backend[name] for name in ("normalizer", "pre_tokenizer", "added_tokens")}
    return digest(parts | {"model": {name: value for name, value in backend["model"].items() if value}})
