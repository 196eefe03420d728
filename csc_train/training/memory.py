"""Estimate the GPU memory of a training from the model's dimensions, and suggest what would fit.

Sizes are in bytes unless a name says otherwise.

- Full fine-tuning without DeepSpeed (`zero=off`) holds fp32 weights, which autocast casts to bf16.
- fp8 is planned as bf16: what is kept for the backward pass is in bf16.
- DeepSpeed in bf16 holds bf16 weights, and an fp32 copy beside the two moments.
- Attention keeps no matrix of all token pairs except a dense mask, if it needs one.
- Gradients count at all times, as from the second forward pass of an optimizer step on.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from transformers import Trainer

from csc_train.errors import check_choice
from csc_train.models.attention.gated_delta_net import chosen_kernel
from csc_train.models.families import (
    DELTA_CHUNK,
    LINEAR_ATTENTION,
    ModelDims,
    get_family,
    model_dims,
    tensors_with_adapters,
    training_flops,
)
from csc_train.training.config import CHECKPOINTING
from csc_train.training.loss import CHUNK

GIB = 2**30
STAGES = ("off", "0", "1", "2", "3")
OFFLOADS = ("none", "optimizer", "all")
ADAPTERS = ("full", "lora", "qlora")

HEAD_BYTES = 8
"""Of two float32 matrices of a chunk's logits, which the head holds at once (see `training.loss`)."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per parameter in bitsandbytes NF4: four bits, and a doubly quantized scale per 64 parameters."""
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2 + 8 / 256}
"""Of a parameter's two moments by optimizer; in 8 bits, 256 of them share an fp32 scale."""
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA's context, kernels and workspaces, and NCCL's channels: a convention, not a measurement."""
FRAGMENTATION = 0.04
"""Unused memory of the allocator, as a share of the allocated memory: a convention."""
AUTO_SHARE = 0.95
"""Of a device's memory, for what the estimate gets wrong: a convention."""
HOST_FACTOR = 1.5
"""DeepSpeed's estimators multiply the host's states by this to allow for buffers."""


@dataclass(frozen=True)
class MemoryScenario:
    """One way to train a model.

    Attributes:
        adapter: one of `ADAPTERS`.
        adapter_parameters: weights of the adapters; 0 under full.
        idle_adapters: those of them that a token does not use.
        adapted_experts: names of the experts' tensors that have adapters (see `ModelDims.expert_tensors`).
        dora: whether linear layers have DoRA's magnitudes, without dropout.
        optimizer: one of `config.OPTIMIZERS`.
        stage: one of `STAGES`; off is DDP, the others are DeepSpeed's ZeRO stages.
        offload: one of `OFFLOADS`, to the host's memory; optimizer: the optimizer states, all: the weights too.
        nodes: number of machines that share the processes evenly.
        tokens: in one forward pass of one process.
        checkpointing: one of `config.CHECKPOINTING`.
        activation_offload: whether the host keeps the inputs of layers, under full checkpointing.
        mask_columns: keys per token in a dense attention mask; 0 without a mask.
        bf16: whether the computation is in bf16; otherwise it is in fp32.
        delta_kernel: fla or torch, of gated delta nets.
        save_in_background: whether checkpoints are copied to the host's memory (see `copy_bytes`).
        reduce_bucket: elements of DeepSpeed's gradient bucket.
        live_parameters: limit of the elements that stage 3 keeps gathered.
    """

    dims: ModelDims
    adapter: str = "full"
    adapter_parameters: int = 0
    idle_adapters: int = 0
    adapted_experts: tuple[str, ...] = ()
    dora: bool = False
    optimizer: str = "adamw"
    stage: str = "off"
    offload: str = "none"
    processes: int = 1
    nodes: int = 1
    tokens: int = 8192
    checkpointing: str = "full"
    activation_offload: bool = False
    mask_columns: int = 0
    bf16: bool = True
    delta_kernel: str = "fla"
    save_in_background: bool = False
    reduce_bucket: int = 500_000_000
    live_parameters: int = 1_000_000_000

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_choice("offload", self.offload, OFFLOADS)
        check_choice("adapter", self.adapter, ADAPTERS)
        check_choice("checkpointing", self.checkpointing, CHECKPOINTING)

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return self.dims.parameters if self.adapter == "full" else self.adapter_parameters

    @property
    def frozen_bytes(self) -> float:
        """Bytes of the frozen weights in the dtype of the computation; QLoRA holds the blocks' linear layers in NF4."""
        if self.adapter == "full":
            return 0
        parameters, quantized = self.dims.parameters, 0
        if self.adapter == "qlora":
            outside = get_family(self.dims.model_type).unquantized_modules
            quantized = sum(
                inputs * outputs
                for kind in self.dims.layer_types
                for name, (inputs, outputs) in self.dims.linears[kind].items()
                if not name.endswith(outside)
            )
        return NF4_BYTES * quantized + self.compute * (parameters - quantized)

    @property
    def moments(self) -> float:
        """Bytes of the moments of all trained parameters.

        Without sharding, bitsandbytes holds those of embeddings in fp32. It does so with tensors of less than 4,096
        elements, too, which are counted as if in 8 bits.
        """
        whole = self.dims.embedding if self.adapter == "full" and self.stage in ("off", "0") else 0
        return 8 * whole + MOMENT_BYTES[self.optimizer] * (self.trained - whole)

    @property
    def compute(self) -> int:
        """Bytes of a number in the dtype of the computation."""
        return 2 if self.bf16 else 4

    @property
    def master_bytes(self) -> int:
        """Bytes of the optimizer's own fp32 weights under DeepSpeed, which stage 0 in fp32 does without."""
        return 4 * self.trained if self.bf16 or self.stage != "0" else 0

    @property
    def cast_by_autocast(self) -> bool:
        """Whether autocast casts fp32 weights to bf16."""
        return self.stage == "off" and self.bf16 and self.adapter != "qlora"

    @property
    def changed_experts(self) -> list[int]:
        """Weights of each tensor of a layer's experts that is trained or has adapters."""
        shapes = self.dims.expert_tensors
        names = shapes if self.adapter == "full" else self.adapted_experts
        return [self.dims.experts.count * math.prod(shapes[name]) for name in names]


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory in bytes: of a process on its GPU, and of a node (`host`)."""

    parameters: float
    gradients: float
    optimizer: float
    host: float = 0.0
    activations: float = 0.0
    communication: float = 0.0

    @property
    def allocated(self) -> float:
        """Bytes of all tensors on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communication

    @property
    def reserve(self) -> float:
        """Bytes besides the tensors: CUDA's context, and unused memory of the allocator."""
        return CUDA_CONTEXT_BYTES + FRAGMENTATION * self.allocated

    @property
    def total(self) -> float:
        """Bytes of GPU memory."""
        return self.allocated + self.reserve

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations", "communication", "reserve")
        sizes = ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in parts)
        return f"{self.total / GIB:.1f} GiB ({sizes})"


def estimate_memory(scenario: MemoryScenario) -> MemoryPlan:
    """Estimate the memory of a scenario."""
    activations, communication = activation_bytes(scenario), communication_bytes(scenario)
    states = model_states(scenario)
    host = states.host + offloaded_bytes(scenario) * scenario.processes / scenario.nodes
    host += copy_bytes(scenario) if scenario.save_in_background else 0
    return replace(states, activations=activations, communication=communication, host=host)


def model_states(scenario: MemoryScenario) -> MemoryPlan:
    """The bytes of parameters, gradients and optimizer states only, for P trained parameters on N processes.

    - off (DDP): 4 P of weights, 4 P of gradients, 8 P of moments.
    - stage 0: 2 P of weights, 2 P + 4 P of gradients in bf16 and in fp32, 4 P + 8 P of fp32 weights and moments.
      In fp32: 4 P of weights, 4 P of gradients, 8 P of moments.
    - stage 1: 2 P of weights, 4 P of gradients, summed whole in fp32; the fp32 weights and moments divided by N.
    - stage 2: all but the weights divided by N: 2 P + 18 P / N.
    - stage 3: 18 P / N, and 4 bytes per weight of the largest module, which is gathered whole with its gradient; all
      experts of a layer are one module.
    - offload: the GPU keeps 2 P under stages 1 and 2. Under stage 3 it keeps the largest module's weights and gradient,
      and 2 P / N of weights unless they are offloaded too.

    Moments in 8 bits have 2 P of the 8 P.

    Stages 2 and 3 follow DeepSpeed's `estimate_zero{2,3}_model_states_mem_needs`. Frozen weights are replicated except
    under stage 3. The host's bytes are DeepSpeed's estimate for one node.
    """
    trained, share, compute = scenario.trained, 1 / scenario.processes, scenario.compute
    largest = scenario.dims.largest
    if scenario.stage == "off":
        return MemoryPlan(4 * trained + scenario.frozen_bytes, 4 * trained, scenario.moments)
    weights = float(compute * trained)
    gradients = {"0": 6 if scenario.bf16 else 4, "1": 4, "2": 6 * share, "3": 4 * share}
    optimizer = (scenario.master_bytes + scenario.moments) * (1 if scenario.stage == "0" else share)
    parameters = weights + scenario.frozen_bytes
    gradient = gradients[scenario.stage] * trained
    if scenario.stage == "3":
        kept = 0 if scenario.offload == "all" else share
        parameters = (weights + scenario.frozen_bytes) * kept + 4 * largest
    host = 0.0
    if scenario.offload != "none":
        gradient = optimizer = 0
        local = scenario.processes / scenario.nodes
        if scenario.stage == "3":
            offloaded = (16 if scenario.offload == "optimizer" else 18) * trained
            host = HOST_FACTOR * (offloaded + (scenario.offload == "all") * scenario.frozen_bytes) / scenario.nodes
        else:
            host = HOST_FACTOR * trained * max(4 * local, 16 / scenario.nodes)
    return MemoryPlan(parameters, gradient, optimizer, host)


def communication_bytes(scenario: MemoryScenario) -> float:
    """Bytes of the buffers in which processes exchange gradients and weights.

    DDP keeps a second copy of every gradient in its buckets. Stage 1 in bf16 sums gradients where they are. The others
    have one bucket of `reduce_bucket` elements. Stage 3 also holds at most `live_parameters` gathered weights;
    `model_states` counts those of the largest module.
    """
    if scenario.stage == "off":
        return 4 * scenario.trained if scenario.processes > 1 else 0
    if scenario.stage == "1" and scenario.bf16:
        return 0
    bucket = scenario.compute * scenario.reduce_bucket
    if scenario.stage == "0":
        bucket = min(bucket, scenario.compute * scenario.trained)
    if scenario.stage == "3":
        whole = scenario.compute * scenario.dims.parameters if scenario.adapter == "full" else scenario.frozen_bytes
        live = min(whole, scenario.compute * scenario.live_parameters)
        bucket += max(0, live - 4 * scenario.dims.largest)
    return bucket


def kept_bytes(scenario: MemoryScenario, kind: str) -> float:
    """Bytes that one layer of a kind keeps of one token from its forward to its backward pass.

    With checkpointing its input, of r h bytes (see `layer_bytes`). Selective checkpointing also keeps the outputs of
    linear layers and of attention: c q + 4 n. Those of adapters' first matrices are left out. Of a gated delta net in
    torch it keeps those of its products: 4 x (2 a + 3 v + s).
    """
    if scenario.checkpointing == "off":
        return layer_bytes(scenario, kind)
    dims, c = scenario.dims, scenario.compute
    kept = residual_bytes(scenario) * dims.hidden
    if scenario.checkpointing == "selective":
        kept += c * sum(outputs for _, outputs in dims.linears[kind].values())
        if dims.experts:
            kept += c * (dims.experts.count + 2 * dims.routed + dims.experts.active * dims.hidden)
        if kind != LINEAR_ATTENTION:
            kept += c * dims.queries + 4 * dims.heads
        elif scenario.delta_kernel == "torch":
            chunk, _, values, state = delta_widths(scenario)
            kept += 4 * (2 * chunk + 3 * values + state)
    return kept


def layer_bytes(scenario: MemoryScenario, kind: str) -> float:
    """Bytes that the backward pass of one layer of a kind needs of one token, kept or recomputed.

    Let h, i, q and k be the widths of hidden states, MLP, queries and keys, and n the number of heads. Let c be the
    bytes of a number in the computation, and r in the residual stream (see `residual_bytes`).

    - Two norms: the input in fp32 and, if the norm is trained, the normalized input: 2 x (4 h + r h). Qwen3.5's
      multiply in fp32: r = 4.
    - Inputs of trained layers: 2 c h in one copy each, c h for each of q, k, v, gate, up if every layer casts for
      itself. LoRA layers cast to their own dtype, so each keeps a copy of its input.
    - Attention: queries, keys, values, output, and a logarithm per head: c x (2 q + 2 k) + 4 n. A gated output: its
      gate and the product, 2 c q, and in fp32 the whole of the wider queries, c q.
    - SwiGLU: gate, its activation, up and their product: 4 c i; 3 c i if a LoRA layer keeps a copy of the last.
    - Norms over heads (Qwen3): fp32 copies, and normalized ones if trained: (4 + c) x (q + k).
    - A gated delta net instead of attention: `delta_bytes`.
    - Experts, beside a shared one or not, instead of the MLP: `expert_bytes`.
    - DoRA: the outputs of each linear layer and of its adapter.
    """
    dims, c = scenario.dims, scenario.compute
    h, i, q, k = dims.hidden, dims.intermediate - dims.routed, dims.queries, dims.keys
    full = scenario.adapter == "full"
    casts = scenario.cast_by_autocast
    r = residual_bytes(scenario)
    normalized = 4 if dims.delta else r
    norms = 2 * (4 * h + (normalized * h if full else 0))
    inputs = c * h * (2 if full or i else 1)
    if casts:
        # Inputs that count below, or the router's; a gate of one output is not adapted.
        leaving = ("o_proj", "out_proj", "down_proj") if full else "shared_expert_gate"
        inputs = c * sum(inputs for name, (inputs, _) in dims.linears[kind].items() if not name.endswith(leaving))
        inputs += c * h if full and dims.experts else 0
    mlp = c * (4 if full or not casts else 3) * i
    if scenario.dora:
        mlp += 2 * c * sum(outputs for _, outputs in dims.linears[kind].values())
    if dims.experts:
        mlp += expert_bytes(scenario) + (c * h if i else 0)
    if kind == LINEAR_ATTENTION:
        return norms + inputs + delta_bytes(scenario) + mlp
    attention = c * (2 * q + 2 * k) + 4 * dims.heads
    if scenario.mask_columns:
        # Keys and values are repeated for every query head, and the mask is kept as numbers to add.
        attention = c * 4 * q + 4 * dims.heads + c * scenario.mask_columns
    if dims.delta:
        attention += c * q * ((2 if full or not casts else 1) + (c == 4))
    head_norms = (4 + ((4 if dims.delta else c) if full else 0)) * dims.head_norms
    return norms + inputs + attention + mlp + head_norms


def expert_bytes(scenario: MemoryScenario) -> float:
    """Bytes that the backward pass of routed experts needs of one token, in transformers' grouped products.

    Let a be the experts of a token, i their width together, and c the bytes of a number in the computation.

    - Router: fp32 probabilities of all experts, the chosen ones, their sum, and four lists of indices.
    - Experts: output, a h, and three of the first product's halves and the activation, 3 i; if they are trained or have
      adapters, their inputs, a h and i.
    """
    dims, c, active = scenario.dims, scenario.compute, scenario.dims.experts.active
    inputs = {"mlp.experts.gate_up_proj": active * dims.hidden, "mlp.experts.down_proj": dims.routed}
    kept = sum(inputs[name] for name in (inputs if scenario.adapter == "full" else scenario.adapted_experts))
    router = 4 * (dims.experts.count + 1) + (36 + c) * active
    return router + c * (kept + active * dims.hidden + 3 * dims.routed)


def delta_widths(scenario: MemoryScenario) -> tuple[int, int, int, float]:
    """Numbers of a gated delta net for one token: pairs in its chunk, keys and values by value head, and state."""
    delta: Any = scenario.dims.delta
    keys, heads = delta.value_heads * delta.key_head, delta.value_heads
    return heads * DELTA_CHUNK, keys, delta.values, keys * delta.value_head / DELTA_CHUNK


def delta_bytes(scenario: MemoryScenario) -> float:
    """Bytes that the backward pass of a gated delta net needs of one token, besides those of its linear layers.

    Let a be the chunk's pairs of one token in all value heads, k and v the widths of keys and values, repeated for all
    value heads, s that of a state by token, and x that of the convolution.

    - The convolution: its inputs if it is trained, and its outputs in their dtype: c x + c x.
    - flash-linear-attention keeps normalized queries and keys, not repeated, values and the solved pairs in the dtype
      of the computation. By its source: it was not measured.
    - The functions of torch compute in fp32: 20 a + 32 k + 12 v + 4 s, and 16 k more if their inputs are in fp32.
    - The gated norm: its input, fp32 copies of it and of the gate, and products.
    """
    delta: Any = scenario.dims.delta
    c, full, casts = scenario.compute, scenario.adapter == "full", scenario.cast_by_autocast
    chunk, keys, values, state = delta_widths(scenario)
    convolution = delta.channels * ((c + (4 if casts else c)) if full else c)
    gate = 28 if c == 4 else (20 + 2 * casts if full else 18 - 2 * casts)
    if scenario.delta_kernel == "fla":
        rule = c * (2 * delta.keys + values + chunk) + 4 * (3 * delta.value_heads)
    else:
        rule = 20 * chunk + (48 if c == 4 else 32) * keys + 12 * values + 4 * state
    return convolution + rule + gate * values


def residual_bytes(scenario: MemoryScenario) -> int:
    """Bytes of a number in the residual stream: fp32 embeddings keep it in fp32 under autocast."""
    return 4 if scenario.adapter == "full" and scenario.cast_by_autocast else scenario.compute


def offloaded_bytes(scenario: MemoryScenario) -> float:
    """Bytes of the inputs of layers that a process keeps in the host's memory; 0 without such offload."""
    if not scenario.activation_offload:
        return 0
    return residual_bytes(scenario) * scenario.dims.hidden * scenario.dims.layers * scenario.tokens


def activation_bytes(scenario: MemoryScenario) -> float:
    """Bytes that a forward and backward pass holds besides the states, at its peak.

    Throughout: what the blocks keep (`kept_bytes`), the final norm, the embeddings and the mask. On top comes the
    largest of three:

    - Head, which makes its gradient at the end of the forward pass: autocast's bf16 copies of all weights; hidden
      states of the trained tokens, counted as if all were trained, and their gradient; if the head is trained, the
      fp32 gradient of its weights; a chunk of logits.
    - Backward pass of the head: gradients of the hidden states and, if the head is trained, of its weights, with a bf16
      copy if they are held in bf16.
    - Backward pass of a block: `layer_bytes` with checkpointing; gradients of its MLP and of the residual stream; if it
      is trained, the gradient of its largest layer, in bf16 and in fp32. A tied head's gradient waits for the
      embedding's. DoRA needs a weight, its change and their sum in fp32. Experts need four gradients of their
      outputs, or that of their first weights when those are free.

    Without checkpointing, autocast's copies stay until the block's own backward pass, and so do the sums of experts and
    their adapters, which PEFT adds to the weights. The auxiliary loss keeps the logits and probabilities of routers.
    """
    dims, c, tokens = scenario.dims, scenario.compute, scenario.tokens
    r = residual_bytes(scenario)
    full = scenario.adapter == "full"
    layer = max(layer_bytes(scenario, kind) for kind in dims.layer_kinds) * tokens
    kept = sum(kept_bytes(scenario, kind) for kind in dims.layer_types) * tokens
    kept -= offloaded_bytes(scenario) * (1 - 1 / dims.layers)  # the GPU has one of them at a time
    final = (4 + 2 * r) * dims.hidden * tokens
    mask = tokens * scenario.mask_columns
    casts = 0.0
    if scenario.cast_by_autocast:
        casts = 2.0 * (dims.linear + dims.layers * dims.router if full else scenario.trained)
    embedding = dims.embedding if full else 0
    held = 4 if scenario.stage == "off" else c
    head = 2 * r * dims.hidden * tokens + 4 * embedding
    weight = max(inputs * outputs for shapes in dims.linears.values() for inputs, outputs in shapes.values())
    passing = (3 * c * dims.intermediate + (2 * r + 8) * dims.hidden) * tokens
    copies = 0
    if dims.experts:
        outputs = c * dims.experts.active * dims.hidden * tokens
        copies = c * sum(scenario.changed_experts) if not full or casts else 0
        gradient = (c + 4 if full and c == 2 else c) * max(scenario.changed_experts, default=0)
        freed = outputs + 4 * c * dims.routed * tokens + copies
        passing += max(4 * outputs, gradient - freed)
        kept += (4 + c) * dims.experts.count * dims.layers * tokens
    lasting = casts + dims.layers * copies if scenario.checkpointing == "off" else 0
    moments = (
        max(casts, lasting)
        + (2 * embedding if scenario.cast_by_autocast else 0)
        + head
        + HEAD_BYTES * min(tokens, CHUNK) * dims.vocabulary,
        lasting + head + (4 + r) * dims.hidden * tokens + (c * embedding if scenario.stage != "off" else 0),
        lasting
        + (held * embedding if dims.tied else 0)
        + passing
        + (0 if scenario.checkpointing == "off" else layer + casts / dims.layers + copies)
        + ((c + 4) * weight if full else 0)
        + (c * weight if scenario.adapter == "qlora" else 0)
        + (12 * weight if scenario.dora else 0),
    )
    return kept + final + mask + max(moments)


def state_bytes(scenario: MemoryScenario) -> float:
    """Bytes of a training checkpoint of all processes: trained weights in their own dtype, and optimizer states."""
    held = 4 if scenario.stage == "off" else scenario.compute + 4
    return held * scenario.trained + scenario.moments


def copy_bytes(scenario: MemoryScenario) -> float:
    """Bytes of a training checkpoint in the memory of the main process's node, until it is written.

    The main process writes all but the sharded optimizer states. Under DeepSpeed the weights are in two files, in one
    of them a tied head beside the embeddings; stage 3 writes them once. Stage 0 in fp32 has no second fp32 weights.
    """
    if scenario.stage == "off":
        return state_bytes(scenario)
    files = 1 if scenario.stage == "3" else 2
    head = scenario.dims.embedding * (scenario.dims.tied and files == 2)
    optimizer = scenario.moments + scenario.master_bytes
    shards = 1 if scenario.stage == "0" else scenario.nodes
    return scenario.compute * (files * scenario.trained + head) + optimizer / shards


def has_memory_to_copy(trainer: Trainer, tokens: int) -> bool:
    """Whether each node has memory for a copy of a `PackTrainer`'s checkpoints, beside what it trains in.

    Args:
        tokens: in the largest forward pass of one process.
    """
    scenario = scenario_of(trainer, tokens)
    need = copy_bytes(scenario) + estimate_memory(scenario).host
    if trainer.args.device.type == "cpu":
        need += estimate_memory(scenario).allocated * scenario.processes / scenario.nodes
    return all(gather_object([need <= AUTO_SHARE * psutil.virtual_memory().available]))


def alternatives(scenario: MemoryScenario) -> list[MemoryScenario]:
    """The scenario under every stage and offload, from the least sharding to the most."""
    sharded = [(stage, "none") for stage in STAGES[1:] if not (scenario.dora and scenario.bf16)]
    offloaded = [("3", each) for each in OFFLOADS[1:] if sharded and scenario.optimizer == "adamw"]
    choices = [("off", "none"), *sharded, *offloaded]  # those that `compatibility.REFUSED` leaves for these settings
    return [replace(scenario, stage=stage, offload=offload) for stage, offload in choices]


def smallest_fit(
    scenarios: Iterable[MemoryScenario], memory: float, host_memory: float = math.inf
) -> MemoryScenario | None:
    """The first scenario that fits in `memory` bytes of a GPU and `host_memory` of a node; None if none fits."""
    for scenario in scenarios:
        planned = estimate_memory(scenario)
        if planned.total <= memory and planned.host <= host_memory:
            return scenario
    return None


def least_checkpointing(scenario: MemoryScenario, memory: float) -> str:
    """The first of `config.CHECKPOINTING` with which a scenario fits in `AUTO_SHARE` of `memory` bytes; else full."""
    fit = smallest_fit((replace(scenario, checkpointing=mode) for mode in CHECKPOINTING), AUTO_SHARE * memory)
    return fit.checkpointing if fit else "full"


def world_sizes(per_node: int, most: int = 1024) -> list[tuple[int, int]]:
    """(processes, nodes) to try: parts of a node, one node, two, four, and so on."""
    sizes = [(count, 1) for count in range(1, per_node) if per_node % count == 0]
    nodes = 1
    while nodes * per_node <= most:
        sizes.append((nodes * per_node, nodes))
        nodes *= 2
    return sizes


def fitting_world_size(
    scenario: MemoryScenario, per_node: int, memory: float, host_memory: float = math.inf
) -> MemoryScenario | None:
    """The scenario on the smallest world size (see `world_sizes`) that fits, or None."""
    sizes = (replace(scenario, processes=processes, nodes=nodes) for processes, nodes in world_sizes(per_node))
    return smallest_fit(sizes, memory, host_memory)


def suggest_fixes(scenario: MemoryScenario, rows: int, memory: float, host_memory: float = math.inf) -> list[str]:
    """Overrides that make a scenario fit on the same number of processes, the mildest first; empty if none does.

    Args:
        rows: `trainer.micro_batch_size`; the scenario's tokens are proportional to it.
    """

    def fits(other: MemoryScenario) -> bool:
        return smallest_fit([other], memory, host_memory) is not None

    found = []
    for fewer in (fewer for fewer in range(rows - 1, 0, -1) if rows % fewer == 0):
        if fits(replace(scenario, tokens=scenario.tokens * fewer // rows)):
            found.append(f"trainer.micro_batch_size={fewer}")
            break
    saving, override = scenario, ""
    for mode in CHECKPOINTING[CHECKPOINTING.index(scenario.checkpointing) + 1 :]:
        saving, override = replace(scenario, checkpointing=mode), f"trainer.gradient_checkpointing={mode}"
        if fits(saving):
            found.append(override)
            break
    # Offloads are slow: only where no stage is enough.
    if (sharded := smallest_fit(alternatives(saving), memory, host_memory)) and sharded != saving:
        stage = "zero=off" if sharded.stage == "off" else f"zero=zero{sharded.stage}"
        offload = {
            "none": "",
            "optimizer": "zero.offload_optimizer=true",
            "all": "zero.offload_optimizer=true zero.offload_parameters=true",
        }[sharded.offload]
        found.append(" ".join(filter(None, (stage, offload, override))))
    return found


def advice(scenario: MemoryScenario, rows: int, per_node: int, memory: float, host_memory: float = math.inf) -> str:
    """What fits instead of a scenario, as text (see `suggest_fixes` and `fitting_world_size`)."""
    found = suggest_fixes(scenario, rows, memory, host_memory)
    larger = fitting_world_size(scenario, per_node, memory, host_memory)
    if larger and larger.processes > scenario.processes:
        found.append(f"{larger.processes} GPUs")
    return f"what fits: {', or '.join(found)}" if found else "nothing tried fits: take shorter packs or an adapter"


def scenario_flops(scenario: MemoryScenario, tokens: float, document_length: float) -> float:
    """FLOPs of training on `tokens` tokens in documents of equal length (see `families.training_flops`)."""
    adapters = 0 if scenario.adapter == "full" else scenario.adapter_parameters - scenario.idle_adapters
    per_token, per_trained_token, per_pair = training_flops(scenario.dims, adapters, scenario.adapted_experts)
    return tokens * (per_token + per_trained_token + per_pair * document_length)


def scenario_of(trainer: Trainer, tokens: int) -> MemoryScenario:
    """The scenario of a `PackTrainer`.

    Args:
        tokens: in one forward pass of one process.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    collator: Any = trainer.data_collator
    args: Any = trainer.args
    # Under ZeRO stage 3 a parameter's own size is that of its shard.
    trained = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    quantized = getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None)
    adapter = "full" if not hasattr(model, "peft_config") else "qlora" if quantized else "lora"
    dims = model_dims(model.config)
    plugin, layout = args.deepspeed_plugin, collator.layout
    return MemoryScenario(
        dims,
        adapter=adapter,
        adapter_parameters=0 if adapter == "full" else trained,
        adapted_experts=tensors_with_adapters(model),
        dora=adapter != "full" and model.peft_config["default"].use_dora,
        optimizer=args.optimizer,
        stage="off" if plugin is None else str(plugin.zero_stage),
        processes=args.world_size,
        nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        tokens=tokens,
        checkpointing="full" if args.checkpointing == "auto" else args.checkpointing,
        activation_offload=args.activation_offload and args.device.type == "cuda",
        mask_columns={"dense_mask": tokens, "position_ids": tokens // args.per_device_train_batch_size}.get(layout, 0),
        bf16=args.bf16,
        delta_kernel="torch" if args.device.type == "cpu" or chosen_kernel(model) == "torch" else "fla",
    )


def choose_checkpointing(trainer: Trainer, tokens: int) -> str:
    """The `config.CHECKPOINTING` of a `PackTrainer` whose arguments say auto, the same on all processes.

    Args:
        tokens: in the largest forward pass of one process.
    """
    args = trainer.args
    if args.device.type == "cuda":
        memory = torch.cuda.get_device_properties(args.device).total_memory
    else:
        memory = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return least_checkpointing(scenario_of(trainer, tokens), min(gather_object([memory])))


def out_of_memory_advice(trainer: Trainer, tokens: int) -> str:
    """The error message when a `PackTrainer` runs out of memory: the estimate, and what would fit.

    Args:
        tokens: in the forward pass in which memory ran out.
    """
    args, scenario = trainer.args, scenario_of(trainer, tokens)
    estimate = estimate_memory(scenario)
    # Memory ran out whatever the estimate is: only less than the estimate can fit.
    limit, available = 0.9 * estimate.total, ""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(args.device).total_memory
        limit, available = min(limit, memory), f" of {memory / GIB:.1f} GiB"
    fixes = advice(scenario, args.per_device_train_batch_size, scenario.processes // scenario.nodes, limit)
    return (
        f"out of memory on process {args.process_index} in step {trainer.state.global_step + 1} ({tokens:,} tokens in "
        f"a batch); estimated: {estimate}{available}; {fixes}"
    )
