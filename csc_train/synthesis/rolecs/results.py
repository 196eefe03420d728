"""What a synthesis leaves behind: dialogues that train, why others were rejected, what it took, how good they are."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import write_dialogues
from csc_train.files import write_json, write_text
from csc_train.synthesis.filters.funnel import filter_funnel
from csc_train.synthesis.filters.llm_checks import RoleCSPoints, panel_agreement
from csc_train.synthesis.quality_report import quality_report, write_quality_report
from csc_train.synthesis.rolecs.backends import Backend
from csc_train.synthesis.rolecs.runner import RULES, Runner
from csc_train.synthesis.rolecs.store import SynthesisStore


def write_results(
    directory: str | os.PathLike,
    runner: Runner,
    store: SynthesisStore,
    backend: Backend,
    reference: Sequence[Dialogue],
    seed: int,
) -> list[dict[str, Any]]:
    """Write what a store holds of a recipe: the same store and target give the same files, byte by byte.

    `dialogues.jsonl` and `.parquet` (the accepted ones in the order of the quotas), `rejected.jsonl`, `filter_funnel.json`,
    `synthesis.json` (counts and cost), `quality.json` and `quality.html`; without dialogues, neither they nor a report.

    Returns:
        The rows of the filter funnel.
    """
    directory = Path(directory)
    dialogues = [store.dialogue(unit, backend.source) for unit in runner.accepted]
    rows = filter_funnel(store.verdicts(), RULES)
    write_text(directory / "rejected.jsonl", "".join(_line(row) for row in store.rejected()))
    write_json(directory / "filter_funnel.json", rows)
    usage = _usage(store, backend)
    write_json(directory / "synthesis.json", _account(runner, store, dialogues) | {"usage": usage})
    if dialogues:
        for name in ("dialogues.jsonl", "dialogues.parquet"):
            write_dialogues(directory / name, dialogues)
        told = {dialogue.id: runner.description(dialogue.extra["persona"]) for dialogue in dialogues}
        total = {name: value for name, value in usage["all"].items() if value is not None}
        report = quality_report(
            dialogues, reference=reference, profiles=told, funnel=rows, usage=total, seed=seed
        )  # fmt: skip
        write_quality_report(directory, report, f"{len(dialogues)} synthetic dialogues (source={backend.source})")
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _usage(store: SynthesisStore, backend: Backend) -> dict[str, dict[str, float | None]]:
    """Calls, tokens, seconds of waiting and cost, by role and of all."""
    roles = {
        role: asdict(spent) | {"cost": backend.cost(role, spent.prompt_tokens, spent.completion_tokens)}
        for role, spent in store.spent().items()
    }
    names = next(iter(roles.values()), {})
    columns = {name: [row[name] for row in roles.values()] for name in names}
    total = {name: None if None in values else sum(values) for name, values in columns.items()}
    return roles | {"all": total}


def _account(runner: Runner, store: SynthesisStore, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """How the quotas were filled, how dialogues ended, and how far judges agree."""
    counted = {name: dict(Counter(each.extra[name] for each in dialogues)) for name in ("topic", "mood", "stop")}
    corrected = {
        name: sum(each.extra[name] for each in dialogues) for name in ("unknown_strategies", "overused_strategies")
    }
    progress = runner.progress
    places = {"target": progress.target, "accepted": progress.accepted, "empty": progress.empty}
    panels = [[RoleCSPoints.model_validate(points) for points in panel] for panel in store.panels()]
    judged = {"panel_agreement": panel_agreement(panels)} if panels and len(panels[0]) > 1 else {}
    return places | {"dialogues": store.counts(), **counted, **corrected} | judged
