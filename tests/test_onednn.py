"""Linear layers that oneDNN multiplies."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from csc_train.inference.config import InferenceConfig
from csc_train.inference.hf import load_final_model
from csc_train.models import onednn
from csc_train.models.onednn import use_onednn
from tests.test_chat import checkpoint  # noqa: F401  a fixture


class Derived(nn.Linear):
    pass


@pytest.fixture(autouse=True)
def amd(monkeypatch):
    """The machine counts as one whose default library is slow."""
    monkeypatch.setattr(onednn, "_is_intel", lambda: False)


def test_an_intel_cpu_keeps_its_own_library(monkeypatch):
    monkeypatch.setattr(onednn, "_is_intel", lambda: True)
    layer = nn.Linear(8, 8)
    use_onednn(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_those_of_torch(bias):
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias))
    layer = copy.deepcopy(plain)
    use_onednn(layer)
    assert type(layer[0]) is not nn.Linear
    x = torch.randn(3, 7, 24)
    with torch.inference_mode():
        for inputs in (x, x[:, -1:], x.transpose(0, 1), x[0, 0], x[:0]):
            torch.testing.assert_close(layer(inputs), plain(inputs))
    assert layer.state_dict().keys() == plain.state_dict().keys()


def test_with_gradients_a_layer_multiplies_as_before():
    plain = nn.Linear(24, 40)
    layer = copy.deepcopy(plain)
    use_onednn(layer)
    x = torch.randn(5, 24)
    for each in (plain, layer):
        each(x).sum().backward()
    assert torch.equal(plain(x), layer(x))
    assert torch.equal(plain.weight.grad, layer.weight.grad)


@pytest.mark.parametrize(
    "layer", [Derived(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, device="meta")]
)
def test_other_layers_stay(layer):
    before = type(layer)
    use_onednn(layer)
    assert type(layer) is before


@pytest.mark.slow
def test_a_model_that_replies_uses_it(checkpoint):  # noqa: F811
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = load_final_model(str(checkpoint), InferenceConfig(dtype="fp32")).model
    assert any(type(each) is not nn.Linear for each in model.modules() if isinstance(each, nn.Linear))
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
