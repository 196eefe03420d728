"""Decisions of routers, recorded in one forward pass and replayed in another."""

import pytest
import torch
from conftest import small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from csc_train.models.experts import recorded_decisions, replayed_decisions

IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_5_moe_text", "qwen3"])
@torch.inference_mode()
def test_replayed_decisions_are_those_recorded_and_an_error_says_how_far_from_the_own_ones(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, small_tokenizer("qwen3_5"), 0.5)).eval()
    with recorded_decisions(model) as decisions:
        logits = model(IDS).logits
    with replayed_decisions(model, decisions) as errors:
        assert torch.equal(model(IDS).logits, logits)
    assert errors == [0.0] * len(decisions) == [0.0] * (0 if architecture == "qwen3" else 2)
    if not decisions:
        return
    # Other experts of one token: the logits are others, and a replay tells how far the chosen ones are from the best.
    router = model.model.layers[0].mlp.gate
    others = [each.clone() for each in decisions]
    others[0][7, 0] = next(expert for expert in range(8) if expert not in decisions[0][7])
    seen = []
    hook = router.register_forward_hook(lambda *call: seen.append(call[-1][0]), prepend=True)
    with replayed_decisions(model, others) as errors:
        assert not torch.allclose(model(IDS).logits, logits, atol=1e-3)
    hook.remove()
    scores = seen[0][7]
    expected = (scores[decisions[0][7, 0]] - scores[others[0][7, 0]]) / seen[0].abs().max()
    assert errors[0] == pytest.approx(expected.item()) and errors[0] > 0.01
