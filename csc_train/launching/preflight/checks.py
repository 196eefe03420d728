"""What can be known about a training before it is started: every check with its own outcome, the memory plan, the time.

Nothing here starts a process group, loads weights or touches GPU memory; what takes long to import is imported late.
"""

import importlib.metadata
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.config.cluster import PreflightConfig
from csc_train.config.paths import PACKAGE
from csc_train.errors import InputError
from csc_train.files import os_errors, read_json
from csc_train.models.config import TRAINED_TOKENIZER
from csc_train.models.families import adapter_parameters, chat_template_name, model_dims
from csc_train.models.hub import is_local_path
from csc_train.training.compatibility import check_supported
from csc_train.training.config import ZeroConfig
from csc_train.training.memory import (
    GIB,
    MemoryPlan,
    MemoryScenario,
    advice,
    alternatives,
    estimate_memory,
    fitting_world_size,
    smallest_fit,
    state_bytes,
    training_flops,
    world_sizes,
)

if TYPE_CHECKING:
    from rich.console import Console

    from csc_train.config.recipes.training import PreflightRecipe
    from csc_train.template.dialogue_template import DialogueTemplate

PYPROJECT = PACKAGE.parent / "pyproject.toml"
DRIVERS = {12: (525, 60), 13: (580, 0)}
"""The oldest NVIDIA driver for Linux on which a CUDA major version runs, by NVIDIA's compatibility guide."""
SAMPLE = 500
"""Dialogues that are encoded and packed for an estimate."""


class NotCheckedError(Exception):
    """A check could not be made here; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    status: str
    """ok, not checked or failed."""
    message: str


@dataclass(frozen=True)
class JobEstimate:
    """The size of a training job."""

    dialogues: int
    tokens: int
    """Of one epoch, shared prefixes counted once a pack."""
    packs: int
    steps: int
    """Optimizer steps of the whole job."""
    flops: float
    """Of the model over the whole job, recomputation not counted."""
    hours: float | None
    """At the assumed MFU; None where the GPU's FLOP/s are not known."""
    basis: str
    """What the figures rest on."""

    def __str__(self) -> str:
        hours = "hours unknown" if self.hours is None else f"{self.hours:.1f} h"
        return (
            f"{self.dialogues:,} dialogues, {self.tokens:,} tokens in {self.packs:,} packs an epoch; {self.steps:,} "
            f"steps, {self.flops:.2e} FLOPs, {hours} ({self.basis})"
        )


@dataclass(frozen=True)
class PreflightReport:
    """What a preflight found.

    Attributes:
        memory: bytes of one GPU; None where they are not known.
        host_memory: bytes of one node; infinite where they are not known.
        settings: the job under every stage and offload, for the cluster's processes.
        chosen: the one of them that is configured; None where the launcher brings its own.
    """

    checks: list[CheckResult]
    settings: list[MemoryScenario]
    chosen: MemoryScenario | None
    per_node: int
    memory: float | None
    host_memory: float
    estimate: JobEstimate | None

    @property
    def failed(self) -> list[CheckResult]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def show(self, console: "Console | None" = None) -> None:
        """Print the checks, the memory plan and the estimate."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console(width=None if sys.stdout.isatty() else 150)

        checks = Table("check", "", "", title="Preflight", title_justify="left")
        colours = {"ok": "green", "not checked": "yellow", "failed": "red"}
        for check in self.checks:
            checks.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", check.message)
        console.print(checks)
        if self.memory is not None:
            console.print(memory_table(self))
            console.print(world_size_table(self))
        elif self.chosen is not None:
            console.print(f"memory plan of each process: {estimate_memory(self.chosen)}")
        console.print(f"estimate: {self.estimate or 'none: see the check of the data'}")
        failed = self.failed
        console.print(
            f"{len(failed)} failed: {', '.join(check.name for check in failed)}" if failed else "nothing failed"
        )


def preflight(
    config: "PreflightRecipe",
    *,
    launching: bool = True,
    free_disk: int | None = None,
) -> PreflightReport:
    """Check a training.

    Args:
        config: a composed training with its `cluster` and `zero` sections.
        launching: whether the training is about to start: then what is absent fails, and is not just not checked.
        free_disk: bytes that are free for the run; asked of the file system where not given.
    """
    options = config.preflight
    cluster = config.cluster
    absent = InputError if launching else NotCheckedError
    gpus = probe_gpus() if options.probe and cluster.device == "cuda" and cluster.scheduler == "local" else None
    setting = setting_of(config)
    chosen = None if config.zero.stage == "from_launcher" else setting
    memory = cluster.gpu_memory_gib * GIB if cluster.gpu_memory_gib else None
    if memory is None and gpus:
        memory = min(gpu.memory for gpu in gpus)
    host_memory = cluster.host_memory_gib * GIB if cluster.host_memory_gib else math.inf
    loaded: dict[str, Any] = {}

    def load_template() -> str:
        loaded["template"] = check_template(config, absent)
        return (
            f"{loaded['template'].chat_template_name} fits the tokenizer, {len(loaded['template'].tokenizer):,} tokens"
        )

    def load_data() -> str:
        from csc_train.data.dialogue import data_digest

        loaded["dialogues"] = check_data(config, absent)
        return f"{len(loaded['dialogues']):,} dialogues, digest {data_digest(loaded['dialogues'])[:12]}"

    def look_for_prepared() -> str:
        if config.data.on_overlap == "drop":
            raise NotCheckedError("which dialogues data.on_overlap=drop leaves is found by the run")
        if len(loaded) < 2:
            raise NotCheckedError("needs the tokenizer and the data")
        from csc_train.tokenized_cache import find_cached

        found = find_cached(loaded["dialogues"], loaded["template"], config.tokenization)
        return f"{found}: hit" if found else "no hit: the run encodes them first, or recipes/prepare.py ahead of it"

    checks = [
        _outcome("batch", lambda: check_batch(config)),
        _outcome("world size", lambda: check_world_size(config)),
        _outcome("ZeRO", lambda: check_zero_support(config)),
        _outcome("model files", lambda: check_model_files(config, absent)),
        _outcome("tokenizer and template", load_template),
        _outcome("data", load_data),
        _outcome("tokenized data", look_for_prepared),
        _outcome("GPUs", lambda: check_gpus(config, gpus, options.probe, absent)),
        _outcome("memory", lambda: check_memory(config, chosen, memory, host_memory)),
        _outcome("disk", lambda: check_disk(config, setting, free_disk)),
        _outcome("packages", check_packages),
        _outcome("CUDA", lambda: check_cuda(config, gpus, absent)),
        _outcome("rendezvous", lambda: check_port(config, options.port)),
        _outcome("W&B", check_tracking),
    ]
    estimate = estimate_job(config, options, setting, loaded.get("template"), loaded.get("dialogues"))
    return PreflightReport(checks, alternatives(setting), chosen, cluster.gpus_per_node, memory, host_memory, estimate)


def _outcome(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, "ok", check())
    except NotCheckedError as reason:
        return CheckResult(name, "not checked", str(reason))
    except InputError as error:
        return CheckResult(name, "failed", str(error))


# What there is to run


def check_batch(config: "PreflightRecipe") -> str:
    """The packs of a step can be divided among the processes."""
    accumulation = config.trainer.accumulation(config.cluster.world_size)
    return (
        f"{config.trainer.packs_per_step} packs a step = {config.cluster.world_size} processes x "
        f"{config.trainer.micro_batch_size} x {accumulation} forward passes"
    )


def check_world_size(config: "PreflightRecipe") -> str:
    """Whoever started this process started as many as the cluster says."""
    cluster = config.cluster
    started = os.environ.get("WORLD_SIZE")
    if started is not None and int(started) != cluster.world_size:
        raise InputError(
            f"WORLD_SIZE={started}, but cluster={cluster.name} has {cluster.nodes} nodes x "
            f"{cluster.gpus_per_node} processes = {cluster.world_size}"
        )
    return f"{cluster.nodes} nodes x {cluster.gpus_per_node} processes = {cluster.world_size}"


def check_zero_support(config: "PreflightRecipe") -> str:
    """Adapter, stage, offload and precision go together (see `training.compatibility`)."""
    precision = "bf16" if _in_bf16(config) else "fp32"
    check_supported(config.zero, config.adapter.kind, precision)
    stage, offload = zero_of(config.zero)
    return f"adapter={config.adapter.kind} with stage {stage}, offload {offload}, {precision}"


def check_model_files(config: "PreflightRecipe", absent: type[Exception]) -> str:
    """The model's files are all there, and its dimensions are those that the plan is made with."""
    model = config.model
    if model.init == "random":
        return "random weights, no files"
    find = _finder(model.path, model.revision)
    if (facts := find("config.json")) is None:
        raise absent(_where(model.path))
    described = read_json(facts)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "tie_word_embeddings"):  # fmt: skip
        stated = getattr(model.architecture, key)
        if stated is not None and described.get(key, stated) != stated:
            raise InputError(
                f"{facts}: {key} is {described[key]}, model.architecture.{key} is {stated}: the plan would be wrong"
            )
    if (index := find("model.safetensors.index.json")) is not None:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if find(shard) is None]
        if missing:
            raise InputError(
                f"{model.path}: {len(missing)} of {len(shards)} shards are missing, the first {missing[0]}"
            )
        return f"{len(shards)} shards in {model.path}"
    if find("model.safetensors") is None:
        raise absent(f"{model.path}: has a config.json, but no model.safetensors and no index of shards")
    return f"model.safetensors in {model.path}"


def _finder(path: str, revision: str | None) -> Callable[[str], str | None]:
    """A function from a file's name to where it is, in a directory or in the hub's cache; None where it is not."""
    if is_local_path(path):
        return lambda name: str(Path(path, name)) if Path(path, name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(path, name, revision=revision)
        return found if isinstance(found, str) else None

    return cached


def _where(path: str) -> str:
    return f"{path}: no such model directory" if is_local_path(path) else f"{path}: not in the hub's cache; download it"


def check_template(config: "PreflightRecipe", absent: type[Exception]) -> "DialogueTemplate":
    """The template that the tokenizer fits."""
    model = config.model
    if model.tokenizer == TRAINED_TOKENIZER:
        raise NotCheckedError("the tokenizer is trained by the run")
    path = model.tokenizer or model.path
    if _finder(path, None if model.tokenizer else model.revision)("tokenizer.json") is None:
        raise absent(f"{path}: no tokenizer.json" if is_local_path(path) else _where(path))
    from csc_train.models.tokenizer import load_tokenizer
    from csc_train.template.dialogue_template import DialogueTemplate

    tokenizer = load_tokenizer(path, None if model.tokenizer else model.revision)
    if model.architecture.vocab_size and len(tokenizer) > model.architecture.vocab_size:
        raise InputError(f"{path}: {len(tokenizer)} tokens, but the model embeds {model.architecture.vocab_size}")
    return DialogueTemplate(tokenizer, chat_template_name(model), config.template)


def check_data(config: "PreflightRecipe", absent: type[Exception]) -> list:
    """The training dialogues, as the run reads them; the overlap check is left to the run."""
    from csc_train.data.splits import read_splits

    data = config.data
    for name, where in (("train", data.train), ("evaluation", data.evaluation)):
        if where.path is None:
            if name == "train":
                raise InputError("data.train.path is not set")
            continue
        if not Path(where.path).is_file():
            if data.sample_dialogues:
                raise NotCheckedError(f"{where.path} is written by the run")
            if not Path(where.path).suffix and where.path.count("/") == 1:
                raise NotCheckedError(f"{where.path}: a data set of the hub, read by the run")
            raise absent(f"data.{name}: {where.path}: no such file")
    return read_splits(data).train


# What there is to run it on


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver reports it; bytes."""

    name: str
    memory: int
    used: int
    driver: str


def probe_gpus() -> list[Gpu] | None:
    """The GPUs of this machine, asked of nvidia-smi, which takes none of their memory; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in answer.splitlines() if line.count(", ") == 3]
    gpus = [Gpu(name, int(total) * 2**20, int(used) * 2**20, driver) for name, total, used, driver in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpus[int(number)] for number in visible.split(",") if number.isdigit() and int(number) < len(gpus)]
    return gpus


def check_gpus(config: "PreflightRecipe", gpus: list[Gpu] | None, probe: bool, absent: type[Exception]) -> str:
    """This machine has the GPUs that the cluster says, with the memory it says, and nobody uses them."""
    cluster = config.cluster
    if cluster.device == "cpu":
        return "none needed: cluster.device=cpu"
    if cluster.scheduler != "local":
        raise NotCheckedError("another machine's")
    if not probe:
        raise NotCheckedError("preflight.probe=false")
    if not gpus:
        raise absent("nvidia-smi finds none on this machine")
    if len(gpus) < cluster.gpus_per_node:
        raise InputError(f"cluster.gpus_per_node={cluster.gpus_per_node}, but there are {len(gpus)} GPUs")
    for number, gpu in enumerate(gpus[: cluster.gpus_per_node]):
        if cluster.gpu_memory_gib and gpu.memory < 0.98 * cluster.gpu_memory_gib * GIB:
            raise InputError(
                f"GPU {number} ({gpu.name}) has {gpu.memory / GIB:.1f} GiB, cluster.gpu_memory_gib="
                f"{cluster.gpu_memory_gib}"
            )
        if gpu.used > 0.05 * gpu.memory:
            raise InputError(f"GPU {number} ({gpu.name}): {gpu.used / GIB:.1f} GiB are in use by others")
    return f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / GIB:.1f} GiB"


def check_memory(
    config: "PreflightRecipe", chosen: MemoryScenario | None, memory: float | None, host_memory: float
) -> str:
    """The job fits into the GPUs' memory and the nodes', by the plan."""
    if chosen is None:
        raise NotCheckedError("the launcher brings its own DeepSpeed configuration")
    if memory is None:
        raise NotCheckedError("the memory of a GPU is not known (cluster.gpu_memory_gib)")
    planned = estimate_memory(chosen)
    sizes = f"{planned.total / GIB:.1f} of {memory / GIB:.1f} GiB a GPU"
    if planned.host:
        sizes += f", {planned.host / GIB:.0f} of {host_memory / GIB:.0f} GiB a node"
    if planned.total <= memory and planned.host <= host_memory:
        return sizes
    rows, per_node = config.trainer.micro_batch_size, config.cluster.gpus_per_node
    raise InputError(f"{sizes}: does not fit; {advice(chosen, rows, per_node, memory, host_memory)}")


def check_disk(config: "PreflightRecipe", setting: MemoryScenario, free: int | None = None) -> str:
    """The saved states of training and the checkpoint find room in the run directory's file system."""
    parent = Path(config.run.directory or "runs").absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free if free is None else free
    # A new state is written before the oldest is removed.
    states = (config.trainer.save_total_limit + 1) * state_bytes(setting)
    weights = setting.compute * setting.shape.parameters * (2 if config.model.init == "random" else 1)
    need = states + weights
    text = (
        f"{need / GIB:.1f} GiB for {config.trainer.save_total_limit + 1} checkpoints of "
        f"{state_bytes(setting) / GIB:.1f} GiB and the final model, {free / GIB:.1f} GiB free at {parent}"
    )
    if need > free:
        raise InputError(f"{text}: fewer with trainer.save_total_limit, or another run.directory")
    return text


def check_packages() -> str:
    """The installed packages are in the ranges that pyproject.toml asks for."""
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
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} ({version})")
    if wrong:
        raise InputError(f"csc-train asks for {', '.join(wrong)}")
    return f"{len(wanted)} in the ranges of csc-train"


def check_cuda(config: "PreflightRecipe", gpus: list[Gpu] | None, absent: type[Exception]) -> str:
    """The installed torch is built for CUDA, and the driver is new enough for it."""
    if config.cluster.device == "cpu":
        return "none needed: cluster.device=cpu"
    version = importlib.metadata.version("torch")
    if "+cpu" in version:
        raise absent(f"torch {version} is built without CUDA")
    if not gpus:
        raise NotCheckedError(f"torch {version}; no driver to ask here")
    import torch

    if torch.version.cuda is None:
        raise absent(f"torch {version} is built without CUDA")
    oldest = DRIVERS.get(int(torch.version.cuda.split(".")[0]), (0, 0))
    driver = tuple(int(part) for part in re.findall(r"\d+", gpus[0].driver)[:2])
    if driver < oldest:
        raise InputError(
            f"driver {gpus[0].driver} is too old for torch {version} (CUDA {torch.version.cuda}): "
            f"{oldest[0]}.{oldest[1]} at least"
        )
    return f"torch {version} (CUDA {torch.version.cuda}), driver {gpus[0].driver}"


def check_port(config: "PreflightRecipe", port: int) -> str:
    """The processes of a node can meet over loopback; those of several nodes at `port`, which is free here."""
    number = 0 if config.cluster.nodes == 1 else port
    if config.cluster.scheduler != "local":
        raise NotCheckedError("another machine's")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with os_errors(f"preflight.port={number}", "choose another port"):
            listener.bind(("127.0.0.1" if number == 0 else "", number))
    return "loopback" if number == 0 else f"port {number} is free"


def check_tracking() -> str:
    """Whether W&B could log in; nothing is sent."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        return f"WANDB_MODE={mode}"
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY is set"
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace"):
        return f"an entry in {netrc.name}"
    raise NotCheckedError("no WANDB_API_KEY and no entry in .netrc: nothing would be logged there")


# How large it is


def zero_of(zero: ZeroConfig) -> tuple[str, str]:
    """The stage and the offload (none, optimizer, all) that the plan knows; what the launcher brings is planned as
    stage 3."""
    offload = "all" if zero.offload_parameters else "optimizer" if zero.offload_optimizer else "none"
    return {"from_launcher": "3", "auto": "off"}.get(zero.stage, zero.stage), offload


def _in_bf16(config: "PreflightRecipe") -> bool:
    return config.trainer.precision == "bf16" or (
        config.trainer.precision == "auto" and config.cluster.device == "cuda"
    )


def setting_of(config: "PreflightRecipe") -> MemoryScenario:
    """The job as the memory plan sees it: the longest packs that the configuration allows."""
    model, adapter, packing, cluster = config.model, config.adapter, config.packing, config.cluster
    shape = model_dims(model.architecture, model.tokenizer_vocab_size)
    stage, offload = zero_of(config.zero)
    tokens = config.trainer.micro_batch_size * packing.max_length
    return MemoryScenario(
        shape,
        adapter=adapter.kind,
        adapter_parameters=(
            0 if adapter.kind == "full" else adapter_parameters(shape, adapter.rank, adapter.target_modules)
        ),
        stage=stage,
        offload=offload,
        processes=cluster.world_size,
        nodes=cluster.nodes,
        tokens=tokens,
        checkpointing=config.trainer.gradient_checkpointing,
        mask_columns=_mask_columns(config, tokens),
        bf16=_in_bf16(config),
    )


def _mask_columns(config: "PreflightRecipe", tokens: int) -> int:
    """Columns of the dense mask that sdpa needs on a GPU to keep the documents of a pack apart."""
    dense = config.model.attn_implementation in ("sdpa", "eager")
    if config.packing.strategy == "off" or config.cluster.device == "cpu" or not dense:
        return 0
    return tokens if config.packing.strategy == "shared_prefix" else config.packing.max_length


def estimate_job(
    config: "PreflightRecipe",
    options: PreflightConfig,
    setting: MemoryScenario,
    template: "DialogueTemplate | None",
    dialogues: list | None,
) -> JobEstimate | None:
    """Tokens, steps, FLOPs and hours: from dialogues where they and a tokenizer can be read, else from the lengths
    that `options` give; None without either."""
    if template is not None and dialogues:
        from csc_train.packing.dataset import pack_dialogues

        sample = dialogues[:: -(-len(dialogues) // SAMPLE)]
        _, report = pack_dialogues(list(template.encode_all(sample)), config.packing, config.loss)
        count, scale = len(dialogues), len(dialogues) / len(sample)
        tokens, packs = report.tokens * scale, report.packs * scale
        document = report.separate_tokens / max(1, report.dialogues - report.dropped)
        basis = f"{len(sample):,} of the dialogues encoded"
    elif options.dialogues and options.tokens_per_dialogue:
        count, document = options.dialogues, options.tokens_per_dialogue
        tokens = count * document
        packs = tokens / config.packing.max_length if config.packing.strategy != "off" else count
        basis = "lengths as given, packs taken as full"
    else:
        return None
    packs = math.ceil(packs)
    steps = math.ceil(config.trainer.epochs * math.ceil(packs / config.trainer.packs_per_step))
    epochs = config.trainer.epochs
    if config.trainer.max_steps > 0:
        epochs = config.trainer.max_steps * config.trainer.packs_per_step / packs
        steps = config.trainer.max_steps
    flops = training_flops(setting, epochs * tokens, document)
    hours = None
    if config.cluster.gpu_tflops:
        hours = flops / (options.mfu * config.cluster.gpu_tflops * 1e12 * config.cluster.world_size) / 3600
        basis += f", MFU {options.mfu} assumed"
    return JobEstimate(count, round(tokens), packs, steps, flops, hours, basis)


# Tables


def _name(setting: MemoryScenario) -> str:
    stage = "off (DDP)" if setting.stage == "off" else f"ZeRO-{setting.stage}"
    return stage + {"none": "", "optimizer": ", optimizer offloaded", "all": ", all offloaded"}[setting.offload]


def _adapters(outcome: PreflightReport) -> Iterator[tuple[str, list[MemoryScenario]]]:
    """The settings of the chosen adapter, then of the others, with adapters of rank 16 where none are configured."""
    settings = outcome.settings
    own = settings[0].adapter
    yield own, settings
    shape = settings[0].shape
    weights = settings[0].adapter_parameters or adapter_parameters(shape, 16)
    for adapter in ("full", "lora", "qlora"):
        if adapter != own:
            count = 0 if adapter == "full" else weights
            yield adapter, [replace(setting, adapter=adapter, adapter_parameters=count) for setting in settings]


def _fits(outcome: PreflightReport, setting: MemoryScenario, planned: MemoryPlan) -> bool:
    return outcome.memory is not None and planned.total <= outcome.memory and planned.host <= outcome.host_memory


def memory_table(outcome: PreflightReport):
    """GiB of every stage and adapter on the cluster's processes, and the number of GPUs from which it fits.

    The chosen row is marked with >, and of each adapter the first that fits with *.
    """
    from rich.table import Table

    first = outcome.settings[0]
    memory = "unknown memory" if outcome.memory is None else f"{outcome.memory / GIB:.1f} GiB"
    table = Table(
        title=(
            f"Memory plan: GiB on each of {first.processes} GPUs of {memory}; {first.tokens:,} tokens a forward pass, "
            f"checkpointing {'on' if first.checkpointing else 'off'}"
            f"{', attention by a dense mask' if first.mask_columns else ''} (> chosen, * smallest that fits)"
        ),
        title_justify="left",
    )
    columns = ("", "adapter", "sharding", "weights", "gradients", "optimizer", "activations", "buffers", "reserve",
               "total", "host", "GPUs from")  # fmt: skip
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 3 else "right", no_wrap=number != 2)
    for adapter, settings in _adapters(outcome):
        smallest = smallest_fit(settings, outcome.memory, outcome.host_memory) if outcome.memory else None
        for setting in settings:
            planned = estimate_memory(setting)
            parts = (planned.parameters, planned.gradients, planned.optimizer, planned.activations,
                     planned.communication, planned.reserve, planned.total)  # fmt: skip
            larger = None
            if outcome.memory:
                larger = fitting_world_size(setting, outcome.per_node, outcome.memory, outcome.host_memory)
            table.add_row(
                (">" if setting == outcome.chosen else "") + ("*" if setting == smallest else ""),
                adapter,
                _name(setting),
                *(f"{part / GIB:.1f}" for part in parts),
                f"{planned.host / GIB:.0f}" if planned.host else "",
                str(larger.processes) if larger else "none" if outcome.memory else "",
                style="green" if _fits(outcome, setting, planned) else None,
                end_section=setting is settings[-1],
            )
    return table


def world_size_table(outcome: PreflightReport):
    """Total GiB on a GPU by world size, for every stage and adapter; those that fit are green."""
    from rich.table import Table

    sizes = [size for size in world_sizes(outcome.per_node) if size[0] <= 16 * outcome.per_node]
    table = Table("adapter", "sharding", title="Total GiB on a GPU by number of GPUs", title_justify="left")
    for processes, _ in sizes:
        table.add_column(str(processes), justify="right")
    for adapter, settings in _adapters(outcome):
        for setting in settings:
            cells = []
            for processes, nodes in sizes:
                planned = estimate_memory(other := replace(setting, processes=processes, nodes=nodes))
                total = f"{planned.total / GIB:.0f}"
                cells.append(f"[green]{total}[/]" if _fits(outcome, other, planned) else total)
            table.add_row(adapter, _name(setting), *cells, end_section=setting is settings[-1])
    return table
