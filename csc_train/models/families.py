"""The table of model families, one row per transformers `model_type`, and the dimensions and FLOPs of a model."""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from csc_train.errors import InputError, check_choice, suggestion
from csc_train.models.config import ALL_EXPERTS, ALL_LINEAR, AdapterConfig, ArchitectureConfig
from csc_train.plugins import check_entry, note_registration

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LINEAR_ATTENTION = "linear_attention"
"""The kind of a gated delta net in transformers' `layer_types`."""
DELTA_CHUNK = 64
"""Tokens that the kernels of a gated delta net multiply at once: transformers' and flash-linear-attention's."""
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_DENSE_LINEARS = (*_ATTENTION_LINEARS, "gate_proj", "up_proj", "down_proj")
_DELTA_LINEARS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")


@dataclass(frozen=True)
class DeltaDims:
    """The dimensions of a gated delta net, whose state is one matrix of keys and values for each value head.

    Attributes:
        key_heads: number of key heads, which is that of query heads; `key_head`: width of one.
        value_heads: number of value heads; `value_head`: width of one.
        kernel: tokens under the causal convolution.
    """

    key_heads: int
    value_heads: int
    key_head: int
    value_head: int
    kernel: int

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.key_heads * self.key_head

    @property
    def values(self) -> int:
        """Width of all value heads."""
        return self.value_heads * self.value_head

    @property
    def channels(self) -> int:
        """Width of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the convolution and of the recurrence in chunks of c tokens, with keys of k and values of v entries.

        For each value head and token: two products of keys (4 c k), two triangular systems (c (k + v)), the chunk's
        own values (2 c v), and three products with the state (6 k v). Token by token it is 6 k v alone.
        """
        c, k, v = DELTA_CHUNK, self.key_head, self.value_head
        return 2 * self.kernel * self.channels + self.value_heads * (c * (5 * k + 3 * v) + 6 * k * v)


@dataclass(frozen=True)
class ExpertDims:
    """The routed experts of a layer: a router, and gated MLPs of which each token uses a few.

    Attributes:
        count: experts of a layer.
        active: experts that a token uses.
        intermediate: width of one.
    """

    count: int
    active: int
    intermediate: int


@dataclass(frozen=True)
class ModelDims:
    """The dimensions of a decoder; widths in entries.

    Attributes:
        model_type: the family.
        queries: width of all query heads; `keys`: of all key heads.
        intermediate: width of the MLP of a token: of its experts together.
        linears: (inputs, outputs) of the linear layers of one decoder layer, by its kind and their names.
        others: parameters of one layer of each kind besides the linear weights and its two norms.
        head_norms: width of what norms over heads normalize in one attention layer; 0 without them.
        tied: whether input and output embeddings are one matrix.
        layer_types: the kind of every layer, named as in transformers.
        delta: of the gated delta nets, if it has any.
        experts: of every layer, if it has any; they and the router are no linear layers.
    """

    model_type: str
    hidden: int
    heads: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    linears: dict[str, dict[str, tuple[int, int]]]
    others: dict[str, int]
    head_norms: int
    tied: bool
    layer_types: tuple[str, ...]
    delta: DeltaDims | None = None
    experts: ExpertDims | None = None

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    @property
    def layer_kinds(self) -> dict[str, int]:
        """Number of layers of each kind."""
        return dict(Counter(self.layer_types))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.queries // self.heads

    def block_linear(self, kind: str) -> int:
        """Weights of the linear layers of one layer of a kind."""
        return sum(inputs * outputs for inputs, outputs in self.linears[kind].values())

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all layers."""
        return sum(map(self.block_linear, self.layer_types))

    @property
    def expert(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.experts.intermediate if self.experts else 0

    @property
    def expert_tensors(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of an expert in the tensors [experts, outputs, inputs] of a layer, by name."""
        if not self.experts:
            return {}
        width = self.experts.intermediate
        gate_up, down = (self.hidden, 2 * width), (width, self.hidden)
        return {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}

    @property
    def routed(self) -> int:
        """Width of the routed experts of a token together."""
        return self.experts.active * self.experts.intermediate if self.experts else 0

    @property
    def router(self) -> int:
        """Weights of one router."""
        return self.hidden * self.experts.count if self.experts else 0

    @property
    def block_experts(self) -> int:
        """Weights of the experts of one layer."""
        return self.experts.count * self.expert if self.experts else 0

    @property
    def embedding(self) -> int:
        """Weights of one embedding matrix, the largest linear layer."""
        return self.vocabulary * self.hidden

    @property
    def largest(self) -> int:
        """Weights of the largest module: an embedding matrix, or the experts of a layer."""
        return max(self.embedding, self.block_experts)

    @property
    def parameters(self) -> int:
        """Parameters of the model, each counted once.

        Linear weights, experts, router, other parameters and two norms of every layer + final norm + embeddings.
        """
        others = sum(self.others[kind] + 2 * self.hidden for kind in self.layer_types)
        experts = self.layers * (self.block_experts + self.router)
        return self.linear + experts + others + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: those of its experts, and all others."""
        idle = self.experts.count - self.experts.active if self.experts else 0
        return self.parameters - self.layers * idle * self.expert


@dataclass(frozen=True)
class LayerKind:
    """FLOPs of a forward pass through one decoder layer besides its linear layers, and its cache when decoding."""

    flops_per_token: Callable[[ModelDims], int]
    flops_per_pair: Callable[[ModelDims], int]
    """For each pair of tokens of a document; of the n² pairs, causal attention computes half."""
    cache: str
    """full: keys and values of every token. window: those of the last tokens only. recurrent: one state."""


@dataclass(frozen=True)
class ModelFamily:
    """The facts about a model family that the project needs."""

    model_type: str
    """The name in transformers and in `model.architecture.model_type`."""
    causal_lm_class: str
    """The class that an export's config.json names under `architectures`; servers choose their code by it."""
    read_dims: Callable[[Any], ModelDims]
    """From a transformers configuration."""
    layer_kinds: Mapping[str, LayerKind]
    """The kinds of layers that a model may have, named as in transformers' `layer_types`."""
    chat_template: str
    """The chat template of a tokenizer without one."""
    tokenizer_style: str
    """Pre-tokenizer and control tokens for a trained tokenizer (see `template.tokenizer_training.TOKENIZER_STYLES`)."""
    lora_targets: tuple[str, ...] = _DENSE_LINEARS
    """Names of the linear layers that `adapter.target_modules=all-linear` adapts; default to those of a dense decoder,
    as do the next two."""
    unquantized_modules: tuple[str, ...] = ("lm_head",)
    """Modules that QLoRA keeps out of 4 bits."""
    packing_layouts: tuple[str, ...] = ("padded", "position_ids", "varlen", "dense_mask")
    """The layouts (see `PackCollator`) in which the documents of a pack stay apart."""
    outer_model_type: str | None = None
    """That of a vision-language configuration whose `text_config` is of this family."""
    not_loaded: str = ""
    """What such a model has besides, for messages."""


class FlopCounts(NamedTuple):
    """FLOPs for each token, for each token that the output head is applied to, and for each pair of tokens."""

    per_token: int
    per_head_token: int
    per_pair: int


def dense_decoder_dims(config: Any, *, qkv_bias: bool = False, head_norms: bool = False) -> ModelDims:
    """Read the dimensions of a decoder with grouped-query attention and a SwiGLU MLP in each layer.

    Args:
        config: a transformers configuration.
        qkv_bias: whether q, k and v have biases (Qwen2).
        head_norms: whether each query and key head is normalized (Qwen3).
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    # Mistral has one window for all layers and names no kinds.
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = tuple(getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers)
    linears = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    others = (queries + 2 * keys) * qkv_bias + 2 * head * head_norms
    return ModelDims(
        model_type=config.model_type,
        hidden=hidden,
        heads=config.num_attention_heads,
        queries=queries,
        keys=keys,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        linears=dict.fromkeys(kinds, linears),
        others=dict.fromkeys(kinds, others),
        head_norms=(queries + keys) * head_norms,
        tied=config.tie_word_embeddings,
        layer_types=kinds,
    )


def hybrid_decoder_dims(config: Any) -> ModelDims:
    """Read the dimensions of a Qwen3.5: gated delta nets, and attention with gated output and norms over heads."""
    dims = dense_decoder_dims(config, head_norms=True)
    delta = DeltaDims(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )
    hidden, attention = dims.hidden, next(iter(dims.linears.values()))
    mlp = {name: shape for name, shape in attention.items() if name.startswith("mlp")}
    linear = {
        "linear_attn.out_proj": (delta.values, hidden),
        "linear_attn.in_proj_qkv": (hidden, delta.channels),
        "linear_attn.in_proj_z": (hidden, delta.values),
        "linear_attn.in_proj_b": (hidden, delta.value_heads),
        "linear_attn.in_proj_a": (hidden, delta.value_heads),
    }
    gated = attention | {"self_attn.q_proj": (hidden, 2 * dims.queries)}
    # The convolution, the decay's two vectors, and the norm of a value head.
    own = delta.kernel * delta.channels + 2 * delta.value_heads + delta.value_head
    return replace(
        dims,
        linears=dict.fromkeys(dims.linears, gated) | {LINEAR_ATTENTION: linear | mlp},
        others=dims.others | {LINEAR_ATTENTION: own},
        delta=delta,
    )


def expert_decoder_dims(
    read_dims: Callable[[Any], ModelDims], config: Any, *, shared_expert: bool = False
) -> ModelDims:
    """Read the dimensions of a decoder whose every layer has routed experts instead of the MLP of `read_dims`.

    Args:
        shared_expert: whether a layer has an expert that every token uses, too; it is one of its linear layers.

    Raises:
        InputError: some layers have no experts.
    """
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise InputError(
            f"{config.model_type}: some layers have no experts (mlp_only_layers, decoder_sparse_step): choose a model "
            "whose every layer has them"
        )
    config = copy.copy(config)
    config.intermediate_size = shared = config.shared_expert_intermediate_size if shared_expert else 0
    dims = read_dims(config)
    experts = ExpertDims(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    linears = {}
    for kind, own in dims.linears.items():
        linears[kind] = {
            name.replace("mlp.", "mlp.shared_expert."): shape
            for name, shape in own.items()
            if shared or not name.startswith("mlp.")
        }
        if shared:
            linears[kind]["mlp.shared_expert_gate"] = (dims.hidden, 1)
    return replace(dims, linears=linears, intermediate=experts.active * experts.intermediate + shared, experts=experts)


_ATTENTION_FLOPS = (lambda dims: 0, lambda dims: 2 * dims.queries)
_FULL = {"full_attention": LayerKind(*_ATTENTION_FLOPS, cache="full")}
_WINDOW = {"sliding_attention": LayerKind(*_ATTENTION_FLOPS, cache="window")}
_DELTA = {LINEAR_ATTENTION: LayerKind(lambda dims: dims.delta.flops_per_token, lambda dims: 0, cache="recurrent")}

MODEL_FAMILIES = {
    family.model_type: family
    for family in (
        ModelFamily(
            model_type="qwen2",  # Qwen2.5
            causal_lm_class="Qwen2ForCausalLM",
            read_dims=functools.partial(dense_decoder_dims, qkv_bias=True),
            layer_kinds=_FULL | _WINDOW,
            chat_template="qwen2_5",
            tokenizer_style="qwen2",
        ),
        ModelFamily(
            model_type="qwen3",
            causal_lm_class="Qwen3ForCausalLM",
            read_dims=functools.partial(dense_decoder_dims, head_norms=True),
            layer_kinds=_FULL | _WINDOW,
            chat_template="qwen3",
            tokenizer_style="qwen2",
        ),
        ModelFamily(
            model_type="llama",  # Llama 3, SmolLM2
            causal_lm_class="LlamaForCausalLM",
            read_dims=dense_decoder_dims,
            layer_kinds=_FULL,
            chat_template="llama3_1",
            tokenizer_style="llama3",
        ),
        ModelFamily(
            model_type="mistral",
            causal_lm_class="MistralForCausalLM",
            read_dims=dense_decoder_dims,
            layer_kinds=_FULL | _WINDOW,
            chat_template="llama3_1",
            tokenizer_style="llama3",
        ),
        ModelFamily(
            model_type="qwen3_5_text",  # Qwen3.5, Qwen3.6, Qwen3.8
            outer_model_type="qwen3_5",
            not_loaded="weights of vision and of multi-token prediction",
            causal_lm_class="Qwen3_5ForCausalLM",
            read_dims=hybrid_decoder_dims,
            layer_kinds=_FULL | _DELTA,
            chat_template="qwen3_5",
            tokenizer_style="qwen3_5",
            lora_targets=(*_DENSE_LINEARS, *_DELTA_LINEARS),
            unquantized_modules=("lm_head", "in_proj_b", "in_proj_a"),  # small gates, that scale the state
        ),
        ModelFamily(
            model_type="qwen3_moe",
            causal_lm_class="Qwen3MoeForCausalLM",
            read_dims=functools.partial(expert_decoder_dims, functools.partial(dense_decoder_dims, head_norms=True)),
            layer_kinds=_FULL | _WINDOW,
            chat_template="qwen3",
            tokenizer_style="qwen2",
            lora_targets=_ATTENTION_LINEARS,
        ),
        ModelFamily(
            model_type="qwen3_5_moe_text",  # Qwen3.5 and Qwen3.6
            outer_model_type="qwen3_5_moe",
            not_loaded="weights of vision and of multi-token prediction",
            causal_lm_class="Qwen3_5MoeForCausalLM",
            read_dims=functools.partial(expert_decoder_dims, hybrid_decoder_dims, shared_expert=True),
            layer_kinds=_FULL | _DELTA,
            chat_template="qwen3_5",
            tokenizer_style="qwen3_5",
            lora_targets=(*_DENSE_LINEARS, *_DELTA_LINEARS),
            unquantized_modules=("lm_head", "in_proj_b", "in_proj_a", "shared_expert_gate"),
        ),
    )
}
"""The known families by `model_type`; `register_family` adds one."""


def register_family(based_on: str | None = None, **fields: Any) -> ModelFamily:
    """Add a model family to the table.

    Args:
        based_on: a known family, whose fields are the defaults.
        fields: those of `ModelFamily`.

    Raises:
        InputError: a field is unknown or missing, or the `model_type` is taken.
    """
    if based_on is not None:
        fields = {**vars(get_family(based_on)), "model_type": None} | fields
    check_entry("model family", ModelFamily, fields)
    family = ModelFamily(**fields)
    if family.model_type in MODEL_FAMILIES:
        taken = ", ".join(MODEL_FAMILIES)
        raise InputError(f"model family: the model_type {family.model_type!r} is taken; taken are {taken}")
    MODEL_FAMILIES[family.model_type] = family
    note_registration("a plugin")  # built-in families are in the table from the start
    return family


def get_family(model_type: str) -> ModelFamily:
    """The family of a `model_type`, or of the text part of a vision-language one.

    Raises:
        InputError: it is not in the table; the message names the nearest one.
    """
    outer = {family.outer_model_type: family for family in MODEL_FAMILIES.values() if family.outer_model_type}
    if (family := MODEL_FAMILIES.get(model_type) or outer.get(model_type)) is None:
        known = ", ".join(MODEL_FAMILIES)
        raise InputError(
            f"model.architecture.model_type={model_type}: choose one of {known}, or add a row by register_family "
            f"(docs/extending.md).{suggestion(model_type, MODEL_FAMILIES)}"
        )
    return family


def build_model_config(
    architecture: ArchitectureConfig, tokenizer: "PreTrainedTokenizerBase | None"
) -> "PretrainedConfig":
    """The transformers configuration of an architecture.

    Args:
        tokenizer: gives the special tokens, and the vocabulary size if the architecture has none.

    Raises:
        InputError: the model family is unknown, or transformers refuses the architecture.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # takes seconds

    facts = {name: value for name, value in asdict(architecture).items() if value is not None}
    facts["model_type"] = get_family(architecture.model_type).model_type
    if tokenizer is not None:
        facts.setdefault("vocab_size", len(tokenizer))
        facts |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    except StrictDataclassError as error:
        raise InputError(f"model.architecture: {' '.join(str(error.__cause__ or error).split())}") from error
    if hasattr(config, "sliding_window"):
        config.sliding_window = None  # an architecture has no windows; the default of Mistral's class has
    return config


def model_dims(config: Any, vocab_size: int | None = None) -> ModelDims:
    """The dimensions of a transformers configuration (see `ModelFamily.read_dims`), or of an `ArchitectureConfig`.

    Args:
        vocab_size: the vocabulary's size if an architecture leaves it open.

    Raises:
        InputError: the model family or a kind of layer is unknown.
        ValueError: the vocabulary's size is unknown.
    """
    family = get_family(config.model_type)
    if isinstance(config, ArchitectureConfig):
        if not (vocabulary := config.vocab_size or vocab_size):
            raise ValueError("the architecture has no vocab_size: pass the tokenizer's size")
        config = build_model_config(replace(config, vocab_size=vocabulary), None)
    dims = family.read_dims(getattr(config, "text_config", None) or config)
    for kind in dims.layer_kinds:
        check_choice(f"{family.model_type} layer_types", kind, family.layer_kinds)
    return dims


def cache_kinds(config: Any) -> set[str]:
    """The `LayerKind.cache` of every layer of a model with this configuration."""
    kinds = get_family(config.model_type).layer_kinds
    return {kinds[kind].cache for kind in model_dims(config).layer_kinds}


def lora_targets(model_type: str, target_modules: Collection[str]) -> str | list[str]:
    """The layers that `AdapterConfig.target_modules` means, for PEFT: layer names, or one regular expression."""
    own = get_family(model_type).lora_targets
    targets = [name for each in target_modules for name in (own if each == ALL_LINEAR else (each,))]
    named = {each: re.fullmatch(r"[\w.]+", each) for each in targets}
    if all(named.values()):
        return targets
    return "|".join(rf"(?:.*\.)?{re.escape(each)}" if named[each] else f"(?:{each})" for each in targets)


def is_lora_target(name: str, targets: str | Collection[str]) -> bool:
    """Whether PEFT adapts the module of this full name under the targets of `lora_targets`."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in targets)


def adapted_experts(dims: ModelDims, target_parameters: Collection[str]) -> dict[str, tuple[int, int]]:
    """Those of `ModelDims.expert_tensors` that `AdapterConfig.target_parameters` means.

    Raises:
        InputError: the model has no tensor of a name; the message names the nearest one.
    """
    known = dims.expert_tensors
    for target in target_parameters:
        if not known or not (target == ALL_EXPERTS or any(is_lora_target(name, [target]) for name in known)):
            names = [name.removeprefix("mlp.") for name in known]
            choices = f"choose {ALL_EXPERTS}, {' or '.join(names)}" if known else "leave it out"
            raise InputError(
                f"adapter.target_parameters={target}: {dims.model_type} has no experts' tensor of this name: {choices}."
                f"{suggestion(target, names)}"
            )
    every = ALL_EXPERTS in target_parameters
    return {name: each for name, each in known.items() if every or is_lora_target(name, target_parameters)}


def lora_parameter_count(
    dims: ModelDims,
    rank: int,
    target_modules: str | Collection[str] = (ALL_LINEAR,),
    target_parameters: Collection[str] = (),
    active: bool = False,
    dora: bool = False,
) -> int:
    """Weights of low-rank adapters: rank x (inputs + outputs) for each linear layer and each expert's tensor.

    DoRA adds the outputs of each linear layer.

    Args:
        target_modules: as in `AdapterConfig`, or as PEFT has them; `target_parameters`: likewise.
        active: whether to count those that one token uses only.
    """
    linears = [shape for _, shape in _adapted_linears(dims, target_modules)]
    widths = sum(map(sum, linears))
    if dims.experts:
        experts = dims.experts.active if active else dims.experts.count
        widths += dims.layers * experts * sum(map(sum, adapted_experts(dims, target_parameters).values()))
    return rank * widths + dora * sum(outputs for _, outputs in linears)


def _adapted_linears(dims: ModelDims, target_modules: str | Collection[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    if not isinstance(target_modules, str):
        target_modules = lora_targets(dims.model_type, target_modules)
    for layer, kind in enumerate(dims.layer_types):
        for name, shape in dims.linears[kind].items():
            if is_lora_target(f"model.layers.{layer}.{name}", target_modules):
                yield name, shape


def adapter_report(adapter: AdapterConfig, dims: ModelDims, bf16: bool) -> str:
    """What low-rank adapters are on and how many weights they have, in words.

    Args:
        bf16: whether the training computes in bf16.

    Raises:
        InputError: as `adapted_experts`.
    """
    tensors = adapted_experts(dims, adapter.target_parameters)
    names = [name.rpartition(".")[2] for name, _ in _adapted_linears(dims, adapter.target_modules)]
    names += [name.removeprefix("mlp.") for name in tensors]
    count = lora_parameter_count(dims, adapter.rank, adapter.target_modules, tensors, dora=adapter.use_dora)
    share = f"{count / dims.parameters:.2%} of the model's {dims.parameters:,}"
    places = ", ".join(dict.fromkeys(names)) or "the output layer"
    dora = " and magnitudes" * adapter.use_dora
    said = [f"{count:,} weights of rank {adapter.rank}{dora}, {share}, on {places}"]
    if dims.experts and not tensors:
        said.append("routed experts have none (see adapter.target_parameters)")
    if dims.experts and adapter.kind == "qlora":
        dtype, size = ("bf16", 2) if bf16 else ("fp32", 4)
        held = size * dims.layers * dims.block_experts / 1024**3
        said.append(f"experts stay in {dtype}, {held:.1f} GiB: only linear layers are held in 4 bits")
    return "; ".join(said)


def count_adapter_parameters(model: Any, active: bool = False) -> int:
    """Weights of a model's low-rank adapters (see `lora_parameter_count`); 0 without PEFT."""
    if (adapters := getattr(model, "peft_config", None)) is None:
        return 0
    targets = adapters["default"].target_modules, tensors_with_adapters(model)
    dora = adapters["default"].use_dora
    return lora_parameter_count(model_dims(model.config), adapters["default"].r, *targets, active, dora)


def tensors_with_adapters(model: Any) -> tuple[str, ...]:
    """Names of the experts' tensors of a model that have adapters."""
    adapters = getattr(model, "peft_config", None)
    return tuple(adapters["default"].target_parameters or ()) if adapters else ()


def forward_flops(model: Any) -> tuple[int, int]:
    """FLOPs of a model's forward pass for each token (output head and adapters included) and each pair of tokens."""
    dims = model_dims(model.config)
    weights, mixing, pairs = _forward_flops(dims)
    return weights + mixing + 2 * (dims.embedding + count_adapter_parameters(model, active=True)), pairs


def training_flops(dims: ModelDims, adapter_parameters: int = 0, experts: Collection[str] = ()) -> FlopCounts:
    """FLOPs of a forward and backward pass; recomputation by activation checkpointing is not counted.

    A backward pass costs one forward pass for the gradients of activations, and another one for those of trained
    weights. Frozen weights have no gradient, but those of experts have one if adapters are added to them. Attention and
    delta nets have no weights but two factors.

    Args:
        adapter_parameters: weights of the adapters that a token uses, which are trained instead of the model; 0 trains
            the whole model. What DoRA computes once a pass, the lengths of rows, is not counted.
        experts: names of the experts' tensors that have adapters.
    """
    weights, mixing, pairs = _forward_flops(dims)
    passes = 2 if adapter_parameters else 3
    own = 6 * adapter_parameters
    if dims.experts:
        behind = sum(inputs * outputs for inputs, outputs in adapted_experts(dims, experts).values())
        own += 2 * dims.layers * dims.experts.active * behind
    return FlopCounts(passes * weights + 3 * mixing + own, passes * 2 * dims.embedding, 3 * pairs)


def _forward_flops(dims: ModelDims) -> tuple[int, int, int]:
    """A forward pass without the head: 2 FLOPs for each weight that a token uses, and what `LayerKind` counts."""
    kinds = [(get_family(dims.model_type).layer_kinds[kind], count) for kind, count in dims.layer_kinds.items()]
    active = dims.experts.active if dims.experts else 0
    return (
        2 * (dims.linear + dims.layers * (active * dims.expert + dims.router)),
        sum(count * kind.flops_per_token(dims) for kind, count in kinds),
        sum(count * kind.flops_per_pair(dims) for kind, count in kinds),
    )
