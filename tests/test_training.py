"""Training does not depend on ranks and micro batches, resumes bit by bit, and writes a final model that plain
from_pretrained loads."""

import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_OF, manifest_of, random_dialogue, real_tokenizer, small_tokenizer, tiny_config
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from wandb_file import offline_runs
from workers.loss_curve import EPOCHS, PACKS_PER_STEP, STEPS_PER_EPOCH, curve, first_packs, train, train_all

from csc_train.checkpoints.export import trained_model
from csc_train.checkpoints.manifest import MANIFEST_FILE, check_manifest, read_manifest, save_final_model
from csc_train.errors import InputError
from csc_train.files import digest, file_digest
from csc_train.models.config import AdapterConfig, ModelConfig
from csc_train.models.inspection import check_tokenizer, inspect_model
from csc_train.models.loading import load_model
from csc_train.models.tokenizer import load_tokenizer, tokenizer_hash
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.packing.loss_weights import LossWeights, count_token_types, count_trained_turns
from csc_train.template.chat_templates import chat_template_names, load_chat_template
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training import memory as memory_plan
from csc_train.training.config import CHECKPOINTING, TrainerConfig
from csc_train.training.trainer import PackTrainer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory) -> Path:
    """A tiny model, packs enough for two steps and a quarter, and dialogues alone in their packs enough for the same.

    So one pack is left for the last step of an epoch.
    """
    folder = tmp_path_factory.mktemp("training")
    rng = random.Random(10)
    examples = [template.encode(random_dialogue(rng)) for _ in range(30)]
    packs, _ = pack_dialogues(examples, PackingConfig("best_fit", max_length=1000))
    packs = first_packs(packs)
    assert min(map(len, packs.document_lengths)) > 1
    alone, _ = pack_dialogues(examples[: len(packs)], PackingConfig("off", max_length=1000))
    (folder / "alone").write_bytes(pickle.dumps(alone))
    more = [*examples, *(template.encode(random_dialogue(rng)) for _ in range(30))]
    shared, _ = pack_dialogues(more, PackingConfig("shared_prefix", max_length=1000))
    shared = first_packs(shared, len(packs))
    assert min(map(len, shared.document_lengths)) > 2  # the prefix and more than one dialogue
    (folder / "shared").write_bytes(pickle.dumps(shared))
    # Packs with different numbers of trained tokens: else a mean of means would pass for the mean over tokens.
    assert len({sum(row["loss_weights"]) for row in list(packs)}) > len(packs) / 2
    (folder / "packs").write_bytes(pickle.dumps(packs))
    turns = sum(count_trained_turns(count_token_types(each), each.strategies) for each in examples)
    for name, config in {
        "weighted": LossConfig("inverse_frequency"),
        # Weights that add up to less than one, by which TRL would not divide.
        "faint": LossConfig(reply_weight=1e-4),
    }.items():
        weigh = LossWeights(config, turns)
        (folder / name).write_bytes(
            pickle.dumps(PackedDataset(examples, packs.pack_items, packs.prefix_lengths, weigh))
        )
    config = tiny_config("qwen2", template.tokenizer, 0.1, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


# The same training however it is cut up


@pytest.fixture(scope="module")
def whole(folder):
    """All packs of a step in one forward pass."""
    return curve(train(folder, micro_batch_size=4))


@pytest.fixture(scope="module")
def halves(folder):
    """The same in two passes, with selective checkpointing; states of training are saved after each step."""
    kept = {"checkpoints": "kept", "save_steps": 1, "save_total_limit": EPOCHS * STEPS_PER_EPOCH}
    return curve(train(folder, micro_batch_size=2, gradient_checkpointing="selective", **kept))


@pytest.fixture(scope="module")
def quarters(folder):
    """The same in four passes, with full checkpointing."""
    return curve(train(folder, micro_batch_size=1, gradient_checkpointing="full"))


@pytest.fixture(scope="module")
def whole_alone(folder):
    """One dialogue a pack, in one forward pass."""
    return curve(train(folder, micro_batch_size=4, packs="alone"))


@pytest.fixture(scope="module")
def whole_weighted(folder):
    """Turns of rare strategies count more."""
    return curve(train(folder, micro_batch_size=4, packs="weighted"))


@pytest.fixture(scope="module")
def whole_shared(folder):
    """Packs that share a prefix, in one forward pass; and what was logged of it."""
    trainer = train(folder, micro_batch_size=4, packs="shared")
    return curve(trainer) | {"history": [entry for entry in trainer.state.log_history if "loss" in entry]}


TWO_PROCESSES = {
    "two_processes": {"micro_batch_size": 2},
    "two_processes_in_quarters": {"micro_batch_size": 1},
    # One dialogue is left for the last step, so one process has none.
    "two_processes_alone": {"micro_batch_size": 2, "packs": "alone"},
    # The pack that is left for the last step is cut in two, and its prefix goes with both.
    "two_processes_shared": {"micro_batch_size": 2, "packs": "shared"},
    "two_processes_weighted": {"micro_batch_size": 1, "packs": "weighted"},
    "two_processes_resumed": {"micro_batch_size": 2, "resume": "kept/checkpoint-4"},
    "two_processes_tracked": {"micro_batch_size": 1, "packs": "shared", "tracked": "tracked"},
}


@pytest.fixture(scope="module")
def on_two_processes(folder, halves):
    """What `TWO_PROCESSES` lists, by name; `halves` has left the state to resume from."""
    return train_all(folder, TWO_PROCESSES, 2)


def worst_weight(one: dict, other: dict) -> float:
    """The norm of a parameter's difference over its norm; the worst parameter counts.

    Not the largest difference: where a gradient is all but zero Adam makes a step of its rounding, and how that falls
    is the processor's.
    """
    assert one["weights"].keys() == other["weights"].keys()
    found = []
    for name, values in one["weights"].items():
        mine, theirs = torch.tensor(values), torch.tensor(other["weights"][name])
        found.append(((mine - theirs).norm() / mine.norm()).item())
    return max(found)


ONE, TWO = "Qwen2ForCausalLM", "DistributedDataParallel"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "reference", "micro_batch_size", "accumulation", "processes", "engine"),
    [
        ("halves", "whole", 2, 2, 1, ONE),
        ("quarters", "whole", 1, 4, 1, ONE),
        ("two_processes", "whole", 2, 1, 2, TWO),
        ("two_processes_in_quarters", "whole", 1, 2, 2, TWO),
        ("two_processes_alone", "whole_alone", 2, 1, 2, TWO),
        ("two_processes_shared", "whole_shared", 2, 1, 2, TWO),
        ("two_processes_weighted", "whole_weighted", 1, 2, 2, TWO),
        ("two_processes_resumed", "whole", 2, 1, 2, TWO),
    ],
)
def test_the_loss_curve_does_not_depend_on_ranks_and_micro_batches(
    run, reference, micro_batch_size, accumulation, processes, engine, request
):
    whole = request.getfixturevalue(reference)
    other = request.getfixturevalue("on_two_processes")[run] if run in TWO_PROCESSES else request.getfixturevalue(run)
    cut = ("micro_batch_size", "accumulation", "processes")
    assert [whole[name] for name in cut] == [4, 1, 1]
    assert [other[name] for name in cut] == [micro_batch_size, accumulation, processes]
    # Two processes that did not find each other would each train alone, on all the packs, and agree as well.
    assert other["engine"] == engine
    assert len(whole["losses"]) == EPOCHS * STEPS_PER_EPOCH
    assert other["losses"] == pytest.approx(whole["losses"], rel=TOLERANCE)
    assert other["grad_norms"][0] == pytest.approx(whole["grad_norms"][0], rel=TOLERANCE)
    # After an update the weights differ as well: Adam turns the rounding of small gradients into steps.
    assert other["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-4)
    assert worst_weight(whole, other) < 1e-4
    assert whole["losses"][-1] < 0.95 * whole["losses"][0]


@pytest.mark.slow
def test_a_training_repeats_itself_bit_by_bit(folder, halves):
    again = curve(train(folder, micro_batch_size=2))
    assert again == halves


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS_PER_EPOCH))
def test_a_training_resumed_after_any_step_continues_bit_by_bit(folder, halves, step, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "packs", tmp_path / "packs")
    shutil.copytree(folder / "kept" / f"checkpoint-{step}", tmp_path / "state")
    resumed = train(tmp_path, micro_batch_size=2, resume="state")
    assert curve(resumed) == {**halves, "first_step": step, "documents": halves["documents"][step:]}


@pytest.mark.slow
def test_another_seed_takes_the_packs_in_another_order(folder, halves):
    other = curve(train(folder, micro_batch_size=2, seed=1))
    assert other["losses"] != halves["losses"]
    assert other["digest"] != halves["digest"]


# What the loss is


def by_hand(folder: Path) -> tuple[float, float]:
    """Cross entropy over the trained tokens of all packs, weighted, summed and divided by the sum of weights; and the
    norm of its gradient. Document by document, without trainer or collator."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total, weight = 0.0, 0.0
    for row in list(pickle.loads((folder / "packs").read_bytes())):
        ids, weights, start = torch.tensor(row["input_ids"], dtype=torch.int64), torch.tensor(row["loss_weights"]), 0
        for length in row["document_lengths"]:
            document = slice(start, start + length)
            logits = model(ids[document][None], use_cache=False).logits[0]
            each = cross_entropy(logits[:-1], ids[document][1:], reduction="none")
            total = total + (each * weights[document][1:]).sum()
            weight += weights[document].sum().item()
            start += length
    loss = total / weight
    loss.backward()
    norm = math.sqrt(sum(parameter.grad.pow(2).sum().item() for parameter in model.parameters()))
    return loss.item(), norm


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("micro_batch_size", [4, 1])
@pytest.mark.parametrize("kind", ["packs", "weighted", "faint"])
def test_the_logged_loss_and_gradient_norm_are_those_computed_by_hand(
    folder, tmp_path, kind, micro_batch_size, checkpointing
):
    # A step takes all the packs, so that their order does not matter.
    packs = pickle.loads((folder / kind).read_bytes())
    (tmp_path / "packs").write_bytes(pickle.dumps(first_packs(packs, PACKS_PER_STEP)))
    shutil.copytree(folder / "model", tmp_path / "model")
    done = curve(train(tmp_path, micro_batch_size, max_steps=1, gradient_checkpointing=checkpointing))
    loss, norm = by_hand(tmp_path)
    assert done["losses"] == [pytest.approx(loss, rel=TOLERANCE)]
    assert done["grad_norms"] == [pytest.approx(norm, rel=TOLERANCE)]
    assert loss == pytest.approx(math.log(597), rel=0.2)  # about as good as guessing


# Out of memory


@pytest.fixture
def batches(monkeypatch) -> list[tuple[int, int]]:
    """(optimizer steps taken, tokens) of every forward pass of a training, as it goes."""
    seen, real = [], PackTrainer.training_step

    def spy(self, model, inputs, num_items_in_batch=None):
        seen.append((self.state.global_step, inputs["input_ids"].numel()))
        return real(self, model, inputs, num_items_in_batch=num_items_in_batch)

    monkeypatch.setattr(PackTrainer, "training_step", spy)
    return seen


@pytest.mark.distributed
def test_two_processes_are_measured_as_one_and_make_one_run(folder, whole_shared, on_two_processes):
    run = folder / "tracked"
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert on_two_processes["two_processes_tracked"]["losses"] == [line["loss"] for line in lines]

    def figures(line: dict) -> dict[str, float]:
        return {name: value for name, value in line.items() if name.startswith(("loss_", "accuracy_"))}

    for line, one in zip(lines, whole_shared["history"], strict=True):
        assert len(figures(line)) > 6
        assert figures(line) == pytest.approx(figures(one), rel=TOLERANCE, abs=0)
        assert line["rank_skew"] > 1
    (kept,) = offline_runs(run)
    assert sorted(kept.rows) == [line["step"] for line in lines]
    assert (kept.exit_code, kept.config["cluster"]["world_size"]) == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"micro_batch_size": 4, "gradient_checkpointing": "full"}, "what fits: trainer.micro_batch_size=2"),
        ({"micro_batch_size": 1, "gradient_checkpointing": "off"}, "trainer.gradient_checkpointing=selective"),
    ],
)
def test_running_out_of_memory_shows_the_estimate_and_what_fits(folder, batches, monkeypatch, options, remedy):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PackTrainer, "compute_loss", exhausted)
    # The convention for CUDA's own memory would outweigh so small a model.
    monkeypatch.setattr(memory_plan, "CUDA_CONTEXT_BYTES", 0)
    with pytest.raises(InputError) as caught:
        train(folder, **options)
    ((step, tokens),) = batches
    message = str(caught.value)
    assert step == 0 and "\n" not in message
    assert message.startswith(f"out of memory on process 0 in step 1 ({tokens:,} tokens in a batch); ")
    assert "estimated: 0.0 GiB (parameters 0.0, gradients 0.0, optimizer 0.0, activations 0.0" in message
    assert remedy in message


@pytest.mark.slow
def test_a_batch_without_a_trained_token_stops_the_training(folder, tmp_path):
    packs = pickle.loads((folder / "packs").read_bytes())
    packs.loss_weights.factors[:] = 0
    (tmp_path / "packs").write_bytes(pickle.dumps(packs))
    shutil.copytree(folder / "model", tmp_path / "model")
    with pytest.raises(ValueError, match="no trained token"):
        train(tmp_path)


@pytest.mark.slow
def test_a_model_that_leaks_between_packed_documents_is_refused_before_training(folder, tmp_path):
    shutil.copy(folder / "shared", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", use_sliding_window=True, sliding_window=512, layer_types=["sliding_attention"] * 2
    )
    model.save_pretrained(tmp_path / "model")
    small_tokenizer("qwen2_5").save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="Qwen2ForCausalLM with varlen attention cannot be trained on packs"):
        train(tmp_path, packs="shared")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_trainers_model_refuses_packed_rows_with_a_cache(folder):
    model = train(folder, max_steps=1).model
    row = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0]])}
    with pytest.raises(ValueError, match="a packed row with use_cache=True"):
        model.train()(**row, use_cache=True)


@pytest.mark.parametrize(
    ("packs_per_step", "micro_batch_size", "processes", "accumulation"),
    [(4, 4, 1, 1), (4, 2, 1, 2), (4, 2, 2, 1), (8, 1, 2, 4), (6, 2, 4, None), (4, 8, 1, None), (4, 1, 3, None)],
)
def test_accumulation_follows_from_the_batch_or_is_refused(packs_per_step, micro_batch_size, processes, accumulation):
    config = TrainerConfig(packs_per_step=packs_per_step, micro_batch_size=micro_batch_size)
    if accumulation:
        assert config.accumulation(processes) == accumulation
        assert accumulation * micro_batch_size * processes == packs_per_step
    else:
        with pytest.raises(InputError) as caught:
            config.accumulation(processes)
        assert str(caught.value) == (
            f"trainer.packs_per_step={packs_per_step} is not a multiple of trainer.micro_batch_size="
            f"{micro_batch_size} x {processes} processes"
        )


# Checkpoints


def probe(template: DialogueTemplate) -> torch.Tensor:
    return torch.tensor(template.encode(random_dialogue(random.Random(11))).input_ids[None], dtype=torch.int64)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def final_model(folder, template):
    """The final model of a full fine-tuning, and the logits of that model before it was saved."""
    trainer = train(folder, max_steps=2)
    model = trained_model(trainer, ModelConfig(path=str(folder / "model")), torch.float32)
    logits = logits_of(model, probe(template))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    save_final_model(folder / "final_model", model, tokenizer, template.chat_template, manifest_of(template))
    return folder / "final_model", logits


@pytest.mark.parametrize("name", chat_template_names())
def test_a_final_model_stops_at_the_end_of_a_turn_whatever_its_base_did(name, tmp_path):
    template = DialogueTemplate(small_tokenizer(name), name, TemplateConfig())
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2", template.tokenizer, 0.1))
    model.generation_config.eos_token_id = 3
    save_final_model(tmp_path / "one", model, template.tokenizer, template.chat_template, manifest_of(template))
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "one").generation_config.eos_token_id
    assert stops == [template.end_of_turn_id, 3]


@pytest.mark.slow
def test_a_final_model_loads_with_plain_from_pretrained(final_model, folder, template):
    directory, logits = final_model
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.dtype is torch.float32
    assert model.config.use_cache is True
    assert torch.equal(logits_of(model, probe(template)), logits)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (logits_of(base, probe(template)) - logits).abs().max() > 0.1
    assert not list(directory.parent.glob(".final_model.*"))  # nothing of the staging is left


@pytest.mark.slow
def test_a_final_model_generates_the_same_with_the_cache_as_without(final_model, template):
    model = AutoModelForCausalLM.from_pretrained(final_model[0])
    prompt = torch.tensor([template.prompt_ids([])])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    cached, plain = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.tolist() == plain.tolist()
    assert cached.shape[1] > prompt.shape[1]


@pytest.mark.slow
def test_a_final_models_chat_template_renders_the_strategy(final_model):
    tokenizer = AutoTokenizer.from_pretrained(final_model[0])
    chat = [
        {"role": "system", "content": "说明"},
        {"role": "assistant", "strategy": "情感管理", "content": "请放心"},
        {"role": "user", "content": "好"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\n说明<|im_end|>\n"
        "<|im_start|>assistant\n[情感管理]请放心<|im_end|>\n"
        "<|im_start|>user\n好<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_a_manifest_reads_back_as_it_was_written_and_passes_its_check(final_model, template):
    directory, _ = final_model
    manifest = read_manifest(directory)
    assert manifest == manifest_of(template, weights_hash=manifest.weights_hash, files=manifest.files)
    assert manifest.weights_hash == digest({"model.safetensors": file_digest(directory / "model.safetensors")})
    tokenizer = load_tokenizer(str(directory))
    again = DialogueTemplate(tokenizer, manifest.chat_template, TemplateConfig(manifest.mode, manifest.language))
    check_manifest(directory, manifest, again.fingerprint, tokenizer_hash(tokenizer))


@pytest.mark.slow
def test_another_template_is_refused_with_both_hashes(final_model, template):
    directory, _ = final_model
    manifest = read_manifest(directory)
    other = DialogueTemplate(template.tokenizer, "qwen3", template.config).fingerprint
    with pytest.raises(InputError) as caught:
        check_manifest(directory, manifest, other, manifest.tokenizer_hash)
    assert str(caught.value) == (
        f"{directory}: the model was trained with another template "
        f"(trained {template.fingerprint[:12]}, now {other[:12]}): "
        "use the code version that its manifest names, or train again"
    )


def _add_token(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<新>"])
    tokenizer.save_pretrained(path)


def _edit(path: Path, change) -> None:
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def _swap_two_tokens(path: Path) -> None:
    def change(content):
        vocabulary = content["model"]["vocab"]
        one, other = sorted(vocabulary)[:2]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    _edit(path, change)


def _drop_last_merge(path: Path) -> None:
    _edit(path, lambda content: content["model"]["merges"].pop())


@pytest.mark.slow
@pytest.mark.parametrize("tamper", [_add_token, _swap_two_tokens, _drop_last_merge])
def test_a_tampered_tokenizer_is_refused_with_both_hashes(final_model, template, tamper, tmp_path):
    shutil.copytree(final_model[0], tmp_path / "final_model")
    tamper(tmp_path / "final_model")
    manifest = read_manifest(tmp_path / "final_model")
    now = tokenizer_hash(load_tokenizer(str(tmp_path / "final_model")))
    trained = tokenizer_hash(template.tokenizer)
    assert now != trained
    with pytest.raises(InputError) as caught:
        check_manifest(tmp_path / "final_model", manifest, manifest.template_hash, now)
    assert str(caught.value) == (
        f"{tmp_path / 'final_model'}: the model was trained with another tokenizer "
        f"(trained {trained[:12]}, now {now[:12]}): "
        "use the code version that its manifest names, or train again"
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(pytest.param("small", name, id=f"small-{name}") for name in SMALL_OF),
        *(
            pytest.param("real", name, id=f"real-{name}", marks=[pytest.mark.real_tokenizer, pytest.mark.slow])
            for name in chat_template_names()
        ),
    ],
)
def test_a_tokenizer_keeps_its_hash_when_it_is_used_saved_and_loaded(kind, name, tmp_path):
    tokenizer = small_tokenizer(name) if kind == "small" else real_tokenizer(name)
    before = tokenizer_hash(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Leaves its padding and truncation behind in the tokenizer, and in what is saved of it.
    tokenizer(["短", "长一点的文字"], padding=True, truncation=True, max_length=4)
    tokenizer.chat_template = load_chat_template(name)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]["max_length"] == 4
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == before
    assert tokenizer_hash(small_tokenizer("llama3_1" if name != "llama3_1" else "qwen2_5")) != before


@pytest.mark.parametrize("name", SMALL_OF)
def test_a_template_does_not_mind_how_its_tokenizer_was_used_before(name):
    fresh, used = small_tokenizer(name), small_tokenizer(name)
    used(["短", "长一点的文字"], padding="max_length", truncation=True, max_length=4)
    dialogue = random_dialogue(random.Random(12))
    one, other = (DialogueTemplate(tokenizer, name, TemplateConfig()).encode(dialogue) for tokenizer in (fresh, used))
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.token_types.tolist() == other.token_types.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such model directory"),
        (
            lambda path: (path / MANIFEST_FILE).unlink(),
            f"no {MANIFEST_FILE}: choose a model that recipes/sft.py trained",
        ),
        (lambda path: (path / MANIFEST_FILE).write_text("{"), "broken JSON at line 1, column 2"),
        (
            lambda path: (path / MANIFEST_FILE).write_text('{"mode": "joint"}'),
            "missing 9 required positional arguments",
        ),
        (lambda path: (path / MANIFEST_FILE).write_text('{"nope": 1}'), "unexpected keyword argument 'nope'"),
    ],
    ids=["no-directory", "no-manifest", "broken", "incomplete", "unknown-field"],
)
def test_a_directory_without_a_final_model_is_refused(spoil, message, tmp_path):
    directory = tmp_path / "final_model"
    directory.mkdir()
    (directory / MANIFEST_FILE).write_text("{}")
    spoil(directory)
    with pytest.raises(InputError) as caught:
        read_manifest(directory)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(directory))
    assert "\n" not in str(caught.value)


# LoRA


@pytest.mark.slow
def test_lora_trains_only_the_adapters_and_merges_into_a_plain_model(folder, template, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    trainer = train(folder, adapter=AdapterConfig("lora", rank=4, alpha=8), learning_rate=2e-2)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # Every linear layer of both decoder layers has its pair, and nothing else is trained.
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trained) == 2 * 2 * len(layers)
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert all(any(layer in name for name in trained) for layer in layers)
    for name, value in trainer.model.state_dict().items():
        if "lora_" in name:
            assert value.abs().max() > 0, name  # B starts at zero
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain]), name
    ids = probe(template)
    adapted = logits_of(trainer.model, ids)

    save_final_model(
        tmp_path / "final_model",
        trained_model(trainer, ModelConfig(path=str(folder / "model")), torch.float32),
        template.tokenizer,
        template.chat_template,
        manifest_of(template),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final_model")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.state_dict().keys() == base.keys()
    assert not list((tmp_path / "final_model").glob("adapter*"))
    merged = logits_of(model, ids)
    assert (merged - adapted).abs().max() < TOLERANCE * adapted.abs().max()
    plain = logits_of(AutoModelForCausalLM.from_pretrained(folder / "model"), ids)
    assert (plain - adapted).abs().max() > 0.1


# What cannot be read


def _empty(path: Path) -> None:
    path.mkdir()


def _tokenizer_only(path: Path) -> None:
    small_tokenizer("qwen2_5").save_pretrained(path)


def _config_only(model_type: str):
    def make(path: Path) -> None:
        AutoConfig.for_model(model_type, hidden_size=32, num_hidden_layers=1).save_pretrained(path)

    return make


@pytest.mark.parametrize(
    ("what", "make", "message"),
    [
        ("tokenizer", None, "{path}: no such model directory"),
        ("model", None, "{path}: no such model directory"),
        ("tokenizer", _empty, "{path}: the directory has no readable tokenizer ("),
        ("tokenizer", _config_only("llama"), "{path}: the directory has no readable tokenizer ("),
        # For this type transformers would make an empty tokenizer up.
        ("tokenizer", _config_only("qwen2"), "{path}: there is no tokenizer (or one of 1 tokens, "),
        ("model", _empty, "{path}: the directory has no readable model ("),
        ("model", _tokenizer_only, "{path}: the directory has no readable model ("),
        ("model", _config_only("qwen2"), "{path}: the directory has no readable model ("),
    ],
)
def test_a_directory_that_cannot_be_read_is_named_in_one_line(what, make, message, tmp_path):
    path = tmp_path / "model"
    if make:
        make(path)
    with pytest.raises(InputError) as caught:
        read(what, str(path))
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def read(what: str, path: str) -> None:
    if what == "tokenizer":
        load_tokenizer(path)
    else:
        load_model(ModelConfig(path=path), small_tokenizer("qwen2_5"), torch.float32, 0)


@pytest.mark.skipif(os.environ["HF_HUB_OFFLINE"] != "1", reason="would reach for the network")
@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(what):
    with pytest.raises(InputError) as caught:
        read(what, "csc-train/no-such-model")
    assert str(caught.value) == (
        f"csc-train/no-such-model: cannot load the {what}: HF_HUB_OFFLINE is set and the cache has no copy: "
        "check the name, give a local directory, or download it"
    )


def test_a_model_with_fewer_embeddings_than_the_tokenizer_has_tokens_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["<新>"])
    config = ModelConfig(name="tiny", path=str(folder / "model"))
    with pytest.raises(InputError, match=r"^tiny: the model embeds 597 tokens, the tokenizer has 598: use its own$"):
        check_tokenizer(config, inspect_model(config), tokenizer)


def test_random_weights_depend_only_on_the_seed(template):
    config = ModelConfig(init="random", tokenizer="train")
    config.architecture.hidden_size, config.architecture.intermediate_size = 32, 64
    models = []
    for seed in (0, 0, 1):
        torch.rand(7)
        models.append(load_model(config, template.tokenizer, torch.float32, seed).state_dict())
    one, again, other = models
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].shape == (597, 32)
