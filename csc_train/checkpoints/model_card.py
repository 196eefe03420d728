"""The model card: README.md of a final model in the hub's form, written from its manifest and an evaluation of it."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from csc_train.checkpoints.base_model import recorded_base
from csc_train.checkpoints.locate import EVALUATED_FILE, MODEL_FOLDER, ModelSource, is_model, open_source
from csc_train.checkpoints.manifest import CARD_FILE, MANIFEST_FILE, Manifest, read_manifest
from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES
from csc_train.data.training_record import read_training_record
from csc_train.errors import InputError
from csc_train.files import read_json, write_text
from csc_train.hub_access import split_revision
from csc_train.models.hub import find_file, is_local_path
from csc_train.models.tokenizer import load_tokenizer
from csc_train.plugins import load_recorded_plugins
from csc_train.runs.comparison import RESULTS_FILE
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import flatten_keys, read_config
from csc_train.template.chat_templates import recorded_name
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply, format_reply
from csc_train.templates import render

logger = logging.getLogger(__name__)
EVALUATION_FOLDER = "evaluation"
"""In the run directory of a training: its evaluation, if it has one."""
METRIC_TYPES = {"ACC": "accuracy", "B-2": "bleu", "B-4": "bleu", "R-L": "rouge", "BS": "bertscore", "BR": "bleurt"}
"""The hub's names of metrics; others have their own."""
LICENSE_FACTS = ("license", "license_name", "license_link")


def write_model_card(
    model: str | os.PathLike,
    evaluation: str | os.PathLike | None = None,
    source: ModelSource | None = None,
    title: str | None = None,
    template: DialogueTemplate | None = None,
) -> None:
    """Write the card of a model directory.

    Args:
        model: a final model, or an exported one.
        evaluation: the run directory of an evaluation; its figures count only if it evaluated this very model, by
            content, and is complete. None for a card without figures.
        source: the model that was evaluated, if it is not this one: what this one was exported from. The text then
            says whose the figures are, and the model index has none.
        title: defaults to the name of the directory, or of the run that it lies in.
        template: the model's; defaults to the one that the manifest names, with the tokenizer of the directory.

    Raises:
        InputError: the model, its template or the evaluation cannot be read, or the card cannot be written.
    """
    directory = Path(model)
    figures = evaluation and _read_figures(Path(evaluation), source or open_source(str(model), training=False))
    named = directory.absolute().parent if directory.name == MODEL_FOLDER else directory.absolute()
    card = _card(directory, read_manifest(directory), figures or {}, title or named.name, template)
    write_text(directory / CARD_FILE, card)


def write_own_card(evaluation: str | os.PathLike) -> None:
    """Write the figures of an evaluation into the card of the final model of the run that it lies in, if any."""
    for run in Path(evaluation).resolve().parents:
        if is_model(run / MODEL_FOLDER) and (run / MANIFEST_FILE).is_file():
            add_figures(run / MODEL_FOLDER, evaluation)
            return


def add_figures(model: str | os.PathLike, evaluation: str | os.PathLike) -> None:
    """Write the figures of an evaluation into the card of a final model.

    Does nothing if the evaluation is incomplete or of another model. A failure is said.
    """
    try:
        source = open_source(str(model), training=False)
        if _read_figures(Path(evaluation), source):
            write_model_card(source.path, evaluation)
            logger.info(f"model card: {source.path / CARD_FILE}")
    except InputError as error:
        logger.warning(f"the model card has no figures of this evaluation: {error}")


def _read_figures(evaluation: Path, source: ModelSource) -> dict[str, Any] | None:
    """The results of an evaluation by system, its name of the model, and its data; None without those of this model."""
    facts, file = evaluation / EVALUATED_FILE, evaluation / RESULTS_FILE
    if not (facts.is_file() and file.is_file()) or read_json(facts).get("content_hash") != source.content_hash():
        return None
    systems = read_json(file)["results"]
    if any(scores["counts"]["incomplete"] for contexts in systems.values() for scores in contexts.values()):
        return None
    data = read_config(evaluation / RESOLVED_FILE).get("data") or source.manifest.config.get("data")
    return {"systems": systems, "system": list(systems)[-1], "data": data or {}}


def _card(
    directory: Path, manifest: Manifest, figures: dict[str, Any], title: str, template: DialogueTemplate | None
) -> str:
    load_recorded_plugins(manifest.config.get("plugins", ()))
    settings, mode, language = flatten_keys(manifest.config), manifest.mode, manifest.language
    template = template or DialogueTemplate(
        load_tokenizer(str(directory)),
        recorded_name(manifest.chat_template, finished=True),
        TemplateConfig(mode=mode, language=language),
    )
    random = settings.get("model.init") == "random"
    base = None if random or is_local_path(manifest.base_model) else manifest.base_model
    licence = {} if random else _licence(directory, manifest)
    adapter, synthetic = manifest.export.get("format") == "adapter", bool(settings.get("data.sample_dialogues"))
    index = _eval_results(figures) if figures and not manifest.export else []
    front = ModelCardData(
        model_name=title if index else None,
        language=language,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["customer-support", "csc-train", *(["synthetic-data"] if synthetic else [])],
        eval_results=index or None,
        **licence,
    )
    trained = read_training_record(directory)
    return render(
        __package__,
        "model_card.md.jinja",
        front=front.to_yaml(),
        title=title,
        manifest=manifest,
        settings=settings,
        figures=figures,
        base=base,
        random=random,
        local_name=Path(manifest.base_model).name,
        licence=licence,
        adapter=adapter,
        synthetic=synthetic,
        dialogues=trained and len(trained),
        messages=template.messages([Turn(Speaker.CUSTOMER, get_language(language).opening)]),
        label=format_reply(Reply(STRATEGIES[0], ""), language),
        manifest_file=MANIFEST_FILE,
    )


def _licence(directory: Path, manifest: Manifest) -> dict[str, str]:
    """What the card of the base model, if it is on disk, says of its licence."""
    with contextlib.suppress(Exception):  # of any kind: the card is somebody else's, and may be none
        if file := find_file(recorded_base(directory, manifest), CARD_FILE, manifest.base_revision):
            data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
            return {name: data[name] for name in LICENSE_FACTS if data.get(name)}
    return {}


def _eval_results(figures: dict[str, Any]) -> list[EvalResult]:
    """The metrics of the profiles, in the form of the hub's model index."""
    data, contexts = figures["data"], figures["systems"][figures["system"]]
    side = data.get("evaluation", {}) if data.get("evaluation", {}).get("path") else data.get("train", {})
    path = str(side.get("path") or "dialogues")
    path, revision = split_revision(path)
    kind = Path(path).stem if is_local_path(path) else path
    return [
        EvalResult(
            task_type="text-generation",
            task_name="customer support",
            dataset_type=kind,
            dataset_revision=revision,
            dataset_name=side.get("source") or kind,
            dataset_config=f"{context} context",
            metric_type=METRIC_TYPES.get(name, name.lower()),
            metric_name=f"{name}, profile {profile}",
            metric_value=round(result["value"], 4),
            metric_args=None if result["low"] is None else {"interval_95": [result["low"], result["high"]]},
        )
        for context, scores in contexts.items()
        for profile, metrics in scores["profiles"].items()
        for name, result in metrics.items()
        if result["value"] is not None
    ]
