"""Rows that share a prefix: loss and every gradient are those of separate sequences, and leaks would be seen."""

import itertools
import random

import pytest
import torch
from conftest import sampled, small_tokenizer
from flash_on_cpu import flash_on_cpu
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.models.attention import varlen
from csc_train.models.attention.select import collator_layout, select_attention
from csc_train.models.attention.varlen import (
    VARLEN_ATTENTION,
    VarlenBounds,
    build_varlen_metadata,
    document_mask,
    varlen_attention,
)
from csc_train.packing.collator import PackCollator, run_bounds
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.pack_cost import PackSlice
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

VOCABULARY = 97
PATHS = {
    "varlen": (VARLEN_ATTENTION, "varlen"),
    "varlen-gathered": (VARLEN_ATTENTION, "varlen"),
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


class Gathered(torch.autograd.Function):
    """The operator by its GPU's kernel, on this machine's tensors."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.max_q, ctx.max_k, ctx.scale = inputs
        output = varlen.attend_gathered(*inputs)
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
        return output

    @staticmethod
    def backward(ctx, gradient, _):
        gradients = varlen.backward_gathered(gradient, *ctx.saved_tensors, ctx.max_q, ctx.max_k, ctx.scale)
        return *gradients, *[None] * 6


@pytest.fixture
def gathered(monkeypatch):
    """Attention as on a GPU, by a reference of the kernel beneath."""
    monkeypatch.setattr(torch.ops.csc_train, "varlen_attention", Gathered.apply)
    with flash_on_cpu():
        yield


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


def make_model(architecture: str, attention: str, dtype: torch.dtype, **facts):
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
        **facts,
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
@pytest.mark.parametrize("architecture", sampled(["qwen2", "llama"], 2))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), sampled([(torch.float64, 1e-9), (torch.float32, 1e-5)], 2), ids=["f64", "f32"]
)
def test_a_row_equals_separate_sequences_in_loss_and_every_gradient(
    request, path, shape, architecture, dtype, tolerance
):
    attention, layout = PATHS[path]
    if path == "varlen-gathered":
        request.getfixturevalue("gathered")
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
    documents["cu_seqlens_k"] = documents["cu_seqlens_q"]
    documents["key_index"] = torch.arange(int(documents["cu_seqlens_q"][-1]))


def boundary_off_by_one(batch):
    """The third document begins a token late, for its queries and for its keys."""
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        batch["varlen_metadata"][name][2] += 1


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sdpa-dense_mask", leaky_mask),
        ("sdpa-dense_mask", positions_that_go_on),
        ("varlen", positions_that_go_on),
        ("varlen", prefix_unseen),
        ("varlen", boundary_off_by_one),
        ("varlen-gathered", positions_that_go_on),
        ("varlen-gathered", prefix_unseen),
        ("varlen-gathered", boundary_off_by_one),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_leak_between_documents_is_detected(request, architecture, path, change):
    """The negative control: the tests above would fail by far."""
    attention, layout = PATHS[path]
    if path == "varlen-gathered":
        request.getfixturevalue("gathered")
    packs, separate = make_packs(SHAPES["several-prefixes"])
    reference = run_separately(make_model(architecture, "sdpa", torch.float32), separate)
    assert (
        error(run_packed(make_model(architecture, attention, torch.float32), packs, layout, change), reference) > 1e-2
    )


def test_the_documents_and_the_mask_of_a_row():
    documents, positions = build_varlen_metadata([[2, 1, 2], [2]], [2, 0])
    assert documents.cu_seqlens_q.tolist() == [0, 2, 3, 5, 7]
    assert documents.cu_seqlens_k.tolist() == [0, 2, 5, 9, 11]
    assert (documents.max_q, documents.max_k) == (2, 4)
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


def random_row(seed: int) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(seed)
    lengths, prefixes = [], []
    for _ in range(rng.randint(1, 4)):
        prefixes.append(rng.choice([0, 1, 5, 30]))
        lengths.append([prefixes[-1]] * (prefixes[-1] > 0) + [rng.choice([1, 7, 20]) for _ in range(rng.randint(1, 4))])
    return lengths, prefixes


@pytest.mark.parametrize("seed", range(8))
def test_both_kernels_are_attention_by_the_dense_mask(gathered, seed):
    lengths, prefixes = random_row(seed)
    metadata, _ = build_varlen_metadata(lengths, prefixes, VarlenBounds(30, 40, 60))
    generator = torch.Generator().manual_seed(seed)
    tokens, scale = int(metadata.cu_seqlens_q[-1]), [None, 0.3][seed % 2]
    states = [
        torch.randn(tokens, heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for heads in (6, 2, 2)
    ]
    heads_first = [each.transpose(0, 1)[None] for each in states]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=document_mask(metadata), scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad(expected, states, gradient)
    for kernel in (varlen.attend_in_blocks, Gathered.apply):
        output, lse = kernel(*states, *metadata, scale)
        assert lse.shape == (6, tokens)
        assert (output - expected).abs().max() < 1e-12
        for found, true in zip(torch.autograd.grad(output, states, gradient), wanted, strict=True):
            assert (found - true).abs().max() < 1e-12


@pytest.mark.slow
def test_the_operator_is_one_that_compilers_can_trust():
    metadata, _ = build_varlen_metadata([[5, 3, 4], [7]], [5, 0], VarlenBounds(6, 8, 12))
    states = [torch.randn(19, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    torch.library.opcheck(varlen.attend_in_blocks, (*states, *metadata, None))


def test_padding_is_documents_of_its_own_and_all_rows_of_a_run_look_alike():
    packs, _ = make_packs(SHAPES["several-prefixes"])
    plain = PackCollator("varlen", 9)(packs)
    length = plain["input_ids"].shape[1]
    bounds = VarlenBounds(20, 17, 25)
    batch = PackCollator("varlen", 9, bounds=bounds, length=128)(packs)
    assert batch["input_ids"].shape == (1, 128)
    for name in ("input_ids", "labels", "loss_weights", "position_ids"):
        assert torch.equal(batch[name][:, :length], plain[name])
    assert (batch["input_ids"][0, length:] == 9).all()
    assert (batch["labels"][0, length:] == -100).all()
    assert not batch["loss_weights"][0, length:].any()
    metadata = batch["varlen_metadata"]
    assert (len(metadata["cu_seqlens_q"]), metadata["max_q"], metadata["max_k"]) == (21, 17, 25)
    assert metadata["cu_seqlens_q"].diff().max() <= 17
    assert metadata["cu_seqlens_q"][-1] == 128
    mask = document_mask(varlen.VarlenMetadata(**metadata))[0, 0]
    assert torch.equal(mask[:length, :length], document_mask(varlen.VarlenMetadata(**plain["varlen_metadata"]))[0, 0])
    assert not mask[:length, length:].any()
    assert not mask[length:, :length].any()
    with pytest.raises(ValueError, match=f"a row of {length} tokens is longer than the 40 of its run"):
        PackCollator("varlen", 9, length=40)(packs)
    with pytest.raises(ValueError, match=r"a row has VarlenBounds\(.*, above the VarlenBounds"):
        PackCollator("varlen", 9, bounds=bounds._replace(max_q=16))(packs)


def test_a_row_longer_than_its_documents_is_refused():
    metadata, _ = build_varlen_metadata([[4]], [0])
    row = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match="a row of 5 tokens has documents of 4"):
        torch.ops.csc_train.varlen_attention(row, row, row, *metadata, None)


def test_the_bounds_of_a_run_hold_for_every_slice_of_its_packs():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    packs, _ = pack_dialogues(list(template.encode_all(generate_sample(40, 0))), PackingConfig("shared_prefix", 1500))
    collator = PackCollator("varlen", 0, bounds=run_bounds([packs], 2, 3000), length=3000)
    found = []
    for first in range(0, len(packs) - 1, 2):
        slices = [PackSlice(number, 0, len(packs.pack_items[number]) // 2 or 1) for number in (first, first + 1)]
        for batch in ([packs[first], packs[first + 1]], [packs[part] for part in slices], [packs[None]]):
            found.append(collator(batch)["varlen_metadata"])
    assert len({(len(each["cu_seqlens_q"]), each["max_q"], each["max_k"]) for each in found}) == 1


def a_layer(wait: bool = False):
    """The gradients of one decoder layer, its attention by the GPU's kernel, on fake tensors."""
    packs, _ = make_packs(SHAPES["several-prefixes"])
    batch = PackCollator("varlen", 9, bounds=VarlenBounds(20, 17, 25), length=128)(packs)
    model = make_model("qwen2", VARLEN_ATTENTION, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        layer = model.model.layers[0]
        for name, weights in list(layer.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, torch.nn.Parameter(mode.from_tensor(weights)))
        metadata = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in batch["varlen_metadata"].items()
        }
        if wait:
            metadata["max_q"] = metadata["cu_seqlens_q"].max().item()
        hidden = torch.randn(1, 128, 32, requires_grad=True)
        embedding = torch.randn(1, 128, 8), torch.randn(1, 128, 8)
        layer(hidden, position_embeddings=embedding, varlen_metadata=metadata).sum().backward()
        return hidden.grad


def test_a_layer_on_a_gpu_never_waits_for_the_device(monkeypatch):
    """Fake tensors have no values: reading one, as `.item()` does, raises."""
    monkeypatch.setattr(torch.ops.csc_train, "varlen_attention", Gathered.apply)
    assert a_layer().shape == (1, 128, 32)
    with pytest.raises(DataDependentOutputException):
        a_layer(wait=True)


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
    least = min(sum(len(each.input_ids) for each in part) for part in (examples[:3], examples[3:]))
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=least))
    prefixes = [pack["input_ids"][: pack["prefix_length"]].tolist() for pack in packs]
    assert prefixes == [each for each, _ in itertools.groupby(prefixes)] == [zh.prefix_ids, en.prefix_ids]
    assert sum(len(pack["document_lengths"]) - 1 for pack in packs) == 6
    # Prefixes whose dialogues do not fill a pack are not shared: all of them are in one.
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=20000))
    assert [(pack["prefix_length"], pack["document_lengths"].tolist()) for pack in packs] == [
        (0, [len(packs.dialogues[item.dialogue].input_ids) for item in packs.pack_items[0]])
    ]


def test_our_attention_refuses_what_it_cannot_keep_apart():
    metadata = PackCollator("varlen", 0)(make_packs(SHAPES["one-prefix"])[0])["varlen_metadata"]
    query = torch.zeros(1, 2, int(metadata["cu_seqlens_q"][-1]), 4)
    varlen_attention(None, query, query, query, None, varlen_metadata=metadata)
    with pytest.raises(ValueError, match="varlen attention was called without varlen_metadata"):
        varlen_attention(None, query, query, query, None)
    with pytest.raises(ValueError, match="one row and no attention mask"):
        varlen_attention(None, query, query, query, torch.ones(1, 3), varlen_metadata=metadata)
    rows = query.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="one row and no attention mask"):
        varlen_attention(None, rows, rows, rows, None, varlen_metadata=metadata)
    with pytest.raises(ValueError, match="varlen attention has no dropout"):
        varlen_attention(None, query, query, query, None, dropout=0.1, varlen_metadata=metadata)


@pytest.mark.parametrize(
    ("attention", "packing"),
    [("flash_attention_2", "shared_prefix"), ("flex_attention", "off"), (VARLEN_ATTENTION, "off")],
)
def test_an_attention_not_known_to_isolate_is_refused(attention, packing):
    with pytest.raises(InputError, match="not known to keep documents apart"):
        select_attention(attention, packing)


class Gpu:
    """A machine with a GPU of this compute capability, as far as the choice of an attention looks."""

    def __init__(self, monkeypatch, capability: int = 9):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capability >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")


@pytest.mark.parametrize("packing", ["shared_prefix", "best_fit"])
@pytest.mark.parametrize(
    ("capability", "precision", "head_dim", "reason"),
    [
        (9, "auto", 128, None),
        (8, "bf16", 256, None),
        (9, "auto", None, None),
        (9, "fp32", 128, "computes in bf16 only"),
        (7, "bf16", 128, "needs compute capability 8.0, which a GPU lacks"),
        (9, "bf16", 20, "heads of 20: the variable-length kernel takes multiples of 8 up to 256"),
        (9, "bf16", 512, "heads of 512"),
    ],
)
def test_auto_takes_our_attention_where_the_gpu_can_run_it_and_else_says_why_not(
    monkeypatch, caplog, capability, precision, head_dim, reason, packing
):
    Gpu(monkeypatch, capability)
    with caplog.at_level("INFO"):
        chosen = select_attention("auto", packing, precision, head_dim)
    if reason is None:
        assert (chosen, caplog.text) == (VARLEN_ATTENTION, "")
        assert select_attention(VARLEN_ATTENTION, packing, precision, head_dim) == VARLEN_ATTENTION
    else:
        assert chosen == "sdpa"
        assert reason in caplog.text
        with pytest.raises(InputError, match=reason):
            select_attention(VARLEN_ATTENTION, packing, precision, head_dim)
    assert select_attention("auto", "off", precision, head_dim) == "sdpa"


def test_a_cpu_runs_our_attention_in_any_precision():
    assert select_attention("auto", "shared_prefix", "fp32", 20) == VARLEN_ATTENTION


def test_flash_attention_3_is_used_only_where_it_is_installed(monkeypatch):
    Gpu(monkeypatch)
    with pytest.raises(InputError, match=r"attn_implementation=varlen_fa3: No module named .*: install"):
        select_attention("varlen_fa3", "shared_prefix", "bf16", 128)


def test_the_layout_follows_attention_and_packing():
    assert select_attention("eager", "shared_prefix") == "eager"
    for packing in ("shared_prefix", "best_fit"):
        assert collator_layout(VARLEN_ATTENTION, packing) == "varlen"
    assert collator_layout("sdpa", "shared_prefix") == "dense_mask"
    assert collator_layout("sdpa", "best_fit") == "position_ids"
    with pytest.raises(ValueError, match="cannot share a prefix"):
        PackCollator("position_ids", 0)(make_packs(SHAPES["one-prefix"])[0])
