"""One system's predictions in one context -> its row of the table, in each metric profile.

Two profiles, because the paper does not publish its metric code:

- `paper` is our reconstruction of what the paper most likely computed. Its ROUGE-L is below its BLEU-2 throughout,
  which fits rouge_score's default tokenizer (it sees digits and Latin letters alone) and neither characters nor words;
  its BERTScore of 55 to 67 fits bert-base-chinese, layer 8, not rescaled; its BLEU cannot be identified fully, and
  nltk's sentence BLEU on jieba words with method1 is a candidate.
- `zh` measures Chinese text as Chinese text: ROUGE-L on characters and on words, and sacrebleu with a signature.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy

from csc_train.data.dialogue import Dialogue
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics import (
    lexical,
)
from csc_train.evaluation.metrics import (
    likelihood as likelihood_metrics,
)
from csc_train.evaluation.metrics import (
    replies as reply_metrics,
)
from csc_train.evaluation.metrics import (
    strategy as strategy_metrics,
)
from csc_train.evaluation.metrics.base import Metric, MetricResult
from csc_train.evaluation.table import PredictionTable
from csc_train.inference.config import CONTEXTS
from csc_train.inference.predictions import Prediction
from csc_train.models.hub import snapshot
from csc_train.stats import Statistic, mean

PROFILE_COLUMNS: dict[str, tuple[str, ...]] = {
    "paper": ("B-2", "B-4", "R-L", "BS", "BR", "ACC"),
    "zh": ("B-2", "B-4", "R-L char", "R-L word", "BS", "BS rescaled", "ACC"),
}
"""The columns of each profile, in the order in which tables show them."""


def fetch_models(config: MetricsConfig) -> None:
    """Download the models that are read from the hub, so that one that cannot be had is known before hours of work.

    Raises:
        InputError: as `hub.snapshot`, or a file is missing that the model is read from.
    """
    if config.bertscore_model is None and config.bleurt_model is None:
        return
    from csc_train.evaluation.metrics import model_based as learned

    models = (config.bertscore_model, learned.BERTSCORE_FILES), (config.bleurt_model, learned.BLEURT_FILES)
    for path, groups in models:
        if path is not None:
            learned.check_files(snapshot(path, "metric model"), groups)


def score(
    predictions: Sequence[Prediction],
    dialogues: Mapping[str, Dialogue],
    config: MetricsConfig,
    *,
    failed: int = 0,
    flagged: Collection[str] = (),
) -> dict[str, Any]:
    """Score one system's predictions in one context.

    Args:
        dialogues: by id, those that were to be predicted.
        failed: turns that could not be predicted; they are counted, not scored.
        flagged: ids of dialogues whose text is in the training data too (see `contamination`).

    Returns:
        `profiles`: by profile and column, a Score, in the order of `PROFILE_COLUMNS`. `strategy`, `likelihood`: Scores by
        name; `calibration`: see `likelihood_metrics`; `by_strategy`: by label, its `turns` and Scores; `confusion` and
        `transitions`: see `strategy_metrics`; `by_position`: ACC and character ROUGE-L by the how many-th supporter
        turn it is. `process` and `reply`: by name, a Score of the `system` and one of the `reference`; `lengths` and
        `lowest_scoring`: see `reply_metrics`. `decontaminated`: `dialogues`, `turns` and `profiles` of the rest, or None
        if nothing is flagged. `counts`: `dialogues`; `turns`; `failed`; `unparsed`, the turns whose strategy could not be
        read (None where the system predicts none); `empty_replies`, which score 0 in every text metric.

    Raises:
        InputError: a metric model cannot be loaded, or a turn is predicted twice.
    """
    turns = PredictionTable(predictions, dialogues)

    def shown(figure: Metric) -> MetricResult:
        return figure.score(turns.dialogue, config.bootstrap_resamples)

    def sides(figures: tuple[Metric, Metric]) -> dict[str, MetricResult]:
        return dict(zip(("system", "reference"), map(shown, figures), strict=True))

    strategy = {
        "macro-F1": strategy_metrics.macro_f1(turns),
        "stage ACC": strategy_metrics.stage_accuracy(turns),
        "parse rate": strategy_metrics.parse_rate(turns),
    }
    reply = {name: sides(figures) for name, figures in reply_metrics.replies(turns, dialogues).items()}
    for order in (1, 2):
        distinct = reply_metrics.distinct(turns, order)
        reply[f"distinct-{order}"] = dict(zip(("system", "reference"), distinct, strict=True))
    chosen = turns.predicts_strategy
    profiles = compute_metrics(turns, config)
    return {
        "profiles": {
            profile: {column: shown(figure) for column, figure in cells.items()} for profile, cells in profiles.items()
        },
        "decontaminated": _without(flagged, turns, profiles, config.bootstrap_resamples),
        "strategy": {name: shown(figure) for name, figure in strategy.items()},
        "likelihood": {name: shown(figure) for name, figure in likelihood_metrics.likelihoods(turns).items()}
        | {"ECE": likelihood_metrics.calibration_error(turns)},
        "by_strategy": {
            label: {"turns": count} | {name: shown(figure) for name, figure in cells.items()}
            for label, count, cells in strategy_metrics.by_strategy(turns)
        },
        "confusion": strategy_metrics.confusion(turns).tolist() if chosen else None,
        "transitions": {
            "system": strategy_metrics.transitions(turns, turns.predicted).tolist() if chosen else None,
            "reference": strategy_metrics.transitions(turns, turns.reference).tolist(),
        },
        "by_position": [
            {"position": position, "turns": count, "ACC": shown(figure), "R-L char": shown(_zh_rouge(turns).only(here))}
            for position, count, figure in strategy_metrics.by_position(turns)
            for here in [turns.position == position - 1]
        ],
        "calibration": likelihood_metrics.calibration(turns) if chosen else None,
        "process": {name: sides(pair) for name, pair in strategy_metrics.process(turns).items()},
        "reply": reply,
        "lengths": reply_metrics.length_histogram(turns),
        "lowest_scoring": reply_metrics.lowest_scoring(turns),
        "counts": {
            "dialogues": len(set(turns.dialogue.tolist())),
            "turns": len(turns),
            "failed": failed,
            "unparsed": int((turns.predicted == 0).sum()) if chosen else None,
            "empty_replies": sum(not reply.strip() for reply, _ in turns.pairs),
        },
    }


def _without(
    flagged: Collection[str], turns: PredictionTable, profiles: dict[str, dict[str, Metric]], resamples: int
) -> dict[str, Any] | None:
    """The profiles over the dialogues that are not flagged."""
    if not flagged:
        return None
    kept = numpy.array([each.dialogue_id not in flagged for each in turns.predictions], bool)
    return {
        "dialogues": len(set(turns.dialogue[kept].tolist())),
        "turns": int(kept.sum()),
        "profiles": {
            profile: {column: figure.only(kept).score(turns.dialogue, resamples) for column, figure in cells.items()}
            for profile, cells in profiles.items()
        },
    }


def drift(
    reference: Sequence[Prediction],
    generated: Sequence[Prediction],
    dialogues: Mapping[str, Dialogue],
    config: MetricsConfig,
) -> list[dict[str, Any]]:
    """By supporter turn, how much is lost once a system goes on from its own turns.

    Turns that failed in one of the contexts are left out of both, so that their curves are of the same turns.

    Returns:
        For each `position`, counted from 1: its `turns`; of each context, by its name, Scores of ACC and character
        ROUGE-L; and of these two a Score of the figure in reference context minus the one in generated context. Nothing
        where the contexts have no turn in common.

    Raises:
        InputError: the two have other references.
    """
    sides, _ = same_turns(reference, generated, "reference context", "generated context", dialogues)
    dialogue, position = sides[0].dialogue, sides[0].position
    rows = []
    for number in range(sides[0].longest if len(sides[0]) else 0):
        here = position == number
        pairs = {
            "ACC": [strategy_metrics.accuracy(turns, here) for turns in sides],
            "R-L char": [_zh_rouge(turns).only(here) for turns in sides],
        }
        by_context = {
            context: {name: pair[index].score(dialogue, config.bootstrap_resamples) for name, pair in pairs.items()}
            for index, context in enumerate(CONTEXTS)
        }
        lost = {name: one.minus(other, dialogue, config.bootstrap_resamples) for name, (one, other) in pairs.items()}
        rows.append({"position": number + 1, "turns": int(here.sum()), **by_context, **lost})
    return rows


def same_turns(
    one: Sequence[Prediction],
    other: Sequence[Prediction],
    name: str,
    other_name: str,
    dialogues: Mapping[str, Dialogue] | None = None,
) -> tuple[tuple[PredictionTable, PredictionTable], int]:
    """Both predictions as columns whose rows are the same turns with the same references; and how many turns are left
    out because only one of the two has them, as where one failed.

    Raises:
        InputError: a turn has another reference, or is predicted twice.
    """
    keys = [{(each.dialogue_id, each.turn) for each in side} for side in (one, other)]
    shared = keys[0] & keys[1]
    sides = tuple(
        PredictionTable([each for each in side if (each.dialogue_id, each.turn) in shared], dialogues)
        for side in (one, other)
    )
    for key, first, second in zip(sides[0].keys, *(side.predictions for side in sides), strict=True):
        if (first.reference_strategy, first.reference_response) != (
            second.reference_strategy,
            second.reference_response,
        ):
            raise InputError(f"{name} and {other_name} have other references at turn {key[1]} of dialogue {key[0]}")
    return sides, len(keys[0] ^ keys[1])


def compute_metrics(turns: PredictionTable, config: MetricsConfig) -> dict[str, dict[str, Metric]]:
    """The figures of each profile: profiles as the config orders them, columns as `PROFILE_COLUMNS` does."""
    raw, rescaled = _bertscores(turns, config)
    shared = {"BS": raw, "BS rescaled": rescaled, "ACC": strategy_metrics.accuracy(turns)}
    profiles = {}
    for name in config.profiles:
        cells = shared | (_paper_cells(turns, config) if name == "paper" else _zh_cells(turns))
        profiles[name] = {column: cells[column] for column in PROFILE_COLUMNS[name]}
    return profiles


def _paper_cells(turns: PredictionTable, config: MetricsConfig) -> dict[str, Metric]:
    bleu_2, bleu_4 = lexical.sentence_bleu(turns.words).T
    nltk = f"nltk {version('nltk')} sentence BLEU on jieba {version('jieba')} words, smoothing method1, mean over turns"
    rouge = f"rouge_score {version('rouge-score')} rougeL F1, default tokenizer, no stemming, mean over turns"
    return {
        "B-2": Metric(mean(bleu_2), "jieba words", f"{nltk}, orders 1-2"),
        "B-4": Metric(mean(bleu_4), "jieba words", f"{nltk}, orders 1-4"),
        "R-L": Metric(mean(lexical.rouge_l_latin(turns.pairs)), "digits and Latin only", rouge),
        "BR": _bleurt(turns, config),
    }


def _zh_cells(turns: PredictionTable) -> dict[str, Metric]:
    counts = lexical.corpus_bleu_zh_counts(turns.pairs)
    return {
        "B-2": _zh_bleu(counts, 2),
        "B-4": _zh_bleu(counts, 4),
        "R-L char": _zh_rouge(turns),
        "R-L word": Metric(
            mean(lexical.rouge_l(turns.words)), "jieba words", f"{_rouge_signature()}, jieba {version('jieba')}"
        ),
    }


def _zh_bleu(counts: numpy.ndarray, order: int) -> Metric:
    signature = f"sacrebleu corpus BLEU, effective order off, {lexical.corpus_bleu_zh_signature(order)}"
    statistic = Statistic(counts, lambda sums: lexical.corpus_bleu_zh(sums, order)) if len(counts) else None
    return Metric(statistic, "Chinese characters and Latin words", signature)


def _zh_rouge(turns: PredictionTable) -> Metric:
    return Metric(mean(turns.rouge), "characters", f"{_rouge_signature()}, white space left out")


def _rouge_signature() -> str:
    return f"ROUGE-L F1, longest common subsequence by rapidfuzz {version('rapidfuzz')}, mean over turns"


# `learned` is imported where it is used: it brings in transformers, and most runs give no metric model.


def _bertscores(turns: PredictionTable, config: MetricsConfig) -> tuple[Metric, Metric]:
    """BERTScore as it is, and rescaled."""
    unit, name = "contextual token vectors", f"bert-score {version('bert-score')} F1, layer {config.bertscore_layers}"
    if config.bertscore_model is None:
        reason = "no BERTScore model given"
        return Metric(None, unit, f"{name}, not rescaled", reason), Metric(None, unit, f"{name}, rescaled", reason)
    from csc_train.evaluation.metrics import model_based as learned

    model, unverified = Path(config.bertscore_model).resolve().name, "unverified on real weights"
    directory = snapshot(config.bertscore_model, "metric model")
    values = learned.bertscore(turns.pairs, directory, config.bertscore_layers, config.batch_size)
    raw = Metric(mean(values), unit, f"{name} of {model}, not rescaled, {unverified}")
    baseline = learned.bertscore_baseline(model, config.bertscore_layers, config.bertscore_baseline)
    if baseline is None:
        reason = f"bert-score has no baseline for a model named {model}; give metrics.bertscore_baseline"
        return raw, Metric(None, unit, f"{name}, rescaled", reason)
    signature = f"{name} of {model}, rescaled with the baseline {baseline:.2f}, {unverified}"
    return raw, Metric(mean(learned.rescaled(values, baseline)), unit, signature)


def _bleurt(turns: PredictionTable, config: MetricsConfig) -> Metric:
    unit, name = "learned score of the pair", "BLEURT by our own loader, unverified on real weights"
    if config.bleurt_model is None:
        return Metric(None, unit, name, "no BLEURT model given")
    from csc_train.evaluation.metrics import model_based as learned

    values = learned.bleurt(turns.pairs, snapshot(config.bleurt_model, "metric model"), config.batch_size)
    return Metric(mean(values), unit, f"{name}, weights {Path(config.bleurt_model).resolve().name}")
