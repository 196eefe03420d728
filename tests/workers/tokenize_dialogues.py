"""Tokenizes `dialogues()` in a separate process: `tokenize_dialogues.py CACHE THREADS [pause]`.

With `pause` it says so when half of the chunks are written, and continues at a line on its standard input.
"""

import random
import sys
from collections.abc import Iterator

from conftest import random_dialogue, small_tokenizer

from csc_train import tokenized_cache
from csc_train.config.cli import log_to_stdout
from csc_train.data.dialogue import Dialogue
from csc_train.template.config import TemplateConfig, TokenizationConfig
from csc_train.template.dialogue_template import DialogueTemplate

CHUNK = 7


def dialogues() -> list[Dialogue]:
    """The same ones in every process."""
    rng = random.Random(20)
    return [random_dialogue(rng) for _ in range(40)]


def template(name: str = "qwen2_5", **settings) -> DialogueTemplate:
    """The template that encodes them."""
    return DialogueTemplate(small_tokenizer(name), name, TemplateConfig(**settings))


def pausing(chunks: Iterator) -> Iterator:
    """The chunks, with a pause in the middle."""
    for number, chunk in enumerate(chunks):
        if number == 3:
            print("half-way", flush=True)
            sys.stdin.readline()
        yield chunk


if __name__ == "__main__":
    log_to_stdout()
    cache, threads, *pause = sys.argv[1:]
    tokenized_cache.CHUNK = CHUNK
    if pause:
        encode = tokenized_cache._encode
        tokenized_cache._encode = lambda *arguments: pausing(encode(*arguments))
    tokenized_cache.tokenize(dialogues(), template(), TokenizationConfig(cache, int(threads)))
