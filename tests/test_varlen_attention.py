"""Rows that share a prefix: loss and every gradient are those of separate sequences, and leaks would be seen."""

import importlib.util
import random

import pytest
import torch
from conftest import small_tokenizer
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.models.attention.flex import (
    BLOCK,
    FLEX_ATTENTION,
    FlexDocuments,
    flex_document_attention,
    flex_documents,
)
from csc_train.models.attention.select import collator_layout, select_attention
from csc_train.models.attention.varlen import VARLEN_ATTENTION, build_varlen_metadata, document_mask, varlen_attention
from csc_train.packing.collator import PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

VOCABULARY = 97
PATHS = {
    "varlen": (VARLEN_ATTENTION, "varlen"),
    "flex": (FLEX_ATTENTION, "flex"),
    "sdpa-dense_mask": ("sdpa", "dense_mask"),
    "eager-dense_mask": ("eager", "dense_mask"),
}

# (prefix length, body lengths) of each pack in a batch.
SHAPES = {
    "one-prefix": [(11, (7, 13, 5))],
    "several-prefixes": [(11, (7, 13)), (4, (9, 2, 6)), (17, (8,))],
    "no-prefix": [(0, (7, 13)), (0, (5,))],
    "with-and-without": [(11, (7, 13)), (0, (9,))],
    "one-body": [(11, (7,))],
    "bodies-of-one-token": [(11, (1, 8, 1))],
}


@pytest.fixture(autouse=True)
def flex_backward_on_cpu(monkeypatch):
    """FlexAttention's plain form has a backward pass on a CPU; torch refuses it, as the compiled form has none."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def make_packs(shape: list[tuple[int, tuple[int, ...]]]) -> tuple[list[dict], list[tuple[list[int], list[float]]]]:
    """Packs as the data set holds them, and the same documents as separate sequences with their weights."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    packs, separate = [], []
    for prefix_length, bodies in shape:
        prefix = ids(prefix_length)
        documents = [(ids(length), [0.0] + [1.0] * (length - 1)) for length in bodies]
        first = [(prefix, [0.0] * prefix_length)] if prefix else []
        packs.append(
            {
                "input_ids": [token for tokens, _ in first + documents for token in tokens],
                "loss_weights": [weight for _, weights in first + documents for weight in weights],
                "document_lengths": [len(tokens) for tokens, _ in first + documents],
                "prefix_length": prefix_length,
            }
        )
        separate += [(prefix + tokens, [0.0] * prefix_length + weights) for tokens, weights in documents]
    return packs, separate


def make_model(architecture: str, attention: str, dtype: torch.dtype):
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Ten times the usual: near zero, attention would be uniform and blind to what it should not see.
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if dtype is torch.float64:
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("norm"):  # transformers' own rounds to float32 inside
                model.set_submodule(name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype))
    return model


def run_separately(model, separate) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    total = 0
    for ids, weights in separate:
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits
        losses = cross_entropy(logits[0, :-1], row[0, 1:], reduction="none")
        total = total + (losses * torch.tensor(weights[1:])).sum()
    total.backward()
    return total.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def run_packed(model, packs, layout: str, change=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    batch = PackCollator(layout, 0, additive=model.config._attn_implementation == "eager")(packs)
    labels = batch.pop("labels")
    del batch["loss_weights"]
    if change:
        change(batch)
    logits = model(**batch, use_cache=False).logits
    loss = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def error(measured, reference) -> float:
    """The largest relative error of the loss and of any parameter's gradient (max norm)."""
    pairs = [(measured[0], reference[0]), *zip(measured[1], reference[1], strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_a_row_equals_separate_sequences_in_loss_and_every_gradient(path, shape, architecture, dtype, tolerance):
    attention, layout = PATHS[path]
    if (dtype, attention) == (torch.float64, "eager"):
        tolerance = 1e-5  # transformers' eager attention takes its softmax in float32
    packs, separate = make_packs(SHAPES[shape])
    reference = run_separately(make_model(architecture, "sdpa", dtype), separate)
    assert error(run_packed(make_model(architecture, attention, dtype), packs, layout), reference) < tolerance


def leaky_mask(batch):
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def positions_that_go_on(batch):
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]


def prefix_unseen(batch):
    """As if the bodies were documents of their own."""
    documents = batch["varlen_metadata"]
    starts = documents["query_lengths"].cumsum(0) - documents["query_lengths"]
    documents["key_lengths"] = documents["query_lengths"]
    documents["key_index"] = torch.arange(int(starts[-1] + documents["query_lengths"][-1]))


def flex_prefix_unseen(batch):
    batch["varlen_metadata"]["prefix_ends"] = batch["varlen_metadata"]["prefix_starts"]


def flex_leak(batch):
    batch["varlen_metadata"]["starts"] = torch.zeros_like(batch["varlen_metadata"]["starts"])


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sdpa-dense_mask", leaky_mask),
        ("sdpa-dense_mask", positions_that_go_on),
        ("varlen", positions_that_go_on),
        ("varlen", prefix_unseen),
        ("flex", flex_leak),
        ("flex", positions_that_go_on),
        ("flex", flex_prefix_unseen),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_leak_between_documents_is_detected(architecture, path, change):
    """The negative control: the tests above would fail by far."""
    attention, layout = PATHS[path]
    packs, separate = make_packs(SHAPES["several-prefixes"])
    reference = run_separately(make_model(architecture, "sdpa", torch.float32), separate)
    assert (
        error(run_packed(make_model(architecture, attention, torch.float32), packs, layout, change), reference) > 1e-2
    )


def test_the_documents_and_the_mask_of_a_row():
    documents, positions = build_varlen_metadata([[2, 1, 2], [2]], [2, 0])
    assert documents.query_lengths.tolist() == [2, 1, 2, 2]
    assert documents.key_lengths.tolist() == [2, 3, 4, 2]
    assert documents.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert positions.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert document_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("seed", range(8))
def test_flex_documents_say_what_the_dense_mask_says_in_blocks_that_torch_would_find(seed):
    rng = random.Random(seed)
    lengths, prefixes = [], []
    for _ in range(rng.randint(1, 4)):
        prefix = rng.choice([0, 1, 5, BLOCK, 300])
        bodies = [rng.choice([1, 7, BLOCK, 200, 400]) for _ in range(rng.randint(1, 4))]
        lengths.append(([prefix] if prefix else []) + bodies)
        prefixes.append(prefix)
    lengths.append([BLOCK - sum(map(sum, lengths)) % BLOCK])
    prefixes.append(0)
    documents, _ = build_varlen_metadata(lengths, prefixes)
    length = sum(map(sum, lengths))
    mask = flex_documents(documents).block_mask()
    dense = torch_flex.create_mask(mask.mask_mod, 1, 1, length, length, "cpu")
    assert torch.equal(dense, document_mask(documents))
    expected = torch_flex.create_block_mask(mask.mask_mod, None, None, length, length, "cpu")
    for name in FlexDocuments._fields[3:]:
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    assert (mask.shape, mask.BLOCK_SIZE) == (expected.shape, expected.BLOCK_SIZE)


def test_a_flex_row_is_padded_to_whole_blocks_by_a_document_of_its_own():
    packs, _ = make_packs(SHAPES["several-prefixes"])
    plain, batch = (PackCollator(layout, 9)(packs) for layout in ("varlen", "flex"))
    length = plain["input_ids"].shape[1]
    assert batch["input_ids"].shape == (1, BLOCK)
    for name in ("input_ids", "labels", "loss_weights", "position_ids"):
        assert torch.equal(batch[name][:, :length], plain[name])
    assert (batch["input_ids"][0, length:] == 9).all()
    assert (batch["labels"][0, length:] == -100).all()
    assert not batch["loss_weights"][0, length:].any()
    assert batch["position_ids"][0, length:].tolist() == list(range(BLOCK - length))
    assert (batch["varlen_metadata"]["starts"][length:] == length).all()


def test_dialogues_share_one_copy_of_their_system_prompt():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    examples = list(template.encode_all(generate_sample(30, 0)))
    prefix = template.prefix_ids
    longest = max(len(example.input_ids) for example in examples)
    packs, report = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=3 * longest))
    bodies = []
    for pack in packs:
        assert pack["prefix_length"] == pack["document_lengths"][0] == len(prefix)
        assert pack["input_ids"][: len(prefix)].tolist() == prefix
        assert not any(pack["loss_weights"][: len(prefix)])
        ids, weights = pack["input_ids"].tolist(), pack["loss_weights"].tolist()
        start = len(prefix)
        for length in pack["document_lengths"][1:]:
            bodies.append((ids[start : start + length], weights[start : start + length]))
            start += length
        assert start == len(pack["input_ids"]) <= 3 * longest
    expected = [
        (e.input_ids[len(prefix) :].tolist(), e.trained[len(prefix) :].astype(float).tolist()) for e in examples
    ]
    assert sorted(bodies) == sorted(expected)
    assert report.separate_tokens == sum(len(example.input_ids) for example in examples)
    assert report.tokens == report.separate_tokens - (30 - len(packs)) * len(prefix)


def test_dialogues_with_other_prompts_do_not_share_a_pack():
    tokenizer = small_tokenizer("qwen2_5")
    zh, en = (DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig(language=language)) for language in ("zh", "en"))
    dialogues = generate_sample(6, 0)
    examples = [*zh.encode_all(dialogues[:3]), *en.encode_all(dialogues[3:])]
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=20000))
    assert [pack["input_ids"][: pack["prefix_length"]].tolist() for pack in packs] == [zh.prefix_ids, en.prefix_ids]
    assert [len(pack["document_lengths"]) for pack in packs] == [4, 4]


@pytest.mark.parametrize("path", ["varlen", "flex"])
def test_our_attention_refuses_what_it_cannot_keep_apart(path):
    name, layout = PATHS[path]
    attend = {"varlen": varlen_attention, "flex": flex_document_attention}[path]
    batch = PackCollator(layout, 0)(make_packs(SHAPES["one-prefix"])[0])
    query = torch.zeros(1, 2, batch["input_ids"].shape[1], 4)
    attend(None, query, query, query, None, varlen_metadata=batch["varlen_metadata"])
    with pytest.raises(ValueError, match=f"{name} attention was called without varlen_metadata"):
        attend(None, query, query, query, None)
    with pytest.raises(ValueError, match="one row and no attention mask"):
        attend(None, query, query, query, torch.ones(1, 3), varlen_metadata=batch["varlen_metadata"])
    rows = query.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="one row and no attention mask"):
        attend(None, rows, rows, rows, None, varlen_metadata=batch["varlen_metadata"])


def test_flex_attention_refuses_dropout():
    query = torch.zeros(1, 2, BLOCK, 4)
    with pytest.raises(ValueError, match="FlexAttention has no dropout"):
        flex_document_attention(None, query, query, query, None, dropout=0.1, varlen_metadata={})


@pytest.mark.parametrize(
    ("attention", "packing"),
    [
        ("flash_attention_2", "shared_prefix"),
        ("flex_attention", "off"),
        (FLEX_ATTENTION, "off"),
        (VARLEN_ATTENTION, "off"),
        ("paged|sdpa", "shared_prefix"),
    ],
)
def test_an_attention_not_known_to_isolate_is_refused(attention, packing):
    with pytest.raises(InputError, match="not known to keep documents apart"):
        select_attention(attention, packing)


@pytest.mark.parametrize("packing", ["shared_prefix", "best_fit"])
@pytest.mark.parametrize(
    ("gpu", "bf16", "flash", "precision", "chosen"),
    [
        (False, False, False, "auto", VARLEN_ATTENTION),
        (False, False, True, "auto", VARLEN_ATTENTION),
        (True, True, True, "auto", VARLEN_ATTENTION),
        (True, True, True, "fp32", FLEX_ATTENTION),  # which flash-attention does not take
        (True, False, True, "auto", FLEX_ATTENTION),
        (True, True, False, "auto", FLEX_ATTENTION),
    ],
)
def test_auto_takes_the_attention_of_the_device(monkeypatch, gpu, bf16, flash, precision, chosen, packing):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if flash else None)
    assert select_attention("auto", packing, precision) == chosen
    assert select_attention("auto", "off", precision) == "sdpa"


def test_flex_attention_on_packs_is_our_call_of_it_on_a_gpu(monkeypatch):
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        if gpu:
            assert select_attention("flex_attention", "shared_prefix") == FLEX_ATTENTION
        else:
            with pytest.raises(InputError, match="trains only on a GPU"):
                select_attention("flex_attention", "shared_prefix")


def test_the_layout_follows_attention_and_packing():
    assert select_attention("eager", "shared_prefix") == "eager"
    for packing in ("shared_prefix", "best_fit"):
        assert collator_layout(VARLEN_ATTENTION, packing) == "varlen"
        assert collator_layout(FLEX_ATTENTION, packing) == "flex"
    assert collator_layout("sdpa", "shared_prefix") == "dense_mask"
    assert collator_layout("sdpa", "best_fit") == "position_ids"
    assert collator_layout("flash_attention_2", "best_fit") == "padding_free"
    with pytest.raises(ValueError, match="cannot share a prefix"):
        PackCollator("position_ids", 0)(make_packs(SHAPES["one-prefix"])[0])
