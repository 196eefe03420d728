"""Inspect a base model by its files, without reading its weights: the same function for preflight and training."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from csc_train.models.config import ModelConfig
from csc_train.models.families import LINEAR_ATTENTION, ModelDims, build_model_config, get_family, model_dims
from csc_train.models.hub import (
    has_own_head,
    hub_errors,
    read_model_config,
    repair_generation_config,
    snapshot,
    weight_files,
)
from csc_train.models.layout import is_vision_language, other_tensors

logger = logging.getLogger(__name__)
DTYPES = ("F32", "BF16", "F16")
"""Dtypes of stored weights that training and export can read."""
DIMS_TOLERANCE = 0.01
"""Allowed difference of the planned number of parameters from that of the model, as a share of it."""


@dataclass
class InspectedModel:
    """A base model as its files, or the architecture of random weights, describe it.

    Attributes:
        place: its directory or name, for messages.
        missing: whether its files are not on this machine.
        repairs: what is wrong with its files and repaired whenever it is loaded, and what of them is not loaded; the
            files stay as they are.
        refusals: why it cannot be trained, in one line each, with what to do.
        model: without weights, on the meta device; None after a refusal.
        dims: its dimensions, if its configuration tells them.
    """

    place: str
    missing: bool = False
    repairs: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    model: PreTrainedModel | None = None
    dims: ModelDims | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As other ranks get it: of the model, its configuration."""
        return vars(self) | {"model": self.model and SimpleNamespace(config=self.model.config)}

    def require(self) -> "InspectedModel":
        """Log the repairs.

        Raises:
            InputError: it cannot be trained; holds all reasons.
        """
        for repair in self.repairs:
            logger.info(f"note: {repair}")
        if self.refusals:
            raise InputError("; ".join(self.refusals))
        return self

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an InputError as a refusal."""
        try:
            yield
        except InputError as error:
            text = str(error)
            self.refusals.append(text if self.place in text else f"{self.place}: {text}")


def inspect_model(config: ModelConfig, download: bool = False) -> InspectedModel:
    """Inspect a base model: settings, adapters, quantization, family, and names, shapes and dtypes of its weights.

    Args:
        download: whether to download a hub model; else only the hub's cache is looked at.
    """
    found = InspectedModel(config.name)
    with found.collect():
        if config.init == "random":
            found.model = _random(config)
        else:
            found.place, found.missing = str(config.path), True
            directory = snapshot(found.place, "model", config.revision, cached=not download)
            found.place, found.missing = str(directory), False
            _inspect_files(found, directory)
        if found.model is not None:
            dims, held = model_dims(found.model.config), found.model.num_parameters()
            if abs(dims.parameters - held) > DIMS_TOLERANCE * held:
                raise InputError(
                    f"the family {dims.model_type} counts {dims.parameters:,} parameters, the model has {held:,}: "
                    "register a family with its own read_dims (docs/extending.md)"
                )
            if {LINEAR_ATTENTION} == set(dims.layer_types):  # transformers' caches would not know their length
                raise InputError(
                    "no layer of the model has full_attention, by default every fourth: set "
                    "model.architecture.layer_types"
                )
            with _model_errors():
                _pass_through(found.model)
            found.dims = dims
    return found


def check_tokenizer(config: ModelConfig, found: InspectedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer is one that the weights know.

    Raises:
        InputError: it has more tokens than the model has embeddings, or gives the ids of the base's own tokenizer
            another meaning.
    """
    if config.init == "random":
        return
    embeddings: Any = found.model.get_input_embeddings()
    if (rows := embeddings.num_embeddings) < len(tokenizer):
        raise InputError(
            f"{config.name}: the model embeds {rows} tokens, the tokenizer has {len(tokenizer)}: use its own"
        )
    own = Path(found.place, "tokenizer.json")
    if config.tokenizer and own.is_file():
        known, ours = read_json(own)["model"]["vocab"], tokenizer.get_vocab()
        if differing := sum(ours.get(token) != number for token, number in known.items()):
            raise InputError(
                f"model.tokenizer={config.tokenizer}: {differing:,} of {len(known):,} token ids mean something else to "
                f"the weights of {found.place}: leave it out, to take the model's own"
            )


def _random(config: ModelConfig) -> PreTrainedModel:
    settings = build_model_config(config.architecture, None)
    with _model_errors(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def _pass_through(model: Any) -> None:
    """A forward pass on the meta device; there the grouped products of experts take bf16 only, so others stand in."""
    prepare_delta_nets(model)
    experts = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
    finally:
        model.set_experts_implementation(experts)


@contextlib.contextmanager
def _model_errors() -> Iterator[None]:
    """Turn any error of a model that is built, or passed through, on the meta device into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of many kinds, by what is wrong
        raise InputError(f"these dimensions make no model ({' '.join(str(error).split())}): correct them") from error


def _inspect_files(found: InspectedModel, directory: Path) -> None:
    with found.collect():
        if (adapter := directory / "adapter_config.json").exists():
            raise InputError(f"{adapter}: an adapter is no base: merge it into its model, or move adapter_* elsewhere")
    with found.collect():
        _check_dtypes(weight_files(directory))
    for name in ("config.json", "generation_config.json"):
        content = read_json(directory / name) if name == "config.json" or (directory / name).exists() else {}
        if (quantization := content.get("quantization_config")) is not None:
            raise InputError(
                f"{directory / name}: the weights are quantized ({dict(quantization).get('quant_method')}): choose the "
                "model as it was before; adapter=qlora quantizes it while it is loaded"
            )
    with hub_errors(str(directory), "config.json", (Exception,)):
        config: Any = read_model_config(str(directory))
    family, whole = get_family(config.model_type), read_json(directory / "config.json")
    expected = family.causal_lm_class
    if is_vision_language(directory):
        if whole["model_type"] != family.outer_model_type:
            raise InputError(
                f"its config.json is of model_type {whole['model_type']}, of which no part is trained alone; choose a "
                f"model of class {expected}"
            )
        expected = expected.replace("ForCausalLM", "ForConditionalGeneration")
    classes = whole.get("architectures") or [expected]
    if expected not in classes:
        raise InputError(f"its config.json names {classes[0]}; choose a model of class {expected}")
    with _model_errors():
        found.dims = model_dims(config)  # refuses unknown kinds of layers; a plan needs no more
    if found.refusals:
        return
    if config.tie_word_embeddings and has_own_head(directory):
        config.tie_word_embeddings = False
        found.repairs.append(
            f"{directory / 'config.json'}: tie_word_embeddings=true, but lm_head.weight differs from the input "
            "embeddings: both are trained, and the final model says tie_word_embeddings=false"
        )
    found.model = _load_names(directory, config)
    if skipped := other_tensors(found.model, directory):
        parts = ", ".join(sorted({name.removeprefix("model.").partition(".")[0] for name in skipped}))
        found.repairs.append(
            f"{directory}: its text model is used; {len(skipped)} other tensors ({parts}) are not loaded, and a model "
            "that is trained from it gets them unchanged"
        )
    with hub_errors(str(directory), "generation_config.json"):
        repair = repair_generation_config(found.model)
    if repair:
        found.repairs.append(f"{directory / 'generation_config.json'}: {repair}")


def _check_dtypes(files: list[Path]) -> None:
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole weights file ({error}): copy it again") from error
        if odd := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
            raise InputError(f"{file}: {odd[0]} is stored as {dtypes[odd[0]]}: choose a model in {', '.join(DTYPES)}")


@contextlib.contextmanager
def silent_loading() -> Iterator[None]:
    """Keep transformers from showing bars and tables while it loads a model on the meta device."""
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.CRITICAL)
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()


def _load_names(directory: Path, config: Any) -> PreTrainedModel:
    """The model on the meta device: names, shapes and no weights."""
    with silent_loading(), hub_errors(str(directory), "model", (Exception,)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, found = loaded
    model.tie_weights()  # transformers cannot tell on the meta device whether copies in a file are equal
    for kind, what in (
        ("missing_keys", "is missing from the files"),
        ("mismatched_keys", "has another shape than config.json says"),
        ("unexpected_keys", "is none of this model"),
    ):
        if names := sorted(found[kind]):
            name = names[0] if isinstance(names[0], str) else names[0][0]
            raise InputError(f"{name} {what} (tensors like it: {len(names)}): correct config.json or the files")
    return model
