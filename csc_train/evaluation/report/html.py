"""The HTML report of an evaluation: one offline page with results, charts and dialogues.

Of many dialogues the page holds a part; a file beside it has all, which the page loads when its reader asks for them.
"""

import base64
import gzip
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.evaluated_model import read_evaluated
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report import tables
from csc_train.evaluation.scoring import ScoredRun
from csc_train.files import digest, write_text
from csc_train.inference.predictions import expected_turns
from csc_train.llm.config import LLMConfig
from csc_train.llm.usage import read_usage
from csc_train.templates import render

REPORT_FILE = "report.html"
DIALOGUES_FILE = "report_dialogues.js"
"""All dialogues, where the page holds a part of them."""
SAMPLE_SIZE = 200
"""Dialogues that the page holds besides those of the lowest-scoring turns, drawn at random with `SEED`."""
MAX_TRANSCRIPT_BYTES = 1_400_000
"""Bytes of the page for dialogues; longer dialogues are fewer. Tables of CSConv's size take another 0.4 MB."""
SEED = 0


def write_html(directory: str | os.PathLike, scored: ScoredRun, config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write `report.html`, and `report_dialogues.js` if the page does not hold all dialogues.

    Args:
        config: the resolved configuration of the evaluation.
        record: the run's `run.json`.

    Raises:
        InputError: it cannot be written.
    """
    results, language = scored.results, scored.language
    held, transcripts = _embedded(scored)
    all_dialogues = None
    if len(held) < len(scored.dialogues):
        everything = _transcripts(scored, scored.dialogues)
        all_dialogues = {"file": DIALOGUES_FILE, "key": digest(everything)}
        call = f'receiveDialogues("{all_dialogues["key"]}", "{everything}");\n'
        write_text(Path(directory) / DIALOGUES_FILE, call)
    system, (manifest, unverified) = list(results)[-1], read_evaluated(directory)
    page = render(
        __package__,
        "report.html.jinja",
        system=system,
        language=language,
        chooses=any(scores["counts"]["unparsed"] is not None for scores in results[system].values()),
        config=config,
        record=record,
        manifest=manifest,
        unverified=unverified,
        usage=read_usage(directory).describe(LLMConfig(**config["llm"])) if config.get("llm") else None,
        sources=Counter(dialogue.source or "unknown" for dialogue in scored.dialogues).most_common(),
        turns=sum(len(dialogue.supporter_turns) for dialogue in scored.dialogues),
        held=len(held),
        all_dialogues=all_dialogues,
        strategies=STRATEGIES,
        scored=scored,
        shown=tables.mark_incomplete(results),
        tables=tables,
        is_result=lambda cell: isinstance(cell, MetricResult),
        data={
            "results": tables.to_plain(results, _shown_fields),
            "drift": tables.to_plain(scored.drifts, _shown_fields),
            "all_dialogues": all_dialogues,
            "position_metrics": tables.position_metrics(results),
            "strategies": [
                # The English name too, which the page's own texts are in.
                {"name": name, "both": name if name == each.en else f"{name} {each.en}", "code": each.code}
                for each in STRATEGIES
                for name in [each.name(language)]
            ],
            "customer": Speaker.CUSTOMER.title(language),
        },
        transcripts=transcripts,
    )
    write_text(Path(directory) / REPORT_FILE, page)


def _shown_fields(result: MetricResult) -> dict[str, Any]:
    """What the page's script reads of a result: half of its bytes."""
    return {name: getattr(result, name) for name in ("value", "low", "high", "unit", "reason")}


def _embedded(scored: ScoredRun) -> tuple[list[Dialogue], str]:
    """The dialogues that the page holds, in the order of the run, and their `_transcripts`.

    A random sample, and the dialogues of the lowest-scoring turns of all systems and contexts, the lowest first. Of
    both the first are taken if they have more than `MAX_TRANSCRIPT_BYTES` together.
    """
    numbers = {each.id: number for number, each in enumerate(scored.dialogues)}
    lists = [scores["lowest_scoring"] for contexts in scored.results.values() for scores in contexts.values()]
    ranks = itertools.zip_longest(*lists)
    lowest = dict.fromkeys(numbers[turn["dialogue_id"]] for rank in ranks for turn in rank if turn)
    sampled = random.Random(SEED).sample(range(len(numbers)), min(SAMPLE_SIZE, len(numbers)))
    pairs = itertools.zip_longest(sampled, lowest)
    chosen = list(dict.fromkeys(number for pair in pairs for number in pair if number is not None))
    while True:
        held = [scored.dialogues[number] for number in sorted(chosen)]
        packed = _transcripts(scored, held)
        if len(packed) <= MAX_TRANSCRIPT_BYTES or not chosen:
            return held, packed
        chosen = chosen[: int(0.95 * len(chosen) * MAX_TRANSCRIPT_BYTES / len(packed))]


def _transcripts(scored: ScoredRun, chosen: Sequence[Dialogue]) -> str:
    """Dialogues and their replies, as gzip of JSON in UTF-16 in base64; Chinese is a tenth shorter than in UTF-8.

    `texts` lists each text once; other fields hold indices into it. `dialogues`: id and turns as (strategy number, 0
    for the customer; text). `replies`: by system and context, for each supporter turn in the order of the dialogues,
    `strategies` (0: unparsed; -1: not predicted by the system) and `texts` (-1: no prediction).
    """
    texts: dict[str, int] = {}

    def text_index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    dialogues = [
        [each.id, [[turn.strategy.number if turn.strategy else 0, text_index(turn.text)] for turn in each.turns]]
        for each in chosen
    ]
    replies: dict[str, dict[str, dict[str, list[int]]]] = {}
    for system, contexts in scored.run.predictions.items():
        replies[system] = {}
        for context, predictions in contexts.items():
            by_key = {each.key: each for each in predictions}
            row = [by_key.get(key) for key in expected_turns(chosen)]
            replies[system][context] = {
                "strategies": [(each.strategy or 0) if each and each.predicts_strategy else -1 for each in row],
                "texts": [text_index(each.response) if each else -1 for each in row],
            }
    everything = {"texts": list(texts), "dialogues": dialogues, "replies": replies}
    packed = json.dumps(everything, ensure_ascii=False, separators=(",", ":")).encode("utf-16-le")
    return base64.b64encode(gzip.compress(packed, mtime=0)).decode()
