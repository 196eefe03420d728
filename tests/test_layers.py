"""Compiled layers train as eager ones do, by one graph; selective checkpointing multiplies nothing twice."""

import functools
import random
from collections import Counter
from dataclasses import replace

import peft
import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from csc_train.errors import InputError
from csc_train.models.attention import select  # noqa: F401  registers our attention
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.layers import checkpoint_activations, compile_layers, mark_varying, recompiles
from csc_train.packing.collator import PackCollator, run_bounds
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.compatibility import resolve_compile
from csc_train.training.config import CHECKPOINTING, TrainerConfig

TOLERANCE = 1e-5
PACKS = 20


@pytest.fixture(autouse=True)
def no_graphs():
    """No test finds graphs of another one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def packs() -> PackedDataset:
    """Packs that differ in length and in number of documents."""
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))
    rng = random.Random(0)
    encoded = [template.encode(random_dialogue(rng)) for _ in range(3 * PACKS)]
    packs, _ = pack_dialogues(encoded, PackingConfig("shared_prefix", 600))
    rows = packs.document_lengths[:PACKS]
    assert len(rows) == PACKS and len({sum(lengths) for lengths in rows}) > PACKS / 2
    assert len({len(lengths) for lengths in rows}) > 1
    return packs


@pytest.fixture(scope="module")
def collator(packs) -> PackCollator:
    """Pads every row to the longest."""
    length = max(map(sum, packs.document_lengths))
    return PackCollator("varlen", 0, bounds=run_bounds([packs], 1, length), length=length)


@pytest.fixture
def without_kernels(monkeypatch):
    """Graphs are made and differentiated as always, but run without compiled kernels, which take long to make."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def tiny(model_type: str = "qwen2", dropout: float | None = None):
    """A tiny model in training mode; with adapters if there is a dropout."""
    torch.manual_seed(0)
    config = tiny_config(model_type, small_tokenizer("qwen2_5"), 0.1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=VARLEN_ATTENTION)
    if dropout is not None:
        adapters = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "lora_B" in name:  # they begin with zero, which hides errors
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def forward(model, batch) -> torch.Tensor:
    mark_varying(batch)
    torch.manual_seed(1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "varlen_metadata")}
    states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return (states * torch.linspace(-1, 1, states.numel()).view_as(states)).mean()


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """The loss of a batch, and the gradient of each trained parameter."""
    model.zero_grad()
    loss = forward(model, batch)
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach()} | found


def difference(one: dict, other: dict) -> float:
    """The largest norm of a difference over the norm. A key's bias shifts a whole softmax, so it has no gradient."""
    assert one.keys() == other.keys()
    return max(
        ((one[name] - other[name]).norm() / one[name].norm()).item() for name in one if "k_proj.bias" not in name
    )


# Compiled layers


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dropout"), [("off", None), ("selective", 0.3)], ids=["full", "lora"])
def test_compiled_layers_train_as_eager_ones_by_one_graph(packs, collator, mode, dropout, tmp_path):
    eager, compiled = tiny(dropout=dropout), tiny(dropout=dropout)
    checkpoint_activations(compiled, mode)
    compile_layers(compiled)
    for number in range(PACKS):
        batch = collator([packs[number]])
        found = gradients(compiled, batch)
        if number % 5 == 0:
            assert difference(gradients(eager, batch), found) < TOLERANCE
    assert recompiles() == 0
    for model, name in ((eager, "eager"), (compiled, "compiled")):
        model.save_pretrained(tmp_path / name)
    names = [load_file(next((tmp_path / name).glob("*.safetensors"))).keys() for name in ("eager", "compiled")]
    assert names[0] == names[1]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # as in a validation
        assert forward(compiled.eval(), batch) == forward(eager.eval(), batch)
    gradients(compiled.train(), batch)
    assert recompiles() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dropout", "mode"),
    [("qwen2", None, "full"), ("qwen3", None, "selective"), ("llama", None, "off"), ("llama", 0.3, "off")],
)
def test_layers_of_every_family_are_one_graph(packs, collator, without_kernels, model_type, dropout, mode):
    eager, compiled = tiny(model_type, dropout), tiny(model_type, dropout)
    checkpoint_activations(compiled, mode)
    compile_layers(compiled)
    for number in range(3):
        batch = collator([packs[number]])
        assert difference(gradients(eager, batch), gradients(compiled, batch)) < TOLERANCE
    assert recompiles() == 0


@pytest.mark.slow
def test_rows_of_other_lengths_and_unmarked_sizes_are_compiled_anew(packs, collator, without_kernels, monkeypatch):
    model = tiny()
    compile_layers(model)
    for number in range(2):
        forward(model, collator([packs[number]]))
    assert recompiles() == 0
    forward(model, replace(collator, length=None)([packs[0]]))
    assert recompiles() == 1
    torch._dynamo.reset()
    compile_layers(model)
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    for number in range(2):
        forward(model, collator([packs[number]]))
    assert recompiles() == 1


@pytest.mark.parametrize(
    ("mode", "stage", "attention", "message"),
    [
        ("layers", "3", "varlen", "trainer.compile=layers with zero.stage=3: .*; or set trainer.compile=off"),
        ("layers", "off", "sdpa", "trainer.compile=layers with attention sdpa: .*; or set trainer.compile=off"),
        ("auto", "3", "varlen", "the layers are not compiled with zero.stage=3"),
    ],
)
def test_what_cannot_be_compiled_is_refused_or_off_by_name(said, mode, stage, attention, message):
    if mode == "layers":
        with pytest.raises(InputError, match=message):
            resolve_compile(mode, stage, attention, "cpu")
    else:
        assert resolve_compile(mode, stage, attention, "cuda") == "off"
        assert message in said[-1]


def test_without_a_compiler_layers_are_refused(monkeypatch):
    assert resolve_compile("layers", "2", "varlen", "cpu") == "layers"
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(InputError, match=r"trainer.compile=layers with no C\+\+ compiler: install g\+\+"):
        resolve_compile("layers", "2", "varlen", "cpu")
    assert resolve_compile("auto", "2", "varlen", "cuda") == "off"
    assert resolve_compile("auto", "2", "varlen", "cpu") == "off"


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"compile": "layer"}, "choose one of auto, off, layers. Did you mean 'layers'?"),
        ({"gradient_checkpointing": "selectiv"}, "Did you mean 'selective'?"),
        ({"gradient_checkpointing": "true"}, "choose one of off, selective, full, auto."),
    ],
)
def test_unknown_modes_are_refused_with_the_nearest(setting, hint):
    ((name, value),) = setting.items()
    with pytest.raises(InputError) as caught:
        TrainerConfig(**setting)
    assert str(caught.value).startswith(f"trainer.{name}={value}: ") and hint in str(caught.value)


# Checkpointing


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dropout"), [("qwen2", None), ("qwen2", 0.3), ("qwen3_moe", None)], ids=["full", "lora", "experts"]
)
def test_checkpointing_changes_no_bit_and_selective_multiplies_nothing_twice(packs, collator, family, dropout):
    batch, found, calls = collator([packs[0]]), {}, {}
    for mode in CHECKPOINTING:
        model = tiny(family, dropout)
        model.enable_input_require_grads()
        checkpoint_activations(model, mode)
        with Counts() as counts:
            found[mode] = gradients(model, batch)
        calls[mode] = counts.calls
    for mode in CHECKPOINTING:
        assert all(torch.equal(found[mode][name], found["off"][name]) for name in found["off"])
    aten = torch.ops.aten
    attention = torch.ops.csc_train.varlen_attention.default
    products = (aten.mm.default, aten.addmm.default, aten._grouped_mm.default)
    assert [calls[mode][attention] for mode in CHECKPOINTING] == [2, 2, 4]
    off, selective, full = (sum(calls[mode][each] for each in products) for mode in CHECKPOINTING)
    # An adapter's second matrix gives a wide output from a narrow input: it is multiplied again, except the last.
    assert selective == off + (0 if dropout is None else 2 * 6) < full
    assert calls["selective"][aten.silu.default] == 2 * calls["off"][aten.silu.default]


def test_experts_multiply_in_the_dtype_of_autocast():
    """torch's rules of autocast leave grouped products out; the gradients of fp32 weights stay fp32."""
    experts = tiny("qwen3_moe").model.layers[0].mlp
    hidden, dtypes = torch.randn(1, 40, 32, requires_grad=True), []
    fallback = torch.ops.transformers.grouped_mm_fallback

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._grouped_mm.default, fallback.default):
                dtypes.append({each.dtype for each in args[:2]})
            return func(*args, **(kwargs or {}))

    exact = experts(hidden).detach()
    with Dtypes(), torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden)
        fallback(hidden[0], torch.randn(1, 32, 8), torch.tensor([40]))
    assert dtypes == [{torch.bfloat16}] * 3
    assert 0 < (output - exact).norm() / exact.norm() < 0.02
    gradients = torch.autograd.grad((output * exact).sum(), list(experts.experts.parameters()))
    assert [each.dtype for each in gradients] == [torch.float32] * 2 and all(each.any() for each in gradients)
