"""The quality report of a set of dialogues, as JSON and HTML: strategies, lengths, variety, profiles, usage."""

import gzip
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.segmentation import segment_words
from csc_train.data.strategies import STRATEGIES, Stage
from csc_train.files import write_json, write_text
from csc_train.stats import bootstrap_interval, mean
from csc_train.templates import render

DISTINCT_ORDERS = (1, 2, 3)
"""Orders n of distinct-n."""
MAX_WORDS = 20_000
"""Most words of a sample for variety."""
MAX_SELF_BLEU_TEXTS = 1000
"""Most texts of a sample for self-BLEU."""
MAX_PROFILE_DIALOGUES = 300
"""Most dialogues of a sample for the overlap with profiles."""
NUM_OTHER_PROFILES = 5
"""Random profiles of the same topic that a dialogue is compared with, besides its own."""
NUM_RESAMPLES = 1000
NUM_PARTS = 5
"""Parts of equal length of a dialogue."""

_REACHED = ["none", *(stage.title("en") for stage in Stage)]


def quality_report(
    dialogues: Sequence[Dialogue],
    *,
    reference: Sequence[Dialogue] = (),
    profiles: Mapping[str, str] | None = None,
    funnel: Sequence[dict[str, Any]] = (),
    usage: Mapping[str, float] | None = None,
    agreement: Mapping[str, dict[str, float | None]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a set of dialogues.

    Args:
        dialogues: the accepted dialogues.
        reference: dialogues to compare with, such as CSConv.
        profiles: the customer's profile by dialogue id; topics are read from `extra["topic"]`.
        funnel: the rows of `funnel.filter_funnel`.
        usage: totals such as `{"requests": .., "prompt_tokens": .., "cost": ..}`.
        agreement: of a panel of judges, from `llm_checks.panel_agreement`.
        seed: of the samples.

    Returns:
        Plain values for JSON; parts without data are None or empty.
    """
    sides = {"set": dialogues} | ({"reference": reference} if reference else {})
    counts = {name: strategy_counts(side) for name, side in sides.items()}
    return {
        "dialogues": {name: len(side) for name, side in sides.items()},
        **{table: {name: side[table].tolist() for name, side in counts.items()} for table in counts["set"]},
        "divergence": {
            table: jensen_shannon(counts["set"][table], counts["reference"][table])
            for table in ("strategies", "stage_by_strategy", "transitions")
        }
        if reference
        else None,
        "lengths": {name: _lengths(side) for name, side in sides.items()},
        "variety": _variety(sides, seed),
        "profiles": _profile_overlap(dialogues, profiles, seed) if profiles else None,
        "filter_funnel": list(funnel),
        "agreement": dict(agreement or {}),
        "usage": dict(usage or {}),
        "per_accepted": {name: value / len(dialogues) for name, value in (usage or {}).items() if dialogues},
    }


def write_quality_report(
    directory: str | os.PathLike, report: dict[str, Any], title: str, language: str = "zh"
) -> None:
    """Write a report as `quality.json` and as the self-contained page `quality.html`.

    Args:
        language: of the strategies' names.

    Raises:
        InputError: the directory cannot be written.
    """
    write_json(Path(directory) / "quality.json", report)
    values = {"report": report, "title": title, "strategies": STRATEGIES, "reached": _REACHED, "plain": plain_number}
    values["language"] = language
    write_text(Path(directory) / "quality.html", render(__package__, "quality_report.html.jinja", **values))


def plain_number(value: float | None) -> str:
    """A number as text for a page; n/a for None."""
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.3g}"


def strategy_counts(dialogues: Sequence[Dialogue]) -> dict[str, numpy.ndarray]:
    """Tables of supporter turns, the last axis by strategy.

    strategies: int [12]. stage_by_strategy: int [6, 12], by the stage reached before; row 0 is no stage yet, and the
    strategy Others leaves the stage unchanged. progress_by_strategy: int [5, 12], by fifth of the dialogue.
    transitions: int [12, 12], by the strategy of the turn before.
    """
    count = len(STRATEGIES)
    stages, progress, transitions = (numpy.zeros((rows, count), int) for rows in (len(_REACHED), NUM_PARTS, count))
    for dialogue in dialogues:
        used = [turn.strategy.number - 1 for turn in dialogue.turns if turn.strategy is not None]
        reached = 0
        for place, strategy in enumerate(used):
            stages[reached, strategy] += 1
            progress[NUM_PARTS * place // len(used), strategy] += 1
            stage = STRATEGIES[strategy].stage
            reached = reached if stage is None else 1 + list(Stage).index(stage)
        numpy.add.at(transitions, (used[:-1], used[1:]), 1)
    return {
        "strategies": stages.sum(axis=0),
        "stage_by_strategy": stages,
        "progress_by_strategy": progress,
        "transitions": transitions,
    }


def jensen_shannon(one: numpy.ndarray, other: numpy.ndarray) -> float | None:
    """The Jensen-Shannon divergence of two tables of counts, in bits (0: equal, 1: disjoint); None if one is empty."""
    from scipy.spatial.distance import jensenshannon  # slow to import

    if not one.sum() or not other.sum():
        return None
    # scipy returns the distance, its square root; by rounding, equal tables may give NaN.
    return float(numpy.nan_to_num(jensenshannon(one.ravel(), other.ravel(), base=2)) ** 2)


def _lengths(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Summaries of utterances per dialogue and characters per utterance, and a histogram of the former."""
    utterances = [len(dialogue.turns) for dialogue in dialogues]
    found = {"utterances per dialogue": summarize_lengths(utterances)}
    for speaker in Speaker:
        texts = [turn.text for dialogue in dialogues for turn in dialogue.turns if turn.speaker is speaker]
        found[f"characters per {speaker.name.lower()} utterance"] = summarize_lengths([len(text) for text in texts])
    return {"summary": found, "histogram": sorted(Counter(utterances).items())}


def summarize_lengths(values: Sequence[int]) -> dict[str, float] | None:
    """Mean, min, p5, median, p95 and max of lengths; None if there are none."""
    if not values:
        return None
    quantiles = zip(("p5", "median", "p95"), numpy.quantile(values, [0.05, 0.5, 0.95]).tolist(), strict=True)
    return {"mean": float(numpy.mean(values)), "min": min(values), **dict(quantiles), "max": max(values)}


def _variety(sides: Mapping[str, Sequence[Dialogue]], seed: int) -> dict[str, dict[str, Any]]:
    """Distinct-n, compression ratio and self-BLEU by speaker and side, on equally many words of every side."""
    found = {}
    for speaker in Speaker:
        samples = {name: _sample(side, speaker, seed) for name, side in sides.items()}
        matched = min(MAX_WORDS, *(sum(map(len, texts)) for texts in samples.values()))
        found[speaker.name.lower()] = {
            "words": matched, **{name: text_variety(_cut(texts, matched), seed) for name, texts in samples.items()}
        }  # fmt: skip
    return found


def _sample(dialogues: Sequence[Dialogue], speaker: Speaker, seed: int) -> list[list[str]]:
    """A random sample of a speaker's utterances as jieba words, of at least `MAX_WORDS` words if possible."""
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns if turn.speaker is speaker]
    random.Random(seed).shuffle(texts)
    sample, count = [], 0
    for text in texts:
        if count >= MAX_WORDS:
            break
        sample.append(segment_words(text))
        count += len(sample[-1])
    return sample


def _cut(texts: Sequence[list[str]], length: int) -> list[list[str]]:
    """The first `length` words of texts."""
    kept = []
    for text in texts:
        if length <= 0:
            break
        kept.append(text[:length])
        length -= len(text)
    return kept


def text_variety(texts: Sequence[Sequence[str]], seed: int) -> dict[str, float | None]:
    """The variety of texts, each a list of words.

    Returns:
        distinct-n: distinct n-grams over all n-grams, in percent. compression: bytes over gzipped bytes; higher means
        more repetition. self-BLEU: mean BLEU-4 of a text against all others, of at most 1,000 drawn by `seed`, in
        percent; lower means more varied. None if there are too few words or texts.
    """
    found: dict[str, float | None] = {}
    for order in DISTINCT_ORDERS:
        grams = [tuple(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)]
        found[f"distinct-{order}"] = 100 * len(set(grams)) / len(grams) if grams else None
    data = "\n".join("".join(text) for text in texts).encode()
    found["compression"] = len(data) / len(gzip.compress(data, mtime=0)) if data else None
    found["self-BLEU"] = _self_bleu(texts, seed)
    return found


def _self_bleu(texts: Sequence[Sequence[str]], seed: int) -> float | None:
    drawn = random.Random(seed).sample(list(texts), min(len(texts), MAX_SELF_BLEU_TEXTS))
    return 100 * float(self_bleu(drawn).mean()) if len(drawn) > 1 else None


def self_bleu(texts: Sequence[Sequence[str]]) -> numpy.ndarray:
    """float [texts] (0..1): BLEU-4 of each of at least two texts, with all others as references.

    Equals nltk's `sentence_bleu` with smoothing method1, but counts every reference only once.
    """
    lengths = Counter(map(len, texts))
    scores = numpy.zeros(len(texts))
    for order in range(1, 5):
        counts = [Counter(tuple(text[at : at + order]) for at in range(len(text) - order + 1)) for text in texts]
        # The two largest counts of each n-gram, because the largest count of the other texts is one of them.
        largest: dict[tuple[str, ...], list[int]] = {}
        for count in counts:
            for gram, times in count.items():
                largest[gram] = sorted([*largest.get(gram, [0, 0]), times])[1:]
        for place, count in enumerate(counts):
            # A text with the largest count itself is clipped by the second largest, which is equal in a tie.
            clipped = (min(times, largest[gram][times < largest[gram][1]]) for gram, times in count.items())
            matched = sum(clipped)
            if order == 1 and not matched:
                scores[place] = -numpy.inf
            scores[place] += numpy.log((matched or 0.1) / max(1, count.total())) / 4
    for place, text in enumerate(texts):
        others = lengths - Counter([len(text)])
        closest = min(others, key=lambda length: (abs(length - len(text)), length))
        if len(text) < closest:
            scores[place] += 1 - closest / len(text) if text else -numpy.inf
    return numpy.exp(scores)


def _profile_overlap(dialogues: Sequence[Dialogue], profiles: Mapping[str, str], seed: int) -> list[dict[str, Any]]:
    """The share of a profile's words that the customer has said by each customer turn (the paper's figure 5).

    A row per turn: the mean share (0..1) of distinct profile words among the customer's words so far, for the own
    profile and for random other profiles of the topic. Each has the bounds of its 95 % interval (bootstrap over
    dialogues; None for fewer than 10). `dialogues` is the number of dialogues with that turn. Words of one character
    are ignored.
    """
    rng = random.Random(seed)
    described = [dialogue for dialogue in dialogues if dialogue.id in profiles]
    by_topic: dict[Any, dict[str, None]] = {}
    for dialogue in described:
        by_topic.setdefault(dialogue.extra.get("topic"), {})[profiles[dialogue.id]] = None
    vocabulary = cache(_content)
    curves = []
    for dialogue in rng.sample(described, min(len(described), MAX_PROFILE_DIALOGUES)):
        own = profiles[dialogue.id]
        others = [text for text in by_topic[dialogue.extra.get("topic")] if text != own]
        drawn = [
            vocabulary(text) for text in rng.sample(others, min(len(others), NUM_OTHER_PROFILES)) if vocabulary(text)
        ]
        if not drawn or not vocabulary(own):
            continue
        said: set[str] = set()
        curve = []
        for turn in dialogue.turns:
            if turn.speaker is Speaker.CUSTOMER:
                said |= _content(turn.text)
                curve.append((_share(vocabulary(own), said), numpy.mean([_share(each, said) for each in drawn])))
        curves.append(curve)
    rows = []
    for turn in range(max(map(len, curves), default=0)):
        values = numpy.array([curve[turn] for curve in curves if len(curve) > turn])
        row: dict[str, Any] = {"turn": turn + 1, "dialogues": len(values)}
        for name, column in zip(("own", "other"), values.T, strict=True):
            interval = bootstrap_interval(mean(column), numpy.arange(len(column)), NUM_RESAMPLES)
            low, high = interval or (None, None)
            row |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def _content(text: str) -> set[str]:
    return {word for word in segment_words(text) if len(word) > 1}


def _share(profile: set[str], said: set[str]) -> float:
    return len(profile & said) / len(profile)
