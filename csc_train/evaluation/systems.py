"""The systems of an evaluation (baselines, base model, trained or served model), and their predictions on disk."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.checkpoints.base_model import BaseModel
from csc_train.data.dialogue import Dialogue
from csc_train.evaluation.config import EvaluationConfig
from csc_train.evaluation.general import Texts, lacks_scores, score_texts
from csc_train.files import digest, file_digest
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.generator import Generator, generate_predictions, shard_dialogues
from csc_train.inference.hf import load_generator
from csc_train.inference.openai import OpenAIGenerator
from csc_train.inference.predictions import (
    BASE_MODEL,
    BASELINE_NAMES,
    TRAINED_MODEL,
    PredictionStore,
    is_complete,
    read_external_replies,
    write_predictions,
)
from csc_train.llm.config import LLMConfig
from csc_train.llm.usage import usage_observer
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

if TYPE_CHECKING:
    from accelerate import PartialState

Systems = dict[str, Callable[[], Generator]]
"""Functions that load a system, by its name."""


def system_hash(predictions: str | None, llm: LLMConfig | None) -> str:
    """SHA-256 (hex) of a system without a model on disk: the predictions file, or the served model's name."""
    return file_digest(predictions) if predictions else digest(llm.model)


def build_systems(
    train: Sequence[Dialogue],
    config: EvaluationConfig,
    model_hash: str,
    template: DialogueTemplate | TemplateConfig,
    state: "PartialState",
    model: str | None,
    base: BaseModel | None,
    llm: LLMConfig | None,
    name: str = TRAINED_MODEL,
    directory: str | os.PathLike = ".",
) -> Systems:
    """The systems of an evaluation, in the order of table rows: baselines, base model, evaluated model.

    Args:
        train: training dialogues, on which the baselines are fitted; without customer support there are none.
        model_hash: identifies the evaluated system.
        state: with one process, a local model is spread over all GPUs; with several, each process has its own copy.
        model: directory of a final model; None for a prompted model.
        base: the model that its training started from; None leaves it out.
        llm: the server; None loads `model` here.
        name: of the evaluated model.
        directory: of the run, which keeps the usage of a server.
    """
    device = state.device if state.num_processes > 1 else None
    language = (template if isinstance(template, TemplateConfig) else template.config).language
    baselines = BASELINE_NAMES if any(dialogue.kind == "csc" for dialogue in train) else ()
    systems: Systems = {
        name: lambda order=order: StrategyBaseline(train, order, language) for order, name in enumerate(baselines)
    }
    if llm:
        name = name if model else llm.model.replace("/", "_")
        systems[name] = lambda: OpenAIGenerator(llm, config, template, model_hash, usage_observer(directory))
    elif model:
        if base:
            systems[BASE_MODEL] = lambda: load_generator(
                base.path, template, config, base.content_hash, device, base.revision
            )
        systems[name] = lambda: load_generator(model, template, config, model_hash, device)
    return systems


def predictions_path(directory: Path, system: str, context: str) -> Path:
    """The predictions file of a system in a context, in a run directory."""
    return directory / "predictions" / f"{system}-{context}.jsonl"


def any_missing(
    directory: Path, systems: Iterable[str], contexts: Sequence[str], dialogues: Sequence[Dialogue], texts: Texts
) -> bool:
    """Whether a system lacks predictions of a turn in a context, or scores of general texts."""
    return any(
        _missing(directory, each, contexts, dialogues) or lacks_scores(directory, each, texts) for each in systems
    )


def _missing(directory: Path, system: str, contexts: Sequence[str], dialogues: Sequence[Dialogue]) -> list[str]:
    return [each for each in contexts if not is_complete(predictions_path(directory, system, each), dialogues)]


def predict_missing(
    directory: Path,
    systems: Systems,
    contexts: Sequence[str],
    dialogues: Sequence[Dialogue],
    texts: Texts,
    state: "PartialState",
) -> None:
    """Predict the missing turns of all systems, one system in memory at a time; each process predicts a shard.

    Args:
        texts: general texts, which every system but the baselines scores; none for a served model.

    Raises:
        InputError: a model cannot be loaded, or predictions on disk are of other settings.
    """
    shard = shard_dialogues(dialogues, state.process_index, state.num_processes)
    for name, load in systems.items():
        missing, unscored = _missing(directory, name, contexts, dialogues), lacks_scores(directory, name, texts)
        generator: Any = load() if missing or unscored else None
        for context in missing:
            path, label = predictions_path(directory, name, context), f"{name}, {context} context"
            with PredictionStore(path, generator.config_hash, state.process_index) as store:
                generate_predictions(shard, generator, context, store, label if state.is_main_process else None)
            state.wait_for_everyone()
            if state.is_main_process:
                store.merge(dialogues)
            state.wait_for_everyone()
        if unscored:
            score_texts(directory, generator, texts, state, name)
        del generator


def import_replies(path: str, directory: Path, context: str, dialogues: Sequence[Dialogue]) -> None:
    """Add the replies of another program (see `read_external_replies`) to the predictions of a run.

    Raises:
        InputError: as `read_external_replies`.
    """
    replies = read_external_replies(path, dialogues, context)
    write_predictions(predictions_path(directory, Path(path).stem, context), replies)
