"""Preflight checks: the model, data, GPUs, memory, disk and packages of a training before it starts.

No check starts a process group, loads weights or touches GPU memory. Slow imports are inside the checks that need them.
"""

import glob
import importlib.metadata
import math
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.config.paths import PACKAGE
from csc_train.config.recipes.training import PreflightRecipe
from csc_train.errors import InputError
from csc_train.launching.gpus import Gpu, probe_gpus
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.on_finish import on_finish_arguments
from csc_train.launching.preflight.report import CheckResult, PreflightReport
from csc_train.launching.preflight.size import computes_in_bf16, estimate_job, memory_scenario, precision_of, zero_of
from csc_train.models.config import TRAINED_TOKENIZER, ArchitectureConfig
from csc_train.models.families import LINEAR_ATTENTION, ModelDims, adapter_report, get_family
from csc_train.models.hub import find_file, is_local_path
from csc_train.models.inspection import InspectedModel, inspect_model
from csc_train.runs.directory import default_directory, refuse_foreign
from csc_train.templates import read_yaml
from csc_train.training.compatibility import check_router_loss, check_supported, resolve_compile
from csc_train.training.memory import GIB, MemoryScenario, advice, alternatives, estimate_memory, least_checkpointing

if TYPE_CHECKING:
    from csc_train.data.splits import Splits
    from csc_train.template.dialogue_template import DialogueTemplate

PYPROJECT = PACKAGE.parent / "pyproject.toml"
MIN_DRIVERS = {12: (525, 60), 13: (580, 0)}
"""Oldest NVIDIA driver for Linux by CUDA major version, from NVIDIA's compatibility guide."""
FAR_RATE = 10
"""How many times a learning rate may be off every published one without a note."""
LONGEST = 20
"""Dialogues, the longest by characters, that are tokenized to find the longest one."""


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
    launcher = launcher_class(cluster)
    absent, here = InputError if launching and launcher.shares_files else NotCheckedError, launcher.attached
    gpus = probe_gpus() if options.probe and cluster.device == "cuda" and here else None
    found = inspect_model(config.model)
    if found.dims is None and config.model.init == "pretrained" and config.model.architecture == ArchitectureConfig():
        advice = "; or give its dimensions by a row of conf/model or by model.architecture.*" * found.missing
        raise InputError("; ".join(found.refusals) + advice)
    scenario = memory_scenario(config, None if config.model.init == "random" else found.dims)
    chosen = None if config.zero.stage == "from_launcher" else scenario
    memory = cluster.gpu_memory_gib * GIB if cluster.gpu_memory_gib else None
    if memory is None and gpus:
        memory = min(gpu.memory for gpu in gpus)
    host_memory = cluster.host_memory_gib * GIB if cluster.host_memory_gib else math.inf
    known: dict[str, Any] = {"the model": None if found.refusals else found}

    def load_template() -> str:
        template = known["the template"] = check_template(config, known["the model"], absent)
        return f"{template.chat_template_name} fits the tokenizer, {len(template.tokenizer):,} tokens"

    def load_data() -> str:
        from csc_train.data.dialogue import data_digest
        from csc_train.template.system_prompt import language_note

        splits = check_data(config, absent)
        counted = f"{len(splits.train):,} dialogues, digest {data_digest(splits.train)[:12]}"
        if splits.mixture:
            counted += f", {len(splits.mixture.names)} sources, about {len(splits.epoch):,} dialogues in an epoch"
        known["the data"] = splits
        return "; ".join(filter(None, (counted, language_note(splits.train, config.template.language))))

    def needing(check: Callable[..., str], *needs: str) -> str:
        if missing := [need for need in needs if known.get(need) is None]:
            raise NotCheckedError(f"needs {' and '.join(missing)}")
        return check(config, *map(known.get, needs))

    def run_disk() -> str:
        if not launcher.shares_files:
            raise NotCheckedError("the run directory is on a volume of the cluster")
        return check_run_disk(config, scenario, free_disk)

    checks: dict[str, Callable[[], str]] = {
        "run": partial(check_run, config),
        "batch": partial(check_batch, config),
        "world size": partial(check_world_size, config),
        "ZeRO": partial(check_zero_support, config),
        "model files": partial(check_model, found, absent),
        "parameters": partial(check_parameters, config, scenario.dims),
        "adapters": partial(check_adapters, config, scenario.dims),
        "learning rate": partial(check_learning_rate, config, scenario.dims),
        "attention": partial(needing, check_attention, "the model"),
        "delta nets": partial(check_delta_nets, config, scenario.dims, absent),
        "tokenizer and template": load_template,
        "data": load_data,
        "tokenized data": partial(needing, check_cache, "the template", "the data"),
        "longest dialogue": partial(needing, check_longest, "the model", "the template", "the data"),
        "final model": partial(
            needing, lambda _, found: check_end(config, found, known.get("the template")), "the model"
        ),
        "GPUs": partial(check_gpus, config, gpus, here, absent),
        "memory": partial(check_memory, config, chosen, memory, host_memory),
        "disk": run_disk,
        "packages": check_packages,
        "CUDA": partial(check_cuda, config, gpus, absent),
        "trackers": partial(check_tracking, config),
    }
    results = [_result(name, check) for name, check in checks.items()]
    data = known.get("the data")
    estimate = estimate_job(config, scenario, known.get("the template"), data and data.epoch)
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
    config.validation.interval(config.trainer)
    accumulation = config.trainer.accumulation(config.cluster.world_size)
    return (
        f"{config.trainer.packs_per_step} packs per step = {config.cluster.world_size} processes x "
        f"{config.trainer.micro_batch_size} x {accumulation} forward passes"
    )


def check_world_size(config: PreflightRecipe) -> str:
    """WORLD_SIZE, if torchrun set it, equals the cluster's."""
    cluster, started = config.cluster, os.environ.get("WORLD_SIZE")
    if cluster.world_size < cluster.gpus:
        raise InputError("cluster.process_launcher=none: a training needs one process per GPU: choose torchrun")
    expected = f"{cluster.nodes} nodes x {cluster.world_size // cluster.nodes} processes = {cluster.world_size}"
    if started not in (None, str(cluster.world_size)):
        raise InputError(f"WORLD_SIZE={started}, but cluster={cluster.name} has {expected}")
    return expected


def check_zero_support(config: PreflightRecipe) -> str:
    """Adapter, ZeRO stage, offload and precision are supported together (see `training.compatibility`)."""
    from csc_train.models.precision import resolve_precision

    precision = precision_of(config)
    check_supported(config.zero, config.adapter, config.trainer.optimizer, precision)
    if config.cluster.device == "cpu":  # else the GPUs may be those of another machine
        resolve_precision(precision)
    stage, offload = zero_of(config)
    return f"adapter={config.adapter.kind} with stage {stage}, offload {offload}, {precision}"


def check_run(config: PreflightRecipe) -> str:
    """The run directory may be written, and the recipe that follows takes its arguments."""
    directory = config.run.directory
    if directory is not None:
        refuse_foreign(Path(directory), "sft", config.run.if_exists)
    on_finish_arguments(config.on_finish, Path(directory or "runs"))
    return f"{directory or default_directory('sft')}, then {config.on_finish.recipe or 'nothing'}"


def check_model(found: InspectedModel, absent: type[Exception]) -> str:
    """The base model can be trained (see `inspect_model`)."""
    if found.refusals:
        raise (absent if found.missing else InputError)("; ".join(found.refusals))
    return "; ".join([found.place, *found.repairs])


def check_parameters(config: PreflightRecipe, dims: ModelDims) -> str:
    """The parameters that are planned for; a weight of the routers' auxiliary loss needs experts."""
    check_router_loss(config.trainer.router_aux_loss_coef, dims)
    other = get_family(dims.model_type).not_loaded
    said = f"{dims.parameters:,}" + " of the text model" * bool(other)
    if dims.experts:
        said += f", of which a token uses {dims.active_parameters:,}"
    return said + f"; its {other} are not loaded" * bool(other)


def check_adapters(config: PreflightRecipe, dims: ModelDims) -> str:
    """What has adapters, and how many weights they have."""
    if config.adapter.kind == "full":
        return "none: all weights are trained"
    return adapter_report(config.adapter, dims, computes_in_bf16(config))


def check_learning_rate(config: PreflightRecipe, dims: ModelDims) -> str:
    """What is published for such a model, with its source; a note if the learning rate is far from all of it."""
    model, chosen, table = config.model, config.trainer.learning_rate, read_yaml(__package__, "learning_rates.yaml")
    if model.init == "random":
        return f"{chosen:g}; nothing is published for random weights"
    factor, added = (1, "") if config.adapter.kind == "full" else (table["adapter_factor"], table["adapter_source"])
    rates = {
        factor * row["rate"] * (2000 / dims.hidden) ** row.get("exponent", 0): row["source"]
        for row in table["rates"]
        if row.get("name", "") in f"{model.name} {model.path}".lower()
    }
    said = f"{chosen:g}; published: {', '.join(f'{rate:.1e} ({source})' for rate, source in rates.items())}"
    said += f"; {added}" * bool(added)
    if all(max(chosen / rate, rate / chosen) > FAR_RATE for rate in rates):
        said += f"; note: more than {FAR_RATE} times off: set trainer.learning_rate, or compare them by sweep=lr"
    return said


def check_attention(config: PreflightRecipe, found: InspectedModel) -> str:
    """The chosen attention keeps the documents of a pack apart (see `training.leak_check`)."""
    import torch

    from csc_train.models.attention.select import select_attention
    from csc_train.training.leak_check import checked_collator

    if torch.cuda.is_available() != (config.cluster.device == "cuda"):
        raise NotCheckedError("on another machine")
    packing, precision = config.packing.strategy, config.trainer.precision
    attention = select_attention(config.model.attn_implementation, packing, precision, found.dims.head_dim)
    if (float8 := precision == "fp8") or config.trainer.compile == "layers":
        device, stage = config.cluster.device, config.zero.stage
        resolve_compile(config.trainer.compile, stage, attention, device, found.dims, float8)
    found.model.config._attn_implementation = attention
    device, dtype = torch.device(config.cluster.device), torch.bfloat16 if computes_in_bf16(config) else torch.float32
    layout = checked_collator(found.model, packing, 0, device, dtype).layout
    return f"{attention}, layout {layout}"


def check_delta_nets(config: PreflightRecipe, dims: ModelDims, absent: type[Exception]) -> str:
    """On GPUs, the kernel of gated delta nets is installed, if the model has any."""
    from csc_train.models.attention.select import check_delta_kernel

    try:
        kernel = check_delta_kernel(config.model.delta_kernel, dims.layer_kinds, config.cluster.device)
    except InputError as error:
        raise absent(str(error)) from error
    return f"{kernel}, {dims.layer_kinds[LINEAR_ATTENTION]} of {dims.layers} layers" if dims.delta else kernel


def check_template(
    config: PreflightRecipe, found: InspectedModel | None, absent: type[Exception]
) -> "DialogueTemplate":
    """The dialogue template, if the tokenizer fits it and the model."""
    model = config.model
    if model.tokenizer == TRAINED_TOKENIZER:
        raise NotCheckedError("the run trains the tokenizer")
    path, revision = (model.tokenizer, None) if model.tokenizer else (str(model.path), model.revision)
    if not (Path(path).is_dir() or find_file(path, "tokenizer.json", revision)):
        missing = "no such model directory" if is_local_path(path) else "not in the hub's cache: download it"
        raise absent(f"{path}: {missing}")
    from csc_train.models.inspection import check_tokenizer
    from csc_train.models.tokenizer import load_tokenizer
    from csc_train.template.chat_templates import chat_template_name
    from csc_train.template.dialogue_template import DialogueTemplate

    tokenizer = load_tokenizer(path, revision)
    if found is not None:
        check_tokenizer(model, found, tokenizer)
    model_type = found.dims.model_type if found else model.architecture.model_type
    name = chat_template_name(model.chat_template, tokenizer, model_type)
    return DialogueTemplate(tokenizer, name, config.template)


def check_cache(config: PreflightRecipe, template: "DialogueTemplate", splits: "Splits") -> str:
    """Whether the dialogues are tokenized already."""
    if config.data.on_overlap == "drop":
        raise NotCheckedError("data.on_overlap=drop: the run finds which dialogues to drop")
    from csc_train.tokenized_cache import find_cached

    found = find_cached(splits.train, template, config.tokenization)
    return f"{found}: hit" if found else "no hit: the run tokenizes first; recipes/prepare.py does it ahead of time"


def check_end(config: PreflightRecipe, found: InspectedModel, template: "DialogueTemplate | None") -> str:
    """What makes the final model works without weights (see `training.rehearsal`)."""
    from csc_train.training.rehearsal import rehearse_end

    rehearse_end(found, config.adapter, template and template.tokenizer, template.chat_template if template else "")
    return "its names and files can be written" if template else "its names can be written"


def check_longest(
    config: PreflightRecipe, found: InspectedModel, template: "DialogueTemplate", splits: "Splits"
) -> str:
    """The model has a position for each token of the longest dialogues, by characters."""
    from csc_train.packing.dataset import pack_dialogues
    from csc_train.packing.truncation import num_turns_to_truncate
    from csc_train.training.rehearsal import check_positions

    longest = sorted(splits.train, key=lambda each: -sum(len(turn.text) for turn in each.turns))[:LONGEST]
    encoded = list(template.encode_all(longest))
    if len(longest) < len(splits.train) and not any(
        num_turns_to_truncate(each, config.packing, number) is not None for number, each in enumerate(encoded, 1)
    ):
        raise NotCheckedError(f"the {LONGEST} longest are dropped: packing.max_length={config.packing.max_length:,}")
    packs, _ = pack_dialogues(encoded, config.packing, config.loss)
    return check_positions(found, packs)


def check_data(config: PreflightRecipe, absent: type[Exception]) -> "Splits":
    """The dialogues, read as in the run; their overlap is checked if the run may end for it."""
    from csc_train.data.sample_grammar import check_sample_place
    from csc_train.data.splits import read_and_check_splits, read_splits

    data = config.data
    if data.train.path is None and not data.mix:
        raise InputError("data.train.path is not set: give data.train.path=... or data.mix=...")
    check_sample_place(data)
    sides = {"train": data.train, "evaluation": data.evaluation}
    sides |= {f"mix[{number}]": entry for number, entry in enumerate(data.mix)}
    for name, path in ((name, path) for name, side in sides.items() for path in side.places):
        if not Path(path).exists() and not glob.has_magic(path):
            if data.sample_dialogues:
                raise NotCheckedError(f"{path}: the run writes this file")
            if not Path(path).suffix and path.count("/") == 1:
                raise NotCheckedError(f"{path}: the run reads this data set from the hub")
            raise absent(f"data.{name}: {path}: no such file")
    read = read_and_check_splits if data.on_overlap == "error" else read_splits
    return read(data)


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
    if config.trainer.gradient_checkpointing == "auto" and not chosen.activation_offload:
        chosen = replace(chosen, checkpointing=least_checkpointing(chosen, memory))
    if config.trainer.save_in_background == "auto":
        copied = replace(chosen, save_in_background=True)
        chosen = copied if estimate_memory(copied).host <= host_memory else chosen
    plan = estimate_memory(chosen)
    sizes = f"{plan.total / GIB:.1f} of {memory / GIB:.1f} GiB per GPU"
    if plan.host:
        whole = f" of {host_memory / GIB:.0f}" if math.isfinite(host_memory) else ""
        sizes += f", {plan.host / GIB:.1f}{whole} GiB per node"
    if plan.total <= memory and plan.host <= host_memory:
        saved = "saved in the background" if chosen.save_in_background else "training waits for saves"
        return f"{sizes}, gradient checkpointing {chosen.checkpointing}, {saved}"
    rows, per_node = config.trainer.micro_batch_size, config.cluster.gpus_per_node
    raise InputError(f"{sizes}: does not fit; {advice(chosen, rows, per_node, memory, host_memory)}")


def check_run_disk(config: PreflightRecipe, scenario: MemoryScenario, free: int | None = None) -> str:
    """The training checkpoints and the final model fit on the run directory's disk; `free` overrides its free bytes."""
    from csc_train.training.rehearsal import check_disk

    directory, random = Path(config.run.directory or "runs"), config.model.init == "random"
    return check_disk(scenario, directory, config.trainer.save_total_limit, random, free)


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


def check_tracking(config: PreflightRecipe) -> str:
    """The trackers are installed and answer; W&B has credentials, or is off or offline. Nothing is sent."""
    from csc_train.tracking.reporters import REPORTERS
    from csc_train.tracking.tracker import check_trackers
    from csc_train.tracking.wandb import resolve_mode

    check_trackers(config.tracking)
    mode = resolve_mode(config.tracking) if "wandb" in config.tracking.to else "off"
    wandb = {"off": "W&B is off", "offline": "W&B is offline", "wandb": "W&B: credentials are there"}[mode]
    return ", ".join(
        [wandb, *(f"{kind.title} works" for name, kind in REPORTERS.items() if name in config.tracking.to)]
    )
