"""Tokenizers: loaded, or trained from scratch for a model that starts from random weights."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from accelerate import PartialState
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from csc_train.data.dialogue import Dialogue
from csc_train.errors import InputError
from csc_train.models.hub import hub_errors
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import chat_messages
from csc_train.training.config import TRAINED_TOKENIZER, ModelConfig

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FAMILIES = {
    # Digits one by one; turns between <|im_start|> and <|im_end|>.
    "qwen2": {
        "pattern": rf"{_LETTERS}|\p{{N}}|{_REST}",
        "normalizer": normalizers.NFC(),
        "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "plain": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        "bos": None,
        "eos": "<|im_end|>",
        "pad": "<|endoftext|>",
    },
    # Digits by threes; turns under a header, ended by <|eot_id|>.
    "llama3": {
        "pattern": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
        "normalizer": None,
        "special": (
            "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        ),
        "plain": (),
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "pad": "<|finetune_right_pad_id|>",
    },
}  # fmt: skip
"""Pre-tokenizer, normalizer and control tokens of the model families: facts of their published tokenizers."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, family: str = "qwen2") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the pre-tokenizer and control tokens of a model family.

    Args:
        texts: what to train on.
        vocab_size: size of the result, at least 256 bytes and the control tokens.
        family: a key of `FAMILIES`.
    """
    facts = FAMILIES[family]
    controls = [*facts["special"], *facts["plain"]]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if facts["normalizer"]:
        tokenizer.normalizer = facts["normalizer"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(facts["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(controls), initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.add_special_tokens(list(facts["special"]))
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in facts["plain"]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=facts["bos"], eos_token=facts["eos"], pad_token=facts["pad"]
    )


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or the hub; a missing padding token is filled in.

    Raises:
        InputError: there is none at `path`, or it cannot be reached (see `hub.hub_errors`).
    """
    with hub_errors(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{path}: the tokenizer has no fast version (tokenizer.json), which the template needs")
    if len(tokenizer) < 256:
        # For some model types transformers makes an empty tokenizer up where a directory holds none.
        raise InputError(
            f"{path}: there is no tokenizer (or one of {len(tokenizer)} tokens, too few to spell any text)"
        )
    if tokenizer.pad_token is None:
        # Llama 3.1 names a token for padding on the right but does not set it.
        named = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = named if named in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def obtain_tokenizer(
    config: ModelConfig, template: TemplateConfig, dialogues: Iterable[Dialogue], directory: Path, job: PartialState
) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` asks for: loaded, or trained on `dialogues` and kept in `directory`.

    Args:
        job: the processes of this job; the main one trains while the others wait.

    Raises:
        InputError: as `load_tokenizer`.
    """
    if config.tokenizer != TRAINED_TOKENIZER:
        return load_tokenizer(config.tokenizer or config.path, None if config.tokenizer else config.revision)
    if job.is_main_process:
        family = "llama3" if config.chat_template == "llama3_1" else "qwen2"
        # All that a rendering holds, as often as it holds it: what stands in every dialogue becomes few tokens.
        texts = (
            text
            for dialogue in dialogues
            for message in chat_messages(dialogue.turns, template)
            for text in (message["role"], f"[{message.get('strategy', '')}]", message["content"])
        )
        train_tokenizer(texts, config.tokenizer_vocab_size, family).save_pretrained(directory)
    job.wait_for_everyone()
    return load_tokenizer(str(directory))
