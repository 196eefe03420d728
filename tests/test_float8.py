"""float8: what is converted, how far its losses are from fp32's, and where it is refused."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.launching.preflight.checks import check_zero_support
from csc_train.models import float8
from csc_train.models.config import AdapterConfig
from csc_train.models.float8 import float8_refusal
from csc_train.models.layers import convert_to_float8
from csc_train.models.precision import resolve_dtype, resolve_precision
from csc_train.training.compatibility import check_supported
from csc_train.training.config import TrainerConfig, ZeroConfig

IDS = torch.arange(64)[None] % 90


def model_of(dtype: torch.dtype = torch.float32, intermediate: int = 64):
    torch.manual_seed(0)
    config = tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.1, tie_word_embeddings=False)
    config.intermediate_size = intermediate
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.fixture
def torchao(monkeypatch):
    """torchao stands beside the environment: in it, peft would import it in every training, with warnings on a CPU."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "optional")
    if not os.environ.get("CI"):
        pytest.importorskip("torchao", reason="make test installs it")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoders_linear_layers_are_converted_and_nothing_else_changes(dtype):
    model = model_of(dtype, intermediate=72)  # which is no multiple of 16
    plain = copy.deepcopy(model)
    convert_to_float8(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "_proj" in name}
    assert {name for name, kind in kinds.items() if kind != "Float8Linear"} == {n for n in kinds if ".mlp." in n}
    assert type(model.lm_head) is torch.nn.Linear
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


@pytest.mark.usefixtures("torchao")
def test_losses_and_gradients_are_those_of_fp32_within_a_few_percent(tmp_path):
    model = model_of()
    plain = copy.deepcopy(model)
    convert_to_float8(model)
    losses = [each(IDS, labels=IDS).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01)
    assert losses[0].item() != losses[1].item()  # it did multiply in float8
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 0.3, name
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(saved(IDS).logits, plain(IDS).logits)


def test_a_machine_that_cannot_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(InputError, match=r"^trainer.precision=fp8: no GPU with CUDA is here; or choose .*=bf16$"):
        resolve_precision("fp8")
    assert resolve_dtype("fp8") is torch.bfloat16  # what the weights of its final model have
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert float8_refusal() == "A100 cannot multiply in float8, which takes compute capability 8.9 (Ada, Hopper)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda _: None)
    assert float8_refusal() == "torchao is not installed: run `pip install .[fp8]`"
    monkeypatch.undo()
    planned = compose("preflight", ["trainer.precision=fp8", "adapter=full", "cluster=gpu1"])
    assert check_zero_support(planned) == "adapter=full with stage 1, offload none, fp8"
    with pytest.raises(InputError, match="no GPU with CUDA is here"):
        check_zero_support(compose("preflight", ["trainer.precision=fp8", "adapter=full", "cluster=cpu1"]))


@pytest.mark.parametrize(("stage", "adapter"), [("off", "lora"), ("1", "qlora"), ("3", "full"), ("0", "full")])
def test_what_float8_does_not_go_with_is_refused(stage, adapter):
    with pytest.raises(InputError, match=rf"zero.stage={stage} with adapter.kind={adapter} in fp8: .*choose "):
        check_supported(ZeroConfig(stage), AdapterConfig(adapter), "adamw", "fp8")
    check_supported(ZeroConfig("1"), AdapterConfig(), "adamw", "fp8")


def test_an_unknown_precision_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"trainer.precision=fp9: .*fp8"):
        TrainerConfig(precision="fp9")
