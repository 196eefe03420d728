"""The likelihood of the 12 labels, against one plain forward pass for each label."""

import random

import pytest
import torch
from conftest import random_dialogue, real_tokenizer, remember, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache

from csc_train.data.strategies import STRATEGIES
from csc_train.template import likelihood
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.likelihood import dialogue_log_likelihoods, log_likelihoods_from_kv_cache

SCENES = [
    pytest.param(
        (real_tokenizer, "qwen2_5", "qwen2"), marks=[pytest.mark.real_tokenizer, pytest.mark.slow], id="Qwen2.5"
    ),
    pytest.param((small_tokenizer, "llama3_1", "llama"), id="small Llama"),
    pytest.param((small_tokenizer, "qwen3_5", "qwen3_5_text"), id="small Qwen3.5"),
    pytest.param((small_tokenizer, "qwen3", "qwen3_moe"), marks=pytest.mark.slow, id="small Qwen3 with experts"),
    pytest.param((small_tokenizer, "qwen3_5", "qwen3_5_moe_text"), id="small Qwen3.5 with experts"),
]


@pytest.fixture(scope="module", params=SCENES)
def scene(request):
    """A model, its template, a dialogue's ids, which of them are trained, and where the labels of its turns start."""
    load, chat_template, architecture = request.param
    tokenizer = load(chat_template)
    torch.manual_seed(1)
    model = remember(AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, 0.3))).eval()
    template = DialogueTemplate(tokenizer, chat_template, TemplateConfig())
    rng = random.Random(5)
    dialogue = next(each for each in iter(lambda: random_dialogue(rng), None) if each.supporter_turns == [1, 3, 5])
    example = template.encode(dialogue)
    # Without most of the system prompt, which would only take time.
    cut = int(example.turn_offsets[0]) - 20
    header = len(template.supporter_header_ids)
    starts = [int(example.turn_offsets[turn]) + header - cut for turn in dialogue.supporter_turns]
    return model, template, example.input_ids[cut:].tolist(), example.trained[cut:], starts


def held(cache):
    """What a cache holds, layer by layer."""
    parts = [(layer.conv_states[0], layer.recurrent_states[0]) if hasattr(layer, "conv_states") else (layer.keys,)
             for layer in cache.layers]  # fmt: skip
    return [tensor.clone() for part in parts for tensor in part]


def slow(model, template, prompt):
    """[12]: each label behind the prompt in a forward pass of its own."""
    result = []
    for strategy in STRATEGIES:
        label = template.tokenizer.encode(f"[{strategy.zh}]", add_special_tokens=False)
        keep = len(label) + 1
        scores = model(torch.tensor([[*prompt, *label]]), use_cache=False, logits_to_keep=keep).logits[0]
        result.append(sum(scores[place].log_softmax(-1)[token] for place, token in enumerate(label)))
    return torch.stack(result)


@pytest.mark.slow
@pytest.mark.parametrize("max_width", [9, 10**9, 1])
@torch.inference_mode()
def test_likelihoods_equal_one_forward_for_each_label(scene, max_width):
    model, template, ids, trained, starts = scene
    expected = torch.stack([slow(model, template, ids[:start]) for start in starts])
    assert min(len(label) for label in template.label_ids.values()) > 1 and len(set(starts)) == 3
    targets = trained.nonzero()[0].tolist()
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, facts: widths.append(facts["input_ids"].shape[1]), with_kwargs=True
    )
    own, tree = dialogue_log_likelihoods(model, template, ids, starts, targets, max_width)
    bare, _ = dialogue_log_likelihoods(model, template, ids, [], targets, max_width)
    hook.remove()
    labels = sum(len(label) - 1 for label in template.label_ids.values())
    assert max(widths) <= max(max_width, labels) or max_width > len(ids) > max(widths) - labels * len(starts) - 1
    assert torch.allclose(bare, own, atol=1e-4, rtol=0)
    assert torch.allclose(tree, expected, atol=1e-4, rtol=0)
    scores = model(torch.tensor([ids]), use_cache=False).logits[0]
    plain = torch.stack([scores[target - 1].log_softmax(-1)[ids[target]] for target in targets])
    assert torch.allclose(own, plain, atol=1e-4, rtol=0)
    # Otherwise nothing above could have gone wrong: labels and turns differ, by far more than the tolerance.
    assert expected.std(0).min() > 0.1 and expected.std(1).min() > 0.1
    assert not torch.allclose(slow(model, template, ids[: starts[0] + 1]), expected[0], atol=0.1)


@torch.inference_mode()
def test_labels_behind_a_cache_equal_those_of_the_dialogue_and_leave_it_as_it_was(scene):
    model, template, ids, _, starts = scene
    _, expected = dialogue_log_likelihoods(model, template, ids, starts)
    cache = DynamicCache(config=model.config)
    for begin, start, row in zip([0, *starts], starts, expected, strict=False):
        logits = model(torch.tensor([ids[begin:start]]), past_key_values=cache, use_cache=True).logits[0, -1]
        before = held(cache)
        # Twice, since it would not be the same behind a cache that was left longer.
        for _ in range(2):
            likelihoods = log_likelihoods_from_kv_cache(model, template, cache, logits)
            assert torch.allclose(likelihoods, row, atol=1e-4, rtol=0)
        assert all(torch.equal(now, then) for now, then in zip(held(cache), before, strict=True))


@torch.inference_mode()
def test_labels_behind_the_cache_of_a_narrower_convolution():
    """transformers caches as many inputs as it sees."""
    template = DialogueTemplate(small_tokenizer("qwen3_5"), "qwen3_5", TemplateConfig())
    config = tiny_config("qwen3_5_text", template.tokenizer, 0.3, linear_conv_kernel_dim=2)
    model, cache, ids = AutoModelForCausalLM.from_config(config).eval(), DynamicCache(config=config), [5, 6, 7, 8, 9]
    logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    expected = dialogue_log_likelihoods(model, template, ids, [5])[1][0]
    assert torch.allclose(log_likelihoods_from_kv_cache(model, template, cache, logits), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_no_label_sees_another_nor_what_comes_later(scene):
    model, template, ids, _, starts = scene
    _, alone = dialogue_log_likelihoods(model, template, ids[: starts[1]], [starts[1]])
    _, together = dialogue_log_likelihoods(model, template, ids, starts)
    assert torch.allclose(alone[0], together[1], atol=1e-4, rtol=0)
    model.set_attn_implementation("eager")
    try:
        _, eager = dialogue_log_likelihoods(model, template, ids, starts)
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.allclose(eager, together, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_labels_leak_into_each_other_through_an_undivided_state(scene, monkeypatch):
    """Negative control: gated delta nets run on through the labels unless they are told where those fork."""
    model, template, ids, _, starts = scene
    _, right = dialogue_log_likelihoods(model, template, ids, starts)
    monkeypatch.setattr(likelihood, "_delta_levels", lambda *_, **__: {})
    _, wrong = dialogue_log_likelihoods(model, template, ids, starts)
    assert ((right - wrong).abs().max() > 0.1) == model.config.model_type.startswith("qwen3_5")


def test_attention_that_makes_its_own_mask_is_refused(scene):
    model, template, ids, _, starts = scene
    model.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match="attention flash_attention_2 does not take a mask for each token"):
            dialogue_log_likelihoods(model, template, ids, starts)
    finally:
        model.config._attn_implementation = "sdpa"


@torch.inference_mode()
def test_no_index_is_a_tensor_that_could_be_moved_to_another_gpu(scene):
    """accelerate moves tensors among the arguments to a spread model's first GPU; its hidden states end on the last."""
    model, template, ids, trained, starts = scene
    asked = []
    hook = model.register_forward_pre_hook(lambda _, __, facts: asked.append(facts["logits_to_keep"]), with_kwargs=True)
    dialogue_log_likelihoods(model, template, ids, starts, trained.nonzero()[0].tolist())
    hook.remove()
    assert [type(each) for each in asked] == [list]
