"""BLEU and ROUGE-L between replies and their references, in percent.

Every function takes pairs (reply, reference), as text or as tokens, and returns the score over all of them, or None
when there are none. An empty reply scores 0.
"""

import functools
import warnings
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

if TYPE_CHECKING:
    import jieba

TextPair = tuple[str, str]
TokenPair = tuple[Sequence[Hashable], Sequence[Hashable]]


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


def words(text: str) -> list[str]:
    """The jieba words of `text` (default dictionary, HMM on), white space left out."""
    return [word for word in _segmenter().lcut(text) if not word.isspace()]


def characters(text: str) -> str:
    """The characters of `text`, white space left out."""
    return "".join(text.split())


def word_pairs(pairs: Sequence[TextPair]) -> list[TokenPair]:
    """Both sides of each pair in jieba words; a text that occurs more than once is segmented once."""
    segment = functools.cache(words)
    return [(segment(reply), segment(reference)) for reply, reference in pairs]


def sentence_bleu(pairs: Sequence[TokenPair]) -> tuple[float, float] | None:
    """BLEU-2 and BLEU-4, each the mean over pairs of nltk's sentence BLEU with smoothing method1.

    Weights are (1/2, 1/2) and (1/4, 1/4, 1/4, 1/4). Method1 counts 0.1 for an order without any match; a reply that
    shares no token with its reference scores 0.
    """
    if not pairs:
        return None
    smoothing = SmoothingFunction().method1
    weights = [(1 / 2, 1 / 2), (1 / 4, 1 / 4, 1 / 4, 1 / 4)]
    scores = [
        nltk_sentence_bleu([reference], reply, weights, smoothing) if reply else (0.0, 0.0)
        for reply, reference in pairs
    ]
    bleu_2, bleu_4 = (100 * sum(column) / len(pairs) for column in zip(*scores, strict=True))
    return bleu_2, bleu_4


def _sacrebleu_zh() -> BLEU:
    return BLEU(tokenize="zh", smooth_method="exp", effective_order=False)


def corpus_bleu_zh(pairs: Sequence[TextPair]) -> tuple[float, float] | None:
    """BLEU-2 and BLEU-4 of sacrebleu over the whole corpus, with its `zh` tokenizer.

    That tokenizer makes each Chinese character a token and keeps Latin words and numbers whole.
    """
    if not pairs:
        return None
    replies, references = zip(*pairs, strict=True)
    full = _sacrebleu_zh().corpus_score(replies, [references])
    short = BLEU.compute_bleu(
        full.counts[:2], full.totals[:2], full.sys_len, full.ref_len, smooth_method="exp", max_ngram_order=2
    )
    return short.score, full.score


def corpus_bleu_zh_signature(order: int) -> str:
    """sacrebleu's reproducibility signature, plus the largest n-gram order, which sacrebleu leaves out."""
    metric = _sacrebleu_zh()
    metric.num_refs = 1
    return f"{metric.get_signature()}|order:{order}"


def rouge_l(pairs: Sequence[TokenPair]) -> float | None:
    """ROUGE-L F1 on the given tokens, mean over pairs: 2 x longest common subsequence / (both lengths together)."""
    if not pairs:
        return None
    return 100 * sum(_rouge_l_f1(reply, reference) for reply, reference in pairs) / len(pairs)


def _rouge_l_f1(reply: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    length = len(reply) + len(reference)
    return 2 * LCSseq.similarity(reply, reference) / length if length else 0.0


def rouge_l_latin(pairs: Sequence[TextPair]) -> float | None:
    """ROUGE-L F1 of rouge_score with its default tokenizer, mean over pairs.

    That tokenizer keeps ASCII letters and digits alone. On Chinese text this compares amounts, dates and Latin names,
    and a pair where either side has none of them scores 0.
    """
    if not pairs:
        return None
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return 100 * sum(scorer.score(reference, reply)["rougeL"].fmeasure for reply, reference in pairs) / len(pairs)
