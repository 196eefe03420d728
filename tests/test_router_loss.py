"""The auxiliary loss of routers: of each document with its prefix, whatever pack, batch or padding it lies in."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from test_gated_delta_net import Wide
from test_varlen_attention import make_packs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from workers.loss_curve import PACKS_PER_STEP, train

from csc_train.models.attention.gated_delta_net import has_delta_nets, prepare_delta_nets
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.models.hub import load_causal_lm
from csc_train.models.layers import checkpoint_activations
from csc_train.packing.collator import PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tracking.history import write_curves
from csc_train.training.config import ValidationConfig
from csc_train.training.loss import add_loss_head, score_routers
from csc_train.training.trainer import ROUTER_SETTINGS

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


@pytest.mark.slow
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


def test_an_empty_pass_has_no_document():
    packs, _ = make_packs(PACKS[:1])
    full, empty = (
        PackCollator("varlen", 0, experts=True)([packs[0] | more])["document_tokens"] for more in ({}, {"empty": True})
    )
    assert (len(full), len(empty)) == (2, 0) and full.shape[1] == empty.shape[1]


def test_the_auxiliary_loss_does_not_wait_for_the_device():
    """On fake tensors whatever needs a value raises."""
    with FakeTensorMode():
        logits = [torch.randn(30, 8, requires_grad=True) for _ in range(2)]
        scores = score_routers(logits, 2, torch.ones(3, 30, dtype=torch.bool), torch.ones(1, 30))
        scores.losses.mean().backward()
    assert logits[0].grad is not None and scores.choices.shape == (2, 8)


# In a training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of 64 experts, and two steps of packs, with a shared prefix and without."""
    folder = tmp_path_factory.mktemp("experts")
    template = DialogueTemplate(small_tokenizer("qwen3"), "qwen3", TemplateConfig(mode="reply_only"))
    rng = random.Random(10)
    examples = [template.encode(random_dialogue(rng)) for _ in range(40)]
    for name, packing in (("shared", "shared_prefix"), ("single", "off")):
        packs, _ = pack_dialogues(examples[: None if name == "shared" else 8], PackingConfig(packing, max_length=600))
        number = 2 * PACKS_PER_STEP
        few = PackedDataset(
            packs.dialogues, packs.pack_items[:number], packs.prefix_lengths[:number], packs.loss_weights
        )
        (folder / name).write_bytes(pickle.dumps(few))
    (folder / "validation").write_bytes(pickle.dumps([random_dialogue(rng) for _ in range(2)]))
    config = tiny_config(
        "qwen3_moe", template.tokenizer, 0.1, num_experts=64, router_aux_loss_coef=0.25, output_router_logits=True
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_auxiliary_loss_of_a_training_is_logged_apart_and_spreads_the_choices(folder, tmp_path, monkeypatch):
    strong = train(folder, 1, packs="shared", router_aux_loss_coef=20.0, gradient_checkpointing="full", epochs=4)
    weights = {name: each.clone() for name, each in strong.model.state_dict().items()}
    without = train(folder, 4, packs="shared", router_aux_loss_coef=0.0, epochs=4)
    first, other = logs(strong), logs(without)
    # Before the first change both see the same, in micro batches of other sizes.
    names = [name for name in first[0] if name.startswith(("loss", "aux_loss", "expert_load", "unused_experts"))]
    assert {"loss", "aux_loss", "aux_loss_by_layer/0", "expert_load/1", "unused_experts", "unused_experts/1"} <= {
        *names
    }
    assert {name: first[0][name] for name in names} == pytest.approx({name: other[0][name] for name in names}, rel=1e-5)
    assert first[0]["aux_loss"] == pytest.approx(
        (first[0]["aux_loss_by_layer/0"] + first[0]["aux_loss_by_layer/1"]) / 2
    )
    for name in ("aux_loss", "expert_load"):
        assert first[-1][name] < 0.9 * other[-1][name]
    assert first[-1]["aux_loss"] > 2 and 0 <= first[-1]["unused_experts"] < 1  # 2 experts a token, evenly
    assert first[0]["grad_norm"] > 1.5 * other[0]["grad_norm"]
    write_curves(tmp_path, first)
    # A coefficient of 0 trains bit by bit what it would train if no router were looked at.
    collate = PackCollator.__call__
    monkeypatch.setattr(PackCollator, "__call__", lambda self, packs: collate(replace(self, experts=False), packs))
    plain = train(folder, 4, packs="shared", router_aux_loss_coef=0.0, epochs=4)
    assert [entry["loss"] for entry in logs(plain)] == [entry["loss"] for entry in other]
    for name, each in plain.model.state_dict().items():
        assert torch.equal(each, without.model.state_dict()[name])
    assert any(not torch.equal(each, weights[name]) for name, each in plain.model.state_dict().items())


@pytest.mark.slow
def test_checkpoints_say_of_routers_what_the_base_said(folder):
    """Also that router logits are an output, as in a checkpoint of TRL; no pass but training's makes any."""
    validation = ValidationConfig(eval_steps=1, num_turns=2, num_samples=2, max_new_tokens=2)
    options = {"packs": "single", "epochs": 1, "validation": validation}
    trainer = train(folder, 2, **options, save_steps=1, checkpoints="saved", router_aux_loss_coef=0.0)
    base = json.loads((folder / "model/config.json").read_text())
    saved = json.loads((folder / "saved/checkpoint-2/config.json").read_text())
    for name in ROUTER_SETTINGS:
        assert saved[name] == base[name] == getattr(trainer.model.config, name)
    assert (saved["output_router_logits"], saved["router_aux_loss_coef"]) == (True, 0.25)
    adapted = train(folder, 2, AdapterConfig("lora"), **options)
    assert (trainer.router_aux_loss_coef, adapted.router_aux_loss_coef) == (0.0, 0.25)
    for each in (trainer, adapted):
        assert sum("eval_strategy_accuracy" in entry for entry in each.state.log_history) == 2
    measured = [entry["eval_loss"] for entry in adapted.state.log_history if "eval_loss" in entry]
    adapted.router_aux_loss_coef = 100.0  # validation has no auxiliary loss
    assert adapted.evaluate()["eval_loss"] == measured[-1]
    model = load_causal_lm(str(folder / "model"))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    output = model(input_ids=torch.arange(4)[None], attention_mask=mask)
    assert output.router_logits is None and model.config.output_router_logits
