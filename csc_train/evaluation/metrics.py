"""One system's predictions in one context -> its row of the table, in each metric profile.

Two profiles, because the paper does not publish its metric code:

- `paper` is our reconstruction of what the paper most likely computed. Its ROUGE-L is below its BLEU-2 throughout,
  which fits rouge_score's default tokenizer (it sees digits and Latin letters alone) and neither characters nor words;
  its BERTScore of 55 to 67 fits bert-base-chinese, layer 8, not rescaled; its BLEU cannot be identified fully, and
  nltk's sentence BLEU on jieba words with method1 is a candidate.
- `zh` measures Chinese text as Chinese text: ROUGE-L on characters and on words, and sacrebleu with a signature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from csc_train.errors import InputError, check_choice, check_range
from csc_train.evaluation import lexical
from csc_train.evaluation.predictions import Prediction

TextPairs = list[tuple[str, str]]

PROFILES: dict[str, tuple[str, ...]] = {
    "paper": ("B-2", "B-4", "R-L", "BS", "BR", "ACC"),
    "zh": ("B-2", "B-4", "R-L char", "R-L word", "BS", "ACC"),
}
"""The columns of each profile, in the order in which tables show them."""

PROFILE_NOTES: dict[str, str] = {
    "paper": "B-2, B-4, R-L, BS and BR are reconstructions: the paper does not publish its metric code. "
    "R-L sees digits and Latin letters only.",
    "zh": "Our own choice of metrics for Chinese; the paper does not report these.",
}
"""What a reader must know before comparing a profile's figures with published ones."""


@dataclass
class MetricsConfig:
    """Which metrics to compute.

    Raises:
        InputError: an unknown profile, a batch size or layer below 1, or a model directory that is none.
    """

    profiles: list[str] = field(default_factory=lambda: ["paper", "zh"])
    """Names out of `PROFILES`."""
    bertscore_model: str | None = None
    """Local directory of the BERTScore model (the paper's figures fit bert-base-chinese); None prints n/a."""
    bertscore_layers: int = 8
    """The layer that BERTScore compares; 8 is the bert-score package's choice for bert-base-chinese."""
    bleurt_model: str | None = None
    """Local directory of a PyTorch conversion of BLEURT-20; None prints n/a."""
    batch_size: int = 64
    """Pairs per forward pass of BERTScore and BLEURT."""

    def __post_init__(self):
        for profile in self.profiles:
            check_choice("metrics.profiles", profile, PROFILES)
        check_range("metrics.bertscore_layers", self.bertscore_layers, 1)
        check_range("metrics.batch_size", self.batch_size, 1)
        # Looked for here, before hours are spent on the predictions.
        for name in ("bertscore_model", "bleurt_model"):
            directory = getattr(self, name)
            if directory is not None and not (Path(directory) / "config.json").is_file():
                raise InputError(f"metrics.{name}={directory}: not a local model directory (it has no config.json)")


@dataclass(frozen=True)
class Score:
    """One cell of the table, and what its number means.

    `value` is in percent, or None where there is none, and then `reason` says why. `unit` is what the metric counts
    (words, characters, ...); `signature` names the implementation and its settings.
    """

    value: float | None
    unit: str
    signature: str
    reason: str | None


def score(predictions: Sequence[Prediction], config: MetricsConfig, *, strategies_apply: bool) -> dict:
    """Score one system's predictions in one context.

    Returns `{"profiles": {profile: {column: Score}}, "counts": {...}}`, profiles as the config orders them and columns
    as `PROFILES` does. Counts: `turns`; `unparsed`, the turns whose strategy could not be read (None where strategies
    do not apply); `empty_replies`, which score 0 in every text metric.

    `strategies_apply` is False where the system predicts no strategy (it is handed in, or left out): ACC is then n/a.

    Raises:
        InputError: a metric model cannot be loaded.
    """
    pairs = [(prediction.response, prediction.reference_response) for prediction in predictions]
    words = lexical.word_pairs(pairs)
    shared = {"BS": _bertscore(pairs, config), "ACC": _accuracy(predictions, strategies_apply)}
    profiles = {}
    for name in config.profiles:
        cells = shared | (_paper_cells(pairs, words, config) if name == "paper" else _zh_cells(pairs, words))
        profiles[name] = {column: cells[column] for column in PROFILES[name]}
    counts = {
        "turns": len(predictions),
        "unparsed": sum(p.strategy is None for p in predictions) if strategies_apply else None,
        "empty_replies": sum(not p.response.strip() for p in predictions),
    }
    return {"profiles": profiles, "counts": counts}


def _cell(value: float | None, unit: str, signature: str) -> Score:
    return Score(value, unit, signature, "no turns to score" if value is None else None)


def _accuracy(predictions: Sequence[Prediction], strategies_apply: bool) -> Score:
    unit, signature = "turns", "predicted strategy equals the reference strategy; an unparsed one counts as wrong"
    if not strategies_apply:
        return Score(None, unit, signature, "this mode predicts no strategy")
    correct = sum(prediction.strategy == prediction.reference_strategy for prediction in predictions)
    return _cell(100 * correct / len(predictions) if predictions else None, unit, signature)


def _paper_cells(pairs: TextPairs, words: list, config: MetricsConfig) -> dict[str, Score]:
    bleu_2, bleu_4 = lexical.sentence_bleu(words) or (None, None)
    nltk = f"nltk {version('nltk')} sentence BLEU on jieba {version('jieba')} words, smoothing method1, mean over turns"
    rouge = f"rouge_score {version('rouge-score')} rougeL F1, default tokenizer, no stemming, mean over turns"
    return {
        "B-2": _cell(bleu_2, "jieba words", f"{nltk}, orders 1-2"),
        "B-4": _cell(bleu_4, "jieba words", f"{nltk}, orders 1-4"),
        "R-L": _cell(lexical.rouge_l_latin(pairs), "digits and Latin only", rouge),
        "BR": _bleurt(pairs, config),
    }


def _zh_cells(pairs: TextPairs, words: list) -> dict[str, Score]:
    bleu_2, bleu_4 = lexical.corpus_bleu_zh(pairs) or (None, None)
    by_character = [(lexical.characters(reply), lexical.characters(reference)) for reply, reference in pairs]
    bleu = "sacrebleu corpus BLEU, effective order off"
    rouge = f"ROUGE-L F1, longest common subsequence by rapidfuzz {version('rapidfuzz')}, mean over turns"
    return {
        "B-2": _cell(bleu_2, "Chinese characters and Latin words", f"{bleu}, {lexical.corpus_bleu_zh_signature(2)}"),
        "B-4": _cell(bleu_4, "Chinese characters and Latin words", f"{bleu}, {lexical.corpus_bleu_zh_signature(4)}"),
        "R-L char": _cell(lexical.rouge_l(by_character), "characters", f"{rouge}, white space left out"),
        "R-L word": _cell(lexical.rouge_l(words), "jieba words", f"{rouge}, jieba {version('jieba')}"),
    }


# `learned` is imported where it is used: it brings in transformers, and most runs give no metric model.


def _bertscore(pairs: TextPairs, config: MetricsConfig) -> Score:
    unit, name = "contextual token vectors", f"bert-score {version('bert-score')} F1, layer {config.bertscore_layers}"
    if config.bertscore_model is None:
        return Score(None, unit, f"{name}, not rescaled", "no BERTScore model directory given")
    from csc_train.evaluation import learned

    value = learned.bertscore(pairs, config.bertscore_model, config.bertscore_layers, config.batch_size)
    return _cell(value, unit, f"{name} of {Path(config.bertscore_model).resolve().name}, not rescaled")


def _bleurt(pairs: TextPairs, config: MetricsConfig) -> Score:
    unit, name = "learned score of the pair", "BLEURT by our own loader, unverified on real weights"
    if config.bleurt_model is None:
        return Score(None, unit, name, "no BLEURT model directory given")
    from csc_train.evaluation import learned

    value = learned.bleurt(pairs, config.bleurt_model, config.batch_size)
    return _cell(value, unit, f"{name}, weights {Path(config.bleurt_model).resolve().name}")
