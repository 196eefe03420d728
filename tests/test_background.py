"""A checkpoint that is written while training goes on holds the state of its own step, and nothing of it is lost."""

import json
import pickle
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from processes import TIMEOUT_S
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workers.loss_curve import curve, first_packs, train

from csc_train.checkpoints import background
from csc_train.checkpoints.background import CheckpointWriter, HostCopies
from csc_train.checkpoints.training_checkpoint import PARTIAL_FOLDER, check_whole, list_checkpoints
from csc_train.errors import InputError
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import TrainerConfig

TENSORS = ("model.safetensors", "optimizer.pt", "rng_state.pth")
OTHERS = ("scheduler.pt", "config.json", "tokenizer.json")
STEPS = {"max_steps": 3, "save_steps": 1, "save_total_limit": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and packs for three steps."""
    folder, rng = tmp_path_factory.mktemp("background"), random.Random(12)
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))
    examples = [template.encode(random_dialogue(rng)) for _ in range(20)]
    packs, _ = pack_dialogues(examples, PackingConfig("best_fit", max_length=1000))
    (folder / "packs").write_bytes(pickle.dumps(first_packs(packs, 4)))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def foreground(folder) -> dict:
    return curve(train(folder, checkpoints="foreground", save_in_background="false", **STEPS))


def same(one: Path, other: Path, names: tuple[str, ...]) -> list[bool]:
    return [(one / name).read_bytes() == (other / name).read_bytes() for name in names]


@pytest.mark.slow
def test_a_checkpoint_written_after_the_next_step_equals_one_that_training_waited_for(folder, foreground):
    trained = curve(train(folder, checkpoints="held", held=True, **STEPS))
    assert trained["losses"] == foreground["losses"] and trained["digest"] == foreground["digest"]
    for step in (1, 2, 3):
        one, other = (folder / name / f"checkpoint-{step}" for name in ("foreground", "held"))
        assert check_whole(one).files.keys() == check_whole(other).files.keys()
        assert all(same(one, other, TENSORS + OTHERS)), step
        states = [json.loads((each / "trainer_state.json").read_text()) for each in (one, other)]
        assert [each["global_step"] for each in states] == [step, step]
        assert [len(each["log_history"]) for each in states] == [step, step]
    again = curve(train(folder, checkpoints="again", resume="held/checkpoint-2", max_steps=3))
    assert again["losses"] == foreground["losses"] and again["digest"] == foreground["digest"]


@pytest.mark.slow
def test_without_the_copy_it_would_hold_the_next_step(folder, foreground, monkeypatch):
    monkeypatch.setattr(HostCopies, "take", lambda _, __, state: state)
    train(folder, checkpoints="uncopied", held=True, **STEPS)
    one, other = (folder / name / "checkpoint-2" for name in ("foreground", "uncopied"))
    assert same(one, other, TENSORS) == [False, False, True]
    later = load_file(folder / "foreground" / "checkpoint-3" / "model.safetensors")
    written = load_file(other / "model.safetensors")
    assert all(torch.equal(written[name], later[name]) for name in later)


def test_a_copy_keeps_shared_parts_and_uses_its_memory_again():
    copies, tensor, betas = HostCopies(), torch.arange(4.0), [0.9]
    state = {"a": tensor, "b": [tensor, {"betas": betas}, {"betas": betas}], "c": torch.ones(2)}
    first = copies.take("optimizer.pt", state)
    assert first["a"] is first["b"][0] and first["b"][1]["betas"] is first["b"][2]["betas"] is not betas
    tensor += 1
    betas[0] = 0.8
    assert first["a"].tolist() == [0, 1, 2, 3] and first["b"][1]["betas"] == [0.9]
    tied = copies.take("tied", {"embeddings": tensor, "head": tensor.detach(), "part": tensor[:2], "none": tensor[:0]})
    assert tied["head"] is tied["embeddings"] and tied["part"].tolist() == [1, 2] and not len(tied["none"])
    second = copies.take("optimizer.pt", state)
    assert second["a"].data_ptr() == first["a"].data_ptr() and second["a"].tolist() == [1, 2, 3, 4]
    assert copies.take("model.safetensors", state)["a"].data_ptr() != second["a"].data_ptr()
    assert copies.take("optimizer.pt", state | {"a": torch.ones(9)})["a"].shape == (9,)


def slow_saves(monkeypatch) -> list[int]:
    """Let each save take a while; the number of saves in progress at the start of each."""
    running, numbers, stamp = [], [], background.stamp_files

    def slow(written, names):
        running.append(written.name)
        numbers.append(len(running))
        time.sleep(0.3)
        stamps = stamp(written, names)
        running.remove(written.name)
        return stamps

    monkeypatch.setattr(background, "stamp_files", slow)
    return numbers


@pytest.mark.slow
def test_the_next_save_waits_for_the_one_before_and_says_so(folder, said, monkeypatch):
    numbers = slow_saves(monkeypatch)
    train(folder, checkpoints="slow", save_in_background="true", **STEPS)
    assert numbers == [1, 1, 1]
    waits = [line for line in said if line.startswith("waiting for the checkpoint of step ")]
    assert waits[-1] == "waiting for the checkpoint of step 3, which is still being written"
    assert [check_whole(each).processes for each in list_checkpoints(folder / "slow")] == [1, 1, 1]


@pytest.mark.slow
def test_a_write_that_fails_ends_training_at_the_next_step_and_keeps_the_checkpoint_before(folder, monkeypatch):
    stamp = background.stamp_files

    def full(written, names):
        if written.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        return stamp(written, names)

    monkeypatch.setattr(background, "stamp_files", full)
    with pytest.raises(InputError, match=r"full: cannot write: No space left on device$"):
        train(folder, checkpoints="full", held=True, **STEPS)
    assert [each.name for each in (folder / "full").iterdir()] == ["checkpoint-1"]
    check_whole(folder / "full" / "checkpoint-1")


def test_a_rank_without_memory_leaves_no_checkpoint_without_its_files(tmp_path, monkeypatch):
    told, all_told = {}, threading.Barrier(2)

    def tell(key, value, ending):  # in place of the store of two processes
        told[pickle.loads(value)[1] is not None] = value  # the second one fails
        all_told.wait(TIMEOUT_S)
        return [told[False], told[True]]

    def stamped(written, names):
        if any("rng_state_1" in name for name in names):
            raise MemoryError
        return {}

    monkeypatch.setattr(background, "tell_main", tell)
    monkeypatch.setattr(background, "stamp_files", stamped)
    written, finished, writers = tmp_path / PARTIAL_FOLDER / "checkpoint-1", [], []
    written.mkdir(parents=True)
    (written / "rng_state_1.pth").touch()
    for rank in (0, 1):
        writers.append(CheckpointWriter(rank, 2))
        writers[rank].start(1, written, finished.append)
    for writer in writers:
        writer.wait()
    assert [str(writer.error()) for writer in writers] == ["rank 1: MemoryError()", ""]
    assert not finished and not written.exists()


@pytest.mark.slow
def test_an_error_of_the_training_waits_for_the_checkpoint_before(folder, monkeypatch):
    slow_saves(monkeypatch)
    with pytest.raises(RuntimeError, match="as planned"):
        train(folder, checkpoints="error", save_in_background="true", ends=("error", 2), **STEPS)
    assert [check_whole(each).processes for each in list_checkpoints(folder / "error")] == [1, 1]
    assert not (folder / "error" / PARTIAL_FOLDER).exists()


@pytest.mark.parametrize("value", [True, "True", "true"])
def test_a_truth_value_of_yaml_is_taken(value):
    assert TrainerConfig(save_in_background=value).save_in_background == "true"
    with pytest.raises(InputError, match="save_in_background=sometimes: choose one of auto, true, false"):
        TrainerConfig(save_in_background="sometimes")
