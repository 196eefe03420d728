"""What a step of a suite takes: estimated before it runs, without loading anything, and counted after."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from csc_train.config.cluster import ClusterConfig, PreflightConfig
from csc_train.config.paths import CONF
from csc_train.config.recipes.evaluation import EvaluateRecipe
from csc_train.config.recipes.training import PreflightRecipe, SftRecipe
from csc_train.data.config import DataConfig
from csc_train.data.dialogue import Dialogue
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits, read_splits, split
from csc_train.data.strategies import STRATEGIES
from csc_train.files import digest
from csc_train.inference.kv_cache import GROWTH
from csc_train.inference.predictions import Prediction, read_outcomes
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.preflight.checks import NotCheckedError, check_template
from csc_train.launching.preflight.size import estimate_job, memory_scenario
from csc_train.llm.config import LLMConfig
from csc_train.llm.usage import read_usage
from csc_train.models.config import ArchitectureConfig, ModelConfig
from csc_train.models.families import ModelDims, get_family, model_dims, training_flops
from csc_train.models.hub import find_file, hub_errors, read_model_config
from csc_train.runs.comparison import history_log
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import read_config, read_run_record
from csc_train.suites.base import Cost
from csc_train.template.config import TemplateConfig
from csc_train.template.system_prompt import system_prompt
from csc_train.training import memory
from csc_train.training.memory import GIB
from csc_train.training.rehearsal import run_bytes

SUPPORTER_TURNS = 13
"""Of a dialogue where no data tell: the mean of RoleCS is 12 to 13."""
HEADER_TOKENS, LABEL_TOKENS = 5, 5
"""Around a turn, as in ChatML; and of a strategy's label."""
BYTES_PER_TURN = 2000
"""Of a prediction on disk."""
BANDWIDTH_SHARE = 0.3
"""Of a GPU's memory bandwidth, reached in decoding by transformers: an assumption, not a measurement."""


@dataclass(frozen=True)
class StepEstimate:
    """What a step is estimated to take; None where it is not known.

    Attributes:
        gpus: GPUs of its job; 0 without any.
        memory_gib: of one GPU; `gpu_memory_gib`: what one has.
        fits: whether the job fits into the memory of GPUs and nodes.
        gpus_from: smallest number of GPUs that fits.
        hours: wall time.
        disk_gib: what it writes: checkpoints, final model, predictions.
        basis: what the estimate rests on.
    """

    cost: Cost = field(default_factory=Cost)
    gpus: int = 0
    memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    fits: bool | None = None
    gpus_from: int | None = None
    hours: float | None = None
    disk_gib: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class DialogueLengths:
    """The dialogues of an evaluation, by the mean length of a turn.

    Attributes:
        supporter_turns: of each dialogue; a customer's turn is between two of them.
        prefix: tokens of the system prompt.
        turn: mean tokens of a turn with its header.
        basis: where the lengths come from.
    """

    supporter_turns: Sequence[int]
    prefix: float
    turn: float
    basis: str

    @property
    def requests(self) -> int:
        """Supporter turns of all dialogues."""
        return sum(self.supporter_turns)

    @property
    def dialogue(self) -> float:
        """Mean tokens of a dialogue, system prompt included."""
        return self.prefix + self.turn * (2 * self.requests / len(self.supporter_turns) - 1)

    def prompts(self) -> int:
        """Tokens of the prompts of all supporter turns, each with its whole history."""
        return round(sum(k * (self.prefix + HEADER_TOKENS) + k * (k - 1) * self.turn for k in self.supporter_turns))

    def prefilled(self, context: str) -> int:
        """Prompt tokens that a cache of each dialogue leaves to compute; its own replies are in it already."""
        turns = {"reference": 2 * self.turn, "generated": self.turn + HEADER_TOKENS}[context]
        return round(self.prefix + sum((k - 1) * turns + HEADER_TOKENS for k in self.supporter_turns))

    def scored(self) -> int:
        """Tokens of the forward passes that compute likelihoods."""
        labels = len(STRATEGIES) * LABEL_TOKENS * self.requests
        return round(self.dialogue * len(self.supporter_turns) + labels)

    def replies(self, limit: int) -> int:
        """Tokens of all replies, which are taken to be as long as the reference's."""
        return round(self.requests * min(limit, self.turn))


def estimate_step(
    recipe: str,
    config: Any,
    cluster: ClusterConfig,
    preflight: PreflightConfig,
    price_per_gpu_hour: float | None = None,
    trained: SftRecipe | None = None,
) -> StepEstimate:
    """Estimate a run of sft, evaluate or compare on a cluster.

    Args:
        config: of the recipe.
        trained: the training that makes the evaluated model.

    Raises:
        InputError: data on this machine cannot be read.
    """
    if recipe == "sft":
        found = _estimate_training(config, cluster, preflight)
    elif recipe != "evaluate" or config.predictions or config.score_only:
        return StepEstimate(basis="a minute of one core")
    else:
        found = (_estimate_served if config.llm else _estimate_local)(config, cluster, preflight, trained)
    return replace(found, cost=_add_gpus(found.cost, cluster, found.hours, price_per_gpu_hour))


def _add_gpus(cost: Cost, cluster: ClusterConfig, hours: float | None, price: float | None) -> Cost:
    """The cost with hours of the cluster's GPUs, if it has any, and their price."""
    gpu_hours = None if hours is None or not cluster.gpus else hours * cluster.gpus
    money = None if gpu_hours is None or price is None else gpu_hours * price
    return cost + Cost(gpu_hours, money=money)


def _estimate_training(config: SftRecipe, cluster: ClusterConfig, preflight: PreflightConfig) -> StepEstimate:
    chosen = {each.name: getattr(config, each.name) for each in fields(SftRecipe)}
    job = PreflightRecipe(**chosen, cluster=cluster, preflight=preflight)
    if (dims := find_dims(config.model.path, config.model)) is None:
        return StepEstimate(gpus=cluster.gpus, basis=f"{config.model.path} is not here, and no row of conf/model")
    scenario, template, basis = memory_scenario(job, dims), None, ""
    dialogues = _find_dialogues(config.data, "epoch")
    with contextlib.suppress(NotCheckedError):
        template = check_template(job, None, NotCheckedError)
    if template is None and dialogues:
        lengths = dialogue_lengths(dialogues, preflight, config.template)
        given = {"dialogues": len(dialogues), "tokens_per_dialogue": math.ceil(lengths.dialogue)}
        job, basis = replace(job, preflight=replace(preflight, **given)), f"{lengths.basis}; "
    size = estimate_job(job, scenario, template, dialogues)
    limit = cluster.gpu_memory_gib and cluster.gpu_memory_gib * GIB
    host = cluster.host_memory_gib * GIB if cluster.host_memory_gib else math.inf
    plan, smallest = None, None
    if cluster.gpus and limit and config.zero.stage != "from_launcher":
        smallest = memory.fitting_world_size(scenario, cluster.gpus_per_node, limit, host)
        if config.trainer.gradient_checkpointing == "auto":
            scenario = replace(scenario, checkpointing=memory.least_checkpointing(scenario, limit))
        plan = memory.estimate_memory(scenario)
    disk = run_bytes(scenario, config.trainer.save_total_limit, config.model.init == "random") / GIB
    fits = None if plan is None else plan.total <= (limit or 0) and plan.host <= host
    return StepEstimate(
        Cost(tokens=size and round(size.tokens * size.epochs)), cluster.gpus, plan and plan.total / GIB,
        cluster.gpu_memory_gib, fits, smallest and smallest.processes, size and size.hours, disk,
        basis + (size.basis if size else _UNKNOWN_LENGTHS),
    )  # fmt: skip


def _estimate_served(
    config: EvaluateRecipe, cluster: ClusterConfig, preflight: PreflightConfig, trained: SftRecipe | None
) -> StepEstimate:
    llm: Any = config.llm
    if (lengths := _evaluation_lengths(config, preflight, trained)) is None:
        return StepEstimate(basis=_UNKNOWN_LENGTHS)
    contexts = len(config.evaluation.contexts)
    prompts, replies = contexts * lengths.prompts(), contexts * lengths.replies(config.evaluation.max_new_tokens)
    price = llm.cost(prompts, replies)
    basis = f"{contexts * lengths.requests:,} requests, {prompts:,} prompt tokens, no thoughts; {lengths.basis}"
    if price is None:
        basis += "; no price: give llm.price_per_million_input and _output in the step's overrides"
    disk = contexts * lengths.requests * BYTES_PER_TURN / GIB
    return StepEstimate(Cost(tokens=prompts + replies, money=price), disk_gib=disk, basis=basis)


def _estimate_local(
    config: EvaluateRecipe, cluster: ClusterConfig, preflight: PreflightConfig, trained: SftRecipe | None
) -> StepEstimate:
    settings, template = config.evaluation, _template_of(config, trained)
    systems = 2 if isinstance(settings.base, str) or (settings.base and config.template is None) else 1
    dims = find_dims(trained.model.path, trained.model) if trained else find_dims(config.checkpoint)
    lengths = _evaluation_lengths(config, preflight, trained)
    if dims is None or lengths is None:
        unknown = f"{config.checkpoint} is not here, and no row of conf/model" if dims is None else _UNKNOWN_LENGTHS
        return StepEstimate(gpus=cluster.gpus, gpu_memory_gib=cluster.gpu_memory_gib, basis=unknown)
    replies = systems * sum(lengths.replies(settings.max_new_tokens) for _ in settings.contexts)
    computed = systems * sum(
        lengths.prefilled(context)
        + (lengths.scored() if settings.likelihoods and (context == "reference" or template.mode == "joint") else 0)
        for context in settings.contexts
    )
    spread = cluster.gpus_per_node if cluster.process_launcher == "none" else 1
    limit, fits, smallest = cluster.gpu_memory_gib and cluster.gpu_memory_gib * GIB, None, None
    plan = inference_memory(dims, config, lengths, spread) if cluster.gpus else None
    if plan and limit:
        fits = plan.total <= limit
        sizes = (gpus for gpus, nodes in memory.world_sizes(cluster.gpus_per_node) if nodes == 1)
        smallest = next((n for n in sizes if inference_memory(dims, config, lengths, n).total <= limit), None)
    hours, basis = None, lengths.basis
    if cluster.gpus and cluster.gpu_tflops and cluster.gpu_bandwidth_gbs:
        counts = training_flops(dims)  # of which a forward pass is a third
        flops = computed * (counts.per_token + counts.per_pair * lengths.dialogue) / 3
        read = _number_bytes(config) * dims.parameters + _cache_bytes(dims, config, lengths.dialogue / 2)
        seconds = flops / (preflight.mfu * cluster.gpu_tflops * 1e12)
        seconds += replies / settings.batch_size * read / (BANDWIDTH_SHARE * cluster.gpu_bandwidth_gbs * 1e9)
        hours = seconds / cluster.world_size / 3600
        basis += f"; rough: MFU {preflight.mfu} for prompts, {BANDWIDTH_SHARE} of the memory bandwidth for replies"
    if fits is False and spread == 1 and smallest:
        basis += "; a copy on each GPU does not fit: cluster.process_launcher=none spreads one over them"
    disk = systems * len(settings.contexts) * lengths.requests * BYTES_PER_TURN / GIB
    return StepEstimate(
        Cost(tokens=replies), cluster.gpus, plan and plan.total / GIB, cluster.gpu_memory_gib, fits, smallest, hours,
        disk, basis,
    )  # fmt: skip


def inference_memory(
    dims: ModelDims, config: EvaluateRecipe, lengths: DialogueLengths, gpus: int = 1
) -> memory.MemoryPlan:
    """Peak memory in bytes of each GPU: weights and cache shared by `gpus`, and the activations of a prefill on one."""
    size, longest = _number_bytes(config), lengths.prefix + 2 * max(lengths.supporter_turns) * lengths.turn
    columns = 1.5 * longest + GROWTH
    tokens = config.evaluation.batch_size * min(longest - lengths.prefix, config.evaluation.max_batch_length)
    activations = size * tokens * (3 * dims.intermediate + 6 * dims.hidden + columns)
    held = size * dims.parameters + _cache_bytes(dims, config, columns)
    return memory.MemoryPlan(held / gpus, 0.0, 0.0, activations=activations)


def _number_bytes(config: EvaluateRecipe) -> int:
    return 4 if config.evaluation.dtype == "fp32" else 2


def _cache_bytes(dims: ModelDims, config: EvaluateRecipe, columns: float) -> float:
    """Bytes of keys and values of a batch, and of the two states in fp32 that a row of a gated delta net has."""
    kinds = get_family(dims.model_type).layer_kinds
    full = sum(count for kind, count in dims.layer_kinds.items() if kinds[kind].cache != "recurrent")
    states = 8 * dims.delta.values * dims.delta.key_head if dims.delta else 0
    return config.evaluation.batch_size * (
        2 * _number_bytes(config) * dims.keys * full * columns + states * (dims.layers - full)
    )


def find_dims(path: str | None, model: ModelConfig | None = None) -> ModelDims | None:
    """The dimensions of a model: by its files here, by `model`, or by the row of conf/model that names its path.

    Args:
        path: a directory, a run directory or a hub id.
    """
    for place in (path, f"{path}/model") if path and (model is None or model.init == "pretrained") else ():
        if file := find_file(place, "config.json", model and model.revision):
            with hub_errors(str(file.parent), "config.json", (Exception,)):
                return model_dims(read_model_config(str(file.parent)))
    if model is None:
        rows = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((CONF / "model").glob("*.yaml")))
        found = next((row for row in rows if row.get("path") == path and "architecture" in row), None)
        return found and model_dims(ArchitectureConfig(**found["architecture"]))
    unknown = model.init == "pretrained" and model.architecture == ArchitectureConfig()
    return None if unknown else model_dims(model.architecture, model.tokenizer_vocab_size)


_UNKNOWN_LENGTHS = "the dialogues are not here: give preflight.dialogues and preflight.tokens_per_dialogue"


def _template_of(config: EvaluateRecipe, trained: SftRecipe | None) -> TemplateConfig:
    return config.template or (trained.template if trained else TemplateConfig())


def _evaluation_lengths(
    config: EvaluateRecipe, preflight: PreflightConfig, trained: SftRecipe | None
) -> DialogueLengths | None:
    data = config.data or (trained and trained.data)
    found = _find_dialogues(data, "evaluation") if data else None
    count = preflight.evaluation_dialogues or preflight.dialogues
    if not found and not (count and preflight.tokens_per_dialogue):
        return None
    return dialogue_lengths(found or [], preflight, _template_of(config, trained), count or 0)


def dialogue_lengths(
    dialogues: Sequence[Dialogue], preflight: PreflightConfig, template: TemplateConfig, count: int = 0
) -> DialogueLengths:
    """Lengths of dialogues without a tokenizer, or of `count` typical ones of `preflight.tokens_per_dialogue`."""
    prefix = _tokens(system_prompt(template.mode, template.language))
    turns = [len(each.supporter_turns) for each in dialogues] or [SUPPORTER_TURNS] * count
    if dialogues:
        texts = [turn.text for each in dialogues for turn in each.turns]
        turn, basis = HEADER_TOKENS + sum(map(_tokens, texts)) / len(texts), "tokens estimated from characters"
    else:
        turn = max(1.0, ((preflight.tokens_per_dialogue or 0) - prefix) / (2 * sum(turns) / len(turns) - 1))
        basis = f"{preflight.tokens_per_dialogue:,} tokens a dialogue given"
    return DialogueLengths(turns, prefix, turn, f"{len(turns):,} dialogues, {sum(turns):,} replies; {basis}")


def _tokens(text: str) -> float:
    """About the number of tokens: 1.5 Chinese characters, or 4 others, make one."""
    return sum(1 / 1.5 if character > "\u2e7f" else 1 / 4 for character in text)


_last_read: dict[str, Splits] = {}
"""The dialogues that were read last, which most steps of a suite share."""


def _find_dialogues(data: DataConfig, side: str) -> list[Dialogue] | None:
    """The dialogues of a training epoch or of the evaluation: those on this machine, or a sample that a run is yet to
    write."""
    paths = [Path(each.path) for each in (data.train, *data.mix, data.evaluation) if each.path is not None]
    if paths and all(path.exists() for path in paths):
        key = digest([asdict(data), [(str(path.absolute()), path.stat().st_mtime_ns) for path in paths]])
        if key not in _last_read:
            _last_read.clear()
            _last_read[key] = read_splits(data)
        return getattr(_last_read[key], side)
    if not data.sample_dialogues:
        return None
    sample = generate_sample(data.sample_dialogues, data.sample_seed, data.sample_language)
    return split(sample, data.evaluation_fraction, data.seed)[side == "evaluation"]


def measure_cost(
    directory: Path,
    recipe: str,
    cluster: ClusterConfig,
    seconds: float | None = None,
    price_per_gpu_hour: float | None = None,
    llm: LLMConfig | None = None,
) -> Cost:
    """What a run has taken so far, over all its starts.

    The tokens are those of the training's steps, of a local model's replies, or of a server's prompts and replies.

    Args:
        seconds: wall time of the run's job as its starter saw it. It counts for attached launchers only: another job
            may have waited, so the time counts that its processes recorded when they ended.
        llm: has the prices of a server's tokens; defaults to what the run recorded.

    Raises:
        InputError: a file of the run cannot be read.
    """
    cost = Cost()
    if recipe == "sft":
        measured = ("step_seconds", "tokens_per_second")
        rows = [row for row in history_log(directory).read() if all(row.get(name) for name in measured)]
        steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
        tokens = sum(n * math.prod(row[name] for name in measured) for row, n in zip(rows, steps, strict=True))
        cost = Cost(tokens=round(tokens) if rows and math.isfinite(tokens) else None)
    elif recipe == "evaluate" and (usage := read_usage(directory)).requests:
        llm = llm or LLMConfig(**read_config(directory / RESOLVED_FILE)["llm"])
        tokens = usage.prompt_tokens, usage.completion_tokens
        cost = Cost(tokens=sum(tokens), money=llm.cost(*tokens))
    elif recipe == "evaluate":
        # Finished ones and parts; a killed process may have left a directory of `atomic_path` beside them.
        files = sorted(path for path in (directory / "predictions").glob("*.jsonl*") if path.is_file())
        outcomes = (each for file in files for each in read_outcomes(file) if isinstance(each, Prediction))
        cost = Cost(tokens=sum(len(each.token_ids) for each in outcomes) if files else None)
    attached = launcher_class(cluster).attached
    time = seconds if attached and seconds is not None else read_run_record(directory).get("seconds")
    time = time if isinstance(time, int | float) else None
    return _add_gpus(cost, cluster, None if time is None else time / 3600, price_per_gpu_hour)
