"""The result files of a synthesis: dialogues, rejected dialogues, filter funnel, usage and quality report."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.jsonl import write_jsonl
from csc_train.synthesis.filters.funnel import filter_funnel
from csc_train.synthesis.filters.llm_checks import RoleCSChecklist, panel_agreement
from csc_train.synthesis.quality_report import quality_report, write_quality_report
from csc_train.synthesis.rolecs.backends import Backend
from csc_train.synthesis.rolecs.runner import ROLECS_RULES, SynthesisRunner
from csc_train.synthesis.rolecs.store import STORE_FILE, SynthesisStore


def refuse_lost_store(directory: Path, store: SynthesisStore) -> None:
    """Refuse to generate again what earlier result files report, if the store that held it is gone or empty.

    Raises:
        InputError: so it is.
    """
    if (directory / "synthesis.json").exists() and not store.count_by_status():
        raise InputError(
            f"{directory / STORE_FILE}: is lost or empty, but synthesis.json reports dialogues: restore a copy of it, "
            "or choose another run.directory"
        )


def write_synthesis(
    directory: str | os.PathLike,
    runner: SynthesisRunner,
    store: SynthesisStore,
    backend: Backend,
    reference: Sequence[Dialogue],
    seed: int,
) -> list[dict[str, Any]]:
    """Write the result files of a synthesis; equal stores and targets give equal bytes.

    `dialogues.jsonl` and `.parquet` (accepted dialogues in the order of the quotas), `rejected.jsonl`,
    `filter_funnel.json`, `synthesis.json` (counts, usage and cost), `quality.json` and `quality.html`. Without accepted
    dialogues there are no dialogue files and no report.

    Returns:
        The rows of the filter funnel.
    """
    directory = Path(directory)
    dialogues = [store.dialogue(dialogue_id, backend.source) for dialogue_id in runner.accepted]
    rows = filter_funnel(store.verdicts(), ROLECS_RULES)
    write_jsonl(directory / "rejected.jsonl", store.rejected_rows())
    write_json(directory / "filter_funnel.json", rows)
    usage = _usage(store, backend)
    counts = _counts(runner, store, dialogues)
    write_json(directory / "synthesis.json", counts | {"usage": usage})
    if dialogues:
        for name in ("dialogues.jsonl", "dialogues.parquet"):
            write_dialogues(directory / name, dialogues)
        profiles = {dialogue.id: runner.persona_description(dialogue.extra["persona"]) for dialogue in dialogues}
        total = {name: value for name, value in usage["all"].items() if value is not None}
        facts = {"reference": reference, "profiles": profiles, "agreement": counts.get("agreement")}
        report = quality_report(dialogues, **facts, funnel=rows, usage=total, seed=seed)
        title = f"{len(dialogues)} synthetic dialogues (source={backend.source})"
        write_quality_report(directory, report, title, runner.language)
    return rows


def _usage(store: SynthesisStore, backend: Backend) -> dict[str, dict[str, float | None]]:
    """Calls, tokens, latency in seconds and cost, by role and in total."""
    roles = {
        role: usage | {"cost": backend.cost(role, usage["prompt_tokens"], usage["completion_tokens"])}
        for role, usage in store.usage().items()
    }
    columns = {name: [row[name] for row in roles.values()] for name in next(iter(roles.values()), {})}
    return roles | {
        "all": {name: None if None in values else sum(filter(None, values)) for name, values in columns.items()}
    }


def _counts(runner: SynthesisRunner, store: SynthesisStore, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """The filled quota slots, the dialogues by topic, mood and stop reason, and the agreement of judges."""
    counts = {name: dict(Counter(each.extra[name] for each in dialogues)) for name in ("topic", "mood", "stop")}
    for name in ("unknown_strategies", "overused_strategies"):
        counts[name] = sum(each.extra[name] for each in dialogues)
    progress = runner.progress
    slots = {"target": progress.target, "accepted": progress.accepted, "empty": progress.empty}
    panels = [[RoleCSChecklist.model_validate(points) for points in panel] for panel in store.judge_answers()]
    agreement = {"agreement": panel_agreement(panels)} if panels and len(panels[0]) > 1 else {}
    return slots | {"dialogues": store.count_by_status()} | counts | agreement
