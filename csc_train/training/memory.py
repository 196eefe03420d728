"""What a training holds in the memory of one GPU, and how much it computes, from dimensions alone.

Sizes are bytes unless a name says otherwise. Weights of a full fine-tuning without DeepSpeed are held in fp32 and cast
to bf16 by autocast (`training.model.weight_dtype`); DeepSpeed in bf16 holds weights in bf16 and an fp32 copy beside the
two moments. Attention keeps no matrix of all pairs of tokens but its mask, where it needs one. Gradients are counted as
there all the time, which is so from the second forward pass of an optimizer step on.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from csc_train.errors import check_choice
from csc_train.models import families
from csc_train.models.dims import ModelDims

GIB = 2**30
STAGES = ("off", "0", "1", "2", "3")
OFFLOADS = ("none", "optimizer", "all")
ADAPTERS = ("full", "lora", "qlora")

HEAD_TILE = (4096, 32768)
"""Tokens and vocabulary entries whose logits TRL's fused head holds at once."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a parameter in bitsandbytes NF4: four bits, and a doubly quantized scale for each 64."""
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA's context, kernels and workspaces and NCCL's channels: a convention, not a measurement."""
FRAGMENTATION = 0.04
"""Share of what is allocated that the allocator holds without using it: a convention as well."""
HOST_FACTOR = 1.5
"""What DeepSpeed's estimators allow for buffers of the host on top of the states that it holds."""


@dataclass(frozen=True)
class MemoryScenario:
    """One way to train a model.

    Attributes:
        adapter: one of `ADAPTERS`.
        adapter_parameters: weights of the adapters; 0 under full.
        stage: one of `STAGES`; off is DDP, the rest DeepSpeed.
        offload: one of `OFFLOADS`: what is kept in the host's memory, the optimizer's states or the weights besides.
        nodes: over which the processes are spread evenly.
        tokens: in one forward pass of one process.
        mask_columns: keys that a dense attention mask has for each token, 0 where attention needs no mask.
        bf16: whether the computation is in bf16; else in fp32.
        reduce_bucket: elements of DeepSpeed's bucket for gradients.
        live_parameters: the most elements that stage 3 keeps gathered at a time.
    """

    shape: ModelDims
    adapter: str = "full"
    adapter_parameters: int = 0
    stage: str = "off"
    offload: str = "none"
    processes: int = 1
    nodes: int = 1
    tokens: int = 8192
    checkpointing: bool = True
    mask_columns: int = 0
    bf16: bool = True
    reduce_bucket: int = 500_000_000
    live_parameters: int = 1_000_000_000

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_choice("offload", self.offload, OFFLOADS)
        check_choice("adapter", self.adapter, ADAPTERS)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.shape.parameters if self.adapter == "full" else self.adapter_parameters

    @property
    def frozen_bytes(self) -> float:
        """Bytes of the weights that are only read: in the dtype of the computation, or NF4 for the blocks' linear
        layers under QLoRA."""
        if self.adapter == "full":
            return 0
        parameters, quantized = self.shape.parameters, 0
        if self.adapter == "qlora":
            quantized = self.shape.layers * self.shape.block_linear
        return NF4_BYTES * quantized + self.compute * (parameters - quantized)

    @property
    def compute(self) -> int:
        """Bytes of a number in the dtype of the computation."""
        return 2 if self.bf16 else 4

    @property
    def cast_by_autocast(self) -> bool:
        """Whether trained weights are fp32 and the computation is not."""
        return self.stage == "off" and self.bf16 and self.adapter != "qlora"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a process holds on its GPU at its peak, and a node in its own memory."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    reserve: float
    host: float

    @property
    def allocated(self) -> float:
        """Bytes that tensors take on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communication

    @property
    def total(self) -> float:
        """Bytes of GPU memory."""
        return self.allocated + self.reserve

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations", "communication", "reserve")
        sizes = ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in parts)
        return f"{self.total / GIB:.1f} GiB ({sizes})"


def estimate_memory(setting: MemoryScenario) -> MemoryPlan:
    """The memory of a setting."""
    states = model_states(setting)
    activations = activation_bytes(setting)
    communication = communication_bytes(setting)
    allocated = states.parameters + states.gradients + states.optimizer + activations + communication
    return replace(
        states,
        activations=activations,
        communication=communication,
        reserve=CUDA_CONTEXT_BYTES + FRAGMENTATION * allocated,
    )


def model_states(setting: MemoryScenario) -> MemoryPlan:
    """Parameters, gradients and optimizer states, and nothing else; P parameters are trained on N processes.

    - off (DDP): 4 P of weights, 4 P of gradients, 8 P of moments. With adapters, P are theirs; QLoRA's are in bf16.
    - stage 0: 2 P of weights, 2 P + 4 P of gradients in bf16 and in fp32, 4 P + 8 P of fp32 weights and moments.
    - stage 1: as 0, with the fp32 weights and moments divided by N; gradients are summed whole, in fp32.
    - stage 2: all but the weights divided by N: 2 P + 18 P / N.
    - stage 3: 18 P / N, and 4 bytes for each weight of the largest layer, which is gathered whole with its gradient.
    - offload: what the GPU keeps of it is 2 P under stages 1 and 2 and nothing but the largest layer's weights and
      gradient under 3, with 2 P / N of weights unless those are offloaded too.

    Under stages 2 and 3 these are the figures of DeepSpeed's `estimate_zero{2,3}_model_states_mem_needs`. Frozen
    weights are replicated but under stage 3. The host's bytes are DeepSpeed's estimate where there is one node.
    """
    trained, share, compute = setting.trained, 1 / setting.processes, setting.compute
    largest = setting.shape.embedding
    if setting.stage == "off":
        held = 2 if setting.adapter == "qlora" and setting.bf16 else 4
        return MemoryPlan(held * trained + setting.frozen_bytes, held * trained, 2 * held * trained, 0, 0, 0, 0)
    weights, gradients = float(compute * trained), {"0": 6, "1": 6, "2": 6 * share, "3": 4 * share}
    parameters, optimizer = weights + setting.frozen_bytes, 12 * trained * (1 if setting.stage == "0" else share)
    gradient = gradients[setting.stage] * trained
    if setting.stage == "3":
        kept = 0 if setting.offload == "all" else share
        parameters = (weights + setting.frozen_bytes) * kept + 4 * largest
    host = 0.0
    if setting.offload != "none":
        gradient = optimizer = 0
        local = setting.processes / setting.nodes
        if setting.stage == "3":
            offloaded = (16 if setting.offload == "optimizer" else 18) * trained
            host = HOST_FACTOR * (offloaded + (setting.offload == "all") * setting.frozen_bytes) / setting.nodes
        else:
            host = HOST_FACTOR * trained * max(4 * local, 16 / setting.nodes)
    return MemoryPlan(parameters, gradient, optimizer, 0, 0, 0, host)


def communication_bytes(setting: MemoryScenario) -> float:
    """Buffers in which processes exchange gradients and weights.

    DDP keeps every gradient a second time in its buckets. DeepSpeed has one bucket of `reduce_bucket` elements, and
    under stage 3 the gathered weights, at most `live_parameters` elements, of which the largest layer's are already
    among the parameters (see `model_states`).
    """
    if setting.stage == "off":
        return (2 if setting.adapter == "qlora" else 4) * setting.trained if setting.processes > 1 else 0
    bucket = setting.compute * setting.reduce_bucket
    if setting.stage == "0":
        bucket = min(bucket, setting.compute * setting.trained)
    if setting.stage == "3":
        whole = setting.compute * setting.shape.parameters if setting.adapter == "full" else setting.frozen_bytes
        live = min(whole, setting.compute * setting.live_parameters)
        bucket += max(0, live - 4 * setting.shape.embedding)
    return bucket


def layer_bytes(setting: MemoryScenario) -> float:
    """What one block keeps of one token for its backward pass.

    With h hidden, i intermediate, q query and k key-value entries, c bytes of a number in the computation, r of one in
    the residual stream (4 where autocast casts trained fp32 weights, else c), and n heads:

    - two norms: the input in fp32 and, where the norm is trained, the normalised input: 2 x (4 h + r h).
    - the inputs of q, k, v and of gate, up, if they are trained: 2 c h in one copy each, or 5 c h where every layer
      casts for itself. A LoRA layer casts its input to its own dtype, so each of them keeps a copy: c x (5 h + q + i).
    - attention: queries, keys, values and output, and a logarithm for each head: c x (2 q + 2 k) + 4 n.
    - SwiGLU: gate, its activation, up and their product: 4 c i; 3 c i where a LoRA layer keeps a copy of the last.
    - norms over heads (Qwen3): fp32 copies, and normalised where trained: (4 + c) x (q + k).
    """
    shape, c = setting.shape, setting.compute
    h, i, q, k = shape.hidden, shape.intermediate, shape.queries, shape.keys
    full = setting.adapter == "full"
    casts = setting.cast_by_autocast
    r = residual_bytes(setting)
    norms = 2 * (4 * h + (r * h if full else 0))
    inputs = 2 * c * h
    if casts:
        inputs = c * (5 * h + (0 if full else q + i))
    attention = c * (2 * q + 2 * k) + 4 * shape.heads
    if setting.mask_columns:
        # Keys and values are repeated for every query head, and the mask is kept as numbers to add.
        attention = c * 4 * q + 4 * shape.heads + c * setting.mask_columns
    swiglu = c * (4 if full or not casts else 3) * i
    head_norms = (4 + (c if full else 0)) * shape.head_norms[1]
    return norms + inputs + attention + swiglu + head_norms


def residual_bytes(setting: MemoryScenario) -> int:
    """Bytes of a number in the residual stream: embeddings in fp32 keep it in fp32 under autocast."""
    return 4 if setting.adapter == "full" and setting.cast_by_autocast else setting.compute


def activation_bytes(setting: MemoryScenario) -> float:
    """What a forward and backward pass holds besides the states, at the worst of three moments.

    Throughout: what the blocks keep (all of `layer_bytes`, or with checkpointing one hidden state each), the final
    norm, the embeddings and the mask. On top of it the most of

    - the end of the forward pass: the bf16 copies that autocast caches of all blocks' weights, and a tile of logits.
      TRL's fused head never holds logits of all tokens.
    - the head's backward pass: gradients of the hidden states in fp32 and, where the head is trained, of its weights in
      fp32, cast once more where they are held in bf16; a tile of logits.
    - a block's backward pass: with checkpointing what `layer_bytes` says; gradients of what its MLP computes and of
      the residual stream; where it is trained, the gradient of its largest layer, in bf16 and in fp32.

    Without checkpointing the casts stay until the block's own backward pass.
    """
    shape, c, tokens = setting.shape, setting.compute, setting.tokens
    r = residual_bytes(setting)
    full = setting.adapter == "full"
    layer = layer_bytes(setting) * tokens
    kept = shape.layers * (r * shape.hidden * tokens if setting.checkpointing else layer)
    head_weight_gradient = (4 + (c if setting.stage != "off" else 0)) * shape.embedding if full else 0
    final = (4 + 2 * r) * shape.hidden * tokens
    mask = tokens * setting.mask_columns
    casts = 0.0
    if setting.cast_by_autocast:
        casts = 2.0 * (shape.layers * shape.block_linear if full else setting.trained)
    tile = c * min(tokens, HEAD_TILE[0]) * min(shape.vocabulary, HEAD_TILE[1])
    weight = max(inputs * outputs for inputs, outputs in shape.linears.values())
    passing = (3 * c * shape.intermediate + (2 * r + 8) * shape.hidden) * tokens
    lasting = 0 if setting.checkpointing else casts
    moments = (
        casts + tile,
        lasting + tile + (4 + r) * shape.hidden * tokens + head_weight_gradient,
        lasting
        + passing
        + (layer + casts / shape.layers if setting.checkpointing else 0)
        + ((c + 4) * weight if full else 0)
        + (c * weight if setting.adapter == "qlora" else 0),
    )
    return kept + final + mask + max(moments)


def state_bytes(setting: MemoryScenario) -> float:
    """Bytes on disk of a saved state of training, of all processes together: the weights that are trained in the dtype
    in which they are held, and the optimizer's states."""
    if setting.stage == "off":
        return (6 if setting.adapter == "qlora" and setting.bf16 else 12) * setting.trained
    return (setting.compute + 12) * setting.trained


def alternatives(setting: MemoryScenario) -> list[MemoryScenario]:
    """The stages and offloads that a setting could be run with instead, from the least sharding to the most."""
    choices = [(stage, "none") for stage in STAGES] + [("3", "optimizer"), ("3", "all")]
    return [replace(setting, stage=stage, offload=offload) for stage, offload in choices]


def smallest_fit(
    settings: Iterable[MemoryScenario], memory: float, host_memory: float = math.inf
) -> MemoryScenario | None:
    """The first of `settings` that fits in `memory` bytes of a GPU and `host_memory` of a node; None if none does."""
    for setting in settings:
        planned = estimate_memory(setting)
        if planned.total <= memory and planned.host <= host_memory:
            return setting
    return None


def world_sizes(per_node: int, most: int = 1024) -> list[tuple[int, int]]:
    """(processes, nodes) to try: parts of a node, one node, and ever twice as many nodes."""
    sizes = [(count, 1) for count in range(1, per_node) if per_node % count == 0]
    nodes = 1
    while nodes * per_node <= most:
        sizes.append((nodes * per_node, nodes))
        nodes *= 2
    return sizes


def fitting_world_size(
    setting: MemoryScenario, per_node: int, memory: float, host_memory: float = math.inf
) -> MemoryScenario | None:
    """The setting on the fewest processes (see `world_sizes`) on which it fits, or None."""
    sizes = (replace(setting, processes=processes, nodes=nodes) for processes, nodes in world_sizes(per_node))
    return smallest_fit(sizes, memory, host_memory)


def suggest_fixes(setting: MemoryScenario, rows: int, memory: float, host_memory: float = math.inf) -> list[str]:
    """What would make a setting fit on as many processes, as overrides, the mildest first; empty where nothing does.

    Args:
        rows: `trainer.micro_batch_size`, to which the setting's tokens are proportional.
    """

    def fits(other: MemoryScenario) -> bool:
        return smallest_fit([other], memory, host_memory) is not None

    found = []
    for fewer in (fewer for fewer in range(rows - 1, 0, -1) if rows % fewer == 0):
        if fits(replace(setting, tokens=setting.tokens * fewer // rows)):
            found.append(f"trainer.micro_batch_size={fewer}")
            break
    saving = replace(setting, checkpointing=True)
    override = "" if setting.checkpointing else "trainer.gradient_checkpointing=true"
    if override and fits(saving):
        found.append(override)
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


def advice(setting: MemoryScenario, rows: int, per_node: int, memory: float, host_memory: float = math.inf) -> str:
    """What fits instead of a setting that does not, in one sentence (see `suggest_fixes` and `fitting_world_size`)."""
    found = suggest_fixes(setting, rows, memory, host_memory)
    larger = fitting_world_size(setting, per_node, memory, host_memory)
    if larger and larger.processes > setting.processes:
        found.append(f"{larger.processes} GPUs")
    return f"what fits: {', or '.join(found)}" if found else "nothing tried fits: take shorter packs or an adapter"


def training_flops(setting: MemoryScenario, tokens: float, document: float) -> float:
    """FLOPs of training on `tokens` tokens in documents of `document` tokens (see `families.training_flops`)."""
    adapters = 0 if setting.adapter == "full" else setting.adapter_parameters
    layers, head, pairs = families.training_flops(setting.shape, adapters)
    return tokens * (layers + head + pairs * document)
