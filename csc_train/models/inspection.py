"""Inspect a base model by its files before it is trained, without reading its weights: one function for all recipes."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.models.config import ModelConfig
from csc_train.models.families import ModelDims, get_family, model_dims
from csc_train.models.hub import (
    find_file,
    has_own_head,
    hub_errors,
    is_local_path,
    repair_generation_config,
    snapshot,
    weight_files,
)
from csc_train.models.loading import build_model_config

logger = logging.getLogger(__name__)
DTYPES = ("F32", "BF16", "F16")
"""Dtypes of stored weights that training and export can read."""
DIMS_TOLERANCE = 0.01
"""Allowed difference of the planned number of parameters from that of the model, as a share of it."""


@dataclass
class InspectedModel:
    """A base model as its files, or its architecture, describe it.

    Attributes:
        place: its directory or name, for messages.
        repairs: what is wrong with its files and repaired whenever it is loaded; the files stay as they are.
        refusals: why it cannot be trained, in one line each, with what to do.
        model: without weights, on the meta device; None if the files do not describe one.
        dims: its dimensions; None if it cannot be planned.
    """

    place: str
    repairs: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    model: PreTrainedModel | None = None
    dims: ModelDims | None = None

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
    def _collect(self) -> Iterator[None]:
        """Keep an error as a refusal, and go on."""
        try:
            yield
        except InputError as error:
            self.refusals.append(str(error))


def base_directory(config: ModelConfig, download: bool = False) -> Path | None:
    """The directory of a base model's files; None for random weights, or if the hub's cache has none.

    Args:
        download: whether to download a hub model.

    Raises:
        InputError: as `hub.snapshot`.
    """
    if config.init == "random":
        return None
    path = str(config.path)
    if download:
        return snapshot(path, "model", config.revision)
    if is_local_path(path):
        return Path(path)
    file = find_file(path, "config.json", config.revision)
    with contextlib.suppress(InputError):
        return file and weight_files(file.parent)[0].parent


def inspect_model(path: str | Path) -> InspectedModel:
    """Inspect the files of a base model: settings, adapters, quantization, and names, shapes and dtypes of its weights.

    Args:
        path: a directory.
    """
    directory, found = Path(path), InspectedModel(str(path))
    if not directory.is_dir():
        found.refusals.append(f"{path}: no such model directory")
        return found
    with found._collect():
        _check_adapter(directory)
    config = None
    with found._collect():
        config = _read_config(directory)
    files: list[Path] = []
    with found._collect():
        files = weight_files(directory)
        _check_dtypes(files)
    if config is None:
        return found
    readable = not found.refusals
    with found._collect():
        _check_family(directory, config)
        if has_own_head(directory) and config.tie_word_embeddings:
            config.tie_word_embeddings = False
            found.repairs.append(
                f"{directory / 'config.json'}: tie_word_embeddings=true, but lm_head.weight differs from the input "
                "embeddings: both are trained, and the final model says tie_word_embeddings=false"
            )
        if readable:
            found.model = _load_names(directory, config)
            if repair := repair_generation_config(found.model):
                found.repairs.append(f"{directory / 'generation_config.json'}: {repair}")
        _check_dims(found)
    return found


def inspect_base(config: ModelConfig, directory: Path | None) -> InspectedModel:
    """As `inspect_model`, also of the architecture that random weights are drawn for.

    Args:
        directory: as `base_directory` returned it.
    """
    if directory is not None:
        return inspect_model(directory)
    found = InspectedModel(config.name)
    with found._collect():
        with torch.device("meta"), _model_errors(config.name):
            found.model = AutoModelForCausalLM.from_config(build_model_config(config.architecture, None))
        _check_dims(found)
    return found


def _check_dims(found: InspectedModel) -> None:
    """Check that a model's family counts its parameters right, as plans of memory and FLOPs need."""
    if found.model is None:
        return
    try:
        dims, held = model_dims(found.model.config), found.model.num_parameters()
    except InputError as error:
        raise InputError(f"{found.place}: {error}") from error
    if abs(dims.parameters - held) > DIMS_TOLERANCE * held:
        raise InputError(
            f"{found.place}: the family {dims.model_type} counts {dims.parameters:,} parameters, it has {held:,}: "
            "register a family with its own read_dims (docs/extending.md)"
        )
    found.dims = dims


def check_tokenizer(config: ModelConfig, found: InspectedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer is one that the weights know.

    Raises:
        InputError: it has more tokens than the model has embeddings, or gives the ids of the base's own tokenizer
            another meaning.
    """
    rows = found.model.get_input_embeddings().num_embeddings
    if config.init == "random":
        return
    if rows < len(tokenizer):
        raise InputError(
            f"{config.name}: the model embeds {rows} tokens, the tokenizer has {len(tokenizer)}: use its own"
        )
    own = Path(found.place, "tokenizer.json")
    if config.tokenizer and own.is_file() and Path(config.tokenizer) != Path(found.place):
        known, ours = read_json(own)["model"]["vocab"], tokenizer.get_vocab()
        known = known if isinstance(known, dict) else {token: number for number, (token, _) in enumerate(known)}
        if differing := sum(ours.get(token) != number for token, number in known.items()):
            raise InputError(
                f"model.tokenizer={config.tokenizer}: {differing:,} of {len(known):,} token ids mean something else to "
                f"the weights of {found.place}: leave it out, to take the model's own"
            )


def _check_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").exists():
        beside = "beside the weights" if (directory / "config.json").is_file() else "and no model"
        raise InputError(
            f"{directory / 'adapter_config.json'}: an adapter {beside}: merge it into its model, or move adapter_* "
            "elsewhere"
        )


def _read_config(directory: Path) -> PretrainedConfig:
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists() or name == "config.json":
            content = read_json(directory / name)
            if not isinstance(content, dict):
                raise InputError(f"{directory / name}: holds no mapping of settings: copy it again")
            if quantization := name == "config.json" and content.get("quantization_config"):
                method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
                raise InputError(
                    f"{directory / name}: the weights are quantized ({method or 'quantization_config'}): choose the "
                    "model as it was before; adapter=qlora quantizes it while it is loaded"
                )
    with _model_errors(directory / "config.json"):
        return AutoConfig.from_pretrained(directory)


def _check_family(directory: Path, config: PretrainedConfig) -> None:
    try:
        expected = get_family(config.model_type).causal_lm_class
    except InputError as error:
        known = str(error).partition(": ")[2]
        raise InputError(f"{directory / 'config.json'}: model_type={config.model_type}: {known}") from error
    if config.architectures and expected not in config.architectures:
        raise InputError(
            f"{directory}: its config.json names {config.architectures[0]}; choose a model of class {expected}"
        )


def _check_dtypes(files: list[Path]) -> None:
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole weights file ({error}): copy it again") from error
        for name, dtype in dtypes.items():
            if dtype not in DTYPES:
                raise InputError(
                    f"{file}: {name} is stored as {dtype}: choose a model whose weights are {', '.join(DTYPES)}"
                )


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


def _load_names(directory: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: names, shapes and no weights."""
    with silent_loading(), hub_errors(str(directory), "model", (Exception,)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{directory}: {len(missing)} tensors of the model are missing, the first is {missing[0]}")
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{directory}: {len(mismatched)} tensors have another shape than config.json says, the first is {name}: "
            f"{list(stored)}, not {list(expected)}: copy both again"
        )
    if unknown := sorted(found["unexpected_keys"]):
        raise InputError(
            f"{directory}: the files hold {len(unknown)} tensors that the model does not have, the first is "
            f"{unknown[0]}: correct config.json, or remove them"
        )
    model.tie_weights()  # transformers cannot tell on the meta device whether copies in a file are equal
    return model


@contextlib.contextmanager
def _model_errors(place: str | Path) -> Iterator[None]:
    """Turn any error of transformers over a model's settings into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of many kinds, by what is wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place}: describes no model ({reason}): correct it") from error
