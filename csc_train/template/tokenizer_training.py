"""Train a tokenizer from scratch, for a model that starts from random weights."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from accelerate import PartialState
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from csc_train.data.dialogue import ROLES, Dialogue, Turn
from csc_train.models.config import TRAINED_TOKENIZER, ModelConfig
from csc_train.models.families import get_family
from csc_train.models.tokenizer import load_tokenizer
from csc_train.template.config import TemplateConfig
from csc_train.template.system_prompt import system_prompt
from csc_train.templates import read_yaml

TOKENIZER_STYLES = read_yaml(__package__, "tokenizer_styles.yaml")
"""Pre-tokenizer, normalizer and control tokens of published tokenizers, by style (`ModelFamily.tokenizer_style`)."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, style: str = "qwen2") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the pre-tokenizer and control tokens of a published tokenizer.

    Args:
        texts: the training texts.
        vocab_size: tokens of the result: at least the 256 bytes and the control tokens.
        style: a key of `TOKENIZER_STYLES`.
    """
    facts = TOKENIZER_STYLES[style]
    controls = [*facts["special"], *facts["plain"]]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if facts["normalizer"]:
        tokenizer.normalizer = getattr(normalizers, facts["normalizer"])()
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


def _texts(turn: Turn, template: TemplateConfig) -> tuple[str, str, str]:
    labelled = turn.strategy and template.mode != "reply_only"
    return ROLES[turn.speaker], f"[{turn.strategy.name(template.language) if labelled else ''}]", turn.text


def get_tokenizer(
    config: ModelConfig, template: TemplateConfig, dialogues: Iterable[Dialogue], directory: Path, job: PartialState
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `config`, or train it on `dialogues` and save it in `directory`.

    Args:
        job: the processes of this job; the main one trains while the others wait.

    Raises:
        InputError: as `load_tokenizer`.
    """
    if config.tokenizer != TRAINED_TOKENIZER:
        return load_tokenizer(config.tokenizer or config.path, None if config.tokenizer else config.revision)
    if job.is_main_process:
        # Every text as often as it is rendered, so that frequent texts become few tokens.
        prompt = system_prompt(template.mode, template.language)
        texts = (
            text
            for dialogue in dialogues
            for message in (
                ("system", "[]", prompt if dialogue.kind == "csc" else dialogue.system),
                *(_texts(turn, template) for turn in dialogue.turns),
            )
            for text in message
        )
        style = get_family(config.architecture.model_type).tokenizer_style
        train_tokenizer(texts, config.tokenizer_vocab_size, style).save_pretrained(directory)
    job.wait_for_everyone()
    return load_tokenizer(str(directory))
