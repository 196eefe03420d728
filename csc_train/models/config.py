"""Settings of the base model and of its adapter."""

import re
from dataclasses import dataclass, field

from csc_train.errors import InputError, check_fields

ALL_LINEAR = "all-linear"
"""The value of `adapter.target_modules` that adapts the linear layers of the model family."""
ALL_EXPERTS = "all-experts"
"""The value of `adapter.target_parameters` that adapts all tensors of routed experts."""
TRAINED_TOKENIZER = "train"
"""The value of `model.tokenizer` that trains a tokenizer on the training dialogues."""

MERGE_INTO = ("base", "dequantized")
DELTA_KERNELS = ("auto", "torch")
ATTENTIONS = ("auto", "varlen", "varlen_fa3", "sdpa", "eager")


@dataclass
class ArchitectureConfig:
    """A decoder's dimensions: to build it from random weights, and to plan memory without its weights.

    Each field is named as in the transformers configuration.
    """

    model_type: str = "qwen2"
    """The model family (see `csc_train.models.families`): qwen2, qwen3, llama, mistral, qwen3_5_text, qwen3_moe,
    qwen3_5_moe_text or a registered one."""
    hidden_size: int = 256
    """Width of the hidden states."""
    intermediate_size: int = 768
    """Width of the MLP."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key-value heads."""
    head_dim: int | None = None
    """Width of a head; defaults to hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Rows of the embedding; defaults to the tokenizer's size."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input and output embeddings."""
    max_position_embeddings: int = 4096
    """The longest sequence in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the variance in RMSNorm."""
    rope_parameters: dict[str, int | float | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    """Rotary position embedding: type, base and scaling."""

    layer_types: list[str] | None = None
    """The kind of every layer, full_attention or linear_attention; defaults to the family's."""
    linear_num_key_heads: int | None = None
    """Key heads of a gated delta net (qwen3_5_text); this and what follows default to those of the family."""
    linear_num_value_heads: int | None = None
    """Value heads of a gated delta net: a multiple of its key heads."""
    linear_key_head_dim: int | None = None
    """Width of a key head of a gated delta net."""
    linear_value_head_dim: int | None = None
    """Width of a value head of a gated delta net."""
    linear_conv_kernel_dim: int | None = None
    """Tokens under the causal convolution of a gated delta net."""

    num_experts: int | None = None
    """Experts of a layer (qwen3_moe, qwen3_5_moe_text); this and what follows default to those of the family."""
    num_experts_per_tok: int | None = None
    """Experts that a token uses."""
    moe_intermediate_size: int | None = None
    """Width of an expert."""
    shared_expert_intermediate_size: int | None = None
    """Width of the expert that every token uses beside them (qwen3_5_moe_text)."""
    norm_topk_prob: bool | None = None
    """Let the weights of a token's experts add up to 1 (qwen3_moe)."""

    def __post_init__(self):
        prefix = "model.architecture."
        check_fields(prefix, self, "hidden_size", "intermediate_size", "num_hidden_layers", low=1, high=10**7)
        check_fields(prefix, self, "num_attention_heads", "num_key_value_heads", "head_dim", low=1, high=10**7)
        check_fields(prefix, self, "vocab_size", "max_position_embeddings", low=1, high=10**7)
        check_fields(prefix, self, "linear_num_key_heads", "linear_num_value_heads", low=1, high=10**7)
        check_fields(prefix, self, "linear_key_head_dim", "linear_value_head_dim", low=1, high=10**7)
        check_fields(prefix, self, "linear_conv_kernel_dim", low=1, high=4)
        check_fields(prefix, self, "num_experts", "num_experts_per_tok", low=1, high=10**5)
        check_fields(prefix, self, "moe_intermediate_size", "shared_expert_intermediate_size", low=1, high=10**7)
        if self.num_experts and self.num_experts < (self.num_experts_per_tok or 1):
            chosen = f"num_experts_per_tok={self.num_experts_per_tok}"
            raise InputError(f"{prefix}{chosen}: there are {self.num_experts} experts: choose no more")
        check_fields(prefix, self, "layer_types", choices=("full_attention", "linear_attention"))
        check_fields(prefix, self, "rms_norm_eps", low=0, high=1)
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"{prefix}layer_types names {len(self.layer_types)} layers, but {prefix}num_hidden_layers="
                f"{self.num_hidden_layers}: name each"
            )


@dataclass
class ModelConfig:
    """The model to start from."""

    name: str = "demo_qwen2"
    """A label for tables and error messages."""
    path: str | None = None
    """A local directory or hub id; not needed with init=random and tokenizer=train."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    init: str = "pretrained"
    """pretrained: the weights at `path`. random: seeded random weights of `architecture`."""
    tokenizer: str | None = None
    """A local directory or hub id; defaults to `path`. train: train a byte-level BPE on the training dialogues."""
    tokenizer_vocab_size: int = 1500
    """Tokens of the trained tokenizer."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, or that of the model family if it has none. Else the name of one of the package
    (qwen2_5, qwen3, qwen3_5, llama3_1), or the path of a .jinja file."""
    attn_implementation: str = "auto"
    """auto: varlen with packs, where this machine can run it, else sdpa. varlen: document by document, by the
    variable-length flash-attention that torch carries. varlen_fa3: the same by FlashAttention-3, if it is installed.
    sdpa, eager: those of transformers, with a mask for every pair of tokens."""
    delta_kernel: str = "auto"
    """Of gated delta nets (Qwen3.5) on a GPU. auto: flash-linear-attention, which must be installed. torch: functions
    of torch, which are much slower. A CPU has these only."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)

    def __post_init__(self):
        check_fields("model.", self, "init", choices=("pretrained", "random"))
        check_fields("model.", self, "attn_implementation", choices=ATTENTIONS)
        check_fields("model.", self, "delta_kernel", choices=DELTA_KERNELS)
        check_fields("model.", self, "tokenizer_vocab_size", low=300, high=10**7)
        if self.init == "pretrained" and not self.path:
            raise InputError("model.path is not set: give a local directory or a hub id, or model.init=random")
        if self.init == "pretrained" and self.tokenizer == TRAINED_TOKENIZER:
            raise InputError(
                "model.tokenizer=train with model.init=pretrained: the weights know other ids: add "
                "model.tokenizer=null, to take the tokenizer of model.path"
            )
        if not (self.tokenizer or self.path):
            raise InputError("model.tokenizer is not set: give a local directory, a hub id, or train")


@dataclass
class AdapterConfig:
    """Which weights are trained."""

    kind: str = "full"
    """full: all weights. lora: low-rank adapters, merged into the final model. qlora: low-rank adapters over 4-bit
    weights (NF4, double quantization), merged as `merge_into` says."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """Scale of the adapters: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that adapters of a high rank learn as fast as those of a low one. Source:
    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023)."""
    use_dora: bool = False
    """Train the length of each row of a weight matrix, in fp32, beside its direction, which the low-rank adapter
    changes. Slower than LoRA. Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024)."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    merge_into: str = "base"
    """The weights that a QLoRA adapter is merged into. base: those before quantization, which the adapter has never
    seen. dequantized: those that it was trained on."""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """all-linear: the linear layers that the model family names. Or names of layers, such as q_proj, and regular
    expressions on full names, such as `.*[02468]\\.self_attn\\.[qv]_proj`: one, or a list in brackets."""
    target_parameters: list[str] = field(default_factory=list)
    """Tensors of routed experts that are adapted besides, each expert by matrices of its own: all-experts, or a list of
    names such as experts.down_proj."""

    def __post_init__(self):
        check_fields("adapter.", self, "kind", choices=("full", "lora", "qlora"))
        check_fields("adapter.", self, "merge_into", choices=MERGE_INTO)
        check_fields("adapter.", self, "rank", "alpha", low=1, high=10**6)
        check_fields("adapter.", self, "dropout", low=0, high=1)
        for variant in ("use_rslora", "use_dora"):
            if getattr(self, variant) and self.kind == "full":
                raise InputError(f"adapter.{variant}=true with adapter.kind=full: choose adapter=lora or qlora")
        if self.use_dora and self.target_parameters:
            raise InputError(
                "adapter.use_dora=true with adapter.target_parameters: PEFT has no DoRA for experts: set "
                "adapter.use_dora=false, or adapter.target_parameters=[]"
            )
        for pattern in self.target_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"adapter.target_modules={pattern}: no regular expression: {error}") from error
        if not (self.target_modules or self.target_parameters):
            raise InputError(f"adapter.target_modules=[]: nothing would be adapted: name layers, or {ALL_LINEAR}")
        if self.target_parameters and self.dropout:
            raise InputError(
                f"adapter.dropout={self.dropout}: adapters of experts have none, as they are added to the weights: set "
                "adapter.dropout=0"
            )
