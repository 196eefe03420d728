"""Models, base models and training dialogues are known by content, wherever they lie and whatever they are called."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import ROOT, manifest_of, random_dialogue, small_tokenizer, tiny_config
from processes import run_script, start_ranks
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from csc_train.checkpoints import content
from csc_train.checkpoints.base_model import find_base
from csc_train.checkpoints.content import base_files, first_difference, hash_files, sha256
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import MANIFEST_FILE, read_manifest, save_final_model, write_manifest
from csc_train.data.config import DataConfig
from csc_train.data.dialogue import Turn, data_digest
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits
from csc_train.data.training_record import RECORD_FILE, find_recorded, sketch_dialogue, write_training_record
from csc_train.errors import InputError
from csc_train.evaluation.evaluated_model import find_trained, open_evaluated
from csc_train.files import file_digest
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

DIALOGUES = generate_sample(30, seed=3)
ADVICE = "give it by evaluation.base=PATH, or leave it out by evaluation.base=false"


def weights_of(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the final model `model`, trained from `base` on `DIALOGUES`."""
    run = tmp_path_factory.mktemp("trained") / "run"
    weights_of(1).save_pretrained(run / "base")
    tokenizer = small_tokenizer("qwen2_5")
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    manifest = manifest_of(
        template,
        base_files=base_files(str(run / "base"), None),
        data_hash=data_digest(DIALOGUES),
        config={"data": {}, "tracking": {"mode": "offline"}},
    )
    write_manifest(run, manifest, DIALOGUES)
    save_final_model(run / "model", weights_of(2), tokenizer, template.chat_template, manifest, record=run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def model_of(run: Path, base: bool | str = True):
    return open_evaluated(str(run / "model"), base)


def test_a_manifest_holds_the_files_as_they_are(run):
    files = read_manifest(run / "model").files
    held = {path.name for path in (run / "model").iterdir()}
    assert set(files) == held - {MANIFEST_FILE} and {"model.safetensors", "config.json", RECORD_FILE} <= set(files)
    for name, known in files.items():
        path = run / "model" / name
        assert (known["size"], known["sha256"]) == (path.stat().st_size, file_digest(path))
    assert (run / "model" / RECORD_FILE).read_bytes() == (run / RECORD_FILE).read_bytes()


def replace_weights(model: Path) -> str:
    other = weights_of(3)
    other.save_pretrained(model.parent / "other")
    shutil.copyfile(model.parent / "other" / "model.safetensors", model / "model.safetensors")
    return "model.safetensors"


def replace_text(name: str, old: str, new: str):
    def edit(model: Path) -> str:
        text = (model / name).read_text("utf-8")
        assert old in text
        (model / name).write_text(text.replace(old, new), "utf-8")
        return name

    return edit


REPLACED = {
    "weights": replace_weights,
    "config": replace_text("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'),
    "generation config": replace_text("generation_config.json", '"transformers_version"', '"x"'),
    "tokenizer config": replace_text("tokenizer_config.json", "}", " }"),
    "chat template": replace_text("chat_template.jinja", "im_start", "im_Start"),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_replaced_file_is_named_and_makes_another_system(kind, run, said):
    before = model_of(run)
    assert not before.unverified and not said
    name = REPLACED[kind](run / "model")
    after = model_of(run)
    assert after.content_hash != before.content_hash and after.base.content_hash == before.base.content_hash
    (text,) = after.unverified
    assert text.startswith(f"{run / 'model'} is not as it was written: ") and f"({name} has " in text
    assert said == [f"note: {text}"]


def test_a_moved_model_is_the_same_system(run):
    before = model_of(run)
    moved = run.rename(run.parent / "elsewhere")
    assert model_of(moved).hashes == before.hashes


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", MANIFEST_FILE])
def test_a_half_copied_model_is_named_with_the_way_to_go_on(name, damage, run):
    path = run / "model" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    with pytest.raises(InputError) as caught:
        model_of(run)
    assert name in str(caught.value) and "copy" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_shard_is_named_without_a_record_of_files(run):
    model = run / "model"
    weights_of(2).save_pretrained(model, max_shard_size="50KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    write_manifest(model, replace(read_manifest(model), files={}))
    (shard, *_) = sorted(model.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: no such file: .* copy it again"):
        open_source(str(model))


@pytest.mark.parametrize("known", ["weights", "nothing"])
def test_an_older_manifest_is_read_and_what_cannot_be_verified_is_said(known, run):
    path = run / "model" / MANIFEST_FILE
    values = json.loads(path.read_text("utf-8"))
    for name in ("files", "base_files", "wandb", *(["weights_hash"] if known == "nothing" else [])):
        del values[name]
    path.write_text(json.dumps(values), "utf-8")
    (run / "model" / RECORD_FILE).unlink()
    texts = model_of(run).unverified
    assert ("not verified, since the manifest has no hash of it" in texts[-1]) and str(run / "base") in texts[-1]
    assert len(texts) == (2 if known == "nothing" else 1)
    REPLACED["weights"](run / "model")
    assert any("the weights have the hash" in text for text in model_of(run).unverified) == (known == "weights")


# The base model


def base_path(run: Path, manifest, **options) -> Path:
    return Path(find_base(run / "model", manifest, ADVICE, **options).path).resolve()


@pytest.mark.parametrize("place", ["in the model", "beside the model", "beside the run", "of a whole run that moved"])
def test_a_moved_base_is_found(place, run):
    manifest = read_manifest(run / "model")
    if place == "of a whole run that moved":
        run = run.rename(run.parent / "elsewhere")
        assert base_path(run, manifest) == run / "base"
        return
    manifest = replace(manifest, base_model=str(run.parent / "gone" / "base"))
    target = {
        "in the model": run / "model/base",
        "beside the model": run / "base",
        "beside the run": run.parent / "base",
    }
    (run / "base").rename(target[place])
    assert base_path(run, manifest) == target[place]


def test_another_folder_of_that_name_is_never_taken(run):
    manifest = read_manifest(run / "model")
    weights_of(5).save_pretrained(run / "base")
    with pytest.raises(InputError) as caught:
        model_of(run)
    text = str(caught.value)
    assert f"{run / 'base'}: model.safetensors has the SHA-256" in text and text.endswith(f": {ADVICE}")
    shutil.copytree(run / "base", run.parent / "base")
    weights_of(1).save_pretrained(run.parent / "base")
    assert base_path(run, manifest) == run.parent / "base"
    shutil.rmtree(run.parent / "base")
    shutil.rmtree(run / "base")
    with pytest.raises(InputError, match=rf"its base model is not found \(no {run}/base\): give it by evaluation"):
        model_of(run)
    assert model_of(run, False).base is None


def test_a_given_base_is_taken_and_a_difference_is_said(run, tmp_path):
    weights_of(1).save_pretrained(tmp_path / "same")
    weights_of(5).save_pretrained(tmp_path / "other")
    same, other = (model_of(run, str(tmp_path / name)) for name in ("same", "other"))
    assert not same.unverified and same.hashes == model_of(run).hashes
    assert other.base.path == str(tmp_path / "other") and other.base.content_hash != same.base.content_hash
    assert other.unverified[0].startswith(f"the base model {tmp_path / 'other'}: model.safetensors has the SHA-256")
    with pytest.raises(InputError, match=r"not found \(no \./nowhere\): give it by"):
        model_of(run, "./nowhere")


def test_a_base_of_the_hub_is_known_by_commit_and_blobs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--an--owner", "c" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("model.safetensors", "config.json"):
        blob = repository / "blobs" / (file_digest(run / "base" / name) if "safe" in name else "1" * 40)
        shutil.copyfile(run / "base" / name, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    files = base_files("an/owner", commit)
    assert files == base_files(str(run / "base"), None)
    manifest = replace(read_manifest(run / "model"), base_model="an/owner", base_revision=commit, base_files=files)
    (run / "base").rename(run / "owner")  # a download of the same files: it counts by content
    assert base_path(run, manifest) == run / "owner"
    shutil.rmtree(run / "owner")
    found = find_base(run / "model", manifest, ADVICE)
    assert (found.path, found.revision, found.note) == ("an/owner", commit, "")
    with pytest.raises(InputError, match=rf"HF_HUB_OFFLINE is set and the cache has no copy .*: {ADVICE}"):
        find_base(run / "model", replace(manifest, base_revision="d" * 40), ADVICE)


# Hashes that are remembered


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """A memory of hashes of its own, for files of any size; counts the files that are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "REMEMBERED_BYTES", 1)
    read = []
    monkeypatch.setattr(content, "file_digest", lambda path: read.append(path.name) or file_digest(path))
    return read


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(memory, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert [sha256(file) for _ in range(3)] == [file_digest(file)] * 3 and len(memory) == 1
    status = file.stat()
    file.write_bytes(b"two")  # as long, and with the old time
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256(file) == file_digest(file) and len(memory) == 2
    other = tmp_path / "other"
    other.write_bytes(b"six")
    other.replace(file)
    assert sha256(file) == file_digest(file) and len(memory) == 3


def test_a_saved_model_is_not_read_again(memory, trained, tmp_path):
    manifest, template = (
        read_manifest(trained / "model"),
        (trained / "model" / "chat_template.jinja").read_text("utf-8"),
    )
    save_final_model(tmp_path / "model", weights_of(2), small_tokenizer("qwen2_5"), template, manifest)
    memory.clear()
    assert first_difference(tmp_path / "model", read_manifest(tmp_path / "model").files) is None and not memory


def test_a_cache_that_cannot_be_written_costs_time_only(memory, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [sha256(tmp_path / "file") for _ in range(2)] == [file_digest(tmp_path / "file")] * 2 and len(memory) == 2


# Training dialogues


def edit(dialogue, how: str):
    """The dialogue after its data file changed."""
    if how in ("punctuation", "both"):
        turns = tuple(replace(turn, text=turn.text.replace("，", ", ") + "!") for turn in dialogue.turns)
        dialogue = replace(dialogue, turns=turns)
    if how == "text":  # every third turn is another one
        turns = [replace(turn, text=f"改过的{n}") if n % 3 == 2 else turn for n, turn in enumerate(dialogue.turns)]
        dialogue = replace(dialogue, turns=tuple(turns))
    if how in ("ids", "both"):
        dialogue = replace(dialogue, id=f"new-{dialogue.id}")
    return dialogue


@pytest.mark.parametrize("how", ["nothing", "punctuation", "text", "ids", "both", "order"])
def test_what_a_model_was_trained_on_is_counted_after_the_file_changed(how, trained, said):
    model = model_of(trained, False)
    held_out = [edit(each, how) for each in DIALOGUES[:8]]
    held_out = held_out[::-1] if how == "order" else held_out
    found = find_trained(model, Splits(generate_sample(4, seed=9), held_out), DataConfig())
    assert [each.evaluation_id.removeprefix("new-") for each in found] == [each.train_id for each in found]
    assert len(found) == len(held_out)
    assert {each.kind for each in found} <= ({"edited", "near"} if how == "text" else {"exact"})
    assert "the checkpoint was trained on 8 of 8 evaluation dialogues (" in said[-1]
    assert said[-1].endswith("by its record of 30 training dialogues")
    with pytest.raises(InputError, match=r"data\.on_overlap=error: the checkpoint was trained on 8 of 8"):
        find_trained(model, Splits([], held_out), DataConfig(on_overlap="error"))


def test_other_dialogues_with_the_same_ids_are_not_counted(trained):
    rng = random.Random(0)
    others = [replace(random_dialogue(rng), id=each.id) for each in DIALOGUES]
    assert find_recorded([sketch_dialogue(each) for each in DIALOGUES], others, 0.8) == []
    assert find_trained(model_of(trained, False), Splits(DIALOGUES, others), DataConfig()) == []


@pytest.mark.parametrize("text", ["好", "？！", "𠮷" * 40, "a" * 10_000, "1"])
def test_short_and_odd_texts_have_a_record(text):
    turns = (Turn(DIALOGUES[0].turns[0].speaker, text, DIALOGUES[0].turns[0].strategy),)
    dialogue = replace(DIALOGUES[0], turns=turns)
    assert [each.kind for each in find_recorded([sketch_dialogue(dialogue)], [dialogue], 0.8)] == ["exact"]
    assert 1 <= len(sketch_dialogue(dialogue).sketch) <= 16


def test_similarity_is_estimated(tmp_path):
    one, other = DIALOGUES[0], edit(DIALOGUES[0], "text")
    assert sketch_dialogue(one).similarity(sketch_dialogue(one)) == 1
    assert 0.3 < sketch_dialogue(one).similarity(sketch_dialogue(other)) < 1
    write_training_record(tmp_path, DIALOGUES)
    assert len((tmp_path / RECORD_FILE).read_bytes()) < 300 * len(DIALOGUES)


# Recipes


def recipe(name: str, *arguments: str, **options):
    done = run_script(ROOT / "recipes" / f"{name}.py", *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


QUICK = ("evaluation.max_new_tokens=4", "metrics.profiles=[zh]", "metrics.bootstrap_resamples=100")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tracked run of two steps from random weights, `run`."""
    folder = tmp_path_factory.mktemp("place")
    recipe(
        "sft", "debug=cpu_tiny", "trainer.max_steps=2", "trainer.save_steps=1", "validation.eval_steps=0",
        "run.directory=run", "tracking=offline", cwd=folder,
    )  # fmt: skip
    return folder


def tree(directory: Path) -> dict[str, str]:
    return {name: known["sha256"] for name, known in hash_files(directory).items()}


@pytest.mark.slow
def test_export_then_evaluate_works_wherever_the_export_is_moved(place):
    recipe("export", "source=run", "output=exported/demo", cwd=place)
    said = recipe("evaluate", "checkpoint=exported/demo", "run.directory=e1", *QUICK, cwd=place)
    assert "untrained base" in said and "note:" not in said
    (place / "moved").mkdir()
    (place / "exported" / "demo").rename(place / "moved" / "mine")
    recipe("evaluate", "checkpoint=moved/mine", "run.directory=e2", *QUICK, cwd=place)
    name = "predictions/trained-generated.jsonl"
    assert (place / "e1" / name).read_bytes() == (place / "e2" / name).read_bytes()
    card = (place / "moved" / "mine" / "README.md").read_text("utf-8")
    assert "- Base: random weights" in card
    facts = json.loads((place / "e2" / "evaluated_model.json").read_text("utf-8"))
    assert facts["unverified"] == [] and facts["base"]["path"] == str(place / "run" / "base")
    # Of another machine: its run is not there.
    (place / "run" / "base").rename(place / "hidden")
    done = run_script(ROOT / "recipes/evaluate.py", "checkpoint=moved/mine", "run.directory=e3", *QUICK, cwd=place)
    assert done.returncode == 2 and done.stderr.strip().endswith(ADVICE) and done.stderr.count("\n") == 1
    recipe("evaluate", "checkpoint=moved/mine", "run.directory=e3", "evaluation.base=hidden", *QUICK, cwd=place)
    assert (place / "e3" / name).read_bytes() == (place / "e1" / name).read_bytes()
    (place / "hidden").rename(place / "run" / "base")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["run", "run/checkpoints/checkpoint-2"])
def test_an_evaluation_writes_into_its_own_directory_only(checkpoint, place):
    before, own = tree(place / "run"), f"own-{Path(checkpoint).name}"
    recipe("evaluate", f"checkpoint={checkpoint}", f"run.directory={own}", *QUICK, cwd=place)
    assert tree(place / "run") == before
    attached = json.loads((place / own / "tracking.json").read_text())
    assert attached["wandb"]["id"] == json.loads((place / "run" / "tracking.json").read_text())["wandb"]["id"]
    assert (place / own / "exported" / "model.safetensors").exists() == ("checkpoints" in checkpoint)
    said = recipe(
        "evaluate", f"checkpoint={checkpoint}", f"run.directory={own}", "run.if_exists=reuse", *QUICK, cwd=place
    )
    assert f"reused {own}" in said


@pytest.mark.distributed
def test_all_ranks_end_where_the_main_one_refuses_the_model(tmp_path):
    ranks = start_ranks(ROOT / "recipes/evaluate.py", "checkpoint=absent", "run.directory=e", ranks=2, cwd=tmp_path)
    done = [rank.wait() for rank in ranks]
    assert [each.returncode for each in done] == [2, 2] and not any("Traceback" in each.stderr for each in done)
    assert "error: absent: no such directory" in done[0].stderr and "error:" not in done[1].stderr


@pytest.mark.slow
def test_a_model_that_lies_in_the_run_of_another_is_not_attached_to_it(place, trained):
    shutil.copytree(place / "run", place / "theirs")
    shutil.copytree(trained / "model", place / "theirs" / "mine")
    write_dialogues(place / "data.jsonl", DIALOGUES)
    recipe(
        "evaluate", "checkpoint=theirs/mine", "run.directory=theirs-e", "evaluation.base=false", "data=files",
        "data.train.path=data.jsonl", *QUICK, cwd=place,
    )  # fmt: skip
    assert not (place / "theirs-e" / "tracking.json").exists() and not (place / "theirs-e" / "wandb").exists()


@pytest.mark.slow
def test_replaced_weights_are_not_reused(place):
    settings = ("checkpoint=copy", "run.directory=replaced", "evaluation.base=false", "run.if_exists=reuse", *QUICK)
    shutil.copytree(place / "run" / "model", place / "copy")
    recipe("evaluate", *settings, cwd=place)
    assert "reused replaced" in recipe("evaluate", *settings, cwd=place)
    file = place / "copy" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    done = run_script(ROOT / "recipes/evaluate.py", *settings, cwd=place)
    assert "reused" not in done.stdout and "model.safetensors has the SHA-256" in done.stdout
