"""What would let the documents of a pack see each other is refused before training, or at its first step."""

import contextlib
import copy

import peft
import pytest
import torch
from conftest import TINY_HYBRID, sampled
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from csc_train.errors import InputError
from csc_train.models.attention.gated_delta_net import build_delta_levels, has_delta_nets, prepare_delta_nets
from csc_train.models.attention.select import collator_layout
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.packing.collator import PackCollator
from csc_train.training import leak_check
from csc_train.training.leak_check import check_no_leaks, dropout_warning, forbid_kv_cache

SHARED, BEST = "shared_prefix", "best_fit"
PATHS = [
    (VARLEN_ATTENTION, SHARED),
    ("sdpa", SHARED),
    ("eager", SHARED),
    ("sdpa", BEST),
    ("eager", BEST),
]


def make(architecture: str, attention: str, **facts):
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"hidden_size": 32, "pad_token_id": 299, "bos_token_id": None, "eos_token_id": None} | facts,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def check(model, packing: str, dtype: torch.dtype = torch.float32) -> None:
    attention = model.config._attn_implementation
    collator = PackCollator(collator_layout(attention, packing), 299, additive=attention == "eager")
    check_no_leaks(model, collator, torch.device("cpu"), dtype)


@pytest.mark.parametrize(("attention", "packing"), PATHS)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_an_attention_that_isolates_is_accepted_and_left_unchanged(architecture, attention, packing, dtype):
    model = make(architecture, attention)
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    random_state = torch.get_rng_state()
    check(model, packing, dtype)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("attention", [VARLEN_ATTENTION, "sdpa", "eager"])
@pytest.mark.parametrize(
    ("architecture", "facts"),
    [
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
        ("gemma3_text", {"head_dim": 8}),
    ],
)
def test_a_sliding_window_that_our_masks_would_lose_is_refused(architecture, facts, attention, dtype):
    with pytest.raises(InputError, match="logits differ from those of separate documents"):
        check(make(architecture, attention, **facts), SHARED, dtype)
    check(make(architecture, "sdpa", **facts), BEST, dtype)  # where transformers makes the mask, the window is in it


@pytest.mark.parametrize(("attention", "packing"), [(VARLEN_ATTENTION, SHARED), ("eager", BEST)])
def test_a_state_carried_from_document_to_document_is_refused(attention, packing):
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with pytest.raises(InputError) as caught:
        check(model, packing)
    assert str(caught.value).startswith(
        f"MambaForCausalLM with {attention} attention cannot be trained on packs: logits differ"
    )
    assert "\n" not in str(caught.value)


class Drops(Qwen2ForCausalLM):
    """A model that does not hand on one of its arguments."""

    dropped: str

    def forward(self, **inputs):
        inputs.pop(self.dropped, None)
        return super().forward(**inputs)


class DropsMask(Drops):
    dropped = "attention_mask"


class DropsPositions(Drops):
    dropped = "position_ids"


class DropsDocuments(Drops):
    dropped = "varlen_metadata"


@pytest.mark.parametrize(
    ("kind", "attention", "packing", "reason"),
    [
        (DropsMask, "sdpa", SHARED, "logits differ"),
        (DropsMask, "eager", SHARED, "logits differ"),
        (DropsPositions, "sdpa", BEST, "logits differ"),
        (DropsPositions, VARLEN_ATTENTION, SHARED, "logits differ"),
        (DropsDocuments, VARLEN_ATTENTION, SHARED, "varlen attention was called without varlen_metadata"),
    ],
)
def test_a_model_that_drops_what_says_where_documents_end_is_refused(kind, attention, packing, reason):
    model = kind(make("qwen2", attention).config)
    with pytest.raises(
        InputError, match=f"^{kind.__name__} with {attention} attention .*: {reason}.*; use packing=off"
    ):
        check(model, packing)


# Experts


FEW = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
EXPERTS = {"qwen3_moe": FEW | {"norm_topk_prob": True}, "qwen3_5_moe_text": FEW | TINY_HYBRID}


class OneDocument(PackCollator):
    """Says of a row of documents that it is one."""

    def __call__(self, packs):
        return super().__call__([packs[0] | {"document_lengths": [len(packs[0]["input_ids"])], "prefix_length": 0}])


class OneState(PackCollator):
    """Says it to the gated delta nets only."""

    def __call__(self, packs):
        batch = super().__call__(packs)
        levels = build_delta_levels([[batch["input_ids"].numel()]], [0])
        return batch | {"delta_levels": [level._asdict() for level in levels]}


def check_experts(architecture, attention, packing, dtype, kind=PackCollator, **facts):
    with torch.device("meta"):
        model = make(architecture, attention, **EXPERTS[architecture], **facts)
    if hybrid := has_delta_nets(model):
        prepare_delta_nets(model)
    collator = kind(collator_layout(attention, packing), 299, attention == "eager", delta_levels=hybrid)
    check_no_leaks(model, collator, torch.device("cpu"), dtype)


@pytest.mark.parametrize(("attention", "packing"), [PATHS[0], PATHS[2], PATHS[3]])
@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16], 2), ids=["f32", "bf16"])
def test_experts_that_see_one_document_each_are_accepted_and_leaks_are_refused(architecture, attention, packing, dtype):
    check_experts(architecture, attention, packing, dtype)
    for kind in [OneDocument] + [OneState] * ("linear_num_key_heads" in EXPERTS[architecture]):
        with pytest.raises(InputError, match="logits differ from those of separate documents"):
            check_experts(architecture, attention, packing, dtype, kind)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXPERTS)
def test_decisions_that_rounding_turns_are_forgiven(architecture, monkeypatch):
    """Of some sizes a decision turns, and the logits with it: without the replay they would be refused."""
    refused = []
    for hidden in (16, 24, 96, 104, 120):
        arguments = (architecture, VARLEN_ATTENTION, SHARED, torch.bfloat16)
        check_experts(*arguments, hidden_size=hidden)
        with monkeypatch.context() as patched:
            patched.setattr(leak_check, "replayed_decisions", lambda *_: contextlib.nullcontext([]))
            try:
                check_experts(*arguments, hidden_size=hidden)
            except InputError:
                refused.append(hidden)
    assert refused


def test_a_decision_that_no_tie_excuses_is_refused(monkeypatch):
    """Experts of which one is as good as the other: the logits are the same, the decisions are not."""

    def equal(model, device):
        probe = made(model, device)
        for name, weights in probe.named_parameters():
            if ".experts." in name:
                weights.data[:] = weights.data[:1].clone()
        return probe

    made = leak_check._probe
    monkeypatch.setattr(leak_check, "_probe", equal)
    arguments = ("qwen3_moe", "sdpa", BEST, torch.float32)
    check_experts(*arguments)
    record = leak_check.recorded_decisions

    @contextlib.contextmanager
    def others(probe):
        with record(probe) as decisions:
            yield decisions
        decisions[0][3] = (decisions[0][3] + 1) % 8

    monkeypatch.setattr(leak_check, "recorded_decisions", others)
    with pytest.raises(InputError, match="logits differ"):
        check_experts(*arguments)


def test_the_probe_of_a_large_model_is_small():
    facts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "hidden_size": 256}
    with torch.device("meta"):
        probe = leak_check._probe(make("qwen3_moe", "sdpa", **facts), torch.device("meta"))
    assert probe.num_parameters() < 8 * 3 * 64 * 256 + 500_000
    assert probe.model.layers[0].mlp.gate.top_k == 2 and probe.model.layers[0].mlp.gate.weight.shape[0] == 8


def test_an_attention_without_dropout_is_refused_where_the_model_has_it():
    with pytest.raises(InputError, match="it has no dropout, but the model has attention_dropout"):
        check(make("qwen2", VARLEN_ATTENTION, attention_dropout=0.1), SHARED)


# At each step


ROW = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"use_cache": True}, "use_cache=True"),
        ({}, "use_cache=True"),  # the model's own default
        ({"use_cache": False, "attention_mask": torch.ones(1, 4)}, "a mask of 2 dimensions"),
    ],
    ids=["cache", "cache-by-default", "dense_mask"],
)
def test_a_packed_row_with_a_cache_or_a_plain_mask_is_refused_in_training(adapter, inputs, reason):
    model = make("qwen2", "sdpa")
    forbid_kv_cache(model)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=reason):
        model.train()(**ROW, **inputs)
    model.eval()(**ROW, **inputs)


def test_rows_as_they_should_be_and_single_documents_are_let_through():
    model = make("qwen2", "sdpa")
    forbid_kv_cache(model)
    model.train()
    model(**ROW, use_cache=False)
    model(**ROW, use_cache=False, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    model(input_ids=ROW["input_ids"], attention_mask=torch.ones(1, 4), use_cache=True)
    model.eval().generate(ROW["input_ids"], attention_mask=torch.ones(1, 4), max_new_tokens=2)


# Dropout


@pytest.mark.parametrize(
    ("attention_dropout", "adapter", "packing", "said"),
    [
        (0.1, AdapterConfig(), SHARED, "the model's attention_dropout=0.1: the dialogues of a pack share"),
        (0.0, AdapterConfig("lora", dropout=0.05), SHARED, "adapter.dropout=0.05: the dialogues"),
        (0.1, AdapterConfig("lora", dropout=0.05), SHARED, "attention_dropout=0.1 and adapter.dropout=0.05: "),
        (0.0, AdapterConfig("full", dropout=0.05), SHARED, None),  # there is no adapter
        (0.0, AdapterConfig("lora"), SHARED, None),
        (0.1, AdapterConfig("lora", dropout=0.05), BEST, None),
    ],
)
def test_dropout_in_a_shared_prefix_gives_a_warning(attention_dropout, adapter, packing, said):
    warning = dropout_warning(AutoConfig.for_model("qwen2", attention_dropout=attention_dropout), adapter, packing)
    assert said in warning if said else warning is None
