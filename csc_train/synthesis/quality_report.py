"""What a set of dialogues is like, as JSON and as one HTML page: strategies, lengths, variety, profiles, cost."""

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
from csc_train.templates import render

ORDERS = (1, 2, 3)
"""Of distinct-n."""
MATCHED_WORDS = 20_000
"""Most words that variety is measured on."""
SELF_BLEU_TEXTS = 1000
"""Most texts that are compared with one another."""
PROFILE_DIALOGUES = 300
"""Most dialogues that are compared with profiles."""
OTHER_PROFILES = 5
"""Random profiles of the same topic that a dialogue is compared with, beside its own."""
RESAMPLES = 1000
PROGRESS_PARTS = 5
"""Parts of equal length of a dialogue."""
FEWEST = 10
"""Dialogues below which no interval is given."""

_REACHED = ["none yet", *(stage.en for stage in Stage)]


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
        dialogues: those that were accepted.
        reference: dialogues to put beside them, such as CSConv.
        profiles: the customer's profile by dialogue id; topics are read from `extra["topic"]`.
        funnel: the rows of `funnel.filter_funnel`.
        usage: what was spent, such as `{"requests": .., "prompt_tokens": .., "cost": ..}`.
        agreement: of a panel of judges, as `llm_filters.agreement` tells it.
        seed: of the samples and resamples.

    Returns:
        Plain values for JSON; a part that there is nothing to tell about is None or empty.
    """
    sides = {"set": dialogues} | ({"reference": reference} if reference else {})
    return {
        "dialogues": {name: len(side) for name, side in sides.items()},
        "strategies": {name: _strategy_counts(side).tolist() for name, side in sides.items()},
        "stage_by_strategy": {name: _stage_by_strategy(side).tolist() for name, side in sides.items()},
        "progress_by_strategy": {name: _progress_by_strategy(side).tolist() for name, side in sides.items()},
        "transitions": {name: _transitions(side).tolist() for name, side in sides.items()},
        "divergence": _divergence(dialogues, reference) if reference else None,
        "lengths": {name: _lengths(side) for name, side in sides.items()},
        "variety": _variety(sides, seed),
        "profiles": _profile_overlap(dialogues, profiles, seed) if profiles else None,
        "filter_funnel": list(funnel),
        "agreement": dict(agreement or {}),
        "usage": dict(usage or {}),
        "per_accepted": {name: value / len(dialogues) for name, value in (usage or {}).items() if dialogues},
    }


def write_quality_report(directory: str | os.PathLike, report: dict[str, Any], title: str) -> None:
    """Write a report as `quality.json` and as the self-contained page `quality.html`.

    Raises:
        InputError: the directory cannot be written.
    """
    write_json(Path(directory) / "quality.json", report)
    values = {"report": report, "title": title, "strategies": STRATEGIES, "reached": _REACHED, "plain": _plain}
    write_text(Path(directory) / "quality.html", render(__package__, "quality_report.html.jinja", **values))


def _plain(value: float | None) -> str:
    """A number as a page shows it."""
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.3g}"


def _strategies(dialogue: Dialogue) -> list[int]:
    """The supporter's strategies, counted from 0."""
    return [turn.strategy.number - 1 for turn in dialogue.turns if turn.strategy is not None]


def _strategy_counts(dialogues: Sequence[Dialogue]) -> numpy.ndarray:
    """int [12]: supporter turns by strategy."""
    counts = numpy.zeros(len(STRATEGIES), int)
    for dialogue in dialogues:
        numpy.add.at(counts, _strategies(dialogue), 1)
    return counts


def _stage_by_strategy(dialogues: Sequence[Dialogue]) -> numpy.ndarray:
    """int [6, 12]: supporter turns by the stage that the supporter's turns before had come to, and their strategy.

    Row 0: none yet. Others, which is of any stage, leaves it where it was.
    """
    counts = numpy.zeros((len(_REACHED), len(STRATEGIES)), int)
    for dialogue in dialogues:
        reached = 0
        for strategy in _strategies(dialogue):
            counts[reached, strategy] += 1
            stage = STRATEGIES[strategy].stage
            reached = reached if stage is None else 1 + list(Stage).index(stage)
    return counts


def _progress_by_strategy(dialogues: Sequence[Dialogue]) -> numpy.ndarray:
    """int [5, 12]: supporter turns by the fifth of the dialogue in which they stand, and their strategy."""
    counts = numpy.zeros((PROGRESS_PARTS, len(STRATEGIES)), int)
    for dialogue in dialogues:
        used = _strategies(dialogue)
        for place, strategy in enumerate(used):
            counts[PROGRESS_PARTS * place // len(used), strategy] += 1
    return counts


def _transitions(dialogues: Sequence[Dialogue]) -> numpy.ndarray:
    """int [12, 12]: pairs of consecutive supporter turns, by the strategy of the first and of the second."""
    counts = numpy.zeros((len(STRATEGIES), len(STRATEGIES)), int)
    for dialogue in dialogues:
        used = _strategies(dialogue)
        numpy.add.at(counts, (used[:-1], used[1:]), 1)
    return counts


def jensen_shannon(one: numpy.ndarray, other: numpy.ndarray) -> float | None:
    """The Jensen-Shannon divergence of two tables of counts, in bits (0: alike, 1: nothing in common).

    None where a table is empty.
    """
    from scipy.spatial.distance import jensenshannon  # takes a quarter of a second to import

    if not one.sum() or not other.sum():
        return None
    # scipy's is the distance, its square root; rounding can take the square of alike ones below 0.
    return float(numpy.nan_to_num(jensenshannon(one.ravel(), other.ravel(), base=2)) ** 2)


def _divergence(dialogues: Sequence[Dialogue], reference: Sequence[Dialogue]) -> dict[str, float | None]:
    tables = {"strategies": _strategy_counts, "stage_by_strategy": _stage_by_strategy, "transitions": _transitions}
    return {name: jensen_shannon(table(dialogues), table(reference)) for name, table in tables.items()}


def _lengths(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Utterances per dialogue (with how many dialogues have how many) and characters per utterance."""
    utterances = [len(dialogue.turns) for dialogue in dialogues]
    found = {"utterances per dialogue": _summary(utterances)}
    for speaker in Speaker:
        texts = [turn.text for dialogue in dialogues for turn in dialogue.turns if turn.speaker is speaker]
        found[f"characters per {speaker.name.lower()} utterance"] = _summary([len(text) for text in texts])
    return {"summary": found, "histogram": sorted(Counter(utterances).items())}


def _summary(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    quantiles = zip(("p5", "median", "p95"), numpy.quantile(values, [0.05, 0.5, 0.95]).tolist(), strict=True)
    return {"mean": float(numpy.mean(values)), "min": min(values), **dict(quantiles), "max": max(values)}


def _variety(sides: Mapping[str, Sequence[Dialogue]], seed: int) -> dict[str, dict[str, Any]]:
    """By speaker and side: distinct-n, compression ratio and self-BLEU, of as many words on every side."""
    found = {}
    for speaker in Speaker:
        samples = {name: _sample(side, speaker, seed) for name, side in sides.items()}
        matched = min(MATCHED_WORDS, *(sum(map(len, texts)) for texts in samples.values()))
        found[speaker.name.lower()] = {
            "words": matched, **{name: variety(_cut(texts, matched), seed) for name, texts in samples.items()}
        }  # fmt: skip
    return found


def _sample(dialogues: Sequence[Dialogue], speaker: Speaker, seed: int) -> list[list[str]]:
    """A speaker's utterances in jieba words, in a random order, until there are words enough."""
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns if turn.speaker is speaker]
    random.Random(seed).shuffle(texts)
    sample, count = [], 0
    for text in texts:
        if count >= MATCHED_WORDS:
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


def variety(texts: Sequence[Sequence[str]], seed: int) -> dict[str, float | None]:
    """How varied texts are, each a list of words.

    Returns:
        distinct-n: different n-grams over all n-grams, in percent. compression: bytes over gzipped bytes; the higher,
        the more repeats. self-BLEU: the mean BLEU-4 of a text against all others, of at most 1,000 drawn by `seed`, in
        percent; the lower, the more varied. None where there are too few words or texts.
    """
    found: dict[str, float | None] = {}
    for order in ORDERS:
        grams = [tuple(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)]
        found[f"distinct-{order}"] = 100 * len(set(grams)) / len(grams) if grams else None
    data = "\n".join("".join(text) for text in texts).encode()
    found["compression"] = len(data) / len(gzip.compress(data, mtime=0)) if data else None
    found["self-BLEU"] = _self_bleu(texts, seed)
    return found


def _self_bleu(texts: Sequence[Sequence[str]], seed: int) -> float | None:
    drawn = random.Random(seed).sample(list(texts), min(len(texts), SELF_BLEU_TEXTS))
    return 100 * float(self_bleu(drawn).mean()) if len(drawn) > 1 else None


def self_bleu(texts: Sequence[Sequence[str]]) -> numpy.ndarray:
    """float [texts] (0..1): BLEU-4 of each of at least two texts, with all others for references.

    As nltk's `sentence_bleu` with smoothing method1, which would count every reference anew for every text.
    """
    lengths = Counter(map(len, texts))
    scores = numpy.zeros(len(texts))
    for order in range(1, 5):
        counts = [Counter(tuple(text[at : at + order]) for at in range(len(text) - order + 1)) for text in texts]
        # The two largest counts of each n-gram: of the others' counts, the largest is one of them.
        largest: dict[tuple[str, ...], list[int]] = {}
        for count in counts:
            for gram, times in count.items():
                largest[gram] = sorted([*largest.get(gram, [0, 0]), times])[1:]
        for place, count in enumerate(counts):
            # A text that has the largest count itself is clipped by the second largest, which is as large in a tie.
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
    """How much of a customer's profile the customer has said by each of the customer's turns (the paper's figure 5).

    A row per turn: the mean share (0..1) of the different words of a profile that are among the customer's words so
    far, of the dialogue's own profile and of random other profiles of its topic, each with the bounds of its 95 %
    interval (bootstrap over dialogues; None for fewer than 10), and the number of dialogues that have so many turns.
    Words of one character are left out.
    """
    rng = random.Random(seed)
    described = [dialogue for dialogue in dialogues if dialogue.id in profiles]
    by_topic: dict[Any, dict[str, None]] = {}
    for dialogue in described:
        by_topic.setdefault(dialogue.extra.get("topic"), {})[profiles[dialogue.id]] = None
    vocabulary = cache(_content)
    curves = []
    for dialogue in rng.sample(described, min(len(described), PROFILE_DIALOGUES)):
        own = profiles[dialogue.id]
        others = [text for text in by_topic[dialogue.extra.get("topic")] if text != own]
        drawn = [vocabulary(text) for text in rng.sample(others, min(len(others), OTHER_PROFILES)) if vocabulary(text)]
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
        rows.append({"turn": turn + 1, "dialogues": len(values)} | _means(values, seed))
    return rows


def _content(text: str) -> set[str]:
    return {word for word in segment_words(text) if len(word) > 1}


def _share(profile: set[str], said: set[str]) -> float:
    return len(profile & said) / len(profile)


def _means(values: numpy.ndarray, seed: int) -> dict[str, float | None]:
    """Means and bounds of the columns `own` and `other` of float [dialogues, 2]."""
    found: dict[str, float | None] = {}
    drawn = numpy.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    for name, column in zip(("own", "other"), values.T, strict=True):
        low, high = numpy.quantile(column[drawn].mean(axis=1), [0.025, 0.975]).tolist()
        bounds = {f"{name}_low": low, f"{name}_high": high} if len(values) >= FEWEST else {}
        found |= {name: float(column.mean()), f"{name}_low": None, f"{name}_high": None} | bounds
    return found
