"""Leak check: refuse a model that lets the packed documents of a row attend to each other.

A leak hardly changes the loss but spoils the gradients, so the check runs before the first step.
"""

import copy
import dataclasses
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PretrainedConfig, PreTrainedModel

from csc_train.errors import InputError
from csc_train.models.attention.gated_delta_net import chosen_kernel, has_delta_nets, prepare_delta_nets
from csc_train.models.attention.select import collator_layout
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.models.experts import recorded_decisions, replayed_decisions
from csc_train.packing.collator import SHARED_PREFIX_LAYOUTS, PackCollator

VOCABULARY = 64
WINDOW = 4
"""Tokens in the probe's sliding window: fewer than its documents have."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Allowed difference of the logits, over the largest logit; a leak changes them by far more."""
SMALL = {
    "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
"""Sizes of the probe that no leak depends on."""


def check_no_leaks(
    model: PreTrainedModel, collator: PackCollator, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse a model whose logits on a packed row differ from those on its separate documents.

    A probe of the model's class gets a few documents: packed in one row as in training, and each alone with eager
    attention. This finds ignored masks and keywords, wrong positions, state carried across documents, and a lost
    sliding window. The probe has one layer of each kind, a small vocabulary, and random weights that make attention
    sharp. The model's own weights, which may be sharded, and the random generators are not touched.

    Routers decide for the separate documents as for the row, since rounding can turn a decision. Their own decision may
    be another only if the router logits of the experts in question tie within the same tolerance.

    Args:
        device: of the training.
        dtype: of the computation in training.

    Raises:
        InputError: the logits differ, or the model rejects a packed row.
    """
    if collator.layout == "padded":
        return
    attention = model.config._attn_implementation
    refusal = f"{type(model).__name__} with {attention} attention cannot be trained on packs"
    if attention == VARLEN_ATTENTION and getattr(model.config, "attention_dropout", 0):
        raise InputError(f"{refusal}: it has no dropout, but the model has attention_dropout; use packing=off")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        probe = _probe(model, device)
        pack, documents = _documents(5 if collator.layout in SHARED_PREFIX_LAYOUTS else 0)
        batch: Any = send_to_device(dataclasses.replace(collator, pad_id=0)([pack]), device)
        del batch["labels"], batch["loss_weights"]
        try:
            with (
                torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
                recorded_decisions(probe) as decisions,
            ):
                row = probe(**batch, use_cache=False).logits.float()
        except (TypeError, ValueError) as error:
            raise InputError(f"{refusal}: {str(error).splitlines()[0]}; use packing=off") from error
        probe.set_attn_implementation("eager")
        alone, ties = [], [0.0]
        for places, own in documents:
            with replayed_decisions(probe, [each[places] for each in decisions]) as errors:
                alone.append(probe(input_ids=batch["input_ids"][:, places], use_cache=False).logits[0, -own:])
            ties += errors
        expected = torch.cat(alone)
    changed = (row[0, : len(expected)] - expected).abs().max() / expected.abs().max()
    difference = torch.tensor([changed, *ties]).max().item()  # NaN if one of them is
    if not difference <= TOLERANCE[dtype]:
        raise InputError(
            f"{refusal}: logits differ from those of separate documents by {difference:.1%}: documents leak into each "
            "other, or miss part of their context; use packing=off"
        )


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not the last hidden states times a matrix, as `training.loss` takes them to be.

    Raises:
        InputError: they are scaled or capped, or have a bias.
    """
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        probe = _probe(model, torch.device("cpu"))
        probe.set_attn_implementation("eager")
        ids = torch.randint(VOCABULARY, (1, 8))
        logits = probe(input_ids=ids, use_cache=False).logits
        head: Any = probe.get_output_embeddings()
        expected = probe.base_model(input_ids=ids, use_cache=False).last_hidden_state @ head.weight.T
    if head.bias is not None or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"{type(model).__name__} cannot be trained: its logits have a bias, a scale or a cap: take a model of a "
            "known family"
        )


def checked_collator(
    model: PreTrainedModel, packing: str, pad_id: int, device: torch.device, dtype: torch.dtype
) -> PackCollator:
    """The collator of a model's batches, after `check_no_leaks` and `check_head`.

    Args:
        model: with its attention implementation; no weights are needed.
        packing: a `PackingConfig.strategy`.

    Raises:
        InputError: as `collator_layout`, `check_no_leaks` and `check_head`.
    """
    attention = model.config._attn_implementation
    layout = collator_layout(attention, packing, model.config.model_type)
    collator = PackCollator(layout, pad_id, attention == "eager", delta_levels=has_delta_nets(model))
    check_no_leaks(model, collator, device, dtype)
    check_head(model)
    return collator


def forbid_kv_cache(model: PreTrainedModel) -> None:
    """Raise a ValueError in a training step with a KV cache or a two-dimensional mask on packed rows.

    transformers tells packed documents apart by their position ids, which other rows do not have; with a cache or such
    a mask it silently does not.
    """

    def refuse(decoder: Any, _, inputs: dict[str, Any]) -> None:
        if not decoder.training or inputs.get("position_ids") is None:
            return
        use_cache, mask = inputs.get("use_cache"), inputs.get("attention_mask")
        if decoder.config.use_cache if use_cache is None else use_cache:
            raise ValueError("a packed row with use_cache=True: documents would leak into each other")
        if mask is not None and mask.ndim != 4:
            raise ValueError(f"a packed row with a mask of {mask.ndim} dimensions: documents would leak")

    # The decoder: every wrapper and TRL's own forward call it.
    model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)


def dropout_warning(config: PretrainedConfig, adapter: AdapterConfig, packing: str) -> str | None:
    """A warning if dropout makes a shared prefix differ from separate ones, else None."""
    found = {"the model's attention_dropout": getattr(config, "attention_dropout", 0) or 0}
    if adapter.kind == "lora":
        found["adapter.dropout"] = adapter.dropout
    named = [f"{name}={value}" for name, value in found.items() if value > 0]
    if packing != "shared_prefix" or not named:
        return None
    return (
        f"{' and '.join(named)}: the dialogues of a pack share the dropout of their prefix, so training differs "
        "slightly from separate dialogues; packing=best_fit gives each its own prefix"
    )


def _probe(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    facts = SMALL | {"vocab_size": VOCABULARY, "num_hidden_layers": 1}
    facts |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if kinds := vars(config).get("layer_types"):
        facts["layer_types"] = list(dict.fromkeys(kinds))
        facts["num_hidden_layers"] = len(facts["layer_types"])
    if getattr(config, "sliding_window", None):
        facts["sliding_window"] = WINDOW
    for name, value in facts.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.device(device):
        probe = type(model)(config).eval()
    for name, weights in probe.named_parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=weights.shape[-1] ** -0.5)
        elif name.endswith("A_log"):
            torch.nn.init.constant_(weights, -3)  # a gated delta net that remembers a document's start at its end
    prepare_delta_nets(probe, chosen_kernel(model))
    return probe


def _documents(prefix: int) -> tuple[dict[str, Any], list[tuple[torch.Tensor, int]]]:
    """A pack, and for each of its documents the places of its tokens and of its prefix, and the number of its own ones.

    Own tokens are at the end.
    """
    lengths = ([prefix] if prefix else []) + [7, 9]
    pack = {
        "input_ids": torch.randint(VOCABULARY, (sum(lengths),)),
        "loss_weights": [weight for length in lengths for weight in [0.0] + [1.0] * (length - 1)],
        "document_lengths": lengths,
        "prefix_length": prefix,
    }
    places = torch.arange(sum(lengths)).split(lengths)
    shared = places[0][:prefix]
    own = [(torch.cat([shared, each]) if prefix and number else each, len(each)) for number, each in enumerate(places)]
    return pack, own
