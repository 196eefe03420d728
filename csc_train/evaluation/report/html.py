"""The HTML report of an evaluation: one offline page with results, charts and all dialogues."""

import base64
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from csc_train.checkpoints.manifest import MANIFEST_FILE, read_manifest
from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report import tables
from csc_train.evaluation.scoring import ScoredRun
from csc_train.files import write_text
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
    results, contamination = scored.results, scored.contamination
    system = list(results)[-1]
    page = render(
        __package__,
        "report.html.jinja",
        system=system,
        chooses=any(scores["counts"]["unparsed"] is not None for scores in results[system].values()),
        facts=_facts(scored, config, record),
        turns=sum(len(dialogue.supporter_turns) for dialogue in scored.dialogues),
        dialogues=len(scored.dialogues),
        strategies=STRATEGIES,
        profiles=tables.metric_profile_tables(results),
        contamination=contamination,
        decontaminated=tables.decontaminated_tables(results, contamination),
        behaviour=tables.behaviour_tables(results),
        counts=tables.turn_counts(results),
        reasons=tables.na_reasons,
        is_result=lambda cell: isinstance(cell, MetricResult),
        drift_note=tables.DRIFT_NOTE,
        interval_note=tables.INTERVAL_NOTE,
        data={
            "results": tables.to_plain(results),
            "drift": tables.to_plain(scored.drifts),
            "position_metrics": tables.position_metrics(results),
            "strategies": [
                {"label": each.label, "zh": each.zh, "en": each.en, "code": each.code} for each in STRATEGIES
            ],
        },
        transcripts=_transcripts(scored),
    )
    write_text(Path(directory) / REPORT_FILE, page)


def write_report(
    directory: str | os.PathLike,
    scored: ScoredRun,
    config: dict[str, Any],
    record: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Write `results.json`, `table.md` and `report.html`; see `write_results` and `write_html`."""
    facts = provenance | {"metrics": config["metrics"]}
    tables.write_results(directory, scored.results, scored.drifts, facts, scored.contamination)
    write_html(directory, scored, config, record)


def _facts(scored: ScoredRun, config: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    """Facts about the evaluated system and data, by name."""
    checkpoint, data = config["checkpoint"], config["data"]
    served = config["llm"]
    facts = {"evaluated": checkpoint or config["predictions"] or f"{served['model']}, asked by chat messages"}
    if checkpoint is not None and served:
        facts["served as"] = served["model"]
    if checkpoint is not None and (Path(checkpoint) / MANIFEST_FILE).is_file():
        manifest = read_manifest(checkpoint)
        place = " in the model's directory" if manifest.base_model.startswith(".") else ""
        revision = f", revision {manifest.base_revision}" if manifest.base_revision else ""
        facts["base model"] = f"{manifest.base_model}{place}{revision}"
        facts["prompts"] = (
            f"chat template {manifest.chat_template}, mode {manifest.mode}, language {manifest.language}, "
            f"hash {manifest.template_hash[:12]}"
        )
        facts["trained on"] = f"data hash {manifest.data_hash[:12]}, {_code(manifest.provenance)}"
        data = data or manifest.config["data"]
    if data is not None:
        held_out = f"split from {data['train']['path']}, share {data['evaluation_fraction']}, seed {data['seed']}"
        facts["dialogues"] = data["evaluation"]["path"] or held_out
    sources = Counter(dialogue.source or "unknown" for dialogue in scored.dialogues)
    facts["source of dialogues"] = ", ".join(f"{source} ({count})" for source, count in sources.most_common())
    settings = config["evaluation"]
    if served:
        # The server's settings take precedence (see `llm.client`).
        sampled = {name: served[name] for name in ("temperature", "top_p") if served[name] is not None}
        how = "greedy" if not served["temperature"] else ", ".join(f"{name} {value}" for name, value in sampled.items())
        longest = settings["max_new_tokens"] if served["max_tokens"] is None else served["max_tokens"]
        facts["decoding"] = f"by a server, {how}, at most {longest} new tokens"
    elif checkpoint is not None:
        facts["decoding"] = f"greedy, at most {settings['max_new_tokens']} new tokens, dtype {settings['dtype']}"
    facts["evaluation started"] = record["started"]
    facts["code"] = _code(record["provenance"])
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in record["provenance"]["versions"].items())
    return facts


def _code(provenance: dict[str, Any]) -> str:
    if not provenance.get("commit"):
        return "commit unknown"
    return f"commit {provenance['commit'][:12]}{' with uncommitted changes' if provenance['dirty'] else ''}"


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
    keys = [(each.id, turn) for each in scored.dialogues for turn in each.supporter_turns]
    replies: dict[str, dict[str, dict[str, list[int]]]] = {}
    for system, contexts in scored.run.predictions.items():
        replies[system] = {}
        for context, predictions in contexts.items():
            by_key = {(each.dialogue_id, each.turn): each for each in predictions}
            row = [by_key.get(key) for key in keys]
            replies[system][context] = {
                "strategies": [(each.strategy or 0) if each and each.predicts_strategy else -1 for each in row],
                "texts": [text_index(each.response) if each else -1 for each in row],
            }
    everything = {"texts": list(texts), "dialogues": dialogues, "replies": replies}
    packed = json.dumps(everything, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(packed, mtime=0)).decode()
