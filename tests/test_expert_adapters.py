"""LoRA on the fused tensors of experts: exact beside a product by hand, on any number of processes, and when merged."""

import json
import pickle
import random
from pathlib import Path

import peft
import pytest
import torch
from conftest import manifest_of, random_dialogue, small_tokenizer, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workers.loss_curve import curve, first_packs, train, train_all

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import export
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import write_manifest
from csc_train.models.config import AdapterConfig
from csc_train.models.layers import checkpoint_activations
from csc_train.models.loading import lora_config
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

FAMILIES = {"qwen3_moe": "qwen3", "qwen3_5_moe_text": "qwen3_5"}
TENSORS = {"down_proj": "", "gate_up_proj": ".base_layer"}
"""The tensors of experts, and what PEFT adds to the name of the adapter on each."""
ADAPTER = {"kind": "lora", "rank": 4, "alpha": 8, "target_parameters": ["all-experts"]}
EXPERTS, RANK, SCALE = 8, 4, 2
IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))


def tiny(model_type: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = tiny_config(model_type, small_tokenizer(FAMILIES[model_type]), 0.1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def matrices(adapted, layer: int, tensor: str) -> list[torch.nn.Parameter]:
    """A and B of the adapter on a tensor: [experts x rank, inputs] and [outputs, rank x experts]."""
    module = f"base_model.model.model.layers.{layer}.mlp.experts{TENSORS[tensor]}"
    return [adapted.get_parameter(f"{module}.lora_{part}.default.weight") for part in "AB"]


def of_experts(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B expert by expert: [experts, rank, inputs] and [experts, outputs, rank]."""
    return a.view(EXPERTS, RANK, -1), b.view(b.shape[0], RANK, EXPERTS).permute(2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"), [("eager", torch.float64, 1e-9), ("grouped_mm", torch.float32, 1e-5)]
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_of_experts_is_a_product_of_two_matrices_for_each(model_type, implementation, dtype, tolerance):
    base, model = tiny(model_type, dtype), tiny(model_type, dtype)
    for each in (base, model):
        each.set_experts_implementation(implementation)
    adapted = peft.get_peft_model(model, lora_config(AdapterConfig(**ADAPTER), model), autocast_adapter_dtype=False)
    assert torch.equal(adapted(IDS).logits, base(IDS).logits)  # to begin with
    generator = torch.Generator().manual_seed(1)
    for name, each in adapted.named_parameters():
        if "experts" in name and "lora_B" in name:
            each.data = torch.randn(each.shape, generator=generator, dtype=dtype) / 10
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()

    # By hand: the products are added to the weights of a plain model, whose gradients are those of both factors.
    wrong = []
    for layer in (0, 1):
        for tensor in TENSORS:
            a, b = of_experts(*(each.detach() for each in matrices(adapted, layer, tensor)))
            weights = base.get_parameter(f"model.layers.{layer}.mlp.experts.{tensor}")
            wrong.append(weights + SCALE * b.flip(0) @ a)
            weights.data += SCALE * b @ a
    by_hand = base(IDS, labels=IDS).loss
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), abs=tolerance)
    for layer in (0, 1):
        for tensor in TENSORS:
            a, b = matrices(adapted, layer, tensor)
            gradient = base.get_parameter(f"model.layers.{layer}.mlp.experts.{tensor}").grad
            (mine_a, mine_b), (each_a, each_b) = of_experts(a.grad, b.grad), of_experts(a.detach(), b.detach())
            assert (mine_a - SCALE * each_b.mT @ gradient).abs().max() < tolerance
            assert (mine_b - SCALE * gradient @ each_a.mT).abs().max() < tolerance
            assert (mine_b - gradient @ each_a.mT).abs().max() > 20 * tolerance  # without the scale

    # Recomputed layers
    found = [each.grad.clone() for each in adapted.parameters() if each.requires_grad]
    adapted.enable_input_require_grads()
    for mode in ("full", "selective"):
        adapted.zero_grad()
        checkpoint_activations(adapted, mode)
        adapted.train()(IDS, labels=IDS).loss.backward()
        again = [each.grad for each in adapted.parameters() if each.requires_grad]
        assert all((one - other).abs().max() < tolerance for one, other in zip(found, again, strict=True)), mode

    # Merged
    merged = adapted.merge_and_unload().eval()
    for layer in (0, 1):
        for tensor in TENSORS:
            name = f"model.layers.{layer}.mlp.experts.{tensor}"
            assert (merged.get_parameter(name) - base.get_parameter(name)).abs().max() < tolerance
            assert (merged.get_parameter(name) - wrong.pop(0)).abs().max() > 1e-3  # experts in another order
    assert merged.state_dict().keys() == base.state_dict().keys()


# Trained, resumed and exported

OPTIONS = {"adapter": ADAPTER, "learning_rate": 2e-2, "micro_batch_size": 2}
SHARDED = {"stage": "3", "persistence_threshold": 0}


def saved(name: str, **options) -> dict:
    return OPTIONS | {"checkpoints": f"{name}/checkpoints", "save_steps": 2, "save_total_limit": 9} | options


TWO_PROCESSES = {
    "off": saved("off", gradient_checkpointing="selective"),
    "2": OPTIONS | {"zero": {"stage": "2"}},
    "3": saved("three", zero=SHARDED, gradient_checkpointing="selective"),
    "again 3": OPTIONS
    | {"zero": SHARDED, "resume": "three/checkpoints/checkpoint-4", "gradient_checkpointing": "full"},
    "moved off": OPTIONS | {"resume": "three/checkpoints/checkpoint-2"},
    "qlora 3": OPTIONS | {"zero": SHARDED, "adapter": ADAPTER | {"kind": "qlora"}},
}


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen3_5"), "qwen3_5", TemplateConfig(mode="reply_only"))


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    rng = random.Random(11)
    packs, _ = pack_dialogues(
        [template.encode(random_dialogue(rng)) for _ in range(40)], PackingConfig("best_fit", 1000)
    )
    packs = first_packs(packs)
    (folder / "packs").write_bytes(pickle.dumps(packs))
    tiny("qwen3_5_moe_text", torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    return train_all(folder, TWO_PROCESSES, 2)


@pytest.fixture(scope="module")
def references(folder) -> dict[str, dict]:
    """One process, all packs of a step in one pass."""
    cases = {"": ADAPTER, "qlora": ADAPTER | {"kind": "qlora"}}
    options = OPTIONS | {"micro_batch_size": 4}
    return {name: curve(train(folder, **options | {"adapter": AdapterConfig(**each)})) for name, each in cases.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_train_experts_as_one_does(on_two, references, name):
    run, reference = on_two[name], references["qlora" if "qlora" in name else ""]
    stage = None if "off" in name else int(name[-1])
    assert (run["processes"], run["stage"], run["empty"]) == (2, stage, 1 if stage == 3 else 0)
    first = {"again 3": 4, "moved off": 2}.get(name, 0)
    assert run["first_step"] == first
    assert run["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    assert run["losses"][-1] < 0.95 * run["losses"][0]
    assert run["weights"].keys() == reference["weights"].keys()
    for weights, values in run["weights"].items():
        mine, theirs = torch.tensor(values).float(), torch.tensor(reference["weights"][weights]).float()
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), weights
        assert "lora_B" not in weights or mine.abs().max() > 1e-3, weights


@pytest.mark.slow
def test_a_training_says_what_has_adapters(folder, said):
    adapter = AdapterConfig(**ADAPTER | {"kind": "qlora"})
    trained = train(folder, **OPTIONS | {"adapter": adapter, "max_steps": 1})
    count = sum(each.numel() for each in trained.model.parameters() if each.requires_grad)
    (line,) = (line for line in said if line.startswith("adapters: "))
    assert (
        f"{count:,} weights of rank 4, " in line and "experts.gate_up_proj, experts.down_proj; experts stay in" in line
    )


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["off", "three"])
def test_adapters_of_experts_are_exported_merged_or_alone(folder, template, on_two, references, run, tmp_path):
    config = {"adapter": ADAPTER, "trainer": {"precision": "fp32"}}
    write_manifest(folder / run, manifest_of(template, base_model=str(folder / "model"), config=config))
    source = open_source(str(folder / run))
    assert export(source, ExportConfig(output=str(tmp_path / "merged"))) < 1e-5
    assert export(source, ExportConfig(output=str(tmp_path / "alone"), format="adapter")) < 1e-5
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", folder / "model"))
    assert merged.keys() == base.keys()
    weights = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert min(each.numel() for each in weights.values()) > 0 and any("experts" in name for name in weights)
    settings = json.loads((tmp_path / "alone" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(settings["target_parameters"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}

    model, reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), references[""]["weights"]
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    for tensor, inner in TENSORS.items():
        module = f"base_model.model.model.layers.1.mlp.experts{inner}"
        a, b = (torch.tensor(reference[f"{module}.lora_{part}.default.weight"]) for part in "AB")
        a = a.view(EXPERTS * RANK, -1)
        product = SCALE * torch.bmm(*reversed(of_experts(a, b.view(-1, EXPERTS * RANK))))
        name = f"model.layers.1.mlp.experts.{tensor}"
        change = model.get_parameter(name) - plain.get_parameter(name)
        assert (change - product).abs().max() < 1e-4 < product.abs().max()
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "alone"))(IDS).logits
        logits = model(IDS).logits
    assert (again - logits).abs().max() < 1e-5 * logits.abs().max()
