"""Decisions of a model's routers: record them in one forward pass and replay them in another.

Rounding can turn a decision between two experts whose scores tie, and the token's output with it. Passes that make the
same decisions remain comparable, if each of them was nearly the model's own.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, layer by layer; none without experts."""
    recorded = [getattr(each, "_can_record_outputs", None) or {} for each in model.modules()]
    kinds = tuple(kind["router_logits"].target_class for kind in recorded if "router_logits" in kind)
    return [each for each in model.modules() if isinstance(each, kinds)]


def leave_out_router_logits(model: nn.Module) -> None:
    """Let a model return router logits, and their auxiliary loss, only where a call asks for them.

    What the configuration says of them stays. transformers' loss takes no four-dimensional mask.
    """
    model.register_forward_pre_hook(_without_router_logits, with_kwargs=True)


def _without_router_logits(_: nn.Module, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return arguments, {"output_router_logits": False} | inputs


def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> contextlib.ExitStack:
    """A context in which each module calls a hook behind its forward pass."""
    stack = contextlib.ExitStack()
    for module in modules:
        stack.enter_context(module.register_forward_hook(hook))
    return stack


@contextlib.contextmanager
def recorded_decisions(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the decisions of a forward pass inside this context.

    Yields:
        For each router, int64 [tokens, top_k]: the experts that it chooses for each token.
    """
    decisions: list[Tensor] = []
    with hooked(routers(model), lambda *call: decisions.append(call[-1][2])):
        yield decisions


@contextlib.contextmanager
def replayed_decisions(model: nn.Module, decisions: Sequence[Tensor]) -> Iterator[list[float]]:
    """Let the routers decide as recorded in a forward pass inside this context.

    Yields:
        For each router, by how much the router logit of an expert that was not chosen exceeds that of one that was, at
        most, over the largest logit; 0 where the decisions are the model's own.
    """
    errors: list[float] = []
    left = iter(decisions)

    def replay(router: nn.Module, _, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, own = output
        chosen = next(left).to(own.device)
        probabilities = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)
        if getattr(router, "norm_topk_prob", True):
            probabilities /= probabilities.sum(-1, keepdim=True)
        inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        others = logits.masked_fill(inside, -torch.inf).amax(-1)
        excess = others - logits.masked_fill(~inside, torch.inf).amin(-1)
        errors.append((excess.clamp(min=0).max() / logits.abs().max()).item())
        return logits, probabilities.to(scores.dtype), chosen

    with hooked(routers(model), replay):
        yield errors
