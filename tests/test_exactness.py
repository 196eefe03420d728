"""One sequence for all that a dialogue trains, several dialogues per row: neither changes the loss or any gradient.

An error is measured for each parameter as the largest absolute difference between two gradients over the largest
absolute entry of the reference, and the worst parameter counts; for a loss as the difference over the reference.
"""

import random
from functools import partial

import numpy
import pytest
import torch
from conftest import random_dialogue, sampled, small_tokenizer, tiny_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from csc_train.data.dialogue import Dialogue
from csc_train.models.config import AdapterConfig
from csc_train.packing.collator import IGNORE_INDEX, PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue
from csc_train.training.config import TrainerConfig
from csc_train.training.trainer import build_trainer, training_arguments

TOLERANCE = 1e-5
LEAK = 1e-2
"""What a leak is told by: a thousand times the tolerance."""
FAMILIES = {"qwen2": "qwen2_5", "llama": "llama3_1"}
MODELS = [
    pytest.param(
        (architecture, attention), id=f"{architecture}-{attention}", marks=[pytest.mark.slow] * (attention == "eager")
    )
    for architecture in FAMILIES
    for attention in ("sdpa", "eager")
]


class Case:
    """A tiny model with its documents, and the reference: the documents one by one, as plain calls of the model."""

    def __init__(self, architecture: str, attention: str):
        tokenizer = small_tokenizer(FAMILIES[architecture])
        self.tokenizer = tokenizer
        self.template = DialogueTemplate(tokenizer, FAMILIES[architecture], TemplateConfig(mode="reply_only"))
        rng = random.Random(9)
        self.examples = [self.template.encode(random_dialogue(rng)) for _ in range(7)]
        self.packs, _ = pack_dialogues(self.examples, PackingConfig("best_fit", max_length=1100))
        # Several packs, of several documents, of unequal length: else nothing could leak, and nothing would be padded.
        assert 2 <= len(self.packs) <= 3
        assert sum(len(row["document_lengths"]) > 1 for row in self.packs) >= 2
        assert len({len(row["input_ids"]) for row in self.packs}) > 1
        config = tiny_config(architecture, tokenizer, 0.2, max_position_embeddings=4096, tie_word_embeddings=False)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        self.model.train()
        self.reference = self.separate(self.examples)

    def separate(self, examples: list[TokenizedDialogue]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss sum and gradients over documents that are run one by one; nothing of packing is used."""
        loss = 0.0
        self.model.zero_grad()
        for example in examples:
            ids = torch.tensor(example.input_ids[None], dtype=torch.int64)
            logits = self.model(input_ids=ids, use_cache=False).logits
            each = cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
            total = (each * torch.tensor(example.trained[1:])).sum()
            total.backward()
            loss += total.item()
        return loss, self.gradients()

    def packed(self, one_row: bool, **changes) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss sum and gradients of the packs in one batch; `changes` go into the model's call, None takes out."""
        packs = list(self.packs)
        if one_row:  # as one pack
            joined = ("input_ids", "loss_weights", "document_lengths")
            packs = [
                {"prefix_length": 0} | {name: numpy.concatenate([each[name] for each in packs]) for name in joined}
            ]
        batch = PackCollator("position_ids", self.tokenizer.pad_token_id)(packs)
        labels = batch.pop("labels")
        del batch["loss_weights"]
        self.model.zero_grad()
        inputs = batch | {"use_cache": False} | {name: make(batch) for name, make in changes.items()}
        logits = self.model(**inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        return loss.item(), self.gradients()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}


def errors(measured: tuple[float, dict], reference: tuple[float, dict]) -> tuple[float, float]:
    """The relative error of the loss, and that of the worst parameter's gradient."""
    (loss, gradients), (true_loss, true_gradients) = measured, reference
    assert gradients.keys() == true_gradients.keys()
    assert all(gradient.abs().max() > 0 for gradient in true_gradients.values())
    worst = max(
        ((gradients[name] - true).abs().max() / true.abs().max()).item() for name, true in true_gradients.items()
    )
    return abs(loss - true_loss) / true_loss, worst


@pytest.fixture(scope="module")
def case_of():
    made = {}

    def make(key: tuple[str, str]) -> Case:
        if key not in made:
            made[key] = Case(*key)
        return made[key]

    return make


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("one_row", [True, False], ids=["one-row", "row-per-pack"])
def test_packed_equals_unpacked_in_loss_and_every_gradient(model, one_row, case_of):
    case = case_of(model)
    loss_error, gradient_error = errors(case.packed(one_row), case.reference)
    assert loss_error < TOLERANCE
    assert gradient_error < TOLERANCE


LEAKY = {
    # A mask of two dimensions switches off what the model would read from the positions.
    "mask-of-ones": {"attention_mask": lambda batch: torch.ones_like(batch["input_ids"])},
    # So does a cache, in transformers 5.
    "cache": {"use_cache": lambda batch: True},
    "positions-that-go-on": {
        "position_ids": lambda batch: torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    },
    "no-positions": {"position_ids": lambda batch: None},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("leak", sampled(LEAKY, 2))
def test_a_leak_between_documents_is_seen(model, leak, case_of):
    """The negative control: were documents to see each other, the test above would fail by far."""
    case = case_of(model)
    for one_row in (True, False):
        loss_error, gradient_error = errors(case.packed(one_row, **LEAKY[leak]), case.reference)
        assert loss_error > TOLERANCE
        assert gradient_error > LEAK


@pytest.mark.parametrize("model", MODELS)
def test_a_padded_batch_equals_its_documents(model, case_of):
    """Packing off: one document a row, with a mask."""
    case = case_of(model)
    rows, _ = pack_dialogues(case.examples, PackingConfig(strategy="off", max_length=1100))
    batch = PackCollator("padded", case.tokenizer.pad_token_id)(list(rows))
    labels = batch.pop("labels")
    del batch["loss_weights"]
    case.model.zero_grad()
    logits = case.model(**batch, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    assert max(errors((loss.item(), case.gradients()), case.reference)) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "mode"),
    [*(pytest.param(*each.values, "joint", marks=each.marks) for each in MODELS), (("qwen2", "sdpa"), "given")],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_turns_of_a_dialogue_one_by_one_equal_all_of_them_in_one_sequence(model, mode, case_of):
    case = case_of(model)
    template = DialogueTemplate(case.tokenizer, case.template.chat_template_name, TemplateConfig(mode=mode))
    rng = random.Random(9)
    dialogue = next(found for found in iter(partial(random_dialogue, rng), None) if found.supporter_turns == [1, 3, 5])
    dialogue = Dialogue("opened by the customer", dialogue.turns[:6])
    whole = template.encode(dialogue)
    # Each turn as a sample of its own: what came before it, and nothing after it.
    samples = [
        template.encode(Dialogue("part", dialogue.turns[: index + 1]), targets=[index])
        for index in dialogue.supporter_turns
    ]
    trained = [int(sample.trained.sum()) for sample in samples]
    assert min(trained) >= 2
    assert sum(trained) == int(whole.trained.sum())
    assert len(whole.input_ids) == len(samples[-1].input_ids) < sum(len(sample.input_ids) for sample in samples) / 2
    one_by_one = case.separate(samples)
    assert max(errors(case.separate([whole]), one_by_one)) < TOLERANCE
    # A turn left out is no rounding error.
    short = template.encode(dialogue, targets=dialogue.supporter_turns[1:])
    assert min(errors(case.separate([short]), one_by_one)) > LEAK


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "gradient-checkpointing"])
def test_the_trainers_own_loss_equals_the_separate_documents(architecture, checkpointing, tmp_path):
    """Through TRL's fused head, with the collator and the call that training uses."""
    case = Case(architecture, "sdpa")  # of its own: the trainer changes its model
    config = TrainerConfig(packs_per_step=len(case.packs), micro_batch_size=len(case.packs), precision="fp32")
    trainer = build_trainer(
        case.model,
        case.tokenizer,
        case.packs,
        packing="best_fit",
        arguments=training_arguments(config, tmp_path, processes=1),
        adapter=AdapterConfig(),
    )
    if checkpointing:
        case.model.activation_checkpointing_enable()
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    assert len(batch["input_ids"]) == len(case.packs)
    trained = sum(int(example.trained.sum()) for example in case.examples)
    assert (batch["labels"] != IGNORE_INDEX).sum() == trained
    case.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(float(trained)))
    (loss * trained).backward()
    assert max(errors(((loss * trained).item(), case.gradients()), case.reference)) < TOLERANCE
