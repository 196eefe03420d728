"""Segmentation of text into words: Chinese by jieba, that of other languages at white space and punctuation."""

import functools
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jieba
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


@functools.cache
def _segmenter() -> "jieba.Tokenizer":
    # jieba's own start-up logs to stderr and leaves a cache file in the shared temporary directory. So the dictionary
    # is loaded here, which takes about a second.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in jieba's source, which newer Pythons print
        import jieba
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def segment_words(text: str) -> list[str]:
    """The jieba words of `text` (default dictionary, HMM on), without white space."""
    return [word for word in _segmenter().lcut(text) if not word.isspace()]


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, and its punctuation, by sacrebleu's tokenizer 13a."""
    return _tokenizer_13a()(text.casefold()).split()


@functools.cache
def _tokenizer_13a() -> "Tokenizer13a":
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def word_end_offsets(text: str) -> set[int]:
    """The offsets in `text` at which dictionary words end (HMM off: it would make words such as 元起)."""
    return {end for _, _, end in _segmenter().tokenize(text, HMM=False)}
