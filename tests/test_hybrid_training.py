"""Models with gated delta nets train the same on one process and on two, sharded or not, in whatever passes."""

import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM
from workers.loss_curve import EPOCHS, PACKS_PER_STEP, STEPS_PER_EPOCH, curve, train, train_all

from csc_train.models.config import AdapterConfig
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import ValidationConfig

LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "learning_rate": 2e-2}
SHARDED = {"stage": "3", "persistence_threshold": 0}
"""The small tensors of a layer, its convolution and decays, are sharded as well."""
VALIDATION = {"eval_steps": 3, "num_turns": 4, "num_samples": 3, "max_new_tokens": 4}
VALIDATED = {"micro_batch_size": 1, "packs": "shared", "zero": SHARDED, "gradient_checkpointing": "selective"}
TWO_PROCESSES = {
    "shared": {"micro_batch_size": 2, "packs": "shared"},
    "shared 2": {"micro_batch_size": 1, "packs": "shared", "zero": {"stage": "2"}},
    "shared 3": {**VALIDATED, "validation": VALIDATION, "checkpoints": "shared-3/checkpoints"},
    "packs 3": {"micro_batch_size": 2, "packs": "packs", "zero": SHARDED, "gradient_checkpointing": "full"},
    "lora 3": {"micro_batch_size": 2, "packs": "shared", "zero": SHARDED, **LORA},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and packs for two steps and one pack, with a shared prefix and without."""
    folder = tmp_path_factory.mktemp("hybrid")
    template = DialogueTemplate(small_tokenizer("qwen3_5"), "qwen3_5", TemplateConfig(mode="reply_only"))
    rng = random.Random(10)
    examples = [template.encode(random_dialogue(rng)) for _ in range(60)]
    for name, packing in (("shared", "shared_prefix"), ("packs", "best_fit")):
        packs, _ = pack_dialogues(examples, PackingConfig(packing, max_length=1000))
        number = 2 * PACKS_PER_STEP + 1
        few = PackedDataset(
            packs.dialogues, packs.pack_items[:number], packs.prefix_lengths[:number], packs.loss_weights
        )
        assert min(map(len, few.document_lengths)) > 1
        (folder / name).write_bytes(pickle.dumps(few))
    dialogues = [random_dialogue(rng) for _ in range(6)]
    (folder / "validation").write_bytes(pickle.dumps(dialogues))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text", template.tokenizer, 0.1), dtype=torch.float32)
    for name, weights in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.constant_(weights, -3)  # states that last, whose leaks would count
    model.save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    return train_all(folder, TWO_PROCESSES, 2)


@pytest.fixture(scope="module")
def validated(folder):
    """One process that measures itself."""
    options = {"packs": "shared", "checkpoints": "shared-1/checkpoints"}
    return train(folder, micro_batch_size=4, validation=ValidationConfig(**VALIDATION), **options)


@pytest.fixture(scope="module")
def references(folder, validated):
    """One process, all packs of a step in one pass."""
    lora = {**LORA, "adapter": AdapterConfig(**LORA["adapter"]), "packs": "shared"}
    cases = {"packs": {"packs": "packs"}, "lora": lora}
    others = {name: curve(train(folder, micro_batch_size=4, **options)) for name, options in cases.items()}
    return {"shared": curve(validated), **others}


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_train_as_one_does(on_two, references, name):
    run, reference = on_two[name], references[name.split()[0]]
    stage = int(name.split()[1]) if " " in name else None
    assert (run["processes"], run["stage"], run["empty"]) == (2, stage, 1 if stage == 3 else 0)
    assert len(reference["losses"]) == EPOCHS * STEPS_PER_EPOCH
    assert run["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert run["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-4)
    assert run["losses"][-1] < 0.95 * run["losses"][0]
    assert run["weights"].keys() == reference["weights"].keys()
    for weights, values in run["weights"].items():
        mine, theirs = torch.tensor(values), torch.tensor(reference["weights"][weights])
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), weights


@pytest.mark.distributed
def test_two_processes_measure_the_same_as_one(folder, on_two, references):
    one, two = references["shared"]["measured"], on_two["shared 3"]["measured"]
    assert [each["step"] for each in two] == [3, 6]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert samples(folder, "shared-3") == samples(folder, "shared-1")


@pytest.mark.slow
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
