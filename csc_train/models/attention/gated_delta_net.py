"""Gated delta nets over the documents of a row, which may continue each other's state.

A gated delta net keeps one matrix per head, which each token decays and corrects, after a causal convolution of its
inputs. All that a document leaves to the next is that matrix and the last inputs of the convolution. So documents that
share a prefix start from copies of its state, whose gradients autograd sums; others start from zeros.

The documents of a row are computed level by level: each segment of a level continues a segment of an earlier one.
Packs, shared prefixes, trees of labels and the cache of a generation are such levels. On a GPU a level runs by
flash-linear-attention's kernel for segments of different lengths, else by transformers' own torch functions.
Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).

Shape suffixes: T tokens of the row, S segments, H value heads, K and V head dimensions, C channels of the convolution.
"""

import functools
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csc_train.errors import InputError
from csc_train.models.families import DELTA_CHUNK

DELTA_NETS = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
"""The classes of transformers whose layers can run level by level."""

HISTORY = 3
"""Inputs before a token that its convolution, of width 4 in all published models, sees."""

_FEW = 8
"""Segments of at most this many tokens, such as labels, are cheaper token by token than as a chunk."""


class DeltaLevel(NamedTuple):
    """Segments that are computed together, each from the state at the end of an earlier one; see `build_levels`.

    A source row is row 0 for zeros, then `HISTORY` rows for each initial state, then the tokens of the row.

    Attributes:
        token_index: int64 [tokens]; places in the flattened row, segment after segment.
        cu_seqlens: int32 [S + 1]; where each segment begins among them, and where the last one ends.
        parents: int64 [S]; the state that each continues: 0 for zeros, then the initial states, then the ends of all
            segments of earlier levels.
        sources: int64 [tokens + S x HISTORY]; the source rows of each segment's history and tokens.
        own: int64 [tokens]; the places of the tokens among those, less `HISTORY`.
        tails: int64 [S, HISTORY]; the source rows of the last inputs of each segment.
        blocks: for each number of `DELTA_CHUNK`s (none up to `_FEW` tokens), int64 [segments, HISTORY + width],
            `sources` padded on the right by 0.
        order: int64 [S]; the place of each segment in the blocks' order.
        forks: whether a segment continues a state that is not zeros.
        follows: whether each segment continues the initial state of its own number, so that none is copied.
    """

    token_index: Tensor
    cu_seqlens: Tensor
    parents: Tensor
    sources: Tensor
    own: Tensor
    tails: Tensor
    blocks: list[Tensor]
    order: Tensor
    forks: bool
    follows: bool


class DeltaStates(NamedTuple):
    """What n segments leave to those that continue them.

    Attributes:
        recurrent: float32 [n, H, K, V].
        inputs: [n, HISTORY, C]; the last inputs of the convolution.
    """

    recurrent: Tensor
    inputs: Tensor


class DeltaCacheLayer:
    """A layer of a cache of several sequences; the states of any other layer are read and stay as they are."""

    def begin(self) -> DeltaStates | None:
        """The states that the segments of a forward pass continue."""
        raise NotImplementedError

    def end(self, states: DeltaStates) -> None:
        """Take the states at the end of the segments."""
        raise NotImplementedError


def level_inputs(levels: Sequence[DeltaLevel], device: torch.device) -> list[dict[str, Any]]:
    """The argument `delta_levels` of a model on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(each) for each in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return [{name: move(value) for name, value in level._asdict().items()} for level in levels]


def build_levels(levels: Sequence[Sequence[tuple[Sequence[int], int]]], initial_states: int = 0) -> list[DeltaLevel]:
    """The levels of a row.

    Args:
        levels: for each segment of each level, the places of its tokens in the flattened row (at least one), and the
            state that it continues: counted over the initial states first, then over all segments of the earlier
            levels in order; -1 for none.
        initial_states: number of states that `run_levels` gets.
    """
    first = 1 + HISTORY * initial_states
    ends = [list(range(1 + HISTORY * state, 1 + HISTORY * (state + 1))) for state in range(initial_states)]
    built = []
    for level in levels:
        rows, blocks = [], {}
        for number, (tokens, parent) in enumerate(level):
            history = ends[parent] if parent >= 0 else [0] * HISTORY
            rows.append(history + [first + token for token in tokens])
            chunks = 0 if len(tokens) <= _FEW else -(-len(tokens) // DELTA_CHUNK)
            blocks.setdefault(chunks, []).append(number)
        lengths = torch.tensor([len(row) - HISTORY for row in rows])
        sources = torch.tensor([source for row in rows for source in row])
        own = torch.arange(len(sources) - HISTORY * len(rows))
        own += HISTORY * torch.arange(len(rows)).repeat_interleave(lengths)
        tensors = [torch.tensor(row) for row in rows]
        built.append(
            DeltaLevel(
                token_index=sources[own + HISTORY] - first,
                cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
                parents=torch.tensor([parent for _, parent in level]) + 1,
                sources=sources,
                own=own,
                tails=torch.tensor([row[-HISTORY:] for row in rows]),
                blocks=[
                    nn.utils.rnn.pad_sequence([tensors[number] for number in members], batch_first=True)
                    for members in blocks.values()
                ],
                order=torch.tensor([number for members in blocks.values() for number in members]).argsort(),
                forks=any(parent >= 0 for _, parent in level),
                follows=[parent for _, parent in level] == list(range(initial_states)),
            )
        )
        ends += [row[-HISTORY:] for row in rows]
    return built


def build_delta_levels(lengths: Iterable[Sequence[int]], prefixes: Iterable[int]) -> list[DeltaLevel]:
    """The levels of a row that concatenates packs; the arguments are those of `varlen.build_varlen_metadata`.

    Without a shared prefix there is one level. With one there are two: the prefixes and other documents, then the
    documents that continue a prefix. A document may have no tokens.
    """
    levels = [], []
    start = 0
    for pack, prefix in zip(lengths, prefixes, strict=True):
        shared = len(levels[0])
        for number, length in enumerate(pack):
            forks = prefix > 0 and number > 0
            if length:
                levels[forks].append((range(start, start + length), shared if forks else -1))
            start += length
    return build_levels([level for level in levels if level])


def prepare_delta_nets(model: nn.Module, kernel: str | None = None) -> bool:
    """Let the gated delta nets of a model take `delta_levels`, the fields of `DeltaLevel`, as a keyword argument.

    Weights and names stay. Without that argument the layers run as transformers' own, by the kernels that it found.

    Args:
        kernel: torch, also for transformers' own; fla, or auto: fla on a GPU if it is installed. None leaves it as it
            was, at first auto.

    Returns:
        Whether the model has such layers.

    Raises:
        InputError: they see further back than `HISTORY`.
    """
    found = False
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_news)
    for module in list(model.modules()):
        if type(module).__name__ in DELTA_NETS:
            _check_width(module)
            _change_class(module, _leveled(type(module)))
            _change_class(module.conv1d, ShiftedConv)
        if isinstance(module, LeveledDeltaNet):
            found = True
            module.kernel = kernel or module.kernel
            if module.kernel == "torch" or not torch.cuda.is_available():
                _use_torch(sys.modules[type(module).__module__])
    return found


def chosen_kernel(model: nn.Module) -> str | None:
    """The `kernel` that the gated delta nets of a model were prepared with; None without such layers."""
    return next((each.kernel for each in model.modules() if isinstance(each, LeveledDeltaNet)), None)


def has_delta_nets(model: nn.Module) -> bool:
    """Whether a model has layers of `DELTA_NETS`, prepared or not."""
    return any(kind.__name__ in DELTA_NETS for each in model.modules() for kind in type(each).__mro__)


def has_fla() -> bool:
    """Whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None


class ShiftedConv(nn.Conv1d):
    """A causal convolution for each channel by shifted products.

    A layer calls it once, however many segments there are: DeepSpeed gathers the weights of a module at each call, and
    all processes must gather equally often.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """From inputs [n + HISTORY, C], the outputs [n, C] before the activation: row i sees the inputs from i on."""
        size, taps = len(inputs) - HISTORY, self.weight[:, 0].T
        first = HISTORY + 1 - len(taps)
        return sum(inputs[shift : shift + size] * tap for shift, tap in enumerate(taps, first))  # pyright: ignore


class LeveledDeltaNet(nn.Module):
    """The forward pass of a gated delta net level by level; mixed into the classes of transformers."""

    kernel = "auto"

    def forward(self, hidden_states, cache_params=None, attention_mask=None, delta_levels=None, **inputs):
        """As the layer of transformers, over `delta_levels` if there are any: they need no mask for padding."""
        if delta_levels is None:
            return super().forward(hidden_states, cache_params, attention_mask, **inputs)
        levels = [DeltaLevel(**level) for level in delta_levels]
        cache = cache_params.layers[self.layer_idx] if cache_params is not None else None
        keep = isinstance(cache, DeltaCacheLayer)
        output, states = run_levels(self, hidden_states.flatten(0, 1), levels, _cached_states(cache), keep)
        if keep:
            cache.end(states)
        return output.view(hidden_states.shape)


def _cached_states(cache: Any) -> DeltaStates | None:
    """The states that a layer of a cache holds, which may be that of transformers for one sequence."""
    if cache is None or isinstance(cache, DeltaCacheLayer):
        return cache and cache.begin()
    if not cache.has_previous_state[0]:
        return None
    inputs = cache.conv_states[0].transpose(1, 2)[:, -HISTORY:]  # fewer under a narrower convolution
    return DeltaStates(cache.recurrent_states[0], F.pad(inputs, (0, 0, HISTORY - inputs.shape[1], 0)))


def run_levels(
    layer: Any, hidden: Tensor, levels: Sequence[DeltaLevel], initial: DeltaStates | None = None, keep: bool = False
) -> tuple[Tensor, DeltaStates | None]:
    """Run a gated delta net over the levels of a row.

    Args:
        layer: of one of `DELTA_NETS`, after `prepare_delta_nets`.
        hidden: [T, width of the model].
        initial: the states that segments may continue besides those of the row.
        keep: return the states at the end of all segments.

    Returns:
        The outputs [T, width of the model], zeros for tokens that are in no segment; and the states in the order of
        the levels' segments, if they are kept.
    """
    qkv, z = layer.in_proj_qkv(hidden), layer.in_proj_z(hidden)
    beta = layer.in_proj_b(hidden).sigmoid()
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(hidden).float() + layer.dt_bias)
    fused = layer.kernel == "fla" or (layer.kernel == "auto" and hidden.is_cuda and has_fla())
    # The convolution, of all levels at once
    given = [initial.inputs.flatten(0, 1).to(qkv)] if initial else []
    sources = torch.cat([qkv.new_zeros(1, qkv.shape[1]), *given, qkv])
    segments = [[level.sources] if fused else level.blocks for level in levels]
    index = torch.cat([rows.flatten() for level in segments for rows in level])
    activate = sys.modules[type(layer).__module__].ACT2FN[layer.activation]
    mixed = activate(layer.conv1d(F.embedding(F.pad(index, (0, HISTORY)), sources))).to(qkv.dtype)
    parts = iter(mixed.split([rows.numel() for level in segments for rows in level]))
    # The recurrence, level by level
    shape = (layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    states = [decay.new_zeros(1, *shape), *([initial.recurrent] if initial else [])]
    places, outputs = [], []
    for number, level in enumerate(levels):
        if initial and level.follows:
            started = initial.recurrent
        else:
            started = F.embedding(level.parents, torch.cat(states).flatten(1)).view(-1, *shape) if level.forks else None
        options: dict[str, Any] = {"output_final_state": keep or number + 1 < len(levels)}
        if fused:
            place, output, state = _run_fused(layer, next(parts), beta, decay, level, started, options)
        else:
            first = len(sources) - len(qkv) - 1  # of the row's tokens, for which place 0 is in no row
            place, output, state = _run_blocks(layer, parts, first, beta, decay, level, started, options)
        places.append(place)
        outputs.append(output)
        states.append(state)
    row = _cat(outputs)
    row = row.new_zeros(1 + len(hidden), *row.shape[1:]).index_copy(0, _cat(places), row)[1:]
    normed = layer.norm(row.flatten(0, 1), z.reshape(-1, layer.head_v_dim)).view(len(hidden), -1)
    kept = None
    if keep:
        inputs = F.embedding(torch.cat([level.tails for level in levels]), sources)
        kept = DeltaStates(_cat(states[1 + len(given) :]), inputs)
    return layer.out_proj(normed), kept


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _run_blocks(layer, parts, first, beta, decay, level, started, options):
    """Run a level by transformers' torch functions; the padding of a block has no decay and corrects nothing."""
    rules = _torch_rules(type(layer))
    beta, decay = (F.pad(each, (0, 0, 1, 0)) for each in (beta, decay))
    begin = [None] * len(level.blocks)
    if started is not None and len(begin) == 1:
        begin = [started]
    elif started is not None:
        begin = started[level.order.argsort()].split([len(block) for block in level.blocks])
    places, outputs, states = [], [], []
    for block, state in zip(level.blocks, begin, strict=True):
        place = (block[:, HISTORY:] - first).clamp(min=0)
        gates = {"g": F.embedding(place, decay), "beta": F.embedding(place, beta)}
        query, key, value = _heads(layer, next(parts).view(*block.shape, -1)[:, :-HISTORY])
        # Key heads are repeated for the value heads that share them, which not all versions of the rules do.
        query, key = (each.repeat_interleave(value.shape[2] // key.shape[2], dim=2) for each in (query, key))
        rule = rules[place.shape[1] <= _FEW]
        with torch.autocast(value.device.type, enabled=False):  # the rule computes in float32
            output, state = rule(query, key, value, **gates, **options, initial_state=state, **_NORMALIZED)
        places.append(place.flatten())
        outputs.append(output.flatten(0, 1))
        states.append(state)
    if len(begin) == 1:
        return places[0], outputs[0], states[0]
    state = torch.cat(states)[level.order] if options["output_final_state"] else None
    return torch.cat(places), torch.cat(outputs), state


def _run_fused(layer, part, beta, decay, level, started, options):
    """Run a level by flash-linear-attention, whose kernels take segments of different lengths."""
    decoding = not torch.is_grad_enabled() and len(level.token_index) == len(level.parents)
    rule = getattr(
        importlib.import_module("fla.ops.gated_delta_rule"),
        "fused_recurrent_gated_delta_rule" if decoding else "chunk_gated_delta_rule",
    )
    gates = {name: each.index_select(0, level.token_index)[None] for name, each in (("g", decay), ("beta", beta))}
    mixed = part.index_select(0, level.own)[None]
    options = options | {"initial_state": started, "cu_seqlens": level.cu_seqlens}
    output, state = rule(*_heads(layer, mixed), **gates, **options, **_NORMALIZED)
    return level.token_index + 1, output[0], state


_NORMALIZED = {"use_qk_l2norm_in_kernel": True}
_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def _heads(layer: Any, mixed: Tensor) -> list[Tensor]:
    """Query, key and value [S, width, heads, K or V] from the convolution's outputs [S, width, C]."""
    parts = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    sizes = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
    return [part.unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True)]


def _is_news(record: logging.LogRecord) -> bool:
    """Not the advice to install kernels: `delta_kernel` says which there must be, and a CPU has none."""
    return "falling back to its reference" not in record.getMessage()


def _check_width(layer: Any) -> None:
    if layer.conv_kernel_size > HISTORY + 1:
        raise InputError(
            f"linear_conv_kernel_dim={layer.conv_kernel_size}: a gated delta net may convolve at most {HISTORY + 1} "
            "tokens: take another model"
        )


def _change_class(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if hasattr(module, "_old_forward"):  # accelerate, which spreads a model over GPUs, calls it
        module._old_forward = types.MethodType(kind.forward, module)


@functools.cache
def _leveled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Leveled{kind.__name__}", (LeveledDeltaNet, kind), {"__module__": kind.__module__})


@functools.cache
def _torch_rules(kind: type[nn.Module]) -> tuple[Any, Any]:
    """The chunked and the token-by-token rule of transformers in torch, which it would replace by a kernel."""
    module = sys.modules[kind.__module__]
    return tuple(inspect.unwrap(getattr(module, name)) for name in _RULES)


def _use_torch(module: types.ModuleType) -> None:
    """Put transformers' torch functions back in the place of the installed kernels, if there are any."""
    if has_fla() or importlib.util.find_spec("causal_conv1d"):
        for name in (*_RULES, "causal_conv1d_fn", "causal_conv1d_update"):
            setattr(module, name, inspect.unwrap(getattr(module, name)))
