"""BLEU and ROUGE-L between replies and their references, in percent, turn by turn.

Every function takes pairs (reply, reference), as text or as tokens, and returns a row per pair: its score, or what it
adds to a score over the whole corpus. An empty reply scores 0.
"""

import functools
from collections.abc import Hashable, Sequence

import numpy
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from csc_train.data.segmentation import segment_words

TextPair = tuple[str, str]
TokenPair = tuple[Sequence[Hashable], Sequence[Hashable]]

_ORDERS = 4
"""The largest n-grams that BLEU counts."""


def characters(text: str) -> str:
    """The characters of `text`, white space left out."""
    return "".join(text.split())


def word_pairs(pairs: Sequence[TextPair]) -> list[TokenPair]:
    """Both sides of each pair in jieba words; a text that occurs more than once is segmented once."""
    segment = functools.cache(segment_words)
    return [(segment(reply), segment(reference)) for reply, reference in pairs]


def sentence_bleu(pairs: Sequence[TokenPair]) -> numpy.ndarray:
    """float [pairs, 2]: BLEU-2 and BLEU-4 of nltk's sentence BLEU with smoothing method1.

    Weights are (1/2, 1/2) and (1/4, 1/4, 1/4, 1/4). Method1 counts 0.1 for an order without any match; a reply that
    shares no token with its reference scores 0.
    """
    smoothing = SmoothingFunction().method1
    weights = [(1 / 2, 1 / 2), (1 / 4, 1 / 4, 1 / 4, 1 / 4)]
    scores = [
        nltk_sentence_bleu([reference], reply, weights, smoothing) if reply else (0.0, 0.0)
        for reply, reference in pairs
    ]
    return 100 * numpy.array(scores, float).reshape(-1, 2)


def _sacrebleu_zh() -> BLEU:
    return BLEU(tokenize="zh", smooth_method="exp", effective_order=False)


def corpus_bleu_zh_counts(pairs: Sequence[TextPair]) -> numpy.ndarray:
    """float [pairs, 10]: what each pair adds to sacrebleu's corpus BLEU with its `zh` tokenizer.

    Lengths of reply and reference, then matching n-grams and all n-grams of the reply for n = 1..4. The tokenizer makes
    each Chinese character a token and keeps Latin words and numbers whole.
    """
    if not pairs:
        return numpy.zeros((0, 2 + 2 * _ORDERS))
    replies, references = zip(*pairs, strict=True)
    # What sacrebleu itself resamples in its significance tests; there is no public name for it.
    return numpy.array(_sacrebleu_zh()._extract_corpus_statistics(replies, [references]), float)


def corpus_bleu_zh(sums: numpy.ndarray, order: int) -> numpy.ndarray:
    """float [...]: sacrebleu's BLEU up to n-grams of `order`, of sums over `corpus_bleu_zh_counts`, float [..., 10].

    As sacrebleu's `compute_bleu` with smoothing `exp`, for many sums at a time: the k-th order without a match counts
    1 / 2^k of one. Without any match, or without any n-gram of an order, BLEU is 0; without any reply, too.
    """
    ours, theirs = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + order], sums[..., 2 + _ORDERS : 2 + _ORDERS + order]
    smoothed = numpy.where(matches > 0, matches, 0.5 ** (matches == 0).cumsum(axis=-1))
    scored = (matches > 0).any(axis=-1) & (total > 0).all(axis=-1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        brevity = numpy.where(ours < theirs, numpy.exp(1 - theirs / ours), 1)
        precision = numpy.exp(numpy.log(smoothed / total).mean(axis=-1))
        return numpy.where(scored, 100 * brevity * precision, 0.0)


def corpus_bleu_zh_signature(order: int) -> str:
    """sacrebleu's reproducibility signature, plus the largest n-gram order, which sacrebleu leaves out."""
    metric = _sacrebleu_zh()
    metric.num_refs = 1
    return f"{metric.get_signature()}|order:{order}"


def rouge_l(pairs: Sequence[TokenPair]) -> numpy.ndarray:
    """float [pairs]: ROUGE-L F1 on the given tokens, 2 x longest common subsequence / (both lengths together)."""
    return 100 * numpy.array([_rouge_l_f1(reply, reference) for reply, reference in pairs], float)


def _rouge_l_f1(reply: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    length = len(reply) + len(reference)
    return 2 * LCSseq.similarity(reply, reference) / length if length else 0.0


def rouge_l_latin(pairs: Sequence[TextPair]) -> numpy.ndarray:
    """float [pairs]: ROUGE-L F1 of rouge_score with its default tokenizer.

    That tokenizer keeps ASCII letters and digits alone. On Chinese text this compares amounts, dates and Latin names,
    and a pair where either side has none of them scores 0.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return 100 * numpy.array([scorer.score(reference, reply)["rougeL"].fmeasure for reply, reference in pairs], float)
