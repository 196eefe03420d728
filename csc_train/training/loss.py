"""The training loss: the weighted mean of the token losses over the global batch.

loss = sum(weight * nll) / sum(weight), both sums over the trained tokens of all micro batches and processes of an
optimizer step. So neither the micro batch size nor the number of processes changes the gradient. The weights are those
of a registered `loss.weighting` (see `packing.loss_weights`).

Logits are computed for trained tokens only, in chunks. A chunk's gradient is made at once, in the forward pass, so that
no logits are kept or computed again. Nothing here waits for the device.

The routers of a model with experts get an auxiliary loss (see `score_routers`), weighted like the token losses.
"""

import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

CHUNK = 1024
"""Tokens whose logits exist at the same time."""
CHUNK_CPU = 256
"""The same on a CPU, whose caches hold no more."""


class RouterScores(NamedTuple):
    """How the routers of a batch spread its documents over the experts; in float32 or better."""

    losses: torch.Tensor
    """[layers]: sum(weight * balance loss) over the documents, each weighted by its loss weights. Has a gradient."""
    choices: torch.Tensor
    """[layers, experts]: tokens that chose the expert; those of a shared prefix count for each document behind it."""
    weight: torch.Tensor
    """Scalar: the sum of the weights."""


class TokenScores(NamedTuple):
    """The loss of n trained tokens, and what they are measured by; floats are in float32 or better."""

    loss: torch.Tensor
    """Scalar: sum(weight * nll). It alone has a gradient, but for the losses of `router`."""
    log_probs: torch.Tensor
    """Float [n]."""
    entropy: torch.Tensor
    """Float [n]: of the distribution over the vocabulary."""
    is_top1: torch.Tensor
    """Bool [n]: whether the token is the most likely one."""
    router: RouterScores | None = None
    """None unless the batch says which tokens are a document's."""


class _LinearCrossEntropy(torch.autograd.Function):
    """`score_tokens`; the forward pass makes the gradient of its loss."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, dtype, trained):
        exact = torch.promote_types(dtype, torch.float32)
        log_probs, entropy = hidden.new_empty(2, len(targets), dtype=exact)
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        needs_hidden, needs_weight = (trained and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        matrix, token_weights = weight.to(dtype), token_weights.to(exact)
        size = CHUNK if hidden.is_cuda else CHUNK_CPU
        for part in (slice(start, start + size) for start in range(0, len(targets), size)):
            states, scale = hidden[part].to(dtype), token_weights[part, None]
            log_probs[part], entropy[part], is_top1[part], gradient = _score(states, matrix, targets[part])
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ matrix * scale
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient.T, (states * scale).to(dtype))
            del gradient  # before the next one is made
        ctx.gradients, ctx.weight_dtype = (hidden_gradient, weight_gradient), weight.dtype
        ctx.mark_non_differentiable(log_probs, entropy, is_top1)
        return -(token_weights * log_probs).sum(), log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, *_):
        hidden, weight = ctx.gradients
        del ctx.gradients  # they change in place: a second backward pass would be wrong
        hidden = None if hidden is None else hidden.mul_(loss_gradient)
        weight = None if weight is None else weight.mul_(loss_gradient).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None


def _score(states: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies and top-1 hits, and the gradient of each token's loss by its logits.

    At most two float32 matrices of the logits' size exist at the same time.
    """
    logits = states @ matrix.T
    is_top1 = logits.argmax(dim=1) == targets
    scores = logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    del logits
    log_probs = scores.gather(1, targets[:, None])
    probs = scores.exp()
    entropy = -scores.mul_(probs).sum(dim=1)
    del scores
    gradient = probs.scatter_add_(1, targets[:, None], -torch.ones_like(log_probs))
    return log_probs[:, 0], entropy, is_top1, gradient.to(matrix.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, rounded only to the dtype of `total`."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def score_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
) -> TokenScores:
    """The loss of tokens under an output head without bias, in the dtype of autocast or else of the head's weights.

    Softmax and loss are in float32 or better. The loss can be differentiated once, by `hidden` and `weight`.

    Args:
        hidden: float [n, width]; the last hidden state before each token.
        weight: float [vocabulary, width].
        targets: int64 [n]; the tokens.
        token_weights: float [n].
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        scores = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, dtype, torch.is_grad_enabled())
    return TokenScores(*scores)


def score_routers(
    logits: Sequence[torch.Tensor], top_k: int, document_tokens: torch.Tensor, loss_weights: torch.Tensor
) -> RouterScores:
    """The balance losses of routers: for each document alone, so that neither packs, batches nor ranks change them.

    The loss of a document is Switch's (equations 4 to 6 of arXiv 2101.03961), over its prefix and its own tokens:
    experts * sum(choices / tokens * mean probability) over the experts. A balance within each sequence is also
    DeepSeek-V3's (arXiv 2412.19437, equations 17 to 20). One over the global batch would need all tokens of a step
    before the first gradient: a second pass over its micro batches.

    Args:
        logits: of each layer, [tokens, experts].
        top_k: experts that a token uses.
        document_tokens: bool [documents, tokens], as a `PackCollator` makes it.
        loss_weights: float, tokens in all.
    """
    losses, choices = [], []
    with torch.autocast(logits[0].device.type, enabled=False):
        exact = torch.promote_types(logits[0].dtype, torch.float32)
        members = document_tokens.to(exact)
        tokens, weights = members.sum(dim=1, keepdim=True), members @ loss_weights.flatten().to(exact)
        for layer in logits:
            probs = layer.softmax(dim=-1, dtype=exact)
            chosen = torch.zeros_like(probs).scatter_(1, probs.detach().topk(top_k).indices, 1.0)
            counts = members @ chosen
            losses.append(weights @ (counts / tokens * (members @ probs / tokens)).sum(dim=1) * probs.shape[1])
            choices.append(counts.sum(dim=0))
    return RouterScores(torch.stack(losses), torch.stack(choices), weights.sum())


def add_loss_head(model: PreTrainedModel) -> None:
    """Let `model(..., trained_index=, labels=, loss_weights=)`, of a `PackCollator` batch, return `TokenScores`.

    Without `trained_index` the model returns logits as before. Under ZeRO stage 3 the head's weights are gathered.
    Router logits are made with `document_tokens`, and not without, whatever the configuration says.
    """
    usual, has_routers = model.forward, hasattr(model.config, "output_router_logits")

    @functools.wraps(usual)
    def forward(self, *args, trained_index=None, loss_weights=None, document_tokens=None, **inputs):
        if has_routers:
            inputs["output_router_logits"] = document_tokens is not None
        if trained_index is None:
            return usual(*args, **inputs)
        targets, weights = (each.flatten()[trained_index + 1] for each in (inputs.pop("labels"), loss_weights))
        outputs = self.base_model(*args, **inputs)
        hidden, weight = outputs.last_hidden_state.flatten(0, 1), self.get_output_embeddings().weight
        with maybe_gather_lm_head_ctx(weight):
            scores = score_tokens(hidden.index_select(0, trained_index), weight, targets, weights)
        if document_tokens is None:
            return scores
        top_k = self.config.num_experts_per_tok
        return scores._replace(router=score_routers(outputs.router_logits, top_k, document_tokens, loss_weights))

    model.forward = types.MethodType(forward, model)


def sum_weights(batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The sum of the loss weights of batches, summed in float64; float32 scalar on `device`."""
    total: Any = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in batches)
    return total.to(device, torch.float32)
