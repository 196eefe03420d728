"""The loss of trained tokens: that of plain logits, exactly, in float32 at least, and without a wait for the device."""

from types import SimpleNamespace

import peft
import pytest
import torch
from test_varlen_attention import make_model, make_packs
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from csc_train.errors import InputError
from csc_train.packing.collator import PackCollator
from csc_train.training.leak_check import check_head
from csc_train.training.loss import CHUNK_CPU, add_loss_head, score_tokens
from csc_train.training.train_metrics import TrainMetrics
from csc_train.training.trainer import PackTrainer

TOKENS, VOCABULARY, WIDTH = 2 * CHUNK_CPU + 30, 50, 16
PACKS = [(11, (7, 13)), (4, (9, 2, 6)), (17, (8,))]


def tokens(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states, head weights, targets and token weights; more tokens than two chunks."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    return [
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(VOCABULARY, (TOKENS,)),
        torch.rand(TOKENS) + 0.1,
    ]


def differences(tensors: list[torch.Tensor], plain_weights: torch.Tensor | None = None) -> list[float]:
    """Of loss, gradients, log-probabilities and entropies of the head from those of plain logits: the largest, over the
    largest value."""
    hidden, weight, targets, weights = tensors
    scores = score_tokens(hidden, weight, targets, weights)
    (scores.loss * 3).backward()
    ours = [scores.loss * 3, hidden.grad, weight.grad, scores.log_probs, scores.entropy]
    hidden.grad = weight.grad = None
    logits = torch.nn.functional.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = cross_entropy(logits, targets, reduction="none")
    loss = (losses * (weights if plain_weights is None else plain_weights)).sum() * 3
    loss.backward()
    theirs = [loss, hidden.grad, weight.grad, -losses, torch.distributions.Categorical(logits=logits).entropy()]
    assert torch.equal(scores.is_top1, logits.argmax(-1) == targets) and scores.is_top1.any()
    return [
        float((own - their).detach().abs().max() / their.abs().max()) for own, their in zip(ours, theirs, strict=True)
    ]


def test_loss_gradients_and_metrics_are_those_of_plain_logits():
    assert max(differences(tokens())) < 1e-14
    assert max(differences(tokens(torch.float32))) < 1e-5
    # The negative control: a weight on the wrong token is no rounding error.
    wrong = differences(tokens(), plain_weights=tokens()[3].roll(1))
    assert min(wrong[:3]) > 1e-3 > max(wrong[3:])


def test_autocast_multiplies_in_bf16_and_keeps_the_loss_in_float32():
    made = tokens(torch.float32)
    hidden, weight, targets, weights = made
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(hidden, weight, targets, weights)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    assert {scores.loss.dtype, scores.log_probs.dtype, scores.entropy.dtype} == {torch.float32}
    expected = (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
    torch.testing.assert_close(scores.loss, expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert max(differences(made)[1:3]) < 0.02
        # Held in bf16, as by DeepSpeed: gradients come in the dtype of what they are of.
        low = [each.detach().bfloat16().requires_grad_() for each in made[:2]]
        score_tokens(low[0], low[1], targets, weights).loss.backward()
    assert {each.grad.dtype for each in low} == {torch.bfloat16}


def test_a_second_backward_pass_is_an_error():
    hidden, weight, targets, weights = tokens()
    loss = score_tokens(hidden, weight, targets, weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="gradients"):
        loss.backward()


def batch_of(layout: str) -> dict:
    packs = make_packs(PACKS if layout == "varlen" else [(0, bodies) for _, bodies in PACKS])[0]
    batch = PackCollator(layout, 0)(packs)
    batch["loss_weights"] *= torch.linspace(0.1, 2, batch["loss_weights"].numel()).view_as(batch["loss_weights"])
    return batch


@pytest.mark.parametrize("layout", ["varlen", "position_ids"])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_a_models_loss_and_every_gradient_are_those_of_its_logits(kind, layout):
    attention = "varlen" if layout == "varlen" else "sdpa"
    model = make_model("qwen2", attention, torch.float64, tie_word_embeddings=kind == "tied")
    base = model
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    add_loss_head(base)
    batch = batch_of(layout)
    labels, weights = batch["labels"], batch["loss_weights"]
    gradients = []
    for index in (batch["trained_index"], None, (batch["trained_index"] - 1).clamp(min=0)):
        model.zero_grad()
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
        inputs |= {"trained_index": index, "use_cache": False}
        if index is None:
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            loss = (cross_entropy(logits, labels[:, 1:].flatten(), reduction="none") * weights[:, 1:].flatten()).sum()
        else:
            loss = model(labels=labels.clamp(min=0), loss_weights=weights, **inputs).loss
        loss.backward()
        gradients.append([loss.detach(), *(each.grad for each in model.parameters() if each.requires_grad)])
        assert (base.get_output_embeddings().weight.grad is None) == (kind == "lora")
    ours, plain, one_off = gradients
    error = [max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(each, plain, strict=True) if b.any())
             for each in (ours, one_off)]  # fmt: skip
    assert error[0] < 1e-12
    assert error[1] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True], ids=["as-it-is", "planted-wait"])
def test_nothing_in_a_training_steps_loss_waits_for_the_device(monkeypatch, waits):
    """On fake tensors whatever needs a value (`.item()`, `.tolist()`, an index by a mask) raises."""
    batch = batch_of("position_ids") | {"token_and_pair_counts": (1.0, 1.0)}
    batch["token_groups"] = torch.ones_like(batch["input_ids"], dtype=torch.uint8)
    if waits:
        score = PackTrainer.compute_loss.__globals__["spread_nonfinite"]
        monkeypatch.setitem(
            PackTrainer.compute_loss.__globals__, "spread_nonfinite", lambda loss: score(loss) * loss.item()
        )
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(each) if torch.is_tensor(each) else each for name, each in batch.items()}
        model = make_model("qwen2", "sdpa", torch.float32)
        add_loss_head(model)
        metrics = TrainMetrics((1.0, 1.0, 1.0), torch.device("cpu"), bf16=False)
        arguments = SimpleNamespace(world_size=1, on_nonfinite="stop", neftune_alpha=None)
        trainer = SimpleNamespace(model=model.train(), metrics=metrics, args=arguments)

        def step():
            total = torch.ones(())
            PackTrainer.compute_loss(trainer, model, dict(fake), num_items_in_batch=total).backward()

        if waits:
            with pytest.raises(DataDependentOutputException):
                step()
        else:
            step()
            assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "facts"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("cohere", {"logit_scale": 0.0625}), ("phi", {})],
    ids=["softcap", "scale", "bias"],
)
def test_a_head_that_is_more_than_a_matrix_is_refused(architecture, facts):
    config = AutoConfig.for_model(architecture, vocab_size=64, hidden_size=64, num_attention_heads=4, **facts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=f"{type(model).__name__} cannot be trained: its logits"):
        check_head(model)
    check_head(make_model("qwen2", "sdpa", torch.float32))
