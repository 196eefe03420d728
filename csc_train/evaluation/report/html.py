"""The HTML report of an evaluation: one offline page with results, charts and all dialogues."""

import base64
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.evaluated_model import read_evaluated
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report import tables
from csc_train.evaluation.scoring import ScoredRun
from csc_train.files import write_text
from csc_train.inference.predictions import expected_turns
from csc_train.llm.config import LLMConfig
from csc_train.llm.usage import read_usage
from csc_train.templates import render

REPORT_FILE = "report.html"


def write_html(directory: str | os.PathLike, scored: ScoredRun, config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write `report.html`.

    Args:
        config: the resolved configuration of the evaluation.
        record: the run's `run.json`.

    Raises:
        InputError: it cannot be written.
    """
    results, contamination, language = scored.results, scored.contamination, scored.language
    shown = tables.mark_incomplete(results)
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
        dialogues=len(scored.dialogues),
        strategies=STRATEGIES,
        profiles=tables.metric_profile_tables(shown),
        contamination=contamination,
        incomplete=scored.incomplete,
        decontaminated=tables.decontaminated_tables(shown, contamination),
        behaviour=tables.behaviour_tables(shown),
        counts=tables.turn_counts(shown),
        reasons=tables.na_reasons,
        is_result=lambda cell: isinstance(cell, MetricResult),
        notes=tables.NOTES,
        data={
            "results": tables.to_plain(results),
            "drift": tables.to_plain(scored.drifts),
            "position_metrics": tables.position_metrics(results),
            "strategies": [
                # The English name too, which the page's own texts are in.
                {"name": name, "both": name if name == each.en else f"{name} {each.en}", "code": each.code}
                for each in STRATEGIES
                for name in [each.name(language)]
            ],
            "customer": Speaker.CUSTOMER.title(language),
        },
        transcripts=_transcripts(scored),
    )
    write_text(Path(directory) / REPORT_FILE, page)


def _transcripts(scored: ScoredRun) -> str:
    """All dialogues and replies, as gzip of JSON in base64.

    `texts` lists each text once; other fields hold indices into it. `dialogues`: id and turns as (strategy number, 0
    for the customer; text). `replies`: by system and context, for each supporter turn in the order of the dialogues,
    `strategies` (0: unparsed; -1: not predicted by the system) and `texts` (-1: no prediction).
    """
    texts: dict[str, int] = {}

    def text_index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    dialogues = [
        [each.id, [[turn.strategy.number if turn.strategy else 0, text_index(turn.text)] for turn in each.turns]]
        for each in scored.dialogues
    ]
    replies: dict[str, dict[str, dict[str, list[int]]]] = {}
    for system, contexts in scored.run.predictions.items():
        replies[system] = {}
        for context, predictions in contexts.items():
            by_key = {each.key: each for each in predictions}
            row = [by_key.get(key) for key in expected_turns(scored.dialogues)]
            replies[system][context] = {
                "strategies": [(each.strategy or 0) if each and each.predicts_strategy else -1 for each in row],
                "texts": [text_index(each.response) if each else -1 for each in row],
            }
    everything = {"texts": list(texts), "dialogues": dialogues, "replies": replies}
    packed = json.dumps(everything, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(packed, mtime=0)).decode()
