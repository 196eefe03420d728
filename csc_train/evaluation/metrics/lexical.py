"""BLEU and ROUGE-L between replies and their references, in percent.

The functions take pairs (reply, reference) of texts or tokens, and return a row per pair: its score, or its terms of a
corpus score. An empty reply scores 0. The `paper` metrics reconstruct unpublished metric code: the paper's ROUGE-L is
below its BLEU-2 throughout, which fits rouge_score's default tokenizer (digits and Latin letters only); its BLEU cannot
be identified fully, and nltk's sentence BLEU on jieba words with method1 is a candidate.
"""

import functools
from collections.abc import Hashable, Sequence
from importlib.metadata import version

import numpy
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable, TextPair
from csc_train.stats import Statistic, mean

TokenPair = tuple[Sequence[Hashable], Sequence[Hashable]]

_ORDERS = 4
"""The largest n-grams that BLEU counts."""


def characters(text: str) -> str:
    """The characters of `text` without white space."""
    return "".join(text.split())


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


@functools.cache  # its tokenizer remembers texts
def _sacrebleu_zh() -> BLEU:
    return BLEU(tokenize="zh", smooth_method="exp", effective_order=False)


def corpus_bleu_zh_counts(pairs: Sequence[TextPair]) -> numpy.ndarray:
    """float [pairs, 10]: the terms of each pair in sacrebleu's corpus BLEU with the `zh` tokenizer.

    Lengths of reply and reference, then matching n-grams and all n-grams of the reply for n = 1..4. Tokens are Chinese
    characters, Latin words and numbers.
    """
    if not pairs:
        return numpy.zeros((0, 2 + 2 * _ORDERS))
    replies, references = zip(*pairs, strict=True)
    # sacrebleu's own significance tests resample these; they have no public name.
    return numpy.array(_sacrebleu_zh()._extract_corpus_statistics(replies, [references]), float)


def corpus_bleu_zh(sums: numpy.ndarray, order: int) -> numpy.ndarray:
    """float [...]: sacrebleu's BLEU up to n-grams of `order`, of sums over `corpus_bleu_zh_counts`, float [..., 10].

    As sacrebleu's `compute_bleu` with smoothing `exp`, vectorized: the k-th order without a match counts 1 / 2^k
    matches. BLEU is 0 without any match, without any n-gram of an order, and without any reply.
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
    """sacrebleu's reproducibility signature, plus the largest n-gram order, which it omits."""
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

    That tokenizer keeps ASCII letters and digits only. On Chinese text this compares amounts, dates and Latin names; a
    pair without them on either side scores 0.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return 100 * numpy.array([scorer.score(reference, reply)["rougeL"].fmeasure for reply, reference in pairs], float)


def rouge_l_char_scores(table: PredictionTable) -> numpy.ndarray:
    """float [turns]: ROUGE-L F1 on characters without white space, in percent."""
    return table.rows(rouge_l, characters)


def _sentence_bleu(table: PredictionTable, column: int) -> Metric:
    signature = (
        f"nltk {version('nltk')} sentence BLEU on {table.segmenter}, smoothing method1, mean over turns, "
        f"orders 1-{(2, 4)[column]}"
    )
    return Metric(mean(table.rows(sentence_bleu, table.segment)[:, column]), signature, unit=table.word_unit)


@metric(name="B-2", unit="words", direction="higher", profiles=["paper", "en"])
def sentence_bleu_2(table: PredictionTable) -> Metric:
    """The paper's BLEU-2, reconstructed."""
    return _sentence_bleu(table, 0)


@metric(name="B-4", unit="words", direction="higher", profiles=["paper", "en"])
def sentence_bleu_4(table: PredictionTable) -> Metric:
    """The paper's BLEU-4, reconstructed."""
    return _sentence_bleu(table, 1)


@metric(name="R-L", unit="digits and Latin only", direction="higher", profiles=["paper"])
def paper_rouge_l(table: PredictionTable) -> Metric:
    """The paper's ROUGE-L, reconstructed."""
    signature = f"rouge_score {version('rouge-score')} rougeL F1, default tokenizer, no stemming, mean over turns"
    return Metric(mean(table.rows(rouge_l_latin)), signature)


def _zh_bleu(table: PredictionTable, order: int) -> Metric:
    counts = table.rows(corpus_bleu_zh_counts)
    statistic = Statistic(counts, lambda sums: corpus_bleu_zh(sums, order)) if len(counts) else None
    return Metric(statistic, f"sacrebleu corpus BLEU, effective order off, {corpus_bleu_zh_signature(order)}")


@metric(name="B-2", unit="Chinese characters and Latin words", direction="higher", profiles=["zh"])
def zh_bleu_2(table: PredictionTable) -> Metric:
    """Corpus BLEU-2 with sacrebleu's Chinese tokenizer."""
    return _zh_bleu(table, 2)


@metric(name="B-4", unit="Chinese characters and Latin words", direction="higher", profiles=["zh"])
def zh_bleu_4(table: PredictionTable) -> Metric:
    """Corpus BLEU-4 with sacrebleu's Chinese tokenizer."""
    return _zh_bleu(table, 4)


def _rouge_signature() -> str:
    return f"ROUGE-L F1, longest common subsequence by rapidfuzz {version('rapidfuzz')}, mean over turns"


@metric(name="R-L char", unit="characters", direction="higher", profiles=["zh"], by_position=True)
def zh_rouge_l_char(table: PredictionTable) -> Metric:
    """ROUGE-L on characters."""
    return Metric(mean(rouge_l_char_scores(table)), f"{_rouge_signature()}, without white space")


@metric(name="R-L", unit="words", direction="higher", profiles=["en"], by_position=True)
@metric(name="R-L word", unit="words", direction="higher", profiles=["zh"])
def rouge_l_word(table: PredictionTable) -> Metric:
    """ROUGE-L on words."""
    return Metric(
        mean(table.rows(rouge_l, table.segment)), f"{_rouge_signature()}, {table.segmenter}", unit=table.word_unit
    )
