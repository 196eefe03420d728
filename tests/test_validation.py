"""Validation during training is exact on any number of ranks, does not change the training, and selects the best."""

import dataclasses
import itertools
import json
import math
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_dialogue, sampled, small_tokenizer, tiny_config
from processes import run_script
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from workers.loss_curve import curve, train, train_all

from csc_train.checkpoints import export as exporting
from csc_train.checkpoints.export import trained_model
from csc_train.checkpoints.reshard import WEIGHT, open_training_checkpoint
from csc_train.checkpoints.training_checkpoint import can_resume, prune
from csc_train.config.cluster import OnFinishConfig
from csc_train.config.compose import compose
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.launching.on_finish import on_finish_arguments
from csc_train.models.config import MERGE_INTO, AdapterConfig, ModelConfig
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tracking.history import History
from csc_train.training.config import TrainerConfig, ValidationConfig
from csc_train.training.trainer import PackTrainer
from csc_train.training.validation import last_validation_metrics

TOLERANCE = 1e-5
# Three turns to reply to, so that one of two processes has more of them.
MEASURED = {"eval_steps": 1, "num_turns": None, "num_samples": 3, "max_new_tokens": 4, "generated_dialogues": 3}
SHORT = {"packs": "shared", "max_steps": 3, "micro_batch_size": 1}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "learning_rate": 2e-2}
COMPILED = {"zero": {"stage": "2"}, "compile": "layers", "gradient_checkpointing": "selective"}
SHARDED = {"stage": "3", "persistence_threshold": 0}
TWO_PROCESSES = {
    "full off": {**SHORT, "validation": MEASURED, "checkpoints": "full-off/checkpoints"},
    "full 2": {**SHORT, **COMPILED, "validation": MEASURED, "checkpoints": "full-2/checkpoints"},
    "full 3": {**SHORT, "validation": MEASURED, "checkpoints": "full-3/checkpoints", "zero": SHARDED, "save_steps": 1},
    "lora 3": {**SHORT, **LORA, "validation": MEASURED, "checkpoints": "lora-3/checkpoints", "zero": SHARDED},
}


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())


@pytest.fixture(scope="module")
def dialogues():
    """Those that are held out. Every strategy is among theirs, so that some are predicted right by any model."""
    rng, strategies = random.Random(11), itertools.cycle(STRATEGIES)
    made = [random_dialogue(rng) for _ in range(8)]
    assert sum(len(dialogue.supporter_turns) for dialogue in made) > len(STRATEGIES)
    return [
        dataclasses.replace(
            dialogue,
            turns=tuple(
                dataclasses.replace(turn, strategy=next(strategies)) if turn.strategy else turn
                for turn in dialogue.turns
            ),
        )
        for dialogue in made
    ]


@pytest.fixture(scope="module")
def folder(template, dialogues, tmp_path_factory) -> Path:
    """A tiny model, weighted packs for two steps and one pack, and held-out dialogues for an odd number of packs."""
    folder = tmp_path_factory.mktemp("held-out")
    rng = random.Random(10)
    examples = [template.encode(random_dialogue(rng)) for _ in range(45)]
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", 1800), LossConfig("inverse_frequency"))
    packs = PackedDataset(packs.dialogues, packs.pack_items[:9], packs.prefix_lengths[:9], packs.loss_weights)
    assert len(set(packs.loss_weights.factors)) > 3
    (folder / "shared").write_bytes(pickle.dumps(packs))
    (folder / "validation").write_bytes(pickle.dumps(dialogues))
    config = tiny_config("qwen2", template.tokenizer, 0.1, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


def measured(folder: Path, validation: dict, **options):
    """A training of one process that measures itself, all held-out packs in one forward pass."""
    return train(folder, **{**SHORT, "micro_batch_size": 4, **options}, validation=ValidationConfig(**validation))


@pytest.fixture(scope="module")
def trainer(folder):
    """After a training on one process."""
    return measured(folder, MEASURED, checkpoints="one/checkpoints")


@pytest.fixture(scope="module")
def references(folder, trainer):
    adapter = {**LORA, "adapter": AdapterConfig(**LORA["adapter"])}
    return {
        "full": curve(trainer),
        "lora": curve(measured(folder, MEASURED, checkpoints="one-lora/checkpoints", **adapter)),
    }


@pytest.fixture(scope="module")
def on_two_processes(folder):
    return train_all(folder, TWO_PROCESSES, 2)


def samples(folder: Path, run: str, table: str = "samples") -> list[dict]:
    return [json.loads(line) for line in (folder / run / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()]


# What is measured


def logits_of(model, ids) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids], dtype=torch.int64), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def plain(trainer):
    """The trained model, freshly built, with attention that knows nothing of packs."""
    model = AutoModelForCausalLM.from_config(trainer.model.config, attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(trainer.model.state_dict())
    return model


@pytest.mark.slow
def test_the_validation_loss_is_that_of_separate_sequences(trainer, references, plain, template, dialogues):
    total = weight = 0.0
    for dialogue in dialogues:
        example = template.encode(dialogue)
        ids, weights = example.input_ids.tolist(), torch.tensor(trainer.packs.loss_weights(example))
        each = cross_entropy(logits_of(plain, ids)[:-1], torch.tensor(ids[1:]), reduction="none")
        total += (each * weights[1:]).sum().item()
        weight += weights.sum().item()
    assert references["full"]["measured"][-1]["loss"] == pytest.approx(total / weight, rel=TOLERANCE)
    assert trainer.validator.total_weight == pytest.approx(weight, rel=TOLERANCE)
    assert len(trainer.validator.packs) == 3


@torch.no_grad()
def likelihoods(model, prompt: list[int], labels: torch.Tensor) -> torch.Tensor:
    """Of labels [12, 2] behind a prompt: the first token of each, and the second behind the first."""
    first = model(torch.tensor([prompt]), use_cache=True)
    first.past_key_values.batch_repeat_interleave(len(labels))
    second = model(labels[:, :1], past_key_values=first.past_key_values)
    return first.logits[0, -1].log_softmax(-1)[labels[:, 0]] + second.logits[:, -1].log_softmax(-1).gather(
        1, labels[:, 1:]
    ).squeeze(1)


@pytest.mark.slow
def test_strategies_are_predicted_by_the_likelihood_of_their_labels(trainer, references, plain, template, dialogues):
    labels = torch.tensor(list(template.label_ids.values()))
    assert labels.shape == (12, 2)
    right = []
    for dialogue in dialogues:
        for index in (index for index, turn in enumerate(dialogue.turns) if turn.strategy):
            best = likelihoods(plain, template.prompt_ids(dialogue.turns[:index]), labels).argmax().item()
            right.append(STRATEGIES[best] is dialogue.turns[index].strategy)
    assert references["full"]["measured"][-1]["strategy_accuracy"] == sum(right) / len(right)
    assert 0 < sum(right) < len(right)


@pytest.mark.slow
def test_the_same_turns_are_drawn_every_time(folder, trainer):
    validator = trainer.validator
    every = [(n, i) for n, each in enumerate(validator.dialogues) for i, turn in enumerate(each.turns) if turn.strategy]
    for number in (None, 5):
        again = type(validator)(
            validator.dialogues, validator.tokenized, validator.template,
            dataclasses.replace(validator.config, num_turns=number), PackingConfig("shared_prefix", 1800),
            trainer.packs.loss_weights, History(folder).log_table,
        )  # fmt: skip
        assert again.samples == validator.samples == sorted(validator.samples)
        assert again.turns[:5] == validator.turns[:5]
        assert len(again.turns) == number or sorted(again.turns) == every


@pytest.mark.slow
def test_samples_are_greedy_and_stand_beside_the_references(folder, trainer, plain, template, dialogues):
    rows = [row for row in samples(folder, "one") if row.pop("step") == 3]
    assert len(rows) == 3
    for row, (number, index) in zip(rows, trainer.validator.samples, strict=True):
        dialogue = dialogues[number]
        text = template.tokenizer.decode(greedy(plain, template, dialogue.turns[:index]))
        assert row == {
            "dialogue_id": dialogue.id,
            "turn": index,
            "customer": dialogue.turns[index - 1].text if index else "",
            "reference_strategy": dialogue.turns[index].strategy.zh,
            "strategy": None,  # of a model that has learned next to nothing
            "reference_response": dialogue.turns[index].text,
            "response": text.strip(),
        }


@pytest.mark.slow
def test_dialogues_are_generated_from_the_models_own_turns(trainer, plain, template, dialogues, monkeypatch):
    """The customer's turns are given; the model's own ids, not those of their text, stand between them."""
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    tables = {}
    monkeypatch.setattr(trainer.validator, "log_table", lambda name, rows, step: tables.update({name: rows}))
    try:
        for model in (trainer.model, plain):  # its replies differ with every token before them
            model.load_state_dict({name: 6 * value for name, value in weights.items()})
        metrics = trainer.validator.evaluate(trainer)
        named = {dialogue.id: dialogue for dialogue in dialogues}
        chosen = {row["dialogue_id"]: named[row["dialogue_id"]] for row in tables["generated"]}
        expected, right, of_reference = [], 0, []
        for dialogue in chosen.values():
            history = []
            for index, turn in enumerate(dialogue.turns):
                if turn.strategy is None:
                    history.append(turn)
                    continue
                of_reference.append(greedy(plain, template, dialogue.turns[:index]))
                own = greedy(plain, template, history)
                history.append(own)
                reply = template.parse(template.tokenizer.decode(own))
                right += reply.strategy is turn.strategy
                expected.append({
                    "dialogue_id": dialogue.id, "turn": index,
                    "customer": dialogue.turns[index - 1].text if index else "",
                    "reference_strategy": turn.strategy.zh, "strategy": reply.strategy and reply.strategy.zh,
                    "reference_response": turn.text, "response": reply.response,
                })  # fmt: skip
    finally:
        for model in (trainer.model, plain):
            model.load_state_dict(weights)
    assert tables["generated"] == expected and len(chosen) == 3
    assert [template.tokenizer.decode(ids) for ids in of_reference] != [row["response"] for row in expected]
    assert metrics["generated_strategy_accuracy"] == right / len(expected) and metrics["generation_seconds"] > 0


@pytest.mark.slow
def test_without_room_for_all_weights_no_dialogue_is_generated_and_the_training_goes_on(trainer, monkeypatch, said):
    tables = []
    monkeypatch.setattr(trainer.validator, "log_table", lambda name, rows, step: tables.append(name))
    monkeypatch.setattr("csc_train.training.validation.is_sharded", lambda model: True)
    monkeypatch.setattr("csc_train.training.validation.lacking_memory", lambda *_: torch.tensor([1.5]))
    assert [*trainer.validator.evaluate(trainer)] == ["strategy_accuracy"] and tables == ["samples"]
    assert [line for line in said if "the whole weights need 1.5 GiB more on a GPU" in line]


def greedy(model, template, history) -> list[int]:
    """A reply of at most four tokens, without the end of its turn."""
    ids = template.prompt_ids(history)
    length = len(ids)
    while len(ids) < length + 4 and template.end_of_turn_id not in ids[length:]:
        ids.append(logits_of(model, ids)[-1].argmax().item())
    return [number for number in ids[length:] if number != template.end_of_turn_id]


def test_a_turn_that_was_sampled_again_is_written_once(tmp_path):
    for step, text in ((2, "a"), (4, "b"), (6, "c"), (4, "d")):
        History(tmp_path).log_table("samples", [{"response": text}, {"response": "好"}], step)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["response"]) for row in rows] == [(2, "a"), (2, "好"), (4, "d"), (4, "好")]


def test_the_last_validation_metrics_are_found():
    log = [{"eval_loss": 2.0, "step": 2}, {"loss": 1.0, "step": 3}, {"eval_loss": 1.0, "step": 4}, {"step": 5}]
    assert last_validation_metrics(log, 3) == {"loss": 2.0, "step": 2}
    assert last_validation_metrics(log, 5) == {"loss": 1.0, "step": 4}
    assert last_validation_metrics(log, 1) == {}


# However it is cut up


@pytest.mark.distributed
@pytest.mark.parametrize("run", TWO_PROCESSES)
def test_two_ranks_validate_as_one_process_does(folder, on_two_processes, references, run):
    kind, stage = run.split()
    reference = {"full": "one", "lora": "one-lora"}
    one, two = references[kind], on_two_processes[run]
    assert two["processes"] == 2 and two["stage"] == (None if stage == "off" else int(stage))
    assert two["empty"] == (1 if stage == "3" else 0)
    assert two["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert [entry["step"] for entry in two["measured"]] == [1, 2, 3]
    for mine, theirs in zip(two["measured"], one["measured"], strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE)
    assert [right for right, _ in two["generated"]] == [right for right, _ in one["generated"]]
    assert len(two["generated"]) == 3 and all(seconds > 0 for _, seconds in two["generated"])
    for table in ("samples", "generated"):
        mine, theirs = (samples(folder, name, table) for name in (run.replace(" ", "-"), reference[kind]))
        assert mine == theirs and {row["step"] for row in mine} == {1, 2, 3}
    assert one["measured"][-1]["loss"] < 0.99 * one["measured"][0]["loss"]
    # A validation, whose rows have other lengths, compiles nothing.
    assert two["recompiles"] == ([0, 0, 0] if run == "full 2" else [None] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_validation_changes_nothing(folder, kind):
    # Dropout draws random numbers, so weights tell whether the generators stand where they stood.
    options = {"adapter": AdapterConfig(kind=kind, dropout=0.3), "learning_rate": 2e-2, "max_steps": 2}
    with_it = curve(
        measured(folder, {**MEASURED, "num_turns": 4}, checkpoints=f"dropout-{kind}/checkpoints", **options)
    )
    without = curve(train(folder, **{**SHORT, "micro_batch_size": 4, **options}))
    assert len(with_it["measured"]) == 2
    assert (with_it["losses"], with_it["digest"]) == (without["losses"], without["digest"])


@pytest.mark.slow
def test_a_validation_loss_that_is_not_finite_stops_the_training_and_is_never_the_best(folder, monkeypatch):
    right = PackTrainer.prediction_step

    def overflow(*arguments, **options):
        return right(*arguments, **options)[0] + math.inf, None, None

    monkeypatch.setattr(PackTrainer, "prediction_step", overflow)
    options = {"max_steps": 2, "save_steps": 1}
    validation = {"eval_steps": 1, "num_turns": 0, "num_samples": 0, "save_best": True}
    with pytest.raises(InputError, match="step 1: the validation loss is not finite"):
        measured(folder, validation, checkpoints="no-loss/checkpoints", **options)
    assert not list((folder / "no-loss" / "checkpoints").glob("checkpoint-*"))
    trainer = measured(folder, validation, checkpoints="no-best/checkpoints", on_nonfinite="skip", **options)
    assert len(curve(trainer)["measured"]) == 2 and trainer.state.best_metric is None
    assert trainer.best_checkpoint() is None  # so the final model has the last weights


# The model that a quantized training ends with


@pytest.fixture(scope="module")
def quantized(folder):
    """A training of adapters over 4-bit weights."""
    adapter = AdapterConfig(kind="qlora", rank=4, alpha=8)
    return measured(
        folder, {**MEASURED, "num_samples": 0}, checkpoints="qlora/checkpoints", adapter=adapter, learning_rate=2e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("merge_into", MERGE_INTO)
def test_a_quantized_training_says_how_far_the_merged_model_is_from_the_trained(
    folder, quantized, merge_into, caplog, monkeypatch
):
    source, layer = ModelConfig(path=str(folder / "model")), "model.layers.1.mlp.up_proj"
    made = trained_model(quantized, source, torch.float32, None, merge_into, quantized.validator.accuracy)
    found = re.search(
        r"merged into the (\w+) weights: largest logit difference (\S+) of the largest logit; "
        r"strategy accuracy (\S+) merged, (\S+) trained",
        caplog.text,
    )
    assert found[1] == merge_into
    accuracy = curve(quantized)["measured"][-1]["strategy_accuracy"]
    assert found[4] == f"{accuracy:.4f}" and found[3] == f"{quantized.validator.accuracy(made):.4f}"
    trained = dict(quantized.model.named_parameters())
    a, b = (trained[f"base_model.model.{layer}.lora_{part}.default.weight"] for part in "AB")
    base = load_file(folder / "model" / "model.safetensors")[f"{layer}.weight"]
    exact = (made.state_dict()[f"{layer}.weight"] - base - 2 * b @ a).abs().max() < TOLERANCE
    if merge_into == "base":
        assert exact and float(found[2]) > 1e-3
    else:
        assert not exact and float(found[2]) < TOLERANCE and found[3] == found[4]
    assert ("warning: " in caplog.text) == (float(found[2]) > exporting.MERGE_WARNING)

    monkeypatch.setattr(exporting, "MERGE_WARNING", 0)
    caplog.clear()
    trained_model(quantized, source, torch.float32, None, merge_into)
    assert "strategy accuracy" not in caplog.text and "warning: the merged model is not the trained one" in caplog.text
    assert ("recipes/export.py with merge_into=dequantized" in caplog.text) == (merge_into == "base")


# Early stopping and the best checkpoint

WORSE = {"max_steps": 9, "learning_rate": 1.0, "lr_scheduler": "constant", "save_steps": 1, "save_total_limit": 2}
STOPPING = {"eval_steps": 1, "num_turns": 0, "num_samples": 0, "early_stopping_patience": 2, "save_best": True}


def listing(states: Path) -> dict[str, bool]:
    """The saved states, and whether a run can resume from each."""
    return {path.name: can_resume(path) for path in sorted(states.glob("checkpoint-*"))}


@pytest.fixture(scope="module")
def stopped(folder):
    """A training that gets worse and worse."""
    return measured(folder, STOPPING, checkpoints="stopped/checkpoints", **WORSE)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_the_last_checkpoint(folder, stopped):
    losses = [entry["loss"] for entry in curve(stopped)["measured"]]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 9
    names = [f"checkpoint-{step}" for step in range(best, best + 3)]
    assert listing(folder / "stopped/checkpoints") == {names[0]: False, names[1]: True, names[2]: True}
    assert stopped.state.best_metric == min(losses)
    assert stopped.best_checkpoint() == folder / "stopped/checkpoints" / names[0]
    assert stopped.state.best_model_checkpoint == str(stopped.best_checkpoint())


@pytest.mark.slow
def test_the_final_model_is_made_from_the_best_checkpoint(folder, stopped):
    best = stopped.best_checkpoint()
    weights = load_file(best / "model.safetensors")
    kept = {path.name for path in best.iterdir()}
    assert not kept & {"optimizer.pt", "scheduler.pt", "rng_state.pth"} and "trainer_state.json" in kept
    whole = open_training_checkpoint(best)
    assert whole.step == stopped.state.best_global_step
    assert all(torch.equal(whole.read(name, WEIGHT), weights[name]) for name in whole.names)
    source = ModelConfig(path=str(folder / "model"))
    last = {name: value.clone() for name, value in stopped.model.state_dict().items()}
    made = trained_model(stopped, source, torch.float32, best)
    assert all(torch.equal(value, weights[name]) for name, value in made.named_parameters())
    assert not all(torch.equal(value, last[name]) for name, value in made.named_parameters())
    stopped.model.load_state_dict(last)


@pytest.mark.slow
@pytest.mark.parametrize("back", [1, 0])
def test_a_resumed_training_knows_the_best_step_and_the_patience_left(folder, stopped, back, tmp_path):
    for name in ("model", "shared", "validation", "stopped"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    end = stopped.state.global_step
    again = measured(
        tmp_path,
        STOPPING,
        checkpoints="stopped/checkpoints",
        resume=f"stopped/checkpoints/checkpoint-{end - back}",
        **WORSE,
    )
    assert (again.state.global_step, again._initial_global_step) == (end, end - back)
    assert (again.state.best_metric, again.state.best_global_step) == (
        stopped.state.best_metric,
        stopped.state.best_global_step,
    )
    assert curve(again)["measured"] == curve(stopped)["measured"]
    assert curve(again)["digest"] == curve(stopped)["digest"]
    assert listing(tmp_path / "stopped/checkpoints") == listing(folder / "stopped/checkpoints")


@pytest.mark.slow
def test_a_checkpoint_of_weights_only_is_not_resumed(folder, stopped):
    best = stopped.best_checkpoint().relative_to(folder)
    with pytest.raises(InputError, match=rf"{best.name} holds weights only: resume from a later checkpoint"):
        measured(folder, STOPPING, checkpoints="stopped/checkpoints", resume=str(best), **WORSE)


@pytest.mark.distributed
def test_a_sharded_checkpoint_of_weights_only_is_consolidated(folder, on_two_processes):
    states = folder / "full-3/checkpoints"
    before = open_training_checkpoint(states / "checkpoint-2")
    weights = {name: before.read(name, WEIGHT).clone() for name in before.names}
    prune(states, 1, best_step=2)
    assert listing(states) == {"checkpoint-2": False, "checkpoint-3": True}
    assert not list((states / "checkpoint-2").glob("global_step*"))
    after = open_training_checkpoint(states / "checkpoint-2")
    assert all(torch.equal(after.read(name, WEIGHT), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    sampled(
        [
            (
                ["validation.eval_steps=0", "validation.save_best=true"],
                "validation.eval_steps=0: save_best and early_stopping_patience need validations",
            ),
            (
                ["validation.eval_steps=0", "validation.early_stopping_patience=2"],
                "validation.eval_steps=0: save_best and early_stopping_patience need validations",
            ),
            (
                ["validation.eval_steps=1.5"],
                "validation.eval_steps=1.5: choose a whole number of steps, or a share below 1",
            ),
            (
                ["validation.metric_for_best_model=strategy_accuracy", "validation.num_turns=0"],
                "validation.metric_for_best_model=strategy_accuracy: choose validation.num_turns above 0",
            ),
            (
                ["validation.metric_for_best_model=strategy_accuracy", "template=given"],
                "validation.metric_for_best_model=strategy_accuracy: the model chooses no strategy under "
                "template.mode=",
            ),
            (
                ["validation.metric_for_best_model=accuracy"],
                "validation.metric_for_best_model=accuracy: choose one of loss, strategy_accuracy.",
            ),
            (
                ["on_finish.overrides=['data=files']"],
                "on_finish.overrides=['data=files']: name the recipe too: on_finish=evaluate",
            ),
        ],
        4,
    ),
)
def test_invalid_validation_settings_are_refused(overrides, message):
    with pytest.raises(InputError) as caught:
        compose("sft", overrides)
    assert str(caught.value).startswith(message)


def test_validations_go_with_checkpoints_by_default():
    assert ValidationConfig().interval(TrainerConfig(save_steps=7)) == 7
    assert ValidationConfig(eval_steps=3).interval(TrainerConfig(save_steps=7)) == 3
    assert ValidationConfig().interval(TrainerConfig(save_steps=0)) == 0
    with pytest.raises(InputError, match=r"^trainer\.save_steps=0: set validation\.eval_steps"):
        ValidationConfig(save_best=True).interval(TrainerConfig(save_steps=0))


# What follows a training


@pytest.mark.slow
def test_on_finish_is_checked_before_the_training():
    assert on_finish_arguments(OnFinishConfig(), Path("runs/x")) == []
    config = compose("sft", ["on_finish=evaluate", "on_finish.overrides=['data=rolecs','evaluation.base=false']"])
    arguments = ["checkpoint=runs/x/model", "run.directory=runs/x/evaluation", "run.if_exists=resume"]
    assert on_finish_arguments(config.on_finish, Path("runs/x")) == [
        *arguments,
        "data=rolecs",
        "evaluation.base=false",
    ]
    with pytest.raises(InputError, match=r"Did you mean 'evaluation\.batch_size'"):
        on_finish_arguments(OnFinishConfig("evaluate", ["evaluation.batchsize=1"]), Path("runs/x"))


def start(
    directory: Path, processes: int, *on_finish: str, settings: Sequence[str] = ("run.directory=run",)
) -> subprocess.CompletedProcess:
    """A training that keeps the best, and what follows it."""
    return run_script(
            ROOT / "recipes" / "sft.py", "debug=cpu_tiny", "data.sample_dialogues=40",
            *settings, "run.if_exists=reuse", "validation.eval_steps=2", "validation.save_best=true",
            "validation.num_turns=6", "validation.num_samples=1", "validation.max_new_tokens=4", "on_finish=evaluate",
            f"on_finish.overrides={list(on_finish)}",
        cwd=directory, ranks=processes,
    )  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_follows_the_training_and_its_exit_status_is_carried(tmp_path):
    failed = start(tmp_path, 2, "data=files", "data.train.path=nowhere.jsonl")
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["finished"], failed.stderr[-4000:]
    assert failed.returncode != 0 and "nowhere.jsonl" in failed.stderr
    assert failed.stdout.count("note: loss on the evaluation dialogues selects the model: evaluate it on others") == 1
    found = json.loads((run / "metrics.json").read_text())["validation"]
    steps = {row["step"] for row in samples(tmp_path, "run")}
    assert steps == {2, 4, 6} and found["step"] in steps and found["loss"] > 0
    # The training is not repeated for another evaluation.
    done = start(tmp_path, 1, "evaluation.max_new_tokens=4", "evaluation.base=false", "evaluation.contexts=[reference]")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "reused run/model" in done.stdout
    assert "trained" in json.loads((run / "evaluation/results.json").read_text())["results"]


@pytest.mark.slow
def test_the_best_checkpoint_is_chosen_on_the_validation_set_and_tested_on_another(tmp_path):
    settings = ["run.directory=run", "data.validation_fraction=0.3"]
    done = start(tmp_path, 1, "evaluation.max_new_tokens=4", "evaluation.contexts=[reference]", settings=settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "chooses the checkpoint" not in done.stdout
    run = tmp_path / "run"
    chosen_on = {row["dialogue_id"] for row in samples(tmp_path, "run")}
    tested_on = {row["id"] for row in map(json.loads, (run / "evaluation/dialogues.jsonl").read_text().splitlines())}
    assert chosen_on and tested_on and not chosen_on & tested_on
