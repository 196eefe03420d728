"""A decoder's dimensions, and the parameter counts that follow from them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelDims:
    """The dimensions of a decoder; widths in entries.

    Attributes:
        model_type: the family (see `models.families`).
        queries: width of all query heads; `keys`: of all key heads.
        linears: (inputs, outputs) of the linear layers of one block, by name.
        biases: bias entries of one block's linear layers.
        head_norms: parameters of one block's norms over heads, and the width of what they normalise.
        tied: whether input and output embeddings are one matrix.
        layer_kinds: number of layers of each kind, named as in transformers' `layer_types`.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    linears: dict[str, tuple[int, int]]
    biases: int
    head_norms: tuple[int, int]
    tied: bool
    layer_kinds: dict[str, int]

    @property
    def block_linear(self) -> int:
        """Weights of the linear layers of one block."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def embedding(self) -> int:
        """Weights of one embedding matrix, the largest layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model, each counted once.

        layers x (linear weights + biases + two norms + norms over heads) + final norm + embeddings.
        """
        block = self.block_linear + self.biases + 2 * self.hidden + self.head_norms[0]
        return self.layers * block + self.hidden + self.embedding * (1 if self.tied else 2)


def dense_decoder_dims(
    config: Any, vocab_size: int | None = None, *, qkv_bias: bool = False, head_norms: bool = False
) -> ModelDims:
    """Read the dimensions of a decoder with grouped-query attention and a SwiGLU MLP in each layer.

    Args:
        config: an `ArchitectureConfig` or a transformers configuration.
        vocab_size: the vocabulary's size if the configuration leaves it open.
        qkv_bias: whether q, k and v have biases (Qwen2).
        head_norms: whether each query and key head is normalised (Qwen3).

    Raises:
        ValueError: the vocabulary's size is unknown.
    """
    if not (vocabulary := config.vocab_size or vocab_size):
        raise ValueError("the architecture has no vocab_size: pass the tokenizer's size")
    hidden, intermediate = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return ModelDims(
        model_type=config.model_type,
        hidden=hidden,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        queries=queries,
        keys=keys,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linears={
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_proj": (hidden, intermediate),
            "mlp.up_proj": (hidden, intermediate),
            "mlp.down_proj": (intermediate, hidden),
        },
        biases=queries + 2 * keys if qkv_bias else 0,
        head_norms=(2 * head, queries + keys) if head_norms else (0, 0),
        tied=config.tie_word_embeddings,
        layer_kinds={kind: kinds.count(kind) for kind in kinds},
    )
