"""The auxiliary loss of routers: of each document with its prefix, whatever pack, batch or padding it lies in."""

import peft
import pytest
import torch
from test_gated_delta_net import Wide
from test_varlen_attention import make_packs
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from csc_train.models.attention.gated_delta_net import has_delta_nets, prepare_delta_nets
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.layers import checkpoint_activations
from csc_train.packing.collator import PackCollator
from csc_train.training.loss import add_loss_head

COEFFICIENT = 5.0
"""Large, so that the auxiliary loss is as large as that of the tokens."""
PACKS = [(11, (7, 66)), (4, (9, 2, 6)), (17, (8,)), (0, (5, 12))]
MODULES = {"qwen3_moe": modeling_qwen3_moe, "qwen3_5_moe_text": modeling_qwen3_5_moe}
FAMILIES = list(MODULES)
LAYOUTS = {  # by layout: attention, and packs of documents (prefix length, body lengths)
    "varlen": (VARLEN_ATTENTION, PACKS),
    "dense_mask": ("eager", PACKS),
    "position_ids": ("sdpa", [(0, bodies) for _, bodies in PACKS]),
    "padded": ("sdpa", [(0, (length,)) for _, bodies in PACKS for length in bodies]),
}


@pytest.fixture
def wide(monkeypatch):
    """Let every float32 inside the models, and inside transformers' auxiliary loss, be a float64."""
    for module in MODULES.values():
        monkeypatch.setattr(module, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def make_model(architecture: str, attention: str = VARLEN_ATTENTION, dtype: torch.dtype = torch.float64):
    hybrid = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    config = AutoConfig.for_model(
        architecture,
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        initializer_range=0.2,
        **hybrid if architecture == "qwen3_5_moe_text" else {},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.set_experts_implementation("eager")  # grouped products know no float64
    if has_delta_nets(model):
        prepare_delta_nets(model)
    return model


def separate_losses(model, documents) -> list[torch.Tensor]:
    """Loss and gradients of documents one by one, their auxiliary loss by transformers: layer by layer."""
    attention, config = model.config._attn_implementation, model.config
    balance = MODULES[config.model_type].load_balancing_loss_func
    model.set_attn_implementation("eager")
    model.zero_grad()
    total = torch.zeros(())
    for ids, weights in documents:
        row, weight = torch.tensor([ids]), torch.tensor(weights[1:])
        output = model.base_model(input_ids=row, use_cache=False, output_router_logits=True)
        logits = model.get_output_embeddings()(output.last_hidden_state)[0, :-1]
        losses = [balance((each,), config.num_experts, config.num_experts_per_tok) for each in output.router_logits]
        total = total + (cross_entropy(logits, row[0, 1:], reduction="none") * weight).sum()
        total = total + COEFFICIENT * weight.sum() * sum(losses) / len(losses)
    total.backward()
    model.set_attn_implementation(attention)
    return [total.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def packed_losses(model, packs, layout: str, batch_size: int | None = None, change=None, **fields):
    """The same of packs in batches of so many."""
    model.zero_grad()
    collate = PackCollator(
        layout, 0, layout == "dense_mask", delta_levels=has_delta_nets(model), experts=True, **fields
    )
    total = 0
    for start in range(0, len(packs), batch_size or len(packs)):
        batch = collate(packs[start : start + (batch_size or len(packs))])
        if change:
            change(batch)
        scores = model(**batch, use_cache=False)
        loss = scores.loss + COEFFICIENT * scores.router.losses.mean()
        loss.backward()
        total += loss.detach()
    return [total, *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of the loss and of the gradient that differs most, over the largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_loss_and_gradients_are_those_of_separate_documents(wide, architecture, layout):
    attention, shape = LAYOUTS[layout]
    packs, documents = make_packs(shape)
    model = make_model(architecture, attention)
    expected = separate_losses(model, documents)
    add_loss_head(model)
    assert len(expected) == 1 + len(list(model.parameters()))
    for size in (1, None):
        assert difference(packed_losses(model, packs, layout, size), expected) < 1e-9
    if layout == "varlen":
        assert difference(packed_losses(model, packs, layout, length=180), expected) < 1e-9
        for mode in ("selective", "full"):
            checkpoint_activations(model.train(), mode)
            assert difference(packed_losses(model, packs, layout), expected) < 1e-9


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_float32_agrees_to_its_own_rounding(adapted):
    packs, documents = make_packs(PACKS)
    model = whole = make_model("qwen3_moe", dtype=torch.float32)
    if adapted:
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        whole = peft.get_peft_model(model, options)
    expected = separate_losses(model, documents)
    add_loss_head(model)
    assert difference(packed_losses(whole, packs, "varlen"), expected) < 1e-5


def count_padding(batch: dict) -> None:
    batch["document_tokens"] |= ~batch["document_tokens"].any(dim=0)


def count_prefixes_once(batch: dict) -> None:
    members = batch["document_tokens"]
    batch["document_tokens"] = members & (members.cumsum(dim=0) == 1)


def count_another_document(batch: dict) -> None:
    batch["document_tokens"][0] |= batch["document_tokens"][1]


def mix(batch: dict) -> None:
    """The loss of all tokens of a batch, as transformers has it."""
    batch["document_tokens"] = batch["document_tokens"].any(dim=0, keepdim=True)


@pytest.mark.parametrize("change", [count_padding, count_prefixes_once, count_another_document, mix])
def test_what_would_count_other_tokens_is_no_rounding_error(wide, change):
    packs, documents = make_packs(PACKS)
    model = make_model("qwen3_moe")
    expected = separate_losses(model, documents)
    add_loss_head(model)
    losses = packed_losses(model, packs, "varlen", length=180, change=change)
    assert abs(losses[0] / expected[0] - 1) > 1e-4
    assert difference(losses, expected) > 1e-2
