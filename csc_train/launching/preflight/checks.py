"""Preflight checks: the model, data, GPUs, memory, disk and packages of a training before it starts.

No check starts a process group, loads weights or touches GPU memory. Slow imports are inside the checks that need them.
"""

import importlib.metadata
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import ENV_VARS_TRUE_VALUES

from csc_train.config.paths import PACKAGE
from csc_train.config.recipes.training import PreflightRecipe
from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.launching.gpus import Gpu, probe_gpus
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.preflight.report import CheckResult, PreflightReport
from csc_train.launching.preflight.size import computes_in_bf16, estimate_job, memory_scenario, zero_of
from csc_train.models.config import TRAINED_TOKENIZER
from csc_train.models.families import chat_template_name
from csc_train.models.hub import is_local_path
from csc_train.training.compatibility import check_supported
from csc_train.training.memory import GIB, MemoryScenario, advice, alternatives, estimate_memory, state_bytes

if TYPE_CHECKING:
    from csc_train.data.dialogue import Dialogue
    from csc_train.template.dialogue_template import DialogueTemplate

PYPROJECT = PACKAGE.parent / "pyproject.toml"
MIN_DRIVERS = {12: (525, 60), 13: (580, 0)}
"""Oldest NVIDIA driver for Linux by CUDA major version, from NVIDIA's compatibility guide."""


class NotCheckedError(Exception):
    """A check is impossible here; the message gives the reason."""


def run_preflight(config: PreflightRecipe, *, launching: bool = True, free_disk: int | None = None) -> PreflightReport:
    """Run all checks of a training, and estimate its memory, time and size.

    Args:
        config: a training with its cluster.
        launching: whether the training starts next; if so, missing files fail a check, else it is "not checked".
        free_disk: free bytes for the run; defaults to the file system's.
    """
    options, cluster = config.preflight, config.cluster
    absent = InputError if launching else NotCheckedError
    here = launcher_class(cluster).attached
    gpus = probe_gpus() if options.probe and cluster.device == "cuda" and here else None
    scenario = memory_scenario(config)
    chosen = None if config.zero.stage == "from_launcher" else scenario
    memory = cluster.gpu_memory_gib * GIB if cluster.gpu_memory_gib else None
    if memory is None and gpus:
        memory = min(gpu.memory for gpu in gpus)
    host_memory = cluster.host_memory_gib * GIB if cluster.host_memory_gib else math.inf
    loaded: dict[str, Any] = {}

    def load_template() -> str:
        template = loaded["template"] = check_template(config, absent)
        return f"{template.chat_template_name} fits the tokenizer, {len(template.tokenizer):,} tokens"

    def load_data() -> str:
        from csc_train.data.dialogue import data_digest
        from csc_train.template.system_prompt import language_note

        dialogues = loaded["dialogues"] = check_data(config, absent)
        found = f"{len(dialogues):,} dialogues, digest {data_digest(dialogues)[:12]}"
        return "; ".join(filter(None, (found, language_note(dialogues, config.template.language))))

    def look_up_cache() -> str:
        if config.data.on_overlap == "drop":
            raise NotCheckedError("data.on_overlap=drop: the run finds which dialogues to drop")
        if len(loaded) < 2:
            raise NotCheckedError("needs the tokenizer and the data")
        from csc_train.tokenized_cache import find_cached

        found = find_cached(loaded["dialogues"], loaded["template"], config.tokenization)
        return f"{found}: hit" if found else "no hit: the run tokenizes first; recipes/prepare.py does it ahead of time"

    checks: dict[str, Callable[[], str]] = {
        "batch": partial(check_batch, config),
        "world size": partial(check_world_size, config),
        "ZeRO": partial(check_zero_support, config),
        "model files": partial(check_model_files, config, absent),
        "tokenizer and template": load_template,
        "data": load_data,
        "tokenized data": look_up_cache,
        "GPUs": partial(check_gpus, config, gpus, here, absent),
        "memory": partial(check_memory, config, chosen, memory, host_memory),
        "disk": partial(check_disk, config, scenario, free_disk),
        "packages": check_packages,
        "CUDA": partial(check_cuda, config, gpus, absent),
        "W&B": check_tracking,
    }
    results = [_result(name, check) for name, check in checks.items()]
    estimate = estimate_job(config, scenario, loaded.get("template"), loaded.get("dialogues"))
    return PreflightReport(
        results, alternatives(scenario), chosen, cluster.gpus_per_node, memory, host_memory, estimate
    )


def _result(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, "ok", check())
    except NotCheckedError as reason:
        return CheckResult(name, "not checked", str(reason))
    except InputError as error:
        return CheckResult(name, "failed", str(error))


# The training


def check_batch(config: PreflightRecipe) -> str:
    """The packs of a global batch divide evenly among the processes."""
    accumulation = config.trainer.accumulation(config.cluster.world_size)
    return (
        f"{config.trainer.packs_per_step} packs per step = {config.cluster.world_size} processes x "
        f"{config.trainer.micro_batch_size} x {accumulation} forward passes"
    )


def check_world_size(config: PreflightRecipe) -> str:
    """WORLD_SIZE, if torchrun set it, equals the cluster's."""
    cluster, started = config.cluster, os.environ.get("WORLD_SIZE")
    expected = f"{cluster.nodes} nodes x {cluster.gpus_per_node} processes = {cluster.world_size}"
    if started is not None and int(started) != cluster.world_size:
        raise InputError(f"WORLD_SIZE={started}, but cluster={cluster.name} has {expected}")
    return expected


def check_zero_support(config: PreflightRecipe) -> str:
    """Adapter, ZeRO stage, offload and precision are supported together (see `training.compatibility`)."""
    precision = "bf16" if computes_in_bf16(config) else "fp32"
    check_supported(config.zero, config.adapter.kind, precision)
    stage, offload = zero_of(config.zero)
    return f"adapter={config.adapter.kind} with stage {stage}, offload {offload}, {precision}"


def check_model_files(config: PreflightRecipe, absent: type[Exception]) -> str:
    """The model's files exist, and its config.json agrees with `model.architecture`."""
    model = config.model
    if model.init == "random":
        return "random weights, no files"
    path = str(model.path)
    find = partial(_find_file, path, model.revision)
    if (file := find("config.json")) is None:
        raise absent(_missing(path))
    described = read_json(file)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "tie_word_embeddings"):  # fmt: skip
        stated = getattr(model.architecture, key)
        if stated is not None and described.get(key, stated) != stated:
            raise InputError(
                f"{file}: {key} is {described[key]}, model.architecture.{key} is {stated}: correct the configuration"
            )
    if (index := find("model.safetensors.index.json")) is not None:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [shard for shard in shards if find(shard) is None]:
            raise InputError(f"{path}: {len(missing)} of {len(shards)} shards are missing, the first {missing[0]}")
        return f"{len(shards)} shards in {path}"
    if find("model.safetensors") is None:
        raise absent(f"{path}: has a config.json, but neither model.safetensors nor an index of shards")
    return f"model.safetensors in {path}"


def _find_file(path: str, revision: str | None, name: str) -> str | None:
    """The path of a model file in a directory or in the hub's cache, or None."""
    if is_local_path(path):
        return str(Path(path, name)) if Path(path, name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, name, revision=revision)
    return found if isinstance(found, str) else None


def _missing(path: str) -> str:
    return f"{path}: no such model directory" if is_local_path(path) else f"{path}: not in the hub's cache: download it"


def check_template(config: PreflightRecipe, absent: type[Exception]) -> "DialogueTemplate":
    """The dialogue template, if the tokenizer fits it."""
    model = config.model
    if model.tokenizer == TRAINED_TOKENIZER:
        raise NotCheckedError("the run trains the tokenizer")
    path, revision = (model.tokenizer, None) if model.tokenizer else (str(model.path), model.revision)
    if _find_file(path, revision, "tokenizer.json") is None:
        raise absent(f"{path}: no tokenizer.json" if is_local_path(path) else _missing(path))
    from csc_train.models.tokenizer import load_tokenizer
    from csc_train.template.dialogue_template import DialogueTemplate

    tokenizer = load_tokenizer(path, revision)
    if model.architecture.vocab_size and len(tokenizer) > model.architecture.vocab_size:
        raise InputError(
            f"{path}: {len(tokenizer)} tokens, more than model.architecture.vocab_size={model.architecture.vocab_size}"
        )
    return DialogueTemplate(tokenizer, chat_template_name(model), config.template)


def check_data(config: PreflightRecipe, absent: type[Exception]) -> "list[Dialogue]":
    """The training dialogues, read as in the run; only the run checks their overlap."""
    from csc_train.data.splits import read_splits

    data = config.data
    if data.train.path is None:
        raise InputError("data.train.path is not set: give data.train.path=...")
    for name, path in (("train", data.train.path), ("evaluation", data.evaluation.path)):
        if path is not None and not Path(path).is_file():
            if data.sample_dialogues:
                raise NotCheckedError(f"{path}: the run writes this file")
            if not Path(path).suffix and path.count("/") == 1:
                raise NotCheckedError(f"{path}: the run reads this data set from the hub")
            raise absent(f"data.{name}: {path}: no such file")
    return read_splits(data).train


# The machine


def check_gpus(config: PreflightRecipe, gpus: list[Gpu] | None, here: bool, absent: type[Exception]) -> str:
    """This machine has the cluster's number of GPUs, with its memory, and they are free.

    Args:
        here: whether the training runs on this machine.
    """
    cluster = config.cluster
    if cluster.device == "cpu":
        return "none needed: cluster.device=cpu"
    if not here:
        raise NotCheckedError("on another machine")
    if not config.preflight.probe:
        raise NotCheckedError("preflight.probe=false")
    if not gpus:
        raise absent("nvidia-smi finds no GPU on this machine")
    if len(gpus) < cluster.gpus_per_node:
        raise InputError(f"cluster.gpus_per_node={cluster.gpus_per_node}, but there are {len(gpus)} GPUs")
    for number, gpu in enumerate(gpus[: cluster.gpus_per_node]):
        if cluster.gpu_memory_gib and gpu.memory < 0.98 * cluster.gpu_memory_gib * GIB:
            raise InputError(
                f"GPU {number} ({gpu.name}) has {gpu.memory / GIB:.1f} GiB, but "
                f"cluster.gpu_memory_gib={cluster.gpu_memory_gib}"
            )
        if not gpu.free:
            raise InputError(f"GPU {number} ({gpu.name}): other processes use {gpu.used / GIB:.1f} GiB")
    return f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / GIB:.1f} GiB"


def check_memory(
    config: PreflightRecipe, chosen: MemoryScenario | None, memory: float | None, host_memory: float
) -> str:
    """The estimated memory fits into the GPUs and nodes; `memory` and `host_memory` are bytes of one each."""
    if chosen is None:
        raise NotCheckedError("the launcher brings its own DeepSpeed configuration")
    if memory is None:
        raise NotCheckedError("unknown GPU memory: give cluster.gpu_memory_gib=...")
    plan = estimate_memory(chosen)
    sizes = f"{plan.total / GIB:.1f} of {memory / GIB:.1f} GiB per GPU"
    if plan.host:
        sizes += f", {plan.host / GIB:.0f} of {host_memory / GIB:.0f} GiB per node"
    if plan.total <= memory and plan.host <= host_memory:
        return sizes
    rows, per_node = config.trainer.micro_batch_size, config.cluster.gpus_per_node
    raise InputError(f"{sizes}: does not fit; {advice(chosen, rows, per_node, memory, host_memory)}")


def check_disk(config: PreflightRecipe, scenario: MemoryScenario, free: int | None = None) -> str:
    """The training checkpoints and the final model fit on the run directory's disk; `free` overrides its free bytes."""
    parent = Path(config.run.directory or "runs").absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free if free is None else free
    count = config.trainer.save_total_limit + 1  # a checkpoint is written before the oldest is removed
    each = state_bytes(scenario)
    copies = 2 if config.model.init == "random" else 1  # a random base model is saved too
    need = count * each + copies * scenario.compute * scenario.dims.parameters
    text = (
        f"{need / GIB:.1f} GiB for {count} checkpoints of {each / GIB:.1f} GiB and the final model, "
        f"{free / GIB:.1f} GiB free at {parent}"
    )
    if need > free:
        raise InputError(f"{text}: lower trainer.save_total_limit, or choose another run.directory")
    return text


def check_packages() -> str:
    """The installed packages satisfy the dependencies of csc-train."""
    from packaging.requirements import Requirement

    if PYPROJECT.is_file():  # a checkout
        lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("csc-train") or []
    wanted = [requirement for requirement in map(Requirement, lines) if requirement.marker is None]
    wrong = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement} ({version})")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} (not installed)")
    if wrong:
        raise InputError(f"csc-train needs {', '.join(wrong)}: install these versions")
    return f"{len(wanted)} packages satisfy csc-train's dependencies"


def check_cuda(config: PreflightRecipe, gpus: list[Gpu] | None, absent: type[Exception]) -> str:
    """The installed torch has CUDA, and the driver is new enough for it."""
    if config.cluster.device == "cpu":
        return "none needed: cluster.device=cpu"
    import torch

    build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    if torch.version.cuda is None:
        raise absent(f"{build}: install a build with CUDA")
    if not gpus:
        raise NotCheckedError(f"{build}; no NVIDIA driver here")
    oldest = MIN_DRIVERS.get(int(torch.version.cuda.split(".")[0]), (0, 0))
    driver = gpus[0].driver
    if tuple(int(part) for part in re.findall(r"\d+", driver)[:2]) < oldest:
        raise InputError(f"driver {driver} is too old for {build}: install at least {oldest[0]}.{oldest[1]}")
    return f"{build}, driver {driver}"


def check_tracking() -> str:
    """W&B has credentials, or is off; nothing is sent."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}"
    if (disabled := os.environ.get("WANDB_DISABLED", "")).upper() in ENV_VARS_TRUE_VALUES:
        return f"WANDB_DISABLED={disabled}"
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY is set"
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace"):
        return f"credentials in {netrc.name}"
    raise NotCheckedError("neither WANDB_API_KEY nor an entry in .netrc: W&B would log nothing")
