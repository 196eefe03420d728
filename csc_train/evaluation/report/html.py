"""An evaluation as one HTML page for a reader who has never seen this project: no network, no other file.

The page is `report.html.jinja`, with `report.css.jinja` and `report.js.jinja` written into it. It holds the results as
`results.json` has them, and all dialogues with what each system said.
"""

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
from csc_train.evaluation.report import tables as report
from csc_train.evaluation.scoring import Scored
from csc_train.files import write_text
from csc_train.templates import render

FILE = "report.html"


def write_html(directory: str | os.PathLike, scored: Scored, config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write `report.html`.

    Args:
        config: the resolved configuration of the evaluation.
        record: what its run noted of itself (`run.json`).

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
        profiles=report.profiles(results),
        contamination=contamination,
        decontaminated=report.decontaminated(results, contamination),
        behaviour=report.behaviour(results),
        counts=report.counts(results),
        reasons=report.reasons,
        is_score=lambda cell: isinstance(cell, MetricResult),
        drift=report.DRIFT,
        intervals=report.INTERVALS,
        data={
            "results": report.plain(results),
            "drift": report.plain(scored.drifts),
            "strategies": [
                {"label": each.label, "zh": each.zh, "en": each.en, "code": each.code} for each in STRATEGIES
            ],
        },
        transcripts=_transcripts(scored),
    )
    write_text(Path(directory) / FILE, page)


def _facts(scored: Scored, config: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    """What was evaluated, by name."""
    checkpoint, data = config["checkpoint"], config["data"]
    served = config["llm"]
    facts = {"evaluated": checkpoint or config["predictions"] or f"{served['model']}, asked in words"}
    if checkpoint is not None and served:
        facts["served as"] = served["model"]
    if checkpoint is not None and (Path(checkpoint) / MANIFEST_FILE).is_file():
        manifest = read_manifest(checkpoint)
        place = " beside the checkpoint" if manifest.base_model.startswith(".") else ""
        revision = f", revision {manifest.base_revision}" if manifest.base_revision else ""
        facts["base model"] = f"{manifest.base_model}{place}{revision}"
        facts["prompts"] = (
            f"chat template {manifest.chat_template}, mode {manifest.mode}, language {manifest.language}, "
            f"hash {manifest.template_hash[:12]}"
        )
        facts["trained on"] = f"data hash {manifest.data_hash[:12]}, {_code(manifest.provenance)}"
        data = data or manifest.config["data"]
    if data is not None:
        held_out = f"held out of {data['train']['path']}, share {data['evaluation_fraction']}, seed {data['seed']}"
        facts["dialogues"] = data["evaluation"]["path"] or held_out
    sources = Counter(dialogue.source or "not named" for dialogue in scored.dialogues)
    facts["their source"] = ", ".join(f"{source} ({count})" for source, count in sources.most_common())
    settings = config["evaluation"]
    if served:
        # What the server's configuration says comes first; so it is asked (see `llm.client`).
        sampled = {name: served[name] for name in ("temperature", "top_p") if served[name] is not None}
        how = "greedy" if not served["temperature"] else ", ".join(f"{name} {value}" for name, value in sampled.items())
        longest = settings["max_new_tokens"] if served["max_tokens"] is None else served["max_tokens"]
        facts["decoding"] = f"by a server, {how}, at most {longest} new tokens"
    elif checkpoint is not None:
        facts["decoding"] = f"greedy, at most {settings['max_new_tokens']} new tokens, dtype {settings['dtype']}"
    facts["evaluation begun"] = record["started"]
    facts["code"] = _code(record["provenance"])
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in record["provenance"]["versions"].items())
    return facts


def _code(provenance: dict[str, Any]) -> str:
    if not provenance.get("commit"):
        return "commit not known"
    return f"commit {provenance['commit'][:12]}{' with uncommitted changes' if provenance['dirty'] else ''}"


def _transcripts(scored: Scored) -> str:
    """All dialogues and replies, as gzip of JSON in base64.

    Each text is there once, and referred to by its place. Of a dialogue: its id and its turns as (strategy's number,
    0 for the customer; text). Of a system in a context, by supporter turn in the order of the dialogues: strategies (0:
    none was read; -1: not the system's own) and texts (-1: no prediction).
    """
    texts: dict[str, int] = {}

    def place(text: str) -> int:
        return texts.setdefault(text, len(texts))

    dialogues = [
        [each.id, [[turn.strategy.number if turn.strategy else 0, place(turn.text)] for turn in each.turns]]
        for each in scored.dialogues
    ]
    keys = [(each.id, turn) for each in scored.dialogues for turn in each.supporter_turns]
    said: dict[str, dict[str, dict[str, list[int]]]] = {}
    for system, contexts in scored.run.predictions.items():
        said[system] = {}
        for context, predictions in contexts.items():
            by_key = {(each.dialogue_id, each.turn): each for each in predictions}
            row = [by_key.get(key) for key in keys]
            said[system][context] = {
                "strategies": [(each.strategy or 0) if each and each.predicts_strategy else -1 for each in row],
                "texts": [place(each.response) if each else -1 for each in row],
            }
    everything = {"texts": list(texts), "dialogues": dialogues, "said": said}
    packed = json.dumps(everything, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(packed, mtime=0)).decode()
