"""Export a trained model to a plain Hugging Face directory: gather, merge adapters, compare the logits."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from csc_train.checkpoints.base_model import BaseModel, find_base, recorded_base
from csc_train.checkpoints.compression import check_compression, compress, load_dequantized, round_weights
from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.locate import MODEL_FOLDER, ModelSource, is_model
from csc_train.checkpoints.manifest import read_manifest, save_final_model, write_manifest
from csc_train.checkpoints.model_card import EVALUATION_FOLDER, write_model_card
from csc_train.checkpoints.reshard import WEIGHT, ConsolidatedState, open_training_checkpoint
from csc_train.checkpoints.training_checkpoint import check_whole
from csc_train.errors import InputError
from csc_train.models.config import AdapterConfig, ModelConfig
from csc_train.models.experts import recorded_decisions, replayed_decisions
from csc_train.models.families import model_dims
from csc_train.models.hub import load_causal_lm, read_model_config, snapshot
from csc_train.models.layers import decoder_layers
from csc_train.models.layout import is_vision_language
from csc_train.models.loading import load_model, lora_config
from csc_train.models.precision import resolve_dtype
from csc_train.models.sharded_parameters import consolidated_weights, is_sharded, unsharded
from csc_train.models.tokenizer import load_tokenizer
from csc_train.overrides import hint
from csc_train.plugins import load_recorded_plugins
from csc_train.runs.claim import Claim, claim
from csc_train.runs.distributed import distributed_state
from csc_train.template.chat_templates import load_chat_template, recorded_name

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Allowed difference of the logits from the trained model's, over the largest logit, by dtype of the exported weights.
In fp16 and bf16 it allows for the rounding of the weights, in fp32 for what gated delta nets make of a sum's.
Where rounding turns the decision of a router, it is the allowed difference of the experts' scores. A model that is more
sensitive may differ by `NOISE_FACTOR` times what random errors in all weights, as large as those of rounding, make."""
NOISE_FACTOR = 2
MERGE_WARNING = 0.05
"""A difference of the logits, over the largest logit, above which a merged QLoRA model is another than the trained."""
PROBE_LENGTH = 64
"""Tokens in each sequence of the comparison."""
Weights = Mapping[str, torch.Tensor]
Measure = Callable[[torch.nn.Module], float]
BASE_ADVICE = "copy it there, or export on the machine that has it"


def trained_model(
    trainer: Trainer,
    base: ModelConfig,
    dtype: torch.dtype,
    checkpoint: Path | None = None,
    merge_into: str = "base",
    accuracy: Measure | None = None,
) -> PreTrainedModel | None:
    """The trained model in `dtype`, unsharded, with adapters merged. It consumes the trainer.

    Says how far a merged QLoRA model is from the trained one.

    Every process calls this; the main process gets the model, others None.

    Args:
        base: the base model; adapters over sharded or quantized weights are merged into it.
        checkpoint: the training checkpoint with the weights; defaults to the trainer's present weights.
        merge_into: an `AdapterConfig.merge_into`.
        accuracy: measures a model, on its device.

    Raises:
        InputError: the checkpoint is incomplete.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapted = isinstance(model, peft.PeftModel)
    quantized = getattr(model, "is_loaded_in_4bit", False)
    apart = is_sharded(model) or quantized
    gathered = consolidated_weights(model, trained_only=adapted) if apart and not checkpoint else {}
    if not trainer.is_world_process_zero():
        return None
    weights = read_weights(checkpoint) if checkpoint else gathered
    if apart:
        adapter = model.peft_config["default"] if adapted else None
        place = base.path, base.revision, trainer.processing_class
        model = merged(_load_base(*place, dtype, merge_into if quantized else "base"), weights, adapter).to(dtype)
        if quantized:
            try:
                trained = with_weights(_load_base(*place, dtype, "4bit"), weights, adapter)
                _report_merge(model, trained, merge_into, accuracy)
            except torch.OutOfMemoryError:
                logger.info("note: too little memory to compare the merged model with the trained one")
            model.to("cpu")
    else:
        model = merged(model, weights, None)
    model.config.use_cache = True
    return model.to(dtype)


def _report_merge(model: PreTrainedModel, trained: Any, merge_into: str, accuracy: Measure | None) -> None:
    """Log how far a merged model is from the trained one."""
    with recorded_decisions(trained) as decisions:
        expected = _logits(trained, {})
    rounded = merge_into == "dequantized"  # nothing else is between them
    with replayed_decisions(model, decisions) if rounded else contextlib.nullcontext([]) as turned:
        difference = max([_difference(_logits(model, {}), expected), *turned])
    found = f"merged into the {merge_into} weights: largest logit difference {difference:.1e} of the largest logit"
    if accuracy:
        model.to(next(trained.parameters()).device)
        found += f"; strategy accuracy {accuracy(model):.4f} merged, {accuracy(trained):.4f} trained"
    logger.info(found)
    if not difference <= MERGE_WARNING:
        remedy = "; recipes/export.py with merge_into=dequantized makes the trained one" * (merge_into == "base")
        logger.info(f"warning: the merged model is not the trained one: above {MERGE_WARNING}{remedy}")


class TrainedWeights(Mapping[str, torch.Tensor]):
    """The trained parameters of a training checkpoint by name, in fp32; each is read when it is asked for."""

    def __init__(self, state: ConsolidatedState):
        self.state = state

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.state.names:
            raise KeyError(name)
        return self.state.read(name, WEIGHT)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.names)

    def __len__(self) -> int:
        return len(self.state.names)


def read_weights(checkpoint: Path) -> Weights:
    """The trained parameters of a training checkpoint.

    Raises:
        InputError: as `check_whole` and `reshard.open_training_checkpoint`.
    """
    check_whole(checkpoint)
    return TrainedWeights(open_training_checkpoint(checkpoint))


def load_unsharded(path: str, revision: str | None, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model onto the CPU without sharding, under any ZeRO stage.

    Raises:
        InputError: as `load_causal_lm`.
    """
    with unsharded():
        return load_causal_lm(path, revision=revision, dtype=dtype)


def with_weights(
    model: PreTrainedModel, weights: Weights, adapter: peft.LoraConfig | None
) -> PreTrainedModel | peft.PeftModel:
    """Copy trained parameters into a model, which gets the adapter first.

    Args:
        adapter: None without adapters.

    Raises:
        ValueError: the model has no such parameter.
    """
    adapted = model if adapter is None else peft.get_peft_model(model, adapter)
    parameters = dict(adapted.named_parameters())
    if unknown := sorted(weights.keys() - parameters.keys()):
        raise ValueError(f"the model has no {unknown[0]}")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return adapted.eval()


def merged(model: PreTrainedModel, weights: Weights, adapter: peft.LoraConfig | None) -> PreTrainedModel:
    """As `with_weights`, then merge the adapter."""
    adapted: Any = with_weights(model, weights, adapter)
    return adapted.merge_and_unload() if isinstance(adapted, peft.PeftModel) else adapted


def usable_model(source: ModelSource, output: Path, base: BaseModel | None = None) -> str:
    """The directory of a final model; a training checkpoint is exported to `output`, unless that was done before.

    All processes of a job may call this at once: the main one exports, the others wait.

    Args:
        base: the base model, if the caller has found it.

    Raises:
        InputError: as `export`.
    """
    if source.finished:
        return str(source.path)
    job = distributed_state()
    if job.is_main_process and not is_model(output):
        export(source, ExportConfig(source=str(source.path), output=str(output), layout="text"), base)
    job.wait_for_everyone()
    return str(output)


def claim_output(source: ModelSource, config: ExportConfig) -> Claim:
    """Claim the directory that an export writes: a new or empty one, or an earlier export that is to be replaced.

    Raises:
        InputError: the directory holds something else, or what the export reads; or another process writes it.
    """
    output, read = Path(str(config.output)), source.path.resolve()
    if output.resolve() in (read, *read.parents) or read in output.resolve().parents:
        raise InputError(f"output={output}: {source.path}, which is read, is in the same place: choose another output")
    if output.is_dir() and (held := sorted(path.name for path in output.iterdir())):
        if not (is_model(output) and read_manifest(output).exported_from):
            raise InputError(f"output={output}: holds {held[0]} and is no export: choose another output")
        if config.if_exists == "error":
            upload = (
                f", or upload it by {hint({'source': output, 'push_to': config.push_to})}" if config.push_to else ""
            )
            raise InputError(
                f"output={output}: holds an export: choose another output, or add if_exists=replace{upload}"
            )
    return claim(output, "export", output.with_name(f".{output.name}.lock"))


def export(source: ModelSource, config: ExportConfig, base: BaseModel | None = None) -> float:
    """Write a plain directory of the trained model, or of its adapter. It appears only if its logits are those of the
    trained model.

    Args:
        base: the base model; defaults to that of the training, wherever it is (see `find_base`).

    Returns:
        The largest difference between logits of the written and of the trained model, over the largest logit.

    Raises:
        InputError: the base model is not found, a file cannot be read or written, or the difference is above
            `TOLERANCE`; or there is no adapter to write.
    """
    manifest, alone = source.manifest, config.format == "adapter"
    if alone and (source.finished or adapter_of(source).kind == "full"):
        held = "holds no adapter of its own" if source.finished else "was trained without an adapter"
        raise InputError(f"format=adapter: {source.path} {held}: choose a training checkpoint of adapter=lora or qlora")
    if config.format == "fp8":
        check_compression()
    load_recorded_plugins(manifest.config.get("plugins", ()))
    weights: Weights = {}
    if source.finished:  # a final model is its own base
        path, revision, note = str(source.path), None, source.unverified()
        place = recorded_base(source.path, manifest)
    else:
        base = base or find_base(source.home / MODEL_FOLDER, manifest, BASE_ADVICE)
        weights, path, revision, note = read_weights(source.path), base.path, base.revision, base.note
        place = os.path.abspath(path) if Path(path).is_dir() else path
    laid_out_as = None if alone or config.layout == "text" else ModelConfig(path=path, revision=revision)
    if config.format == "fp8" and model_dims(read_model_config(path, revision)).experts:
        raise InputError(f"format=fp8: {path} has experts, which are not rounded: choose format=merged")
    if laid_out_as and config.format == "fp8" and is_vision_language(snapshot(path, "model", revision)):
        raise InputError(f"format=fp8: {path} is a vision-language model: add layout=text")
    # The directory may be moved, and its base stays.
    manifest = replace(manifest, base_model=place, exported_from=str(source.path))
    if note:
        logger.info(f"note: {note}")
    adapter = adapter_of(source)
    quantized = adapter.kind == "qlora"
    merge_into = (config.merge_into or adapter.merge_into) if quantized else "base"
    exact = alone or not quantized or merge_into == "dequantized"
    tokenizer = load_tokenizer(str(source.path))
    # Memory: at no time are there two copies of the weights.
    model: Any = _load_base(path, revision, tokenizer, "auto", "4bit" if quantized else "base")
    lora = None if adapter.kind == "full" else lora_config(adapter, model)
    adapted: Any = model if lora is None else peft.get_peft_model(model, lora)
    with recorded_decisions(adapted) as decisions:
        logits = _logits(adapted, weights)  # nothing is merged
    if alone:
        dtype = resolve_dtype("fp32" if config.dtype == "auto" else config.dtype)
        model = with_weights(adapted, weights, None)
        model.peft_config["default"].base_model_name_or_path, model.peft_config["default"].revision = place, revision
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype) if name in weights else parameter.data
    else:
        if quantized:
            model = adapted = None
            model = _load_base(path, revision, tokenizer, "auto", merge_into)
        elif lora:
            model = adapted.unload()
        if config.dtype != "auto" or adapter.kind == "full":
            precision = manifest.config["trainer"]["precision"] if config.dtype == "auto" else config.dtype
            model = model.to(resolve_dtype(precision))
        model, dtype = merged(model, weights, lora), model.dtype
    model.config.use_cache = True
    difference, expected = 0.0, logits
    if config.format == "fp8":  # which rounds: the written model must have the logits of the rounded weights
        round_weights(model)
        expected = _logits(model, {})
        compress(model)

    def noise() -> float:
        """What errors in the trained model's weights, as large as those of rounding, change."""
        base: Any = _load_base(path, revision, tokenizer, "auto", "4bit" if quantized else "base")
        trained = base if lora is None else peft.get_peft_model(base, lora)
        with replayed_decisions(trained, decisions) as turned:
            found = _logits(trained, weights, torch.finfo(dtype).eps / 2)
        return max([_difference(found, logits), *turned])

    def check(directory: Path) -> None:
        nonlocal difference
        if alone:
            written: Any = peft.PeftModel.from_pretrained(model.unload(), str(directory))
        else:
            model.to("meta")  # frees the memory
            fp8 = config.format == "fp8"
            written = load_dequantized(str(directory)) if fp8 else load_unsharded(str(directory), None, "auto")
        with replayed_decisions(written, decisions) if exact else contextlib.nullcontext([]) as turned:
            found = _logits(written, {})
        difference, tolerance = _difference(found, logits), TOLERANCE[dtype]
        errors = {"a router's decisions": max(turned, default=0.0), "the logits": _difference(found, expected)}
        if exact and not max(errors.values()) <= tolerance:
            del written
            tolerance = max(tolerance, NOISE_FACTOR * noise())
        for what, error in errors.items():
            if (exact or expected is not logits) and not error <= tolerance:
                raise InputError(
                    f"{source.path}: {what} of the exported model differ by {error:.1e}, above {tolerance:.0e}"
                )
        if errors["a router's decisions"]:
            logger.info(f"note: routers decide differently where scores tie within {max(turned):.1e} of the largest")
        facts = {"format": config.format, "difference": difference}
        facts |= {"merge_into": merge_into} if quantized and not alone else {}
        facts |= {} if source.finished else {"step": source.path.name.rpartition("-")[2]}
        write_manifest(directory, replace(read_manifest(directory), export=facts))
        run = source.path.parent if source.finished else source.home
        write_model_card(directory, run / EVALUATION_FOLDER, source, Path(str(config.output)).name)

    template = load_chat_template(recorded_name(manifest.chat_template, source.finished), tokenizer)
    options = {"shard_size": config.shard_size, "record": source.home, "check": check}
    save_final_model(str(config.output), model, tokenizer, template, manifest, laid_out_as, **options)
    logger.info(
        f"exported {source.path} to {config.output}: largest logit difference {difference:.1e} of the largest logit"
    )
    return difference


def _load_base(
    path: str,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | str,
    form: str,
) -> PreTrainedModel:
    """The base model, unsharded.

    Args:
        form: base: in `dtype`, on the CPU. 4bit: quantized, computing in fp32, on the GPU if there is one. dequantized:
            the quantized weights in fp32, on the CPU.
    """
    if form == "base":
        return load_unsharded(path, revision, dtype)
    settings, device = ModelConfig(path=path, revision=revision), "cpu" if form == "dequantized" else None
    with unsharded():
        model: Any = load_model(settings, tokenizer, torch.float32, 0, load_in_4bit=True, device_map=device)
    return model.dequantize() if form == "dequantized" else model


def adapter_of(source: ModelSource) -> AdapterConfig:
    """The adapter that is merged into the base model; that of a final model is merged already."""
    return AdapterConfig() if source.finished else AdapterConfig(**source.manifest.config["adapter"])


@torch.no_grad()
def _logits(model: PreTrainedModel | peft.PeftModel, weights: Weights, noise: float = 0.0) -> torch.Tensor:
    """Logits on seeded random token ids, computed in fp32; float32 [2, `PROBE_LENGTH`, vocabulary].

    Only one decoder layer at a time has its weights in fp32.

    Args:
        weights: take the place of the model's own.
        noise: the largest relative error that all weights get at random.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, PROBE_LENGTH), generator=generator)
    parts = {each: list(each.parameters()) for each in decoder_layers(model)}
    inside = {each for layer in parts for each in layer.modules()}
    parts |= {each: list(each.parameters(recurse=False)) for each in model.modules() if each not in inside}
    names = {parameter: name for name, parameter in model.named_parameters()}
    held: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _) -> None:
        for parameter in filter(torch.is_floating_point, dict.fromkeys(parts[module])):
            held[parameter] = parameter.data
            value = weights.get(names[parameter], parameter.data)
            parameter.data = value.to(parameter.device, torch.float32)
            if noise:
                errors = 1 + noise * (2 * torch.rand(value.shape, generator=generator) - 1)
                parameter.data = parameter.data * errors.to(parameter.device)

    def restore(module: torch.nn.Module, *_) -> None:
        for parameter in held.keys() & parts[module]:
            parameter.data = held.pop(parameter)

    hooks = [module.register_forward_pre_hook(widen) for module in parts]
    hooks += [module.register_forward_hook(restore) for module in parts]
    model.eval()
    logits = model(ids.to(next(model.parameters()).device)).logits.float().cpu()
    for hook in hooks:
        hook.remove()
    return logits


def _difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference of logits from others, over the largest of those."""
    return ((logits - others).abs().max() / others.abs().max()).item()
