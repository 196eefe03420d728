"""The systems of an evaluation (baselines, base model, trained or served model), and their predictions on disk."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from csc_train.checkpoints.manifest import Manifest
from csc_train.data.dialogue import Dialogue
from csc_train.evaluation.config import EvaluationConfig
from csc_train.files import digest
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.generator import Generator, generate_predictions, shard_dialogues
from csc_train.inference.hf import base_model_path, load_generator
from csc_train.inference.openai import OpenAIGenerator
from csc_train.inference.prediction_store import PredictionStore, is_complete
from csc_train.inference.predictions import BASE_MODEL, BASELINE_NAMES, TRAINED_MODEL
from csc_train.llm.config import LLMConfig
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

Systems = dict[str, Callable[[], Generator]]
"""Functions that load a system, by its name."""


def baseline_systems(train: Sequence[Dialogue]) -> Systems:
    """The two strategy baselines, fitted on the training dialogues."""
    return {name: lambda order=order: StrategyBaseline(train, order) for order, name in enumerate(BASELINE_NAMES)}


def served_system(
    llm: LLMConfig,
    config: EvaluationConfig,
    template: DialogueTemplate | TemplateConfig,
    model_hash: str,
    trained: bool,
) -> Systems:
    """A model on a server; `trained` if it serves the checkpoint."""
    name = TRAINED_MODEL if trained else llm.model.replace("/", "_")
    return {name: lambda: OpenAIGenerator(llm, config, template, model_hash)}


def local_systems(
    directory: str,
    template: DialogueTemplate,
    manifest: Manifest,
    config: EvaluationConfig,
    model_hash: str,
    device: "torch.device | None",
) -> Systems:
    """The final model in `directory`, after its base model if `evaluation.include_base`."""
    base_hash, systems = digest([model_hash, "base"]), {}
    if config.include_base:
        base, revision = base_model_path(directory, manifest), manifest.base_revision
        systems[BASE_MODEL] = lambda: load_generator(base, template, config, base_hash, device, revision)
    return systems | {TRAINED_MODEL: lambda: load_generator(directory, template, config, model_hash, device)}


def predictions_path(directory: Path, system: str, context: str) -> Path:
    """The predictions file of a system in a context, in a run directory."""
    return directory / "predictions" / f"{system}-{context}.jsonl"


def any_missing(
    directory: Path, systems: Iterable[str], contexts: Sequence[str], dialogues: Sequence[Dialogue]
) -> bool:
    """Whether a system lacks predictions of a turn in a context."""
    return any(_missing(directory, system, contexts, dialogues) for system in systems)


def _missing(directory: Path, system: str, contexts: Sequence[str], dialogues: Sequence[Dialogue]) -> list[str]:
    return [each for each in contexts if not is_complete(predictions_path(directory, system, each), dialogues)]


def predict_missing(
    directory: Path, systems: Systems, contexts: Sequence[str], dialogues: Sequence[Dialogue], state: "PartialState"
) -> None:
    """Predict the missing turns of all systems, one system in memory at a time; each process predicts a shard.

    Raises:
        InputError: a model cannot be loaded, or predictions on disk are of other settings.
    """
    shard = shard_dialogues(dialogues, state.process_index, state.num_processes)
    for name, load in systems.items():
        missing = _missing(directory, name, contexts, dialogues)
        generator = load() if missing else None
        for context in missing:
            path, label = predictions_path(directory, name, context), f"{name}, {context} context"
            with PredictionStore(path, generator.config_hash, state.process_index) as store:
                generate_predictions(shard, generator, context, store, label if state.is_main_process else None)
            state.wait_for_everyone()
            if state.is_main_process:
                store.merge(dialogues)
            state.wait_for_everyone()
        del generator
