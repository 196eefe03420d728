"""A loss, gradient or weight that is not finite: every engine and rank decides alike, and names pack and dialogue."""

import itertools
import json
import math
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_dialogue, small_tokenizer, tiny_config
from processes import run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from workers.loss_curve import EPOCHS, PACKS_PER_STEP, STEPS_PER_EPOCH, curve, first_packs, train, train_all

from csc_train.errors import InputError, ResumableError
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.loss import score_tokens
from csc_train.training.nonfinite import MAX_IN_A_ROW, spread_nonfinite

ENGINES = ("off", "0", "1", "2", "3")
STEPS = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and packs for two steps and one pack."""
    folder = tmp_path_factory.mktemp("nonfinite")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))
    rng = random.Random(11)
    packs, _ = pack_dialogues(
        [template.encode(random_dialogue(rng)) for _ in range(40)], PackingConfig("best_fit", max_length=1000)
    )
    packs = first_packs(packs)
    (folder / "packs").write_bytes(pickle.dumps(packs))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.0, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def packs(folder) -> PackedDataset:
    return pickle.loads((folder / "packs").read_bytes())


@pytest.fixture(scope="module")
def broken(packs) -> tuple[int, int]:
    """A token that occurs in one pack only, and that pack."""
    tokens = [set(packs[index]["input_ids"].tolist()) for index in range(len(packs))]
    for index, own in enumerate(tokens):
        if only := own - set().union(*tokens[:index], *tokens[index + 1 :]):
            return min(only), index
    raise AssertionError("no token is in one pack only")


@pytest.fixture(scope="module")
def alone(folder, broken) -> dict:
    """One process that leaves such steps out, with a checkpoint of each step."""
    kept = {"checkpoints": "kept", "save_steps": 1, "save_total_limit": 99}
    return curve(train(folder, micro_batch_size=1, broken=broken[0], on_nonfinite="skip", **kept))


@pytest.fixture(scope="module")
def on_two(folder, broken) -> dict[str, dict]:
    """Every engine on two processes; the token is read by one of them only."""
    cases = {}
    for stage, action in itertools.product(ENGINES, ("skip", "stop")):
        zero = {"stage": stage} | ({"persistence_threshold": 0} if stage == "3" else {})
        made = {"zero": zero, "micro_batch_size": 1, "broken": broken[0], "on_nonfinite": action}
        saved = {"save_steps": 1, "save_total_limit": 99} if action == "stop" else {}
        cases[f"{action} {stage}"] = {**made, **saved, "checkpoints": f"{action}-{stage}"}
        if stage != "0":
            bf16 = {"precision": "bf16", "checkpoints": f"{action}-{stage}-bf16"}
            cases[f"{action} {stage} bf16"] = {**made, **saved, **bf16}
    return train_all(folder, cases, 2)


def skipped(run: dict) -> list[int]:
    return [step for step, loss in enumerate(run["losses"], start=1) if math.isnan(loss)]


@pytest.mark.slow
def test_a_step_that_is_left_out_changes_no_weight(folder, alone):
    out = skipped(alone)
    assert len(alone["losses"]) == STEPS and len(out) == EPOCHS  # the pack comes once in each epoch
    assert 1 < out[0] < out[1]
    weights = {
        step: load_file(folder / "kept" / f"checkpoint-{step}" / "model.safetensors") for step in range(1, STEPS)
    }
    for step in range(2, STEPS):
        same = all(torch.equal(value, weights[step - 1][name]) for name, value in weights[step].items())
        assert same == (step in out), step
    # The learning rate waits as well.
    rates = alone["learning_rates"]
    assert [step for step in range(1, STEPS) if rates[step] == rates[step - 1]] == out


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ENGINES)
def test_every_engine_leaves_out_the_same_steps(on_two, alone, stage):
    run = on_two[f"skip {stage}"]
    assert skipped(run) == skipped(alone)
    assert run["losses"] == pytest.approx(alone["losses"], rel=1e-4, nan_ok=True)
    assert run["learning_rates"] == pytest.approx(alone["learning_rates"], rel=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["off", "1", "2", "3"])
def test_in_bf16_the_same_steps_are_left_out(on_two, alone, stage):
    assert skipped(on_two[f"skip {stage} bf16"]) == skipped(alone)


@pytest.mark.distributed
@pytest.mark.parametrize("run", [*ENGINES, "off bf16", "1 bf16", "2 bf16", "3 bf16"])
def test_every_engine_stops_at_that_step_and_names_its_pack(folder, packs, on_two, alone, broken, run):
    step = skipped(alone)[0]
    message = on_two[f"stop {run}"]["error"]
    token, pack = broken
    place = rf"^step {step}: the loss is not finite in pack {pack} \(dialogues (.*)\): the step is not taken"
    # Of a pack that two processes share, those of the one that met the token.
    found = set(re.search(place, message)[1].split(", "))
    inside = [packs.dialogues[item.dialogue] for item in packs.pack_items[pack]]
    assert {each.id for each in inside if token in each.input_ids} <= found <= {each.id for each in inside}
    saved = sorted(path.name for path in (folder / f"stop-{run.replace(' ', '-')}").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{each}" for each in range(1, step)]


@pytest.mark.slow
def test_a_stopped_training_goes_on_without_the_step(folder, alone, broken, tmp_path):
    for name in ("model", "packs"):
        (tmp_path / name).symlink_to(folder / name)
    saved = {"checkpoints": "saved", "save_steps": 1, "save_total_limit": 99, "broken": broken[0]}
    with pytest.raises(ResumableError) as stopped:
        train(tmp_path, micro_batch_size=1, **saved)
    assert stopped.value.needs == "trainer.on_nonfinite=skip"
    last = f"saved/checkpoint-{skipped(alone)[0] - 1}"
    resumed = curve(train(tmp_path, micro_batch_size=1, resume=last, on_nonfinite="skip", **saved))
    assert resumed["digest"] == alone["digest"]
    assert resumed["losses"] == pytest.approx(alone["losses"], nan_ok=True, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "continue"])
def test_broken_weights_are_not_saved_whatever_the_training_does(folder, broken, action, tmp_path):
    """A learning rate that breaks the weights in the last step, after a finite gradient; and steps that are taken."""
    for name in ("model", "packs"):
        (tmp_path / name).symlink_to(folder / name)
    options = (
        {"learning_rate": 1e38, "weight_decay": 1e3, "max_steps": 1} if action == "skip" else {"broken": broken[0]}
    )
    refusal = r"step \d: the weights are not finite, so neither a checkpoint nor a model"
    with pytest.raises(InputError, match=refusal) as stopped:
        train(tmp_path, on_nonfinite=action, save_steps=1, **options)
    step = re.search(r"step (\d)", str(stopped.value)).group(1)
    assert not list(tmp_path.glob(f"checkpoints/checkpoint-{step}*"))


@pytest.mark.slow
def test_a_gradient_alone_that_is_not_finite_names_all_packs_of_the_step(folder, packs, monkeypatch):
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    monkeypatch.setattr("csc_train.training.trainer.spread_nonfinite", Breaks.apply)
    with pytest.raises(InputError, match="step 1: the gradient norm, not the loss, is not finite in pack") as stopped:
        train(folder, checkpoints="none", max_steps=1)
    assert str(stopped.value).count("pack ") == PACKS_PER_STEP


@pytest.mark.slow
def test_a_loss_alone_that_is_not_finite_is_found(folder, monkeypatch):
    def infinite(*arguments):
        scores = score_tokens(*arguments)
        return scores._replace(loss=scores.loss + math.inf)

    monkeypatch.setattr("csc_train.training.loss.score_tokens", infinite)
    with pytest.raises(InputError, match="step 1: the loss is not finite in pack"):
        train(folder, checkpoints="none", max_steps=1)
    run = curve(train(folder, checkpoints="none", max_steps=1, on_nonfinite="continue"))
    assert run["grad_norms"][0] > 0 and not math.isfinite(run["losses"][0])  # the step is taken


@pytest.mark.slow
def test_steps_are_not_left_out_for_ever(folder, packs, caplog):
    token = int(packs[0]["input_ids"][0])  # it is in all packs
    with pytest.raises(InputError, match=f"it is the last of {MAX_IN_A_ROW} such steps in a row"):
        train(folder, checkpoints="none", broken=token, on_nonfinite="skip", epochs=9)
    with pytest.raises(InputError, match=r"step 2: .* it is the last of 2 such steps"):
        train(folder, checkpoints="none", broken=token, on_nonfinite="skip", max_steps=2)


@pytest.mark.slow
def test_a_run_on_a_broken_base_ends_in_one_line_that_says_how_to_go_on(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe, base = ROOT / "recipes" / "sft.py", ["model.init=pretrained", "model.path=base", "model.tokenizer=null"]
    options = ["debug=cpu_tiny", *base, "trainer.max_steps=2", "run.directory=run", "tracking=off"]
    done = run_script(recipe, *options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: step 1: the loss is not finite in pack \d+ \(dialogues sample-0-\d+", error)
    assert error.endswith("; to go on: run=run resume=true trainer.on_nonfinite=skip")
    assert "\nnote: 2 optimizer steps, fewer than 50, may not teach much: " in done.stdout
    assert "note: 0% of the letters" not in done.stdout
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "failed"

    done = run_script(recipe, *error.split("to go on: ")[1].split(), cwd=tmp_path)
    assert done.returncode == 2 and "note: step 1: the loss is not finite" in done.stdout
    assert "error: step 1: the weights are not finite, so neither a checkpoint nor a model is written" in done.stderr
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())

    done = run_script(recipe, "run=run", "resume=true", "trainer.learning_rate=1", cwd=tmp_path)
    assert done.returncode == 2 and "trainer.learning_rate=1: a run resumes with its own values" in done.stderr


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-45, 3e38])
def test_a_finite_loss_and_its_gradient_stay_bit_by_bit(value):
    loss = torch.tensor(value, requires_grad=True)
    spread_nonfinite(loss).backward()
    assert torch.equal(spread_nonfinite(loss), loss) and loss.grad.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value):
    inputs = torch.tensor([1.0, 0.0], requires_grad=True)
    spread_nonfinite((inputs * 0).sum() + value).backward()
    assert inputs.grad.isnan().all()
