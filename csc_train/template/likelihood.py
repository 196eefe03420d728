"""Log-likelihoods of the 12 strategy labels at a supporter turn.

The likelihood of a label is that of its tokens, up to and including `]`, after the header of the supporter turn. These
are the tokens of the bare label, `[情感管理]`. In a reply, a tokenizer can merge the bracket with the text behind it;
the probability of such merged tokens is not counted.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from csc_train.data.strategies import STRATEGIES
from csc_train.models.attention.gated_delta_net import build_levels, level_inputs, prepare_delta_nets
from csc_train.template.dialogue_template import DialogueTemplate


def dialogue_log_likelihoods(
    model: torch.nn.Module,
    template: DialogueTemplate,
    ids: Sequence[int],
    starts: Sequence[int],
    targets: Sequence[int] = (),
    max_width: int = sys.maxsize,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods of the labels at several turns of one dialogue, and of some of its tokens, in one forward pass.

    The 12 labels of each turn are appended to the dialogue. Each sees the dialogue up to its turn, and itself.

    Args:
        ids: those of the dialogue.
        starts: by turn, the number of ids before its label.
        targets: indices into `ids`, ascending from 1, of the tokens to score.
        max_width: maximum tokens of a forward pass, labels left out; more take several, with a key-value cache.

    Returns:
        float32 [targets] and float32 [starts, 12], in nats, on the model's device.

    Raises:
        ValueError: the model's attention does not take a mask for each token (sdpa and eager do).
    """
    _check_attention(model)
    if len(ids) > max_width:
        return _in_pieces(model, template, ids, starts, targets, max_width)
    labels = _labels(template)
    tokens, positions = list(ids), list(range(len(ids)))
    branches, ends = [0] * len(ids), list(range(1, len(ids) + 1))
    # For gated delta nets: the dialogue in pieces that end where labels fork, and the labels.
    cuts = sorted({*starts, len(ids)})
    pieces = [[(range(first, end), number - 1)] for number, (first, end) in enumerate(itertools.pairwise([0, *cuts]))]
    forks = []
    # The place of the logits that predict each wanted token, and the token itself.
    places, wanted = [target - 1 for target in targets], [ids[target] for target in targets]
    for start in starts:
        for label in labels:
            places += [start - 1, *range(len(tokens), len(tokens) + len(label) - 1)]
            wanted += label
            forks.append((range(len(tokens), len(tokens) + len(label) - 1), cuts.index(start)))
            tokens += label[:-1]
            positions += range(start, start + len(label) - 1)
            branches += [branches[-1] + 1] * (len(label) - 1)
            ends += [start] * (len(label) - 1)
    device = next(model.parameters()).device
    branch, end = torch.tensor(branches, device=device), torch.tensor(ends, device=device)
    order = torch.arange(len(tokens), device=device)
    sees = (branch == 0) & (order < end[:, None]) | (branch == branch[:, None]) & (order <= order[:, None])
    logits = model(
        input_ids=torch.tensor([tokens], device=device),
        attention_mask=_mask(model, sees),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        # A list, not a tensor: in a model spread over GPUs, a tensor would be moved to the first GPU, while the hidden
        # states are on the last.
        logits_to_keep=places,
        **_delta_levels(model, [*pieces, forks]),
    ).logits[0]
    likelihoods = _log_likelihoods(logits, torch.tensor(wanted, device=device))
    own, branched = likelihoods[: len(targets)], likelihoods[len(targets) :]
    lengths = [len(label) for label in labels] * len(starts)
    summed = torch.stack([part.sum() for part in branched.split(lengths)]) if lengths else branched
    return own, summed.view(len(starts), len(labels))


def _in_pieces(
    model: torch.nn.Module,
    template: DialogueTemplate,
    ids: Sequence[int],
    starts: Sequence[int],
    targets: Sequence[int],
    max_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dialogue_log_likelihoods` by forward passes that end at the labels and after each `max_width` tokens."""
    device = next(model.parameters()).device
    cache, own, labels = DynamicCache(config=model.config), [], []
    ends = sorted({*starts, *range(max_width, len(ids), max_width), len(ids)})
    for first, end in itertools.pairwise([0, *ends]):
        wanted = [target for target in targets if first < target <= end]
        logits = model(
            input_ids=torch.tensor([ids[first:end]], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=[*(target - 1 - first for target in wanted), end - 1 - first],
        ).logits[0]
        tokens = torch.tensor([ids[target] for target in wanted], dtype=torch.long, device=device)
        own.append(_log_likelihoods(logits[:-1], tokens))
        if end in starts:
            labels.append(log_likelihoods_from_kv_cache(model, template, cache, logits[-1]))
    return torch.cat(own), torch.stack(labels) if labels else own[0].new_empty(0, len(STRATEGIES))


def batch_log_likelihoods(model: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-likelihoods of the tokens of several texts, in one forward pass.

    Padding stands behind a text, where no causal model sees it from the text's own tokens.

    Args:
        batch: ids of each text.

    Returns:
        For each text float32 [ids - 1], in nats: that of each token but the first, behind all tokens before it.
    """
    width, device = max(map(len, batch)), next(model.parameters()).device
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in batch], device=device)
    found = _log_likelihoods(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    return [row[: len(text) - 1] for row, text in zip(found, batch, strict=True)]


def log_likelihoods_from_kv_cache(
    model: torch.nn.Module, template: DialogueTemplate, cache: Cache, logits: torch.Tensor
) -> torch.Tensor:
    """Log-likelihoods of the labels behind a cached prompt; only the labels' own tokens are computed.

    Args:
        cache: the cache of one prompt; it is restored.
        logits: the model's logits behind the prompt, [vocabulary].

    Returns:
        float32 [12], in nats, on the model's device.

    Raises:
        ValueError: as `dialogue_log_likelihoods`.
    """
    _check_attention(model)
    labels, held = _labels(template), cache.get_seq_length()
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    forks = []
    # The place of the logits that predict each wanted token; those of the prompt come first.
    places: list[int] = []
    for number, label in enumerate(labels):
        places += [0, *range(len(tokens) + 1, len(tokens) + len(label))]
        forks.append((range(len(tokens), len(tokens) + len(label) - 1), 0))
        tokens += label[:-1]
        positions += range(held, held + len(label) - 1)
        branches += [number] * (len(label) - 1)
    branch = torch.tensor(branches, device=logits.device)
    own = (branch == branch[:, None]).tril()
    try:
        rest = model(
            input_ids=torch.tensor([tokens], device=logits.device),
            attention_mask=_mask(model, torch.cat([own.new_ones(len(tokens), held), own], dim=1)),
            position_ids=torch.tensor([positions], device=logits.device),
            past_key_values=cache,
            use_cache=True,
            **_delta_levels(model, [forks], initial_states=1),
        ).logits[0]
    finally:
        for layer in cache.layers:
            if isinstance(layer, DynamicLayer):  # the forks leave the states of gated delta nets as they were
                layer.crop(held - layer.get_seq_length())
    wanted = torch.tensor([token for label in labels for token in label], device=logits.device)
    likelihoods = _log_likelihoods(torch.cat([logits[None], rest])[places], wanted)
    return torch.stack([part.sum() for part in likelihoods.split([len(label) for label in labels])])


def _check_attention(model: Any) -> None:
    if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
        raise ValueError(f"attention {attention} does not take a mask for each token; use sdpa or eager")


def _mask(model: torch.nn.Module, sees: torch.Tensor) -> torch.Tensor:
    """An additive mask, for sdpa and eager attention, from bool [tokens, keys]: the keys that each token sees."""
    dtype = next(model.parameters()).dtype
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[
        None, None
    ]


def _delta_levels(
    model: torch.nn.Module, levels: list[list[tuple[range, int]]], initial_states: int = 0
) -> dict[str, Any]:
    """The argument of a model with gated delta nets, from segments as in `build_levels`; none of another model."""
    if not prepare_delta_nets(model):
        return {}
    filled = [[segment for segment in level if len(segment[0])] for level in levels]
    built = build_levels([level for level in filled if level], initial_states)
    return {"delta_levels": level_inputs(built, next(model.parameters()).device)}


def _labels(template: DialogueTemplate) -> list[list[int]]:
    return [template.label_ids[strategy.number] for strategy in STRATEGIES]


def _log_likelihoods(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [...]: the log-likelihood of each token under the logits [..., vocabulary] that predict it."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
