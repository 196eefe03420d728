"""Mixes of training data: shares by hand, sources as they are read, packs of both kinds, and a run on two ranks."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ROOT, SMALL_TOKENIZERS, random_dialogue, sampled, small_tokenizer, tiny_config
from processes import TIMEOUT_S, run_script, start_ranks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose, from_container, to_container
from csc_train.data.config import DataConfig, DialogueSourceConfig, MixEntryConfig
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.mixture import Mixture
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import read_and_check_splits, read_splits
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.evaluation.systems import build_systems
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.predictions import BASELINE_NAMES
from csc_train.launching.preflight.checks import run_preflight
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.packing.collator import IGNORE_INDEX, PackCollator
from csc_train.packing.config import WEIGHTINGS, LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.loss_weights import LossWeights
from csc_train.packing.token_groups import NUM_GROUPS
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.system_prompt import language_note
from csc_train.training.train_metrics import source_metrics


def mixture(sizes: dict[str, int], **settings) -> tuple[Mixture, list[str]]:
    """A mixture of sources of so many dialogues, and the dialogues' ids; drawn numbers by chance."""
    rng = random.Random(sum(sizes.values()))
    members = {f"{name}{i}": (place, rng.random()) for place, name in enumerate(sizes) for i in range(sizes[name])}
    settings = {"weights": None, "epochs": [1.0] * len(sizes), "unit": "tokens"} | settings
    return Mixture(list(sizes), members=members, **settings), list(members)


def counts(mix: Mixture, ids: list[str], tokens: list[int]) -> dict[str, int]:
    """How often each dialogue is in an epoch; the order is that of `ids`."""
    chosen = mix.choose(ids, tokens)
    assert chosen == sorted(chosen)
    found = Counter(ids[index] for index in chosen)
    return {name: found[name] for name in ids}


# The choice


def test_shares_by_hand():
    mix, ids = mixture({"a": 4, "b": 2}, weights=[3.0, 1.0], unit="dialogues")
    # An epoch is as large as both together: 6 dialogues, 4.5 of them of a and 1.5 of b. Halves go to the smaller.
    found = counts(mix, ids, [1] * 6)
    assert sum(found[name] for name in ids[:4]) == 4 and sum(found[name] for name in ids[4:]) == 1
    # The drawn number says which: b's smaller one.
    assert found[min(ids[4:], key=lambda name: mix.members[name][1])] == 1
    # 600 tokens: 360 of the long dialogues of b (200 each, so 2: 400 is nearer than 200), 240 of a (50 each, so 5).
    mix, ids = mixture({"a": 4, "b": 2}, weights=[4.0, 6.0])
    found = counts(mix, ids, [50] * 4 + [200] * 2)
    assert [found[name] for name in ids[4:]] == [1, 1] and sorted(found[name] for name in ids[:4]) == [1, 1, 1, 2]
    mix, ids = mixture({"a": 4, "b": 2}, epochs=[1.5, 3.0], unit="dialogues")
    found = counts(mix, ids, [7] * 6)
    assert sorted(found[name] for name in ids[:4]) == [1, 1, 2, 2] and [found[name] for name in ids[4:]] == [3, 3]
    mix, ids = mixture({"a": 4, "b": 2})
    assert set(counts(mix, ids, [7] * 6).values()) == {1}


@pytest.mark.parametrize("unit", ["tokens", "dialogues"])
@pytest.mark.parametrize("seed", range(5))
def test_no_source_misses_its_share_by_more_than_half_a_dialogue(unit, seed):
    rng = random.Random(seed)
    sizes = {name: rng.randint(3, 80) for name in "abc"}
    weights = [rng.uniform(0.5, 9) for _ in sizes]
    mix, ids = mixture(sizes, weights=weights, unit=unit)
    tokens = [rng.randint(5, 900) for _ in ids]
    by_id = dict(zip(ids, tokens if unit == "tokens" else [1] * len(ids), strict=True))
    found = counts(mix, ids, tokens)
    for name, weight in zip(sizes, weights, strict=True):
        own = {each: count for each, count in found.items() if each.startswith(name)}
        part = sum(count * by_id[each] for each, count in own.items())
        wanted = sum(by_id.values()) * weight / sum(weights)
        assert abs(part - wanted) <= max(by_id[each] for each in own) / 2 + 1e-6
        assert max(own.values()) - min(own.values()) <= 1  # nobody waits while another comes twice
    # The place of a dialogue in its file says nothing.
    order = list(zip(ids, tokens, strict=True))
    rng.shuffle(order)
    mixed = [name for name, _ in order]
    again = Counter(mixed[index] for index in mix.choose(mixed, [count for _, count in order]))
    assert again == Counter({name: count for name, count in found.items() if count})


def test_a_source_that_gets_nothing_is_named():
    mix, ids = mixture({"big": 100, "small": 3}, weights=[10000.0, 1.0])
    with pytest.raises(InputError, match=r"^data.mix: the part of small in an epoch is less than one dialogue: raise"):
        mix.choose(ids, [10] * 103)
    with pytest.raises(InputError, match=r"^data.mix: no dialogue of small fits packing.max_length: raise it"):
        mix.choose(ids[:100], [10] * 100)
    mix, ids = mixture({"a": 3, "b": 3}, epochs=[1.0, 0.01])
    with pytest.raises(InputError, match=r"the part of b in an epoch is less than one dialogue: raise its epochs"):
        mix.choose(ids, [10] * 6)


# Settings


@pytest.mark.parametrize(
    ("mix", "message"),
    sampled([
        ("[{path: a.jsonl, weight: 0}]", "data.mix[0].weight=0.0: must be above 0 and at most 1e+12"),
        ("[{path: a.jsonl}, {path: b.jsonl, epochs: -1}]", "data.mix[1].epochs=-1.0: must be above 0 and at most 1000"),
        ("[{path: a.jsonl, weight: nan}]", "data.mix[0].weight=nan: must be above 0"),
        ("[{path: a.jsonl, fraction: 2}]", "data.mix[0].fraction=2.0: must be above 0 and at most 1"),
        ("[{path: a.jsonl, weight: 1, epochs: 1}]", "data.mix[0]: give every entry of data.mix a weight, or none"),
        ("[{path: a.jsonl, weight: 1}, {path: b.jsonl}]", "data.mix[1]: give every entry of data.mix a weight, or"),
        ("[{path: a.jsonl}, {path: b.jsonl, weight: 1}]", "data.mix[1]: give every entry of data.mix a weight, or"),
        ("[{path: a.jsonl, kind: chats}]", "data.mix[0].kind=chats: choose one of csc, chat. Did you mean 'chat'?"),
        (
            "[{path: x/a.jsonl}, {path: y/a.jsonl.gz}]",
            "data.mix[1].name=a: data.mix[0] has the same name: give another",
        ),
        ("[{path: a.jsonl, name: x/y}]", "data.mix[0].name='x/y': must be a printable name without /"),
        ('[{path: a.jsonl, name: "x\ty"}]', r"data.mix[0].name='x\ty': must be a printable name without /"),
        ("[{path: a.jsonl, name: ' '}]", "data.mix[0].name=' ': must be a printable name without /"),
        ("[{weight: 1}]", "data.mix[0].path is not set: give a dialogue file"),
        (
            "[{path: a.jsonl, wieght: 1}]",
            "unknown key 'data.mix.wieght' for recipe sft. Did you mean 'data.mix.weight'?",
        ),
        ("[{path: a.jsonl, weight: much}]", "data.mix.weight: Value 'much' of type 'str' could not be converted"),
        ("[a.jsonl]", "data.mix[0]: must be a mapping, such as {path: ...}"),
        ("[]", "data.mix is required: give data.mix=..."),
        ("[{path: a}] data.mix.weight=2", "data.mix.weight=2: data.mix is a list: write data.mix=[{weight: ...}], all"),
    ], 4),
)  # fmt: skip
def test_a_bad_mix_is_named(mix, message):
    with pytest.raises(InputError) as error:
        compose("sft", ["data=mix", *f"data.mix={mix}".replace("] data", "]|data").split("|")])
    assert str(error.value).startswith(message)


@pytest.mark.slow
def test_a_mix_takes_the_place_of_a_training_file(tmp_path):
    with pytest.raises(InputError, match=r"^data.mix and data.train.path are both set"):
        compose("sft", ["data=files", "data.train.path=a.jsonl", "data.mix=[{path: b.jsonl}]"])
    with pytest.raises(InputError, match=r"^data.mix and data.sample_dialogues are both set: add data.sample_dialog"):
        compose("sft", ["debug=cpu_tiny", "data=mix", "data.train.path=null", "data.mix=[{path: b.jsonl}]"])
    inspected = compose("inspect_data", ["data=mix", "data.mix=[{path: b.jsonl}]", "path=c.jsonl"]).data
    assert (inspected.mix, inspected.train.path) == ([], "c.jsonl")
    with pytest.raises(InputError, match=r"^data.mix_unit=words: choose one of tokens, dialogues"):
        compose("sft", ["data=mix", "data.mix=[{path: b.jsonl}]", "data.mix_unit=words"])
    with pytest.raises(InputError, match=r"^data.mix has 201 entries: at most 200 are possible"):
        DataConfig(mix=[MixEntryConfig(f"{number}.jsonl") for number in range(201)])
    own = tmp_path / "data" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(
        "mix:\n- {path: ~/a.jsonl, weight: 1}\n- {path: DianJin/DianJin-CSC-Data, source: RoleCS, weight: 2}\n"
    )
    config = compose("sft", [f"--config-dir={tmp_path}", "data=mine"]).data
    assert [entry.label for entry in config.mix] == ["a", "RoleCS"] and config.mix[0].path == str(
        Path.home() / "a.jsonl"
    )
    assert from_container(DataConfig, to_container(config)) == config
    own.write_text("mix:\n- {path: a.jsonl, wieght: 1}\n")
    with pytest.raises(InputError, match=r"^conf/data/mine.yaml: unknown key 'data.mix.wieght'"):
        compose("sft", [f"--config-dir={tmp_path}", "data=mine"])


# Reading


def write_chats(path: Path, number: int, system: str = "", turns: int = 3) -> None:
    """Chats of their own words; every second has the system prompt."""
    head = [{"role": "system", "content": system}]
    rows = [
        {"id": f"d{i}", "messages": head * (bool(system) and i % 2) + [
            {"role": role, "content": f"{role} {path.stem} {i} {turn}: why is the sky blue"}
            for turn in range(turns) for role in ("user", "assistant")
        ]}
        for i in range(number)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Three sources: two of customer support, one of chats, which share ids."""
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("synthetic", 40, 1), ("calls", 14, 2)):
        dialogues = generate_sample(count, seed)
        write_dialogues(f"{name}.jsonl", [replace(each, id=f"d{i}") for i, each in enumerate(dialogues)])
    write_chats(tmp_path / "chats.jsonl", 16, "You are brief.")
    return tmp_path


def entries(**changes) -> list[MixEntryConfig]:
    weights = {"synthetic": 5.0, "calls": 3.0, "chats": 2.0}
    kinds = {"chats": "chat"}
    return [
        MixEntryConfig(f"{name}.jsonl", kind=kinds.get(name, "csc"), weight=weight, **changes.get(name, {}))
        for name, weight in weights.items()
    ]


def test_the_sources_of_a_mix_are_read_as_one_set(here):
    splits = read_and_check_splits(DataConfig(mix=entries(), validation_fraction=0.2, evaluation_fraction=0.2))
    whole = [*splits.train, *splits.validation, *splits.evaluation]
    assert len({each.id for each in whole}) == len(whole) == 70
    assert {each.id.partition("/")[0] for each in whole if "/" in each.id} == {"calls", "chats"}
    # Only customer support is set aside, and every chat is trained.
    assert sum(each.kind == "chat" for each in splits.train) == 16 and splits.mixture.names == [
        "synthetic",
        "calls",
        "chats",
    ]
    assert {each.kind for each in [*splits.validation, *splits.evaluation]} == {"csc"}
    # The same dialogues, in other files and another order, fall on the same sides.
    for name in ("synthetic", "calls"):
        lines = Path(f"{name}.jsonl").read_text().splitlines()
        Path(f"{name}.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    again = read_splits(DataConfig(mix=entries()[::-1], validation_fraction=0.2, evaluation_fraction=0.2))
    assert {each.fingerprint for each in again.evaluation} == {each.fingerprint for each in splits.evaluation}
    assert {each.fingerprint for each in again.train} == {each.fingerprint for each in splits.train}
    # A part of a source, which is a part of a larger part.
    part, more = (
        {
            each.fingerprint
            for each in read_splits(DataConfig(mix=entries(chats={"fraction": fraction}))).train
            if each.kind == "chat"
        }
        for fraction in (0.3, 0.7)
    )
    assert 0 < len(part) < len(more) < 16 and part < more


def test_files_of_a_mix_that_cannot_be_used_are_named(here):
    Path("empty.jsonl").write_text("")
    both = [MixEntryConfig("calls.jsonl"), MixEntryConfig("empty.jsonl")]
    with pytest.raises(InputError, match=r"^data.mix\[1\]: empty.jsonl: no rows"):
        read_splits(DataConfig(mix=both))
    with pytest.raises(InputError, match=r"^data.mix\[0\]: chats.jsonl: every row is rejected.*dialogue"):
        read_splits(DataConfig(mix=[MixEntryConfig("chats.jsonl")]))
    with pytest.raises(InputError, match=r"^data.mix\[0\]: calls.jsonl: every row is rejected.*messages"):
        read_splits(DataConfig(mix=[MixEntryConfig("calls.jsonl", kind="chat")]))
    with pytest.raises(
        InputError, match=r"^data.mix\[0\].fraction=0.01 leaves no dialogue of 14 in calls.jsonl: raise it"
    ):
        read_splits(DataConfig(mix=[MixEntryConfig("calls.jsonl", fraction=0.01)]))
    chats = DataConfig(mix=[MixEntryConfig("chats.jsonl", kind="chat")])
    with pytest.raises(InputError, match=r"^data.evaluation_fraction=0.1: there are chats only.*data.evaluation.path"):
        read_splits(chats)
    evaluated = replace(chats, evaluation=DialogueSourceConfig("calls.jsonl"))
    assert len(read_splits(evaluated).train) == 16
    with pytest.raises(InputError, match=r"^data.validation_fraction=0.1: there are chats only.*leave it out"):
        read_splits(replace(evaluated, validation_fraction=0.1))
    with open("chats.jsonl", "a") as file:
        file.write('{"messages": [{"role": "narrator", "content": "x"}]}\n')
    read_splits(DataConfig(mix=entries()), here)
    (rejected,) = map(json.loads, Path("rejected-mix-2.jsonl").read_text().splitlines())
    assert (rejected["row"], rejected["file"]) == (17, "chats.jsonl") and "unknown role" in rejected["issues"][0][
        "reason"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 2},
        {"train_fraction": 0.05},
        {"evaluation_fraction": 0.95},
        {"validation_fraction": 0.93},
        {"on_overlap": "drop", "evaluation": DialogueSourceConfig("calls.jsonl")},
    ],
)
def test_what_takes_all_of_a_source_is_named(here, settings):
    key, value = next(iter(settings.items()))
    named = r"(synthetic, data.mix\[0\]|calls, data.mix\[1\]): choose another value"
    named = rf"^data.{key}={value} leaves no training dialogue of {named}"
    with pytest.raises(InputError, match=named):
        read_and_check_splits(DataConfig(mix=entries(), **settings))


def test_an_evaluation_dialogue_in_any_source_is_found(here):
    leaked = read_splits(DataConfig(mix=entries())).evaluation[0]
    row = {
        "messages": [
            {"role": {"客服": "assistant", "客户": "user"}[t.speaker.value], "content": t.text} for t in leaked.turns
        ]
    }
    with open("chats.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert read_and_check_splits(DataConfig(mix=entries())).overlaps[0].evaluation_id == leaked.id
    dropped = read_and_check_splits(DataConfig(mix=entries(), on_overlap="drop"))
    assert sum(each.kind == "chat" for each in dropped.train) == 16


def test_a_training_on_chats_only_is_evaluated_without_baselines(here):
    data = DataConfig(mix=entries(), evaluation=DialogueSourceConfig("calls.jsonl"))
    for mix, names in ((data.mix, list(BASELINE_NAMES)), (data.mix[2:], [])):
        train = read_splits(replace(data, mix=mix)).train
        arguments = EvaluationConfig(), "", TemplateConfig(), SimpleNamespace(num_processes=1), None, None, None
        assert list(build_systems(train, *arguments)) == names


def test_chats_count_for_no_strategy_and_no_language(here):
    splits = read_splits(DataConfig(mix=entries()))
    assert language_note(splits.train, "zh") is None
    only = [each for each in splits.train if each.kind == "csc"]
    one, other = (StrategyBaseline(training, 1) for training in (splits.train, only))
    assert one.config_hash == other.config_hash and None not in one._replies


# Packs


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))


def mixed_examples(template: DialogueTemplate):
    """Customer support, chats with two system prompts of their own, and chats without, in turn."""
    rng = random.Random(3)
    dialogues = [random_dialogue(rng) for _ in range(15)]
    systems = (None, "You are brief.", "You are a pirate.", "")
    chats = [
        each if (system := systems[number % 4]) is None else Dialogue(
            each.id, tuple(replace(turn, strategy=None) for turn in each.turns), kind="chat", system=system
        )
        for number, each in enumerate(dialogues)
    ]  # fmt: skip
    return chats, [template.encode(each) for each in chats]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["shared_prefix", "best_fit", "off"])
def test_packs_of_both_kinds_equal_their_dialogues_one_by_one(template, packing):
    """Loss and every gradient; a chat that read the system prompt of others would change both."""
    dialogues, examples = mixed_examples(template)
    members = {each.id: (int(each.kind == "chat"), 0.5) for each in dialogues}
    mix = Mixture(["support", "chats"], None, [2.0, 1.0], "tokens", members)
    limit = 3000 if packing == "off" else 900
    packs, report = pack_dialogues(examples, PackingConfig(packing, limit), mixture=mix)
    seen = Counter(item.dialogue for pack in packs.pack_items for item in pack)
    assert seen == Counter({number: 1 if each.kind == "chat" else 2 for number, each in enumerate(dialogues)})
    prefixes = {
        (packs.prefix_lengths[number], dialogues[item.dialogue].kind)
        for number, pack in enumerate(packs.pack_items) for item in pack
    }  # fmt: skip
    support = len(template.prefix_ids)
    if packing == "shared_prefix":  # chats share their own prefix if they fill a pack
        assert [kind for prefix, kind in sorted(prefixes)] == ["chat", "chat", "chat", "csc"]
        assert min(prefixes) == (0, "chat") and max(prefixes) == (support, "csc")
    else:
        assert prefixes == {(0, "csc"), (0, "chat")}
    for number, pack in enumerate(packs.pack_items):  # the group of a trained token tells its source
        kinds = {dialogues[item.dialogue].kind for item in pack}
        groups = packs[number]["token_groups"]
        assert {*(groups[groups > 0] // NUM_GROUPS).tolist()} == {int(kind == "chat") for kind in kinds}
    if packing == "best_fit":
        assert any(len({dialogues[item.dialogue].kind for item in pack}) == 2 for pack in packs.pack_items)
    layout = {"shared_prefix": "varlen", "best_fit": "position_ids", "off": "padded"}[packing]
    attention = VARLEN_ATTENTION if layout == "varlen" else "sdpa"
    torch.manual_seed(0)
    model, plain = (
        AutoModelForCausalLM.from_config(  # a configuration each: it keeps the attention
            tiny_config("qwen2", template.tokenizer, 0.2, max_position_embeddings=4096),
            dtype=torch.float32,
            attn_implementation=each,
        )
        for each in (attention, "sdpa")
    )
    plain.load_state_dict(model.state_dict())

    def measured(batch) -> tuple[float, list[torch.Tensor]]:
        labels = batch.pop("labels")
        kept = {
            name: batch[name]
            for name in ("input_ids", "position_ids", "attention_mask", "varlen_metadata")
            if name in batch
        }
        model.zero_grad()
        logits = model(**kept, use_cache=False).logits
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        loss.backward()
        return loss.item(), [each.grad for each in model.parameters()]

    plain.zero_grad()
    total = 0.0
    for number, example in enumerate(examples):
        ids = torch.tensor(example.input_ids[None], dtype=torch.int64)
        each = cross_entropy(plain(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        loss = seen[number] * (each * torch.tensor(example.trained[1:])).sum()
        loss.backward()
        total += loss.item()
    expected = [each.grad for each in plain.parameters()]
    loss, gradients = measured(PackCollator(layout, 0)(list(packs)))
    assert loss == pytest.approx(total, rel=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    if packing == "shared_prefix":  # chats that share the prefix of others are seen
        wrong = [pack for pack, shared in zip(packs, packs.prefix_lengths, strict=True) if shared == 0]
        head = packs[packs.prefix_lengths.index(support)]["input_ids"][:support]
        mistaken = [
            {
                **pack,
                "input_ids": numpy.concatenate([head, pack["input_ids"]]),
                "loss_weights": numpy.concatenate([numpy.zeros(support, numpy.float32), pack["loss_weights"]]),
                "document_lengths": [support, *pack["document_lengths"]],
                "prefix_length": support,
            }
            for pack in wrong
        ]
        others = [pack for pack, shared in zip(packs, packs.prefix_lengths, strict=True) if shared]
        assert abs(measured(PackCollator(layout, 0)(others + mistaken))[0] / total - 1) > 1e-3
    assert report.sources["support"]["epochs"] == 2 and report.sources["chats"]["dialogues"] == 11
    assert sum(each["tokens"] for each in report.sources.values()) == sum(
        seen[number] * (len(each.input_ids) - each.turn_offsets[0]) for number, each in enumerate(examples)
    )
    assert "source chats: 11 dialogues, 1.00 times in an epoch" in str(report)


def test_chats_that_fill_a_pack_share_their_own_prefix(template):
    _, examples = mixed_examples(template)
    same = [
        each
        for each in examples
        if each.input_ids[: each.turn_offsets[0]].tolist()
        == examples[1].input_ids[: examples[1].turn_offsets[0]].tolist()
    ]
    length = sum(len(each.input_ids) for each in same)
    packs, _ = pack_dialogues([*same, examples[0]], PackingConfig("shared_prefix", max_length=length))
    assert [bool(prefix) for prefix in packs.prefix_lengths] == [True, False]


def test_a_chat_with_a_long_system_prompt_is_too_long_and_stops_no_training(template):
    _, examples = mixed_examples(template)
    turns = (Turn(Speaker.CUSTOMER, "hi"), Turn(Speaker.SUPPORTER, "yes"))
    long = template.encode(Dialogue("long", turns, kind="chat", system="ab " * 900))
    for overflow in ("drop", "truncate"):
        _, report = pack_dialogues([*examples, long], PackingConfig("shared_prefix", 900, overflow))
        assert report.dropped == 1
    with pytest.raises(InputError, match=r"^dialogue 1 \(long\) has \d+ tokens, more than packing.max_length=900"):
        pack_dialogues([long], PackingConfig("shared_prefix", 900, "error"))


def test_what_a_mix_leaves_out_of_an_epoch_is_counted(template):
    dialogues, examples = mixed_examples(template)
    members = {each.id: (int(each.kind == "chat"), number / 15) for number, each in enumerate(dialogues)}
    half = Mixture(["support", "chats"], None, [0.5, 1.0], "dialogues", members)
    _, report = pack_dialogues(examples, PackingConfig("best_fit", 900), mixture=half)
    assert (report.dialogues, report.dropped, report.unused) == (15, 0, 2)
    assert str(report).startswith("13 dialogues (0 truncated, 0 dropped, 2 not in an epoch) in ")
    with pytest.raises(
        InputError, match=r"^data.mix: the loss weights leave no trained token of chats: raise loss.rep"
    ):
        labels = [replace(each, token_types=each.token_types * (each.strategies.any() > 0)) for each in examples]
        pack_dialogues(labels, PackingConfig("best_fit", 900), mixture=half)


@pytest.mark.parametrize(
    "weighting", [name for name in WEIGHTINGS if name in ("tokens", "turns", "inverse_frequency", "by_strategy")]
)
def test_the_turns_of_chats_weigh_as_a_mean_turn(template, weighting):
    factors = {"GT": 0.0} if weighting == "by_strategy" else {}
    weights = LossWeights(LossConfig(weighting, strategy_factors=factors), numpy.arange(13) + 1)
    assert weights.factors[0] == 1
    dialogues, examples = mixed_examples(template)
    chat = next(number for number, each in enumerate(dialogues) if each.kind == "chat")
    found = weights(examples[chat])
    assert ((found > 0) == examples[chat].trained).all()


def test_metrics_by_source_by_hand():
    # Two tokens of one source, a hit and a loss of 3 in all; six of the other, 3 hits and a loss of 12.
    sums = torch.tensor([[2.0, 6.0, 0.0], [3.0, 12.0, 0.0], [1.0, 3.0, 0.0]])
    assert source_metrics(sums, ["a", "b", "none"]) == {
        "token_share_by_source/a": 0.25, "loss_by_source/a": 1.5, "accuracy_by_source/a": 0.5,
        "token_share_by_source/b": 0.75, "loss_by_source/b": 2.0, "accuracy_by_source/b": 0.5,
        "token_share_by_source/none": 0.0,
    }  # fmt: skip


# Whole runs

MIX = "[{path: synthetic.jsonl, weight: 5}, {path: calls.jsonl, weight: 3}, {path: chats.jsonl, weight: 2, kind: chat}]"
TRAINING = (
    "debug=cpu_tiny", "data.train.path=null", "data.train.source=null", "data.sample_dialogues=null",
    f"data.mix={MIX}", "trainer.epochs=1", "trainer.max_steps=-1", "trainer.save_steps=1",
)  # fmt: skip

PLAN = ("preflight.probe=false", f"model.tokenizer={SMALL_TOKENIZERS / 'qwen2'}")


@pytest.mark.slow
def test_preflight_plans_a_mix(here):
    report = run_preflight(compose("preflight", [*TRAINING, *PLAN]))
    (line,) = [each.message for each in report.checks if each.name == "data"]
    assert ", 3 sources, about " in line and "dialogues in an epoch" in line
    assert report.estimate.tokens > 0
    once, thrice = (f"data.mix=[{{path: chats.jsonl, epochs: {n}, kind: chat}}, {{path: calls.jsonl}}]" for n in (1, 3))
    chats, more = (run_preflight(compose("preflight", [*TRAINING, mix, *PLAN])).estimate for mix in (once, thrice))
    assert more.dialogues == chats.dialogues + 2 * 16
    # The longest dialogues may all be too long: the training drops them and goes on.
    write_chats(here / "long.jsonl", 25, turns=90)
    mix = "data.mix=[{path: chats.jsonl, kind: chat}, {path: calls.jsonl}, {path: long.jsonl, kind: chat}]"
    longest = run_preflight(compose("preflight", [*TRAINING, mix, "packing.overflow=drop", *PLAN]))
    (check,) = [each for each in longest.checks if each.name == "longest dialogue"]
    assert check.message == "the 20 longest are dropped: packing.max_length=2,048" and check.status == "not checked"
    absent = run_preflight(compose("preflight", [*TRAINING, "data.mix=[{path: nowhere.jsonl}]", *PLAN]))
    assert any("data.mix[0]: nowhere.jsonl: no such file" in str(each.message) for each in absent.checks)


def history(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "history.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


@pytest.mark.distributed
def test_a_mix_that_is_killed_on_two_ranks_resumes_with_the_same_losses_and_shares(here):
    script = ROOT / "recipes" / "sft.py"
    alone = run_script(script, *TRAINING, "run.directory=alone")
    assert alone.returncode == 0, alone.stderr
    expected = history(here / "alone")
    assert len(expected) >= 4
    ranks = start_ranks(script, *TRAINING, "run.directory=run", ranks=2)
    end = time.monotonic() + TIMEOUT_S
    while not list(here.glob("run/checkpoints/checkpoint-2*")) and time.monotonic() < end:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert not (here / "run" / "model").exists()
    done = run_script(script, "run=run", "resume=true", ranks=2)
    assert done.returncode == 0, done.stderr
    found = history(here / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        sources = [name for name in theirs if "_by_source/" in name]
        assert {name.rpartition("/")[2] for name in sources} == {"synthetic", "calls", "chats"}
        for name in sources:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    packing = json.loads((here / "run" / "metrics.json").read_text(encoding="utf-8"))["packing"]
    assert packing == json.loads((here / "alone" / "metrics.json").read_text(encoding="utf-8"))["packing"]
    shares = {name: source["token_share"] for name, source in packing["sources"].items()}
    assert shares == pytest.approx({"synthetic": 0.5, "calls": 0.3, "chats": 0.2}, abs=0.01)
    # The model's evaluation reads the mix again; its baselines count in customer support only.
    card = (here / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "chats.jsonl`, ordinary chats, weight 2" in card
