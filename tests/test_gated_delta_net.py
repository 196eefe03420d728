"""Gated delta nets and experts in packs: loss and every gradient are those of separate sequences; leaks are seen."""

import functools
import itertools
import os
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import TINY_FACTS, sampled
from processes import TIMEOUT_S
from test_varlen_attention import make_packs, run_separately
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5ForCausalLM
from transformers.integrations import moe
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.inference.hf import load_generator
from csc_train.models.attention import gated_delta_net
from csc_train.models.attention.gated_delta_net import (
    LeveledDeltaNet,
    build_delta_levels,
    build_levels,
    prepare_delta_nets,
    run_levels,
)
from csc_train.models.attention.select import check_delta_kernel, collator_layout
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.experts import routers
from csc_train.models.families import model_dims
from csc_train.models.layers import checkpoint_activations
from csc_train.packing.collator import PackCollator
from csc_train.training.compatibility import resolve_compile
from csc_train.training.leak_check import _probe, checked_collator

VOCABULARY = 97
# (prefix length, body lengths) of each pack in a batch; 64 tokens are a chunk of the recurrence.
SHARED = {
    "one-prefix": [(70, (7, 130, 5))],
    "several-prefixes": [(11, (7, 66)), (4, (9, 2, 6)), (17, (8,))],
    "with-and-without": [(11, (7, 13)), (0, (9,))],
    "prefix-of-one": [(1, (7, 2))],
    "prefix-of-two": [(2, (1, 2, 13))],
    "bodies-of-one-token": [(11, (1, 8, 1))],
}
FACTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "initializer_range": 0.2,
}
"""Settings of a small hybrid."""
EXPERTS = {
    "qwen3_moe": {name: fact for name, fact in FACTS.items() if name != "layer_types"} | TINY_FACTS["qwen3_moe"],
    "qwen3_5_moe_text": TINY_FACTS["qwen3_5_moe_text"] | FACTS,
}
"""Those of small models with experts."""
PLAIN = {"plain": [(0, (70, 13)), (0, (5,))], "single-tokens": [(0, (1, 9, 2, 1))]}


class Wide:
    """The module torch, whose float32 is float64: transformers' delta nets and routers compute in float32 always."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def wide(monkeypatch):
    """Let every float32 inside the model be a float64."""
    for module in (modeling_qwen3_5, modeling_qwen3_5_moe, modeling_qwen3_moe):
        monkeypatch.setattr(module, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    # torch's grouped product takes no float64; transformers' own does the same, expert by expert.
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)


def make_model(
    attention: str = VARLEN_ATTENTION, dtype: torch.dtype = torch.float32, family: str = "qwen3_5_text", **facts
):
    config = AutoConfig.for_model(family, **EXPERTS.get(family, FACTS) | facts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for name, weights in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.constant_(weights, -3)  # else the state forgets within a few tokens, and a leak would be small
    prepare_delta_nets(model)
    return model


def run_packed(model, packs, packing: str, change=None, **fields):
    """The summed loss and the gradients of a batch that is collated as in training."""
    model.zero_grad()
    attention = model.config._attn_implementation
    layout = collator_layout(attention, packing)
    batch = PackCollator(layout, 0, additive=attention == "eager", delta_levels=True, **fields)(packs)
    labels = batch.pop("labels")
    del batch["loss_weights"], batch["trained_index"]
    if change:
        change(batch)
    logits = model(**batch, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def differences(model, packs, separate, packing: str, **options) -> tuple[float, float]:
    """The relative differences of the loss, and of the gradient that differs most; alone, experts run in a loop."""
    packed = run_packed(model, packs, packing, **options)
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    alone = run_separately(model, separate)
    model.set_attn_implementation(attention)
    model.config._experts_implementation = experts
    worst = max(
        (ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in zip(packed[1], alone[1], strict=True)
    )
    return abs(packed[0] / alone[0] - 1).item(), worst.item()


ATTENTIONS = [VARLEN_ATTENTION, "sdpa", "eager"]
HYBRIDS = ["qwen3_5_text", "qwen3_5_moe_text"]
FAMILIES = [*HYBRIDS, "qwen3_moe"]
CASES = [(shape, "shared_prefix", attention, HYBRIDS[0]) for shape in SHARED for attention in ATTENTIONS[:2]]
CASES += [("one-prefix", "shared_prefix", "eager", HYBRIDS[0])]
CASES += [(shape, "best_fit", attention, HYBRIDS[0]) for shape in PLAIN for attention in ATTENTIONS]
CASES += [
    (shape, packing, attention, family)
    for family in FAMILIES[1:]
    for shape, packing in (("several-prefixes", "shared_prefix"), ("plain", "best_fit"))
    for attention in ATTENTIONS[:2]
]


@pytest.mark.parametrize(("shape", "packing", "attention", "family"), sampled(CASES, 3))
def test_loss_and_gradients_are_those_of_separate_sequences(wide, shape, packing, attention, family):
    model = make_model(attention, torch.float64, family)
    loss, gradient = differences(model, *make_packs((SHARED | PLAIN)[shape]), packing)
    assert loss < 1e-9 and gradient < 1e-9


@pytest.mark.parametrize(("shape", "packing"), [("one-prefix", "shared_prefix"), ("plain", "best_fit")])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_to_its_own_rounding(shape, packing, family):
    model = make_model(family=family, initializer_range=0.1)
    loss, gradient = differences(model, *make_packs((SHARED | PLAIN)[shape]), packing)
    assert loss < 1e-6 and gradient < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_padding_of_a_row_of_fixed_length_changes_nothing(wide, family):
    packs, separate = make_packs(SHARED["several-prefixes"])
    model = make_model(dtype=torch.float64, family=family)
    loss, gradient = differences(model, packs, separate, "shared_prefix", length=150)
    assert loss < 1e-9 and gradient < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(wide, mode, family):
    model = make_model(dtype=torch.float64, family=family).train()
    packs, separate = make_packs(SHARED["several-prefixes"])
    checkpoint_activations(model, mode)
    loss, gradient = differences(model, packs, separate, "shared_prefix")
    assert loss < 1e-9 and gradient < 1e-9


def test_adapters_on_all_projections_get_the_same_gradients(wide):
    model = make_model(dtype=torch.float64)
    names = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss, gradient = differences(adapted.double(), *make_packs(SHARED["several-prefixes"]), "shared_prefix")
    assert loss < 1e-9 and gradient < 1e-9


def test_mixed_precision_stays_near(monkeypatch):
    model = make_model()
    packs, _ = make_packs(SHARED["several-prefixes"])
    exact, _ = run_packed(model, packs, "shared_prefix")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = run_packed(model, packs, "shared_prefix")
    assert abs(loss / exact - 1) < 0.02
    assert all(each.isfinite().all() for each in gradients)


def forget_state(level: dict) -> None:
    level["parents"].zero_()


def forget_inputs(level: dict) -> None:
    for block in level["blocks"]:
        block[:, : gated_delta_net.HISTORY] = 0


def one_document(batch: dict) -> None:
    """The levels of a row whose documents are one."""
    batch["delta_levels"] = [level._asdict() for level in build_delta_levels([[batch["input_ids"].numel()]], [0])]


def each_level(change):
    return lambda batch: [change(level) for level in batch["delta_levels"]]


def restart_positions(batch: dict) -> None:
    batch["position_ids"] = torch.where(batch["position_ids"] > 11, 0, batch["position_ids"])


@pytest.mark.parametrize(
    "change",
    [each_level(forget_state), each_level(forget_inputs), one_document, restart_positions],
    ids=["recurrence", "convolution", "no isolation", "positions"],
)
def test_a_broken_isolation_is_seen(wide, change):
    packs, separate = make_packs(SHARED["several-prefixes"])
    loss, gradient = differences(make_model(dtype=torch.float64), packs, separate, "shared_prefix", change=change)
    assert loss > 1e-6 and gradient > 1e-3


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("experts", [True, False], ids=["experts of another token", "positions"])
def test_what_experts_must_not_see_is_seen(wide, family, experts):
    model = make_model(dtype=torch.float64, family=family)

    def change(batch: dict) -> None:
        if not experts:
            return restart_positions(batch)
        handle = routers(model)[1].register_forward_hook(
            lambda _, __, output: handle.remove() or (*output[:2], output[2].roll(1, 0))
        )

    loss, gradient = differences(model, *make_packs(SHARED["several-prefixes"]), "shared_prefix", change=change)
    assert loss > 1e-6 and gradient > 1e-3


def leak_inputs(batch: dict) -> None:
    """Give the first tokens of each document the inputs of the tokens before it in the row."""
    for block in batch["delta_levels"][0]["blocks"]:
        for row in block:
            row[: gated_delta_net.HISTORY] = (row[3] + torch.arange(-3, 0)).clamp(min=0)


def leak_state(batch: dict) -> None:
    """Let each document continue the one before it, with its own inputs of the convolution."""
    tokens = [range(70), range(70, 83), range(83, 88)]
    levels = [[(each, number - 1)] for number, each in enumerate(tokens)]
    batch["delta_levels"] = [level._asdict() for level in build_levels(levels)]
    each_level(forget_inputs)(batch)


@pytest.mark.parametrize("leak", [leak_inputs, leak_state])
def test_a_leak_between_the_documents_of_a_plain_pack_is_seen(wide, leak):
    model = make_model(dtype=torch.float64)
    loss, gradient = differences(model, *make_packs(PLAIN["plain"]), "best_fit", change=leak)
    assert loss > 1e-6 and gradient > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_packs_are_those_of_separate_sequences(wide, family):
    """Padding on the right changes neither loss nor gradients."""
    documents = [(0, (70,)), (0, (5,)), (0, (13,))]
    model = make_model("sdpa", torch.float64, family)
    loss, gradient = differences(model, *make_packs(documents), "off")
    assert loss < 1e-9 and gradient < 1e-9


def test_preparing_changes_neither_names_nor_weights_nor_other_calls():
    model = make_model("eager")
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(VOCABULARY, (2, 9))
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(plain.generate(input_ids=ids, max_new_tokens=5), model.generate(input_ids=ids, max_new_tokens=5))
    prepare_delta_nets(model, "torch")
    nets = [module for module in model.modules() if isinstance(module, LeveledDeltaNet)]
    assert [net.kernel for net in nets] == ["torch"] * 2
    assert all(isinstance(net, modeling_qwen3_5.Qwen3_5GatedDeltaNet) for net in nets)


def test_kept_states_are_continued_exactly(wide):
    """States at the ends of segments, given back later, continue them: three turns of three dialogues."""
    layer = next(each for each in make_model(dtype=torch.float64).modules() if isinstance(each, LeveledDeltaNet))
    lengths = [(5, 1, 4), (70, 2, 1), (1, 1, 66)]
    hidden = [torch.randn(sum(each), 32, dtype=torch.float64) for each in lengths]
    whole = [run_levels(layer, each, build_levels([[(range(len(each)), -1)]]))[0] for each in hidden]
    states, parts = None, [[], [], []]
    for turn in range(3):
        rows = [each.split(own)[turn] for each, own in zip(hidden, lengths, strict=True)]
        start, segments = 0, []
        for number, row in enumerate(rows):
            segments.append((range(start, start + len(row)), number if turn else -1))
            start += len(row)
        level = build_levels([segments], 3 if turn else 0)
        output, states = run_levels(layer, torch.cat(rows), level, states, keep=True)
        for own, part in zip(parts, output.split([len(row) for row in rows]), strict=True):
            own.append(part)
    for own, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(own), expected, rtol=1e-9, atol=1e-9)


def test_tokens_in_no_segment_get_zeros_and_change_no_other():
    layer = next(each for each in make_model().modules() if isinstance(each, LeveledDeltaNet))
    hidden = torch.randn(8, 32)
    output, _ = run_levels(layer, hidden, build_levels([[((1, 2, 5), -1), ((6,), -1)]]))
    apart, _ = run_levels(layer, hidden[[1, 2, 5]], build_levels([[(range(3), -1)]]))
    torch.testing.assert_close(output[[1, 2, 5]], apart)
    assert not output[[0, 3, 4, 7]].any() and output[6].any()


def stand_in(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens: Any, **options):
    """flash-linear-attention's rules, as transformers' torch function segment by segment."""
    assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int32 and options == {"use_qk_l2norm_in_kernel": True}
    assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
    rule = gated_delta_net._torch_rules(modeling_qwen3_5.Qwen3_5GatedDeltaNet)[0]
    outputs, states = [], []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        output, state = rule(
            *(each[:, start:end] for each in (q, k, v)),
            g=g[:, start:end],
            beta=beta[:, start:end],
            initial_state=None if initial_state is None else initial_state[number : number + 1],
            output_final_state=True,
            **options,
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Functions in the place of flash-linear-attention's, which run on GPUs only; the names of those called."""
    called = []
    module = type(sys)("fla.ops.gated_delta_rule")

    def named(name):
        return lambda *tensors, **options: called.append(name) or stand_in(*tensors, **options)

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        setattr(module, name, named(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


@pytest.mark.parametrize("shape", list(SHARED | PLAIN))
def test_the_gpu_path_feeds_its_kernel_the_same_segments(wide, kernels, shape):
    model = make_model(dtype=torch.float64)
    prepare_delta_nets(model, "fla")
    packing = "shared_prefix" if shape in SHARED else "best_fit"
    loss, gradient = differences(model, *make_packs((SHARED | PLAIN)[shape]), packing)
    assert loss < 1e-9 and gradient < 1e-9
    assert set(kernels) == {"chunk_gated_delta_rule"}  # the other one has no backward pass


def test_the_gpu_path_decodes_by_the_kernel_for_single_tokens(wide, kernels):
    layer = next(each for each in make_model(dtype=torch.float64).modules() if isinstance(each, LeveledDeltaNet))
    hidden = torch.randn(9, 32, dtype=torch.float64)
    prompts = build_levels([[(range(4), -1), (range(4, 7), -1)]])
    token = build_levels([[((0,), 0), ((1,), 1)]], 2)
    found = []
    for layer.kernel in ("torch", "fla"):
        with torch.no_grad():
            states = run_levels(layer, hidden[:7], prompts, keep=True)[1]
            found.append(run_levels(layer, hidden[7:], token, states, keep=True))
    assert kernels == ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
    for ours, theirs in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Around the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("packing", ["shared_prefix", "best_fit"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_leak_check_accepts_the_levels(attention, packing, dtype):
    checked_collator(make_model(attention), packing, 0, torch.device("cpu"), dtype)


def without(change):
    """A model whose batches are changed on their way into it."""

    class Changed(Qwen3_5ForCausalLM):
        def forward(self, **inputs):
            change(inputs)
            return super().forward(**inputs)

    return Changed


@pytest.mark.parametrize(
    "change",
    [each_level(forget_state), each_level(forget_inputs), lambda batch: batch.pop("delta_levels", None)],
    ids=["recurrence", "convolution", "no isolation"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_leak_check_sees_a_broken_isolation(change, dtype):
    def changed(batch):
        if "delta_levels" in batch:
            change(batch)

    model = without(changed)(make_model().config)
    with pytest.raises(InputError, match="logits differ from those of separate documents"):
        checked_collator(model, "shared_prefix", 0, torch.device("cpu"), dtype)


def test_the_leak_check_runs_the_kernel_of_the_training():
    model = make_model()
    prepare_delta_nets(model, "torch")
    layers = _probe(model, torch.device("cpu")).modules()
    assert {each.kernel for each in layers if isinstance(each, LeveledDeltaNet)} == {"torch"}


def test_a_gpu_without_its_kernel_is_refused_unless_asked_for(monkeypatch):
    hybrid, plain = {"linear_attention": 3, "full_attention": 1}, {"full_attention": 4}
    assert check_delta_kernel("auto", hybrid) == "functions of torch"  # a CPU needs none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_delta_kernel("torch", hybrid)
    check_delta_kernel("auto", plain)
    with pytest.raises(InputError, match=r"^model.delta_kernel=auto: flash-linear.* is not installed: .*=torch"):
        check_delta_kernel("auto", hybrid)
    # One that would compute as many heads as there are keys, and leave the rest of the output as it was.
    versions = iter(["0.4.2", "0.5.0"])
    monkeypatch.setattr("importlib.metadata.version", lambda _: next(versions))
    with pytest.raises(InputError, match=r"^model.delta_kernel=auto: flash-linear-attention 0.4.2 takes no key heads"):
        check_delta_kernel("auto", hybrid)
    assert check_delta_kernel("auto", hybrid) == "flash-linear-attention 0.5.0"


INSTALLED = """
import torch
import transformers
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model("qwen3_5_text", **{facts})
model, ids = AutoModelForCausalLM.from_config(config), torch.arange(9)[None]
try:
    model(ids)
    print("the kernel ran")
except RuntimeError as error:
    print(error)
prepare_delta_nets(model)
cache = transformers.DynamicCache(config=model.config)
whole = model(ids).logits
model(ids[:, :-1], past_key_values=cache)
print(torch.allclose(model(ids[:, -1:], past_key_values=cache).logits[0, -1], whole[0, -1], atol=1e-4))
"""


@pytest.mark.slow
def test_kernels_that_are_installed_without_a_gpu_are_not_called(tmp_path):
    rules = tmp_path / "fla" / "ops" / "gated_delta_rule"
    rules.mkdir(parents=True)
    for package in (rules, rules.parent, rules.parents[1]):
        (package / "__init__.py").touch()
    kernel = "def {}(*_, **__):\n    raise RuntimeError('0 active drivers')\n"
    names = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    (rules / "__init__.py").write_text("".join(map(kernel.format, names)))
    script = INSTALLED.format(facts=FACTS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout.split("\n")[:2] == ["0 active drivers", "True"], done.stdout + done.stderr


def test_a_gpu_that_is_asked_for_torch_calls_no_kernel_in_transformers_own_layers(monkeypatch):
    rule = functools.wraps(modeling_qwen3_5.torch_chunk_gated_delta_rule)(
        lambda *_, **__: pytest.fail("the kernel ran")
    )
    for name in ("torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(modeling_qwen3_5, name, getattr(modeling_qwen3_5, name))  # to be put back
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gated_delta_net, "has_fla", lambda: True)
    model = make_model()
    model.set_attn_implementation("eager")
    prepare_delta_nets(model)
    with pytest.raises(pytest.fail.Exception, match="the kernel ran"):
        model(torch.arange(9)[None])
    prepare_delta_nets(model, "torch")
    model(torch.arange(9)[None])


def test_a_model_that_replies_on_a_gpu_needs_its_kernel_unless_asked_for(monkeypatch, tmp_path):
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"^evaluation.delta_kernel=auto: flash-linear.* is not installed: .*=torch"):
        load_generator(str(tmp_path), None, EvaluationConfig())


@pytest.mark.parametrize(("family", "reason"), [("qwen3_5_text", "gated delta nets"), ("qwen3_moe", "experts")])
def test_the_layers_of_hybrids_and_experts_are_not_compiled(caplog, family, reason):
    hybrid = model_dims(make_model(family=family).config)
    with caplog.at_level("INFO"):
        assert resolve_compile("auto", "2", VARLEN_ATTENTION, "cuda", hybrid) == "off"
    assert f"note: the layers are not compiled with {reason}" in caplog.text
    with pytest.raises(InputError, match=rf"trainer.compile=layers with {reason}.*set trainer.compile=off"):
        resolve_compile("layers", "2", VARLEN_ATTENTION, "cuda", hybrid)
    with pytest.raises(InputError, match=rf"^trainer.precision=fp8: .* \({reason}.*\): set trainer.precision=bf16$"):
        resolve_compile("auto", "2", VARLEN_ATTENTION, "cuda", hybrid, float8=True)


def test_a_convolution_of_another_width():
    with pytest.raises(InputError, match="linear_conv_kernel_dim=5: a gated delta net may convolve at most 4"):
        make_model(linear_conv_kernel_dim=5)
    loss, gradient = differences(
        make_model(linear_conv_kernel_dim=2, initializer_range=0.1), *make_packs(SHARED["one-prefix"]), "shared_prefix"
    )
    assert loss < 1e-6 and gradient < 1e-5


def test_a_layer_with_hooks_of_accelerate_runs_the_levels():
    """accelerate, which spreads a model over GPUs, calls the forward pass that a layer had before."""
    model = make_model()
    packs, _ = make_packs(SHARED["one-prefix"])
    expected = run_packed(model, packs, "shared_prefix")[0]
    for module in model.modules():
        if isinstance(module, LeveledDeltaNet):
            gated_delta_net._change_class(module, modeling_qwen3_5.Qwen3_5GatedDeltaNet)
            gated_delta_net._change_class(module.conv1d, nn.Conv1d)
            add_hook_to_module(module, ModelHook())
            add_hook_to_module(module.conv1d, ModelHook())
    assert run_packed(model, packs, "shared_prefix")[0].item() != pytest.approx(expected.item(), rel=1e-5)
    prepare_delta_nets(model)
    assert run_packed(model, packs, "shared_prefix")[0] == expected
