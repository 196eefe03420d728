"""The memory estimate: exact where the libraries can say the same, and its advice fits."""

import re
from dataclasses import replace

import peft
import pytest
import torch
from conftest import ROOT, sampled, small_tokenizer
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import moe

from csc_train.config.compose import compose
from csc_train.launching.preflight.size import zero_of
from csc_train.models.attention.gated_delta_net import build_delta_levels, prepare_delta_nets
from csc_train.models.attention.varlen import VARLEN_ATTENTION, build_varlen_metadata
from csc_train.models.config import AdapterConfig, ArchitectureConfig, ModelConfig
from csc_train.models.families import (
    adapted_experts,
    build_model_config,
    forward_flops,
    lora_parameter_count,
    lora_targets,
    model_dims,
)
from csc_train.models.layers import checkpoint_activations
from csc_train.models.loading import load_model, lora_config
from csc_train.training import loss
from csc_train.training.config import CHECKPOINTING, OPTIMIZERS
from csc_train.training.memory import (
    AUTO_SHARE,
    GIB,
    MOMENT_BYTES,
    STAGES,
    MemoryScenario,
    advice,
    alternatives,
    estimate_memory,
    fitting_world_size,
    kept_bytes,
    least_checkpointing,
    model_states,
    scenario_flops,
    smallest_fit,
    state_bytes,
    suggest_fixes,
    world_sizes,
)

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "own")
VOCABULARY = 1500
"""Where a model's own is open."""
HYBRID, EXPERTS, HYBRID_EXPERTS = "qwen3_5_text", "qwen3_moe", "qwen3_5_moe_text"
FULL, LINEAR = "full_attention", "linear_attention"


def architecture_of(model: str) -> ArchitectureConfig:
    architecture = compose("sft", [f"model={model}"]).model.architecture
    return replace(architecture, vocab_size=architecture.vocab_size or VOCABULARY)


def on_meta(architecture: ArchitectureConfig):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_model_config(architecture, None))


def small(model_type: str, layers: int = 2, kind: str = FULL, **facts) -> ArchitectureConfig:
    own = {}
    if "moe" in model_type:
        own |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        own |= {"shared_expert_intermediate_size": 80} if model_type == HYBRID_EXPERTS else {}
    if model_type in (HYBRID, HYBRID_EXPERTS):
        own |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": [kind] * layers}
        own |= {"linear_key_head_dim": 24, "linear_value_head_dim": 40}
    facts = own | facts
    return ArchitectureConfig(
        model_type=model_type, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY, **facts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seven() -> MemoryScenario:
    """Full fine-tuning of Qwen2.5-7B on one node of eight."""
    return MemoryScenario(model_dims(architecture_of("qwen2_5_7b")), stage="3", processes=8, tokens=8192)


# What it counts


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_parameters_and_linear_layers_of_every_model_are_counted_exactly(model):
    architecture = architecture_of(model)
    built, shape = on_meta(architecture), model_dims(architecture)
    assert shape.parameters == sum(each.numel() for each in built.parameters())
    assert shape.embedding == max(each.numel() for each in built.parameters() if each.ndim == 2)
    assert shape.largest == max(sum(map(torch.numel, each.parameters(recurse=False))) for each in built.modules())
    # The head is a linear layer, tied or not.
    linear = sum(each.in_features * each.out_features for each in built.modules() if isinstance(each, torch.nn.Linear))
    assert shape.linear + shape.embedding == linear
    deltas = shape.layer_kinds.get("linear_attention", 0)
    # A token uses a few experts of a layer, and its router.
    experts = [
        (name, each.numel()) for name, each in built.named_parameters() if re.search(r"mlp\.(experts|gate)\.", name)
    ]
    share = shape.experts.active / shape.experts.count if shape.experts else 0
    linear += sum(size * (1 if "gate." in name else share) for name, size in experts)
    assert forward_flops(built)[0] == 2 * linear + (deltas * shape.delta.flops_per_token if deltas else 0)


@pytest.mark.parametrize(
    "target", [["all-linear"], [r".*\.(q|v)_proj"], ["o_proj"], ["self_attn.o_proj", r".*1\.mlp\.up_proj"]]
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", HYBRID])
def test_adapters_are_counted_exactly(model_type, target):
    architecture = small(model_type, layer_types=[LINEAR, FULL]) if model_type == HYBRID else small(model_type)
    targets = "all-linear" if target == ["all-linear"] else lora_targets(model_type, target)
    configured = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(on_meta(architecture), configured)
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert lora_parameter_count(model_dims(architecture), 8, target) == trained


def test_an_unknown_vocabulary_size_is_an_error():
    with pytest.raises(ValueError, match="vocab_size"):
        model_dims(ArchitectureConfig())
    assert model_dims(ArchitectureConfig(), 300).vocabulary == 300


@pytest.mark.parametrize("model", sampled(["qwen2_5_7b", "qwen3_30b_a3b_instruct_2507"], 2))
@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (8, 1), (64, 8)])
def test_model_states_are_those_of_deepspeeds_estimators(seven, processes, nodes, model):
    shape = model_dims(architecture_of(model))
    seven = replace(seven, dims=shape)
    per_node = processes // nodes

    def states(stage: str, offload: str) -> tuple[float, float]:
        planned = model_states(replace(seven, stage=stage, offload=offload, processes=processes, nodes=nodes))
        return planned.host, planned.allocated

    for offload in ("none", "optimizer"):
        theirs = estimate_zero2_model_states_mem_needs(shape.parameters, per_node, nodes, offload == "optimizer")
        ours = states("2", offload)
        assert ours[1] == pytest.approx(theirs[1], abs=1)
        if offload == "optimizer" and nodes == 1:
            assert ours[0] == pytest.approx(theirs[0], abs=1)
    for offload in ("none", "optimizer", "all"):
        theirs = estimate_zero3_model_states_mem_needs(
            shape.parameters, shape.largest, per_node, nodes, offload != "none", offload == "all"
        )
        ours = states("3", offload)
        assert ours[1] == pytest.approx(theirs[1], abs=2)
        if offload != "none":
            assert ours[0] == pytest.approx(theirs[0], abs=1)


@pytest.mark.parametrize(("adapter", "optimizer"), [("full", "adamw"), ("lora", "adamw"), ("full", "adamw_8bit")])
def test_model_states_are_the_bytes_of_the_tensors_after_a_step(adapter, optimizer, tmp_path):
    architecture = small("qwen3")
    model = AutoModelForCausalLM.from_config(
        build_model_config(architecture, None), dtype=torch.float32 if adapter == "full" else torch.bfloat16
    )
    if adapter == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = {"optim": OPTIMIZERS[optimizer], "use_cpu": True, "report_to": "none"}
    made = Trainer(model, TrainingArguments(str(tmp_path), **options)).create_optimizer()
    ids = torch.arange(16)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    made.step()

    def size(tensors) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    states = [item for state in made.state.values() for item in state.items()]
    moments = [value for name, value in states if name != "step" and "qmap" not in name]  # two tables for all
    shape = model_dims(architecture)
    weights = lora_parameter_count(shape, 8) if adapter == "lora" else 0
    setting = MemoryScenario(shape, adapter, weights, optimizer=optimizer)
    planned = model_states(setting)
    assert planned.parameters == size(model.parameters())
    assert planned.gradients == size(each.grad for each in model.parameters() if each.grad is not None)
    small_tensors = sum(each.numel() for each in model.parameters() if each.numel() < 4096)
    allowed = (8 - MOMENT_BYTES[optimizer]) * small_tensors  # of which the plan knows nothing
    assert planned.optimizer <= size(moments) <= planned.optimizer + allowed
    assert allowed < 0.05 * planned.optimizer
    held = size(each for each in model.parameters() if each.requires_grad)
    assert held + planned.optimizer == state_bytes(setting)
    assert optimizer == "adamw" or planned.optimizer < 0.5 * 8 * shape.parameters


def test_qlora_holds_linear_layers_in_4_bits_and_experts_in_bf16(tmp_path):
    tokenizer = small_tokenizer("qwen2_5")
    architecture = small(HYBRID_EXPERTS, layer_types=[LINEAR, FULL], moe_intermediate_size=128)
    model = AutoModelForCausalLM.from_config(build_model_config(architecture, None), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    held = 0
    loaded = load_model(ModelConfig(path=str(tmp_path)), tokenizer, torch.bfloat16, 0, load_in_4bit=True)
    for weight in loaded.parameters():
        held += weight.nbytes
        if scales := getattr(weight, "quant_state", None):
            held += scales.absmax.nbytes + scales.state2.absmax.nbytes
    planned = MemoryScenario(model_dims(architecture), "qlora", 1)
    assert planned.frozen_bytes == pytest.approx(held, rel=1e-4)
    experts = [each for name, each in loaded.named_parameters() if "mlp.experts." in name]
    assert {each.dtype for each in experts} == {torch.bfloat16}
    assert planned.frozen_bytes > sum(each.nbytes for each in experts) > held / 2


class Alive(TorchDispatchMode):
    """The memory behind the tensors that operators make, as long as it is held."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda each: self.storages.setdefault(each.untyped_storage(), None), made)
        return made


def one_document(tokens: int) -> dict:
    """What a hybrid gets for a row of one document."""
    metadata, _ = build_varlen_metadata([[tokens]], [0])
    levels = [level._asdict() for level in build_delta_levels([[tokens]], [0])]
    return {"delta_levels": levels, "varlen_metadata": metadata._asdict()}


def kept_by_blocks(model, tokens: int, autocast: bool) -> int:
    """Bytes that a forward pass of the blocks keeps for the backward pass, weights aside, shared storages once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    ids = torch.arange(tokens)[None] % VOCABULARY
    prepare_delta_nets(model)
    inputs = one_document(tokens) if model_dims(model.config).delta else {}
    with Alive() as alive, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.get_decoder().train()(input_ids=ids, use_cache=False, **inputs)
    kept = sum(storage.nbytes() for storage in alive.storages if storage.data_ptr() not in own)
    assert output.last_hidden_state.requires_grad
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("model_type", "kind", "adapter", "stage", "bf16"),
    [
        *(
            (*block, *training)
            for block in (
                *((name, FULL) for name in ("qwen2", "qwen3", "llama", HYBRID, EXPERTS, HYBRID_EXPERTS)),
                (HYBRID, LINEAR),
                (HYBRID_EXPERTS, LINEAR),
            )
            for training in (
                *(("full", "off", True), ("full", "off", False), ("full", "2", True)),
                *(("lora", "off", True), ("lora", "3", True)),
            )
        ),
        ("qwen2", FULL, "dora", "off", True),
        (HYBRID_EXPERTS, LINEAR, "dora", "off", False),
    ],
)
def test_what_a_block_keeps_is_what_is_left_of_its_forward_pass(model_type, kind, adapter, stage, bf16, checkpointing):
    """One token of one block: the difference that a third block makes, over those of the first two."""
    tokens, rank, sizes = 256, 2, {}
    mixed = stage == "off" and bf16
    adapter, dora = adapter.replace("dora", "lora"), adapter == "dora"
    dtype = torch.bfloat16 if bf16 and (adapter == "lora" or stage != "off") else torch.float32
    experts = ["all-experts"] if "moe" in model_type and stage == "3" else []
    for layers in (2, 3):
        architecture = small(model_type, layers, kind)
        attention = VARLEN_ATTENTION if model_dims(architecture).delta else "sdpa"
        config = build_model_config(architecture, None)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        base = model
        if adapter == "lora":
            config = lora_config(AdapterConfig("lora", rank=rank, target_parameters=experts, use_dora=dora), model)
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=mixed)
            adapted.enable_input_require_grads()
            model = adapted
        checkpoint_activations(model, checkpointing)
        sizes[layers] = kept_by_blocks(base, tokens, autocast=mixed)
    shape = model_dims(architecture)
    weights = lora_parameter_count(shape, rank) if adapter == "lora" else 0
    setting = MemoryScenario(
        shape, adapter, weights, stage=stage, bf16=bf16, tokens=tokens, checkpointing=checkpointing,
        adapted_experts=tuple(adapted_experts(shape, experts)), delta_kernel="torch", dora=dora,
    )  # fmt: skip
    # The bf16 copies of weights that autocast makes, and their sums with adapters, are counted apart.
    casts = 0
    if mixed and checkpointing == "off":
        linear = shape.linear // shape.layers + shape.router + shape.block_experts
        casts = 2 * (weights // shape.layers if adapter == "lora" else linear)
    elif experts and checkpointing == "off":
        casts = 2 * shape.block_experts
    measured = (sizes[3] - sizes[2] - casts) / tokens
    assert kept_bytes(setting, kind) == pytest.approx(measured, rel=0.025 if dora else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "checkpointing"),
    [
        *(("qwen2_5_7b", mode) for mode in CHECKPOINTING),
        ("qwen3_4b_instruct_2507", "full"),
        ("qwen3_5_4b", "off"),
        ("qwen3_5_4b", "full"),
        ("qwen3_30b_a3b_instruct_2507", "full"),
    ],
)
def test_the_peak_of_a_simulated_training_is_as_planned(monkeypatch, model, checkpointing):
    """Two steps of two forward passes on tensors without data, whose sizes PyTorch follows, at a published width."""
    # As on a GPU, where the head has larger chunks, and its products add up in place.
    monkeypatch.setattr(loss, "CHUNK_CPU", loss.CHUNK)
    monkeypatch.setattr(loss, "_add_product", lambda *_: None)
    # The grouped product takes bf16 only on such tensors; what stands in has inputs, output and gradients of one size.
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    architecture = replace(architecture_of(model), num_hidden_layers=2)
    tokens, levels = 8192, {}
    documents = {"document_tokens": torch.ones(1, tokens, dtype=torch.bool)} if "a3b" in model else {}
    if "qwen3_5" in model:  # fewer chunks, which transformers computes one by one, and a head that leaves them the peak
        architecture, tokens = replace(architecture, layer_types=[LINEAR, FULL], vocab_size=8000), 1024
        levels = {"delta_levels": one_document(tokens)["delta_levels"]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(build_model_config(architecture, None), attn_implementation="sdpa")
        prepare_delta_nets(model)
        checkpoint_activations(model, checkpointing)
        loss.add_loss_head(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids, positions = torch.ones(1, tokens, dtype=torch.int64), torch.arange(tokens)[None]
        head = {"labels": ids, "trained_index": torch.arange(tokens - 1), "loss_weights": torch.ones(1, tokens)}
        tracker = MemTracker()
        tracker.track_external(model.train(), optimizer)
        with tracker:
            for _ in range(2):
                for _ in range(2):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16):
                        out = model(
                            input_ids=ids, position_ids=positions, use_cache=False, **head, **levels, **documents
                        )
                    loss_of_routers = out.router.losses.mean() if out.router else 0
                    (out.loss + loss_of_routers).backward()
                    del out, loss_of_routers
                optimizer.step()
                optimizer.zero_grad()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    dims = model_dims(architecture)
    setting = MemoryScenario(dims, tokens=tokens, checkpointing=checkpointing, delta_kernel="torch")
    planned = estimate_memory(setting).allocated
    assert planned == pytest.approx(peak["Total"], rel=0.05 if dims.delta else 0.03)
    assert planned > peak["Total"] or not dims.delta  # of what a delta net recomputes, some is free before its peak


def test_sharding_more_never_takes_more_and_activations_grow_with_the_tokens(seven):
    for adapter in ("full", "lora", "qlora"):
        setting = replace(seven, adapter=adapter, adapter_parameters=0 if adapter == "full" else 10**7)
        for stage in STAGES:
            totals = [
                estimate_memory(replace(setting, stage=stage, processes=processes, nodes=nodes)).allocated
                for processes, nodes in world_sizes(8)[1:]
            ]
            assert totals == sorted(totals, reverse=True)
    assert estimate_memory(replace(seven, checkpointing="off")).activations > estimate_memory(seven).activations
    double = estimate_memory(replace(seven, tokens=2 * seven.tokens)).activations
    assert estimate_memory(seven).activations < double < 2 * estimate_memory(seven).activations


# What it advises


def test_the_smallest_fit_is_the_least_sharded_one(seven):
    memory = 79.6 * GIB
    fit = smallest_fit(alternatives(seven), memory)
    order = [(setting.stage, setting.offload) for setting in alternatives(seven)]
    before = alternatives(seven)[: order.index((fit.stage, fit.offload))]
    assert estimate_memory(fit).total <= memory
    assert before and all(estimate_memory(setting).total > memory for setting in before)
    assert smallest_fit(alternatives(seven), GIB) is None
    # Offloading takes the host's memory.
    offloaded = replace(seven, offload="all")
    assert smallest_fit([offloaded], memory, estimate_memory(offloaded).host) == offloaded
    assert smallest_fit([offloaded], memory, estimate_memory(offloaded).host - 1) is None


def test_auto_takes_the_least_checkpointing_that_fits(seven):
    totals = [estimate_memory(replace(seven, checkpointing=mode)).total for mode in CHECKPOINTING]
    assert totals == sorted(totals, reverse=True)
    for mode, total in zip(CHECKPOINTING, totals, strict=True):
        assert least_checkpointing(seven, 1.01 * total / AUTO_SHARE) == mode
    assert least_checkpointing(seven, GIB) == "full"  # a training then says what would fit


def test_the_fewest_processes_that_fit(seven):
    large = replace(seven, dims=model_dims(architecture_of("qwen2_5_72b")))
    fit = fitting_world_size(large, 8, 79.6 * GIB)
    assert estimate_memory(fit).total <= 79.6 * GIB < estimate_memory(replace(fit, processes=fit.processes // 2)).total
    assert fit.nodes == fit.processes // 8 > 1
    assert fitting_world_size(replace(large, stage="off"), 8, 79.6 * GIB) is None
    assert world_sizes(8, most=16) == [(1, 1), (2, 1), (4, 1), (8, 1), (16, 2)]


def test_every_suggested_fix_fits_and_is_an_override(seven):
    setting = replace(seven, stage="2", tokens=4 * 8192, checkpointing="off")
    memory = 60 * GIB
    assert estimate_memory(setting).total > memory
    found = suggest_fixes(setting, 4, memory)
    assert found
    for remedy in found:
        config = compose("preflight", ["model=qwen2_5_7b", "cluster=node8", "zero=zero2", *remedy.split()])
        changed = replace(
            setting,
            **dict(zip(("stage", "offload"), zero_of(config), strict=True)),
            tokens=8192 * config.trainer.micro_batch_size if "micro" in remedy else setting.tokens,
            checkpointing=config.trainer.gradient_checkpointing if "checkpointing" in remedy else "off",
        )
        assert estimate_memory(changed).total <= memory, remedy
    assert suggest_fixes(setting, 4, GIB) == []
    assert "shorter packs" in advice(setting, 4, 8, GIB)


def test_flops_are_six_a_weight_and_token_and_four_with_adapters(seven):
    weights = seven.dims.linear + seven.dims.embedding
    assert scenario_flops(seven, 1000, 0) == 6 * weights * 1000
    assert scenario_flops(replace(seven, adapter="lora", adapter_parameters=1), 1000, 0) == (4 * weights + 6) * 1000
    assert scenario_flops(seven, 1000, 100) > scenario_flops(seven, 1000, 0)
