"""Choices of the training: each does what it says, packed or not, changes nothing else, and is planned or refused."""

import math
import pickle
import random
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from peft.tuners.lora import LoraLayer
from test_exactness import Case, errors
from transformers import AutoModelForCausalLM
from workers.loss_curve import curve, first_packs, train

from csc_train.checkpoints.export import merged
from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.launching.preflight.checks import check_learning_rate
from csc_train.models.config import AdapterConfig
from csc_train.models.families import adapter_report, count_adapter_parameters, model_dims
from csc_train.models.loading import lora_config, set_magnitudes
from csc_train.packing.collator import PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.embedding_noise import noisy_embeddings
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import TrainerConfig
from csc_train.training.memory import MemoryScenario, estimate_memory

TOLERANCE = 1e-5
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
VARIANTS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and packs for two steps and one pack."""
    folder = tmp_path_factory.mktemp("choices")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))
    rng = random.Random(11)
    examples = [template.encode(random_dialogue(rng)) for _ in range(40)]
    for name, strategy in (("packs", "best_fit"), ("shared", "shared_prefix")):
        packs, _ = pack_dialogues(examples, PackingConfig(strategy, max_length=1000))
        (folder / name).write_bytes(pickle.dumps(first_packs(packs)))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.1, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


# Adapters


def adapted(model, **variant):
    """A model with adapters that are not those of the start."""
    adapter = peft.get_peft_model(model, lora_config(AdapterConfig(**LORA, **variant), model))
    torch.manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.rand_like(parameter) * (1 if "magnitude" in name else 0.3)
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_packed_equals_unpacked_and_merges_into_what_was_trained(name):
    case = Case("qwen2", "sdpa")
    ids = torch.tensor(case.examples[0].input_ids[None], dtype=torch.int64)
    with torch.no_grad():
        plain = adapted(case.model).eval()(ids).logits
    case = Case("qwen2", "sdpa")
    case.model = adapted(case.model, **VARIANTS[name])
    trained = {name: each for name, each in case.model.named_parameters() if each.requires_grad}
    case.gradients = lambda: {name: each.grad.clone() for name, each in trained.items()}
    assert sum(each.numel() for each in trained.values()) == count_adapter_parameters(case.model)
    case.model.train()
    reference = case.separate(case.examples)
    assert max(errors(case.packed(one_row=True), reference)) < TOLERANCE
    with torch.no_grad():
        logits = case.model.eval()(ids).logits
        assert (logits - plain).abs().max() > 0.01 * plain.abs().max()  # another adapter than plain LoRA
        found = merged(case.model, {}, None)(ids).logits
    assert (found - logits).abs().max() < TOLERANCE * logits.abs().max()


def test_rslora_scales_by_the_root_of_the_rank():
    model = Case("qwen2", "sdpa").model
    adapter = peft.get_peft_model(model, lora_config(AdapterConfig(**LORA, use_rslora=True), model))
    scales = {each.scaling["default"] for each in adapter.modules() if isinstance(each, LoraLayer)}
    assert scales == {8 / math.sqrt(4)}


@pytest.mark.slow
def test_the_magnitudes_of_dora_start_right_and_move_in_fp32(folder):
    options = {"micro_batch_size": 4, "precision": "bf16", "learning_rate": 1e-4, "max_steps": 2}
    trainer = train(folder, adapter=AdapterConfig(**LORA, use_dora=True), **options)
    plain = curve(train(folder, adapter=AdapterConfig(**LORA), **options | {"max_steps": 1}))
    # At the start they change nothing; PEFT's, rounded to bf16, change the loss by more than this.
    assert curve(trainer)["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    layers = [each for each in trainer.model.modules() if getattr(each, "lora_magnitude_vector", None)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.base_layer.weight.dtype == torch.bfloat16
        moved = layer.lora_magnitude_vector["default"].weight - layer.base_layer.weight.float().norm(dim=1)
        assert moved.dtype == torch.float32
        assert (moved != 0).all() and moved.abs().max() < 1e-3
    set_magnitudes(trainer.model)  # of weights with their adapters
    norm = layers[0].get_delta_weight("default").float() / 2 + layers[0].base_layer.weight.float()
    assert torch.allclose(layers[0].lora_magnitude_vector["default"].weight, norm.norm(dim=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "adapter.use_dora=true with adapter.kind=full: choose adapter=lora or qlora"),
        ({"use_rslora": True}, "adapter.use_rslora=true with adapter.kind=full: choose adapter=lora or qlora"),
        (
            {"kind": "lora", "use_dora": True, "target_parameters": ["all-experts"]},
            "adapter.use_dora=true with adapter.target_parameters: PEFT has no DoRA for experts: set ",
        ),
    ],
)
def test_adapters_that_do_not_go_together_are_refused_in_one_line(settings, said):
    with pytest.raises(InputError) as caught:
        AdapterConfig(**settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_report_of_adapters_counts_magnitudes():
    dims = model_dims(Case("qwen2", "sdpa").model.config)
    outputs = 2 * sum(outputs for _, outputs in dims.linears["full_attention"].values())
    reports = [adapter_report(AdapterConfig(**LORA, use_dora=dora), dims, True) for dora in (False, True)]
    counts = [int(report.split()[0].replace(",", "")) for report in reports]
    assert counts[1] - counts[0] == outputs
    assert "rank 4 and magnitudes" in reports[1]


# Noise


@pytest.mark.parametrize("name", ["packs", "shared", "padded"])
def test_noise_has_the_scale_of_each_document_and_padding_has_none(folder, name):
    packs = pickle.loads((folder / ("packs" if name == "padded" else name)).read_bytes())
    layout = {"packs": "position_ids", "shared": "varlen", "padded": "padded"}[name]
    rows = [packs[number] for number in range(2)]
    if name == "padded":  # one document a row
        rows = [
            {key: row[key][: row["document_lengths"][0]] for key in ("input_ids", "loss_weights")}
            | {"document_lengths": row["document_lengths"][:1], "prefix_length": 0}
            for row in rows
        ]
    batch = PackCollator(layout, 0, noise=True, length=2048 if name == "shared" else None)(rows)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    embeddings, ids = model.get_input_embeddings(), batch["input_ids"]
    plain = embeddings(ids).detach()
    torch.manual_seed(0)
    with torch.no_grad(), noisy_embeddings(model, 5.0, batch["sequence_lengths"]):
        noise = (embeddings(ids) - plain).flatten(0, 1).abs()
    assert torch.equal(embeddings(ids), plain)  # the hook is gone
    second = sum(rows[0]["document_lengths"]) if name == "shared" else ids.shape[1]
    covered = torch.zeros(len(noise), dtype=torch.bool)
    found = []
    for start, row in zip((0, second), rows, strict=True):
        lengths, prefix = list(map(int, row["document_lengths"])), int(row["prefix_length"])
        tokens = [length + prefix for length in lengths]
        if prefix:
            assert lengths[0] == prefix
            tokens[0] = max(tokens[1:])
        for length, whole in zip(lengths, tokens, strict=True):
            own, bound = noise[start : start + length], 5.0 / math.sqrt(whole * plain.shape[-1])
            assert own.max() <= bound * 1.001
            assert own.mean() == pytest.approx(bound / 2, rel=0.1)  # as it would be alone
            covered[start : start + length] = True
            start, found = start + length, [*found, bound]
    assert noise[~covered].abs().sum() == 0
    assert (~covered).any() == (name != "packs" or len(rows[0]["input_ids"]) != len(rows[1]["input_ids"]))
    assert max(found) > 1.15 * min(found)  # a scale by row would be one for all
    if name != "padded":
        assert min(found) > 1.15 * 5.0 / math.sqrt(len(rows[0]["input_ids"]) * plain.shape[-1])


@pytest.mark.slow
def test_noise_is_there_in_training_only_and_a_resume_draws_the_same(folder):
    options = {"micro_batch_size": 2, "neftune_alpha": 5.0, "packs": "shared", "save_steps": 2, "save_total_limit": 9}
    trainer = train(folder, checkpoints="noisy", **options)
    again = curve(train(folder, checkpoints="again", resume="noisy/checkpoint-4", **options))
    noisy = curve(trainer)
    assert again["first_step"] == 4 and again["digest"] == noisy["digest"]
    plain = train(folder, max_steps=1, packs="shared").state.log_history[0]["loss"]
    assert 1e-4 < abs(noisy["losses"][0] / plain - 1) < 0.05
    assert not trainer.model.get_input_embeddings()._forward_hooks
    batch = next(iter(trainer.get_train_dataloader()))

    def losses() -> set[float]:
        with torch.no_grad():
            return {trainer.compute_loss(trainer.model, dict(batch)).item() for _ in range(2)}

    trainer.model.train()
    assert len(losses()) == 2
    trainer.model.eval()
    assert len(losses()) == 1
    assert "sequence_lengths" in batch and trainer.data_collator.noise


# Offload


@pytest.mark.slow
def test_offloaded_inputs_of_layers_change_no_gradient(monkeypatch, folder):
    saved = []

    class Spy(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool):
            assert pin_memory == torch.cuda.is_available()
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (saved.append(tuple(tensor.shape)), pack(tensor))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Spy)
    options = {"micro_batch_size": 4, "max_steps": 2, "gradient_checkpointing": "full"}
    plain = curve(train(folder, **options))
    assert not saved
    trainer = train(folder, activation_offload=True, **options)
    assert curve(trainer)["digest"] == plain["digest"]
    assert len(saved) == 2 * 2 and {len(shape) for shape in saved} == {3}  # hidden states of two layers, twice
    with pytest.raises(InputError, match=r"trainer.gradient_checkpointing=off: choose full"):
        TrainerConfig(activation_offload=True, gradient_checkpointing="off")


def test_offloaded_inputs_of_layers_are_planned_for_the_host():
    dims = model_dims(compose("preflight", ["model=qwen2_5_7b"]).model.architecture)
    kept = MemoryScenario(dims, tokens=4096, processes=4, nodes=2, bf16=False)
    offloaded = replace(kept, activation_offload=True)
    inputs = 4 * dims.hidden * 4096
    assert estimate_memory(kept).activations - estimate_memory(offloaded).activations == pytest.approx(
        (dims.layers - 1) * inputs
    )
    assert estimate_memory(offloaded).host == 2 * dims.layers * inputs and estimate_memory(kept).host == 0


# Learning rates


@pytest.mark.slow
def test_preflight_says_what_is_published_and_notes_what_is_far_off():
    def said(*overrides: str) -> str:
        config = compose("preflight", list(overrides))
        return check_learning_rate(config, model_dims(config.model.architecture, 1500))

    full = said("experiment=llama3_1_8b_rolecs")
    by_width = 5e-5 * (2000 / 4096) ** 0.781
    assert (
        f"1e-05; published: 1.0e-05 (DianJin-R1, by the group of RoleCS), {by_width:.1e} (Tinker Cookbook for" in full
    )
    assert "note:" not in full and "LoRA" not in full
    lora = said("experiment=llama3_1_8b_lora")
    assert f"1.0e-04 (DianJin-R1, by the group of RoleCS), {10 * by_width:.1e} (" in lora and "Without Regret" in lora
    assert "note: more than 10 times off" in said("experiment=llama3_1_8b_rolecs", "trainer.learning_rate=3e-4")
    assert "note: more than 10 times off" in said("experiment=llama3_1_8b_lora", "trainer.learning_rate=9e-6")
    assert said("experiment=demo").endswith("nothing is published for random weights")
