"""The words of a Chinese text."""

import functools
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jieba


@functools.cache
def _segmenter() -> "jieba.Tokenizer":
    # Loading the dictionary by hand (about a second) keeps jieba's own start-up from logging to stderr and from
    # leaving a cache file in the system's temporary directory that every user of the machine would share.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in jieba's source, which newer Pythons print
        import jieba
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def segment_words(text: str) -> list[str]:
    """The jieba words of `text` (default dictionary, HMM on), white space left out."""
    return [word for word in _segmenter().lcut(text) if not word.isspace()]


def word_end_offsets(text: str) -> set[int]:
    """The places in `text` at which jieba words of the dictionary end (HMM off: it would make words such as 元起)."""
    return {end for _, _, end in _segmenter().tokenize(text, HMM=False)}
