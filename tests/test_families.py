"""The table of model families, and a family that is added from outside the package."""

import dataclasses
import functools
import math
import re
from typing import Any

import peft
import pytest
import torch
from conftest import SMALL_OF, small_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.models import families
from csc_train.models.attention.gated_delta_net import build_delta_levels, prepare_delta_nets
from csc_train.models.attention.select import collator_layout
from csc_train.models.config import AdapterConfig, ArchitectureConfig, ModelConfig
from csc_train.models.families import (
    MODEL_FAMILIES,
    build_model_config,
    cache_kinds,
    dense_decoder_dims,
    forward_flops,
    get_family,
    model_dims,
    register_family,
    training_flops,
)
from csc_train.models.inspection import inspect_model
from csc_train.models.loading import check_lora_targets, load_model, lora_config
from csc_train.packing.pack_cost import pack_cost
from csc_train.template.chat_templates import chat_template_names
from csc_train.template.tokenizer_training import TOKENIZER_STYLES


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(families, "MODEL_FAMILIES", dict(MODEL_FAMILIES))


def architecture(model_type: str) -> ArchitectureConfig:
    kinds = {"layer_types": ["linear_attention", "full_attention"]} if model_type.startswith("qwen3_5") else {}
    if "moe" in model_type:
        kinds |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return ArchitectureConfig(
        model_type, hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=2100, **kinds
    )


@pytest.mark.parametrize("family", MODEL_FAMILIES.values(), ids=MODEL_FAMILIES)
def test_every_row_fits_the_model_that_transformers_builds(family):
    config = build_model_config(architecture(family.model_type), None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == family.causal_lm_class
    assert model_dims(config).parameters == sum(each.numel() for each in model.parameters())
    assert cache_kinds(config) == ({"full", "recurrent"} if model_dims(config).delta else {"full"})
    linear = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert linear == {*family.lora_targets, *family.unquantized_modules}
    # PEFT's own reading of all-linear, which takes routers and experts in.
    theirs, ours = (
        peft.get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
        for adapter in (
            peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
            lora_config(AdapterConfig("lora"), model),
        )
    )
    if not model_dims(config).experts:
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert family.chat_template in chat_template_names()
    # A name, names or regular expressions; each has to match.
    for known in (["q_proj"], ["self_attn.q_proj", "o_proj"], [r".*\.(q|v)_proj"], ["all-linear", r"lm_.*"]):
        check_lora_targets(AdapterConfig("lora", target_modules=known), model)
    for unknown in ("nope", "proj", "q_proj.", r".*\.w[12]", "embed_tokens"):
        with pytest.raises(InputError, match=rf"^adapter.target_modules={re.escape(unknown)}: .*o_proj, .*q_proj"):
            check_lora_targets(AdapterConfig("lora", target_modules=["q_proj", unknown]), model)
    with pytest.raises(InputError, match=r"^adapter.target_modules=\(q: no regular expression"):
        AdapterConfig("lora", target_modules=["(q"])
    assert family.tokenizer_style in TOKENIZER_STYLES
    assert family.chat_template in SMALL_OF
    random = ModelConfig(init="random", tokenizer="train", architecture=architecture(family.model_type))
    inspected = inspect_model(random).require().model
    assert inspected.get_experts_implementation() == model.get_experts_implementation()


EXPERTS = {f"{layer}.mlp.experts{inner}" for layer in (0, 1) for inner in ("", ".base_layer")}


@pytest.mark.parametrize("tensors", [[], ["all-experts"], ["experts.gate_up_proj", "mlp.experts.down_proj"]])
@pytest.mark.parametrize("layers", [[], [r".*1\.self_attn\.[qv]_proj"], ["all-linear"]])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_5_moe_text"])
def test_adapters_are_on_what_was_named_and_nothing_else(model_type, layers, tensors):
    if not (layers or tensors):
        with pytest.raises(InputError, match=r"^adapter.target_modules=\[\]: nothing would be adapted"):
            AdapterConfig("lora", target_modules=layers)
        return
    adapter = AdapterConfig("lora", rank=4, target_modules=layers, target_parameters=tensors)
    config = build_model_config(architecture(model_type), None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_lora_targets(adapter, model)
    adapted = peft.get_peft_model(model, lora_config(adapter, model))
    trained = {name: each.numel() for name, each in adapted.named_parameters() if each.requires_grad}
    assert families.count_adapter_parameters(adapted) == sum(trained.values())
    assert families.lora_parameter_count(model_dims(config), 4, layers, tensors) == sum(trained.values())
    found = {name.partition(".lora_")[0].partition("layers.")[2] for name in trained}
    assert {each for each in found if ".experts" in each} == (EXPERTS if tensors else set())
    report = families.adapter_report(adapter, model_dims(config), bf16=True)
    assert report.startswith(f"{sum(trained.values()):,} weights of rank 4, ")
    assert ("on q_proj, v_proj" in report) == (layers == [r".*1\.self_attn\.[qv]_proj"])
    assert (
        ("experts.gate_up_proj, experts.down_proj" in report) != ("routed experts have none" in report) == (not tensors)
    )
    if layers != ["all-linear"]:
        assert found - EXPERTS == {f"1.self_attn.{each}_proj" for each in "qv" if layers}


def test_what_qlora_leaves_in_bf16_is_said():
    dims = model_dims(AutoConfig.for_model("qwen3_moe", num_hidden_layers=48, num_experts=128))
    report = families.adapter_report(AdapterConfig("qlora"), dims, bf16=True)
    assert report.endswith("; experts stay in bf16, 54.0 GiB: only linear layers are held in 4 bits")
    assert "4 bits" not in families.adapter_report(AdapterConfig("lora"), dims, bf16=True)


def test_experts_that_are_not_there_are_refused():
    for model_type, name, message in (
        (
            "qwen3_moe",
            "experts.up_gate_proj",
            r"choose all-experts, experts.gate_up_proj or .* mean 'experts.gate_up_proj'",
        ),
        (
            "qwen3_5_moe_text",
            "conv1d.weight",
            "qwen3_5_moe_text has no experts' tensor of this name: choose all-experts",
        ),
        ("qwen3", "all-experts", "qwen3 has no experts' tensor of this name: leave it out"),
    ):
        adapter = AdapterConfig("lora", target_parameters=[name])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(build_model_config(architecture(model_type), None))
        with pytest.raises(InputError, match=rf"^adapter.target_parameters={name}: .*{message}"):
            check_lora_targets(adapter, model)
    with pytest.raises(InputError, match=r"^adapter.dropout=0.1: adapters of experts have none"):
        AdapterConfig("lora", dropout=0.1, target_parameters=["all-experts"])


def test_one_window_for_all_layers_is_counted_as_such():
    config = build_model_config(architecture("mistral"), None)
    config.sliding_window = 64
    assert model_dims(config).layer_kinds == {"sliding_attention": 2}
    assert cache_kinds(config) == {"window"}


def test_a_family_from_outside_is_built_measured_and_adapted():
    with pytest.raises(InputError, match=r"model_type=granite: choose one of .* qwen3_5_moe_text, or add a row"):
        build_model_config(architecture("granite"), None)
    added = register_family(
        based_on="llama",
        model_type="granite",
        causal_lm_class="GraniteForCausalLM",
        lora_targets=("q_proj", "v_proj"),
        packing_layouts=("padded", "dense_mask"),
        read_dims=functools.partial(dense_decoder_dims, qkv_bias=False),
    )
    assert get_family("granite") == added
    assert added.chat_template == "llama3_1"
    config = ModelConfig(init="random", tokenizer="train", architecture=architecture("granite"))
    inspect_model(config).require()
    model = load_model(config, small_tokenizer("llama3_1"), torch.float32, 0)
    assert type(model).__name__ == added.causal_lm_class
    assert model_dims(model.config).parameters == sum(each.numel() for each in model.parameters())
    linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    assert forward_flops(model)[0] == sum(2 * each.in_features * each.out_features for each in linear)
    adapted = peft.get_peft_model(model, lora_config(AdapterConfig("lora", rank=4), model))
    trained = {name.split(".")[-4] for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    assert families.count_adapter_parameters(adapted) == sum(
        each.numel() for each in adapted.parameters() if each.requires_grad
    )
    assert collator_layout("sdpa", "shared_prefix", "granite") == "dense_mask"
    with pytest.raises(InputError, match="granite does not keep documents apart in layout position_ids"):
        collator_layout("sdpa", "best_fit", "granite")


FIELDS = {field.name: "" for field in dataclasses.fields(families.ModelFamily)}


@pytest.mark.parametrize(
    ("based_on", "fields", "message"),
    [
        (None, FIELDS | {"model_type": "llama"}, "the model_type 'llama' is taken; taken are qwen2, "),
        ("llama", {"model_type": "qwen2"}, "the model_type 'qwen2' is taken"),
        ("llama", {}, "the field 'model_type' is missing; give model_type"),
        (None, {"model_type": "new"}, "the field 'causal_lm_class' is missing; give causal_lm_class, read_dims, "),
        (
            "llama",
            {"model_type": "new", "lora_target": ()},
            r"unknown field 'lora_target'\. Did you mean 'lora_targets'",
        ),
        ("lama", {"model_type": "new"}, r"lama: choose one of qwen2, qwen3, llama, mistral, .* Did you mean 'llama'"),
    ],
)
def test_a_row_that_is_taken_or_incomplete_is_refused_in_one_line(based_on, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        register_family(based_on, **fields)
    assert "\n" not in str(caught.value)
    assert families.MODEL_FAMILIES == MODEL_FAMILIES


def test_a_base_of_an_unknown_family_or_class_is_refused(tmp_path):
    config = build_model_config(architecture("qwen2"), None)
    config.architectures = ["Qwen2ForSequenceClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="names Qwen2ForSequenceClassification; choose a model of class Qwen2ForCausal"
    ):
        inspect_model(ModelConfig(path=str(tmp_path))).require()
    with pytest.raises(InputError, match=r"model_type=qwen: choose one of .* Did you mean 'qwen3'|'qwen2'"):
        inspect_model(ModelConfig(init="random", tokenizer="train", architecture=architecture("qwen"))).require()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [(each, adapter) for each in ("qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text") for adapter in ("full", "lora")]
    + [("qwen3_moe", "experts")],
)
def test_flops_are_those_that_torch_counts(model_type, adapter):
    """Forward and backward, over packs with a shared prefix; a token is charged for its own experts only."""
    config = AutoConfig.for_model(
        model_type, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=500, linear_key_head_dim=32, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=96, shared_expert_intermediate_size=64,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")  # whose products torch counts
    prepare_delta_nets(model)
    if adapter != "full":
        tensors = ["all-experts"] if adapter == "experts" else []
        adapted = AdapterConfig("lora", rank=4, target_parameters=tensors)
        model = peft.get_peft_model(model, lora_config(adapted, model))
        model.enable_input_require_grads()
    dims = model_dims(config)
    lengths, tokens = [192, 64, 256], 512
    levels = [level._asdict() for level in build_delta_levels([lengths], [lengths[0]])]
    inputs = {"delta_levels": levels} if dims.delta else {}

    def triangular(_, values, *__, **___) -> int:
        return math.prod(values) * values[-2]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: triangular}) as counter:
        model(input_ids=torch.ones(1, tokens, dtype=torch.int64), **inputs).logits.sum().backward()
    adapters = families.count_adapter_parameters(model, active=True), families.tensors_with_adapters(model)
    counts = training_flops(dims, *adapters)
    # Eager attention computes all pairs of tokens, of which half are causal.
    pairs = 2 * counts.per_pair * tokens**2
    ours, counted = (counts.per_token + counts.per_head_token) * tokens + pairs, counter.get_total_flops()
    assert ours == pytest.approx(counted, rel=0.02)
    if adapter == "experts":  # as if they were frozen
        assert training_flops(dims, adapters[0]).per_token < 0.9 * counts.per_token
    passes = 2 if adapter == "lora" else 3
    if dims.delta:
        recurrence = 3 * 3 * dims.delta.flops_per_token * tokens
        assert ours - recurrence != pytest.approx(counted, rel=0.02)
    if dims.experts:
        idle = dims.parameters - dims.active_parameters
        assert ours + passes * 2 * idle * tokens > 2 * counted
        assert ours - passes * 2 * dims.experts.active * dims.expert * dims.layers * tokens < 0.8 * counted
    if not dims.delta:
        return
    # One layer of four has attention, so one document twice as long costs less than twice that of all four.
    assert counts.per_pair == 3 * 2 * dims.queries
    short, long = (pack_cost([length], 0, counts.per_token, counts.per_pair).total for length in (4096, 8192))
    assert long - 2 * short == 2 * counts.per_pair * 4096**2


@pytest.mark.parametrize("kind", ["conv", "nonsense"])
def test_a_model_whose_layers_are_unknown_is_refused_in_one_line(tmp_path, kind):
    """Of kinds that transformers knows, and that it does not."""
    kinds = ["full_attention", kind]
    with pytest.raises(InputError, match=rf"layer_types={kind}: choose one of full_attention, linear") as one:
        dataclasses.replace(architecture("qwen3_5_text"), layer_types=kinds)
    with pytest.raises(InputError, match=r"layer_types names 1 layers, but .*num_hidden_layers=2"):
        dataclasses.replace(architecture("qwen3_5_text"), layer_types=kinds[:1])
    without = dataclasses.replace(architecture("qwen3_5_text"), layer_types=["linear_attention"] * 2, vocab_size=64)
    (refusal,) = inspect_model(ModelConfig(init="random", tokenizer="train", architecture=without)).refusals
    assert "no layer of the model has full_attention, by default every fourth" in refusal
    AutoModelForCausalLM.from_config(build_model_config(architecture("qwen3_5_text"), None)).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"layer_types": kinds})
    with pytest.raises(InputError) as other:
        inspect_model(ModelConfig(path=str(tmp_path))).require()
    assert "\n" not in str(one.value) + str(other.value)
    assert "layer_types" in str(other.value)


def test_an_architecture_that_transformers_refuses_is_refused_in_one_line():
    uneven = ArchitectureConfig("llama", hidden_size=64, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"^model\.architecture: The hidden size \(64\) .*heads \(3\)\.$"):
        model_dims(uneven, 100)
