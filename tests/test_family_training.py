"""Models with gated delta nets or experts train the same on one process and on two, sharded or not, in whatever passes.

The routers are made so that nobody chooses the first expert of a layer, and one process in a step the second one.
"""

import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_dialogue, remember, small_tokenizer, tiny_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from workers.loss_curve import EPOCHS, STEPS_PER_EPOCH, curve, first_packs, train, train_all

from csc_train.models.config import AdapterConfig
from csc_train.models.experts import routers
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import ValidationConfig

TEMPLATES = {"qwen3_5_text": "qwen3_5", "qwen3_moe": "qwen3"}
"""By family."""
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "learning_rate": 2e-2}
SHARDED = {"stage": "3", "persistence_threshold": 0}
"""The small tensors of a layer, its convolution and decays, are sharded as well."""
VALIDATION = {"eval_steps": 3, "num_turns": 4, "num_samples": 3, "max_new_tokens": 4}
VALIDATED = {"micro_batch_size": 1, "packs": "shared", "zero": SHARDED, "gradient_checkpointing": "selective"}
TWO_PROCESSES = {
    "shared": {"micro_batch_size": 2, "packs": "shared"},
    "shared 2": {"micro_batch_size": 1, "packs": "shared", "zero": {"stage": "2"}},
    "shared 3": {**VALIDATED, "validation": VALIDATION, "checkpoints": "shared-3/checkpoints", "save_steps": 4},
    "packs 3": {"micro_batch_size": 2, "packs": "packs", "zero": SHARDED, "gradient_checkpointing": "full"},
    "lora 3": {"micro_batch_size": 2, "packs": "shared", "zero": SHARDED, **LORA},
}
"""By the name of what trains the same on one process, with the ZeRO stage."""
LORA_ON_EXPERTS = LORA | {"adapter": LORA["adapter"] | {"target_modules": [], "target_parameters": ["all-experts"]}}
CASES = {
    "qwen3_5_text": TWO_PROCESSES,
    "qwen3_moe": {
        **{name: TWO_PROCESSES[name] for name in ("shared", "shared 3", "packs 3")},
        "lora 3": TWO_PROCESSES["lora 3"] | LORA_ON_EXPERTS,
        "shared 2 resumed": TWO_PROCESSES["shared 2"] | {"resume": "shared-3/checkpoints/checkpoint-4"},
        "shared 3 loop": VALIDATED | {"experts": "eager"},
        "bf16 3": VALIDATED | {"precision": "bf16"},
    },
}
"""By family, too."""
WITH_EXPERTS = {"qwen3_moe"}
BALANCED = {"router_aux_loss_coef": 0.1}


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request, tmp_path_factory) -> Path:
    """A tiny model of a family, and packs for two steps and one pack, with a shared prefix and without."""
    folder = tmp_path_factory.mktemp("models") / request.param
    folder.mkdir()
    chat_template = TEMPLATES[folder.name]
    template = DialogueTemplate(small_tokenizer(chat_template), chat_template, TemplateConfig(mode="reply_only"))
    rng = random.Random(10)
    examples = [template.encode(random_dialogue(rng)) for _ in range(60)]
    torch.manual_seed(0)
    config = tiny_config(folder.name, template.tokenizer, 0.1)
    model = remember(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    for name, packing in (("shared", "shared_prefix"), ("packs", "best_fit")):
        packs, _ = pack_dialogues(examples, PackingConfig(packing, max_length=1000))
        few = first_packs(packs)
        assert min(map(len, few.document_lengths)) > 1
        (folder / name).write_bytes(pickle.dumps(few))
        if name == "shared":
            leave_experts_out(model, few)
    dialogues = [random_dialogue(rng) for _ in range(6)]
    (folder / "validation").write_bytes(pickle.dumps(dialogues))
    model.save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@torch.no_grad()
def leave_experts_out(model: PreTrainedModel, packs: PackedDataset) -> None:
    """Let no token choose the first expert of a layer, and only a token that one pack has the second one."""
    counts = Counter(token for pack in range(len(packs)) for token in set(packs[pack]["input_ids"].tolist()))
    rare = min(counts, key=counts.__getitem__)
    assert counts[rare] == 1
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0], embeddings[:, 1], embeddings[rare, 1] = 1, 0, 3
    for router in routers(model):
        weight: Any = router.weight
        weight[:, 0], weight[:2] = 0, 0
        weight[:2, 0], weight[1, 1] = -3, 10


def options_of(folder: Path, **options) -> dict:
    return options | (BALANCED if folder.name in WITH_EXPERTS else {})


@pytest.fixture(scope="module")
def on_two(folder):
    return train_all(folder, {name: options_of(folder, **case) for name, case in CASES[folder.name].items()}, 2)


@pytest.fixture(scope="module")
def validated(folder):
    """One process that measures itself."""
    options = options_of(folder, packs="shared", checkpoints="shared-1/checkpoints")
    return train(folder, micro_batch_size=4, validation=ValidationConfig(**VALIDATION), **options)


@pytest.fixture(scope="module")
def references(folder, validated):
    """One process, all packs of a step in one pass."""
    adapted = CASES[folder.name]["lora 3"]
    lora = {"packs": "shared", **LORA, "adapter": AdapterConfig(**adapted["adapter"])}
    cases = {"packs": {"packs": "packs"}, "lora": lora}
    others = {
        name: curve(train(folder, micro_batch_size=4, **options_of(folder, **options)))
        for name, options in cases.items()
    }
    return {"shared": curve(validated), **others}


@pytest.mark.distributed
def test_two_processes_train_as_one_does(folder, on_two, references):
    for name, run in on_two.items():
        kind, *stage = name.split()
        reference = references["shared" if kind == "bf16" else kind]
        stage = int(stage[0]) if stage else None
        assert (run["processes"], run["stage"], run["empty"]) == (2, stage, 1 if stage == 3 else 0), name
        assert run["first_step"] == (4 if name.endswith("resumed") else 0)
        assert len(reference["losses"]) == EPOCHS * STEPS_PER_EPOCH
        assert run["losses"][-1] < 0.97 * run["losses"][0]
        if kind == "bf16":
            assert run["losses"] == pytest.approx(reference["losses"], rel=2e-3)
            assert run["losses"] != pytest.approx(reference["losses"], rel=1e-5)  # it did compute in bf16
            continue
        assert run["losses"] == pytest.approx(reference["losses"], rel=1e-5), name
        assert run["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-4), name
        if folder.name in WITH_EXPERTS:
            assert run["aux_losses"] == pytest.approx(reference["aux_losses"], rel=1e-5), name
        assert run["weights"].keys() == reference["weights"].keys()
        for weights, values in run["weights"].items():
            mine, theirs = torch.tensor(values), torch.tensor(reference["weights"][weights])
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), (name, weights)


@pytest.mark.distributed
def test_a_process_chose_no_token_for_experts_that_another_trained(folder, on_two):
    """Which is when processes would wait for each other, if each gathered what its own tokens need."""
    for name in ("shared", "shared 3", "shared 3 loop") if folder.name in WITH_EXPERTS else ():
        steps = on_two[name]["chosen"]
        assert not any([layer, 0] in chosen for layer in range(2) for ranks in steps for chosen in ranks)
        assert any(([0, 1] in one) != ([0, 1] in other) for one, other in steps)


@pytest.mark.distributed
def test_a_checkpoint_names_tensors_as_parameters_and_keeps_the_configuration(folder, on_two):
    saved = folder / "shared-3" / "checkpoints" / "checkpoint-4"
    with safe_open(saved / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == on_two["shared 3"]["weights"].keys()
    mine, theirs = (json.loads((path / "config.json").read_text()) for path in (saved, folder / "model"))
    assert {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)} <= {"use_cache"}


@pytest.mark.distributed
def test_two_processes_measure_the_same_as_one(folder, on_two, references):
    one, two = references["shared"]["measured"], on_two["shared 3"]["measured"]
    assert [each["step"] for each in two] == [3, 6]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert samples(folder, "shared-3") == samples(folder, "shared-1")


# With experts, test_likelihood.py and test_generator.py compare the same in less time.
@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(TEMPLATES.keys() - WITH_EXPERTS), indirect=True, scope="module")
@torch.no_grad()
def test_a_validation_measures_what_transformers_own_layers_would(folder, validated):
    """By forward passes of one sequence: no padding reaches a state, and no label another one."""
    plain = AutoModelForCausalLM.from_config(validated.model.config, attn_implementation="eager", dtype=torch.float32)
    plain.load_state_dict(validated.model.state_dict())
    plain.eval()
    validator, template = validated.validator, validated.validator.template

    def logits(ids):
        return plain(torch.tensor([ids]), use_cache=False).logits[0]

    hits = 0
    for turn in validator.turns:
        prompt, labels = validator.prompt(turn), template.label_ids
        scores = {
            number: logits([*prompt, *label])[len(prompt) - 1 : -1].log_softmax(-1)[range(len(label)), label].sum()
            for number, label in labels.items()
        }
        hits += (
            max(scores, key=lambda number: scores[number]) == validator.tokenized[turn.dialogue].strategies[turn.turn]
        )
    measured = curve(validated)["measured"][-1]
    assert measured["strategy_accuracy"] == hits / len(validator.turns)
    rows = [row for row in samples(folder, "shared-1") if row["step"] == 6]
    lengths = {len(validator.prompt(turn)) for turn in validator.samples}
    assert len(rows) == len(lengths) == 3
    for row, turn in zip(rows, validator.samples, strict=True):
        prompt = ids = validator.prompt(turn)
        while len(ids) < len(prompt) + 4 and template.end_of_turn_id not in ids[len(prompt) :]:
            ids = [*ids, logits(ids)[-1].argmax().item()]
        text = template.tokenizer.decode([each for each in ids[len(prompt) :] if each != template.end_of_turn_id])
        assert template.parse(text).response == row["response"]


def samples(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
