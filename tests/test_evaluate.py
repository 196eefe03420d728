"""recipes/evaluate.py on a small untrained model: killed, failed, and on several processes."""

import importlib.util
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, manifest_of, random_dialogue, small_tokenizer, tiny_config
from processes import Script, run_script
from transformers import Qwen2ForCausalLM

from csc_train.checkpoints.manifest import read_manifest, save_final_model
from csc_train.config.compose import compose
from csc_train.data.dialogue import data_digest
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.inference import hf as hf_generator
from csc_train.inference.predictions import read_outcomes
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

SETTINGS = [
    "checkpoint=model", "data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl",
    "evaluation.base=false", "evaluation.batch_size=3", "evaluation.max_new_tokens=24",
    "metrics.profiles=[zh]", "metrics.bootstrap_resamples=100", "run.if_exists=resume",
]  # fmt: skip
FILE = "trained-{}.jsonl"
CONTEXTS = ("reference", "generated")


def recipe():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "recipes" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a final model, dialogues, and in runs/whole an evaluation that nothing interrupted."""
    directory = tmp_path_factory.mktemp("workplace")
    tokenizer = small_tokenizer("qwen2_5")
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5))
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    rng = random.Random(5)
    dialogues = [replace(random_dialogue(rng), id=str(number), source="test") for number in range(20)]
    write_dialogues(directory / "train.jsonl", dialogues[:4])
    write_dialogues(directory / "evaluation.jsonl", dialogues[4:])
    manifest = manifest_of(template, data_hash=data_digest(dialogues[:4]), config={})
    save_final_model(directory / "model", model, tokenizer, template.chat_template, manifest)
    before = Path.cwd()
    os.chdir(directory)
    yield directory
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(workplace):
    """The predictions of a run that nothing interrupted, by context."""
    recipe().main(compose("evaluate", [*SETTINGS, "run.directory=runs/whole"]))
    return predictions("whole")


def predictions(run):
    """What the files of the model's predictions hold, by context."""
    return {context: Path(f"runs/{run}/predictions/{FILE.format(context)}").read_bytes() for context in CONTEXTS}


@pytest.mark.slow
def test_likelihoods_are_kept_with_the_predictions(whole):
    for context, content in whole.items():
        for row in map(json.loads, content.splitlines()):
            assert len(row["label_log_likelihoods"]) == 12 and max(row["label_log_likelihoods"]) < 0
            assert row["cut_off"] == (len(row["token_ids"]) == 24)
            assert (row["reference_nll"] is None) == (row["reference_tokens"] is None) == (context == "generated")


@pytest.fixture
def answers(monkeypatch):
    """The turns that a model is asked, and whose likelihoods are added, as they come."""
    turns = {"asked": 0, "amended": 0}
    run = hf_generator.HFGenerator.run

    def counted(generator, queue):
        complete, update = queue.complete, queue.update

        def count(name, do):
            def call(*arguments):
                turns[name] += 1
                do(*arguments)

            return call

        queue.complete, queue.update = count("asked", complete), count("amended", update)
        run(generator, queue)

    monkeypatch.setattr(hf_generator.HFGenerator, "run", counted)
    return turns


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["replies", "likelihoods"])
def test_killed_and_resumed_it_ends_with_the_same_file(stage, workplace, whole, answers):
    name, turns = f"killed_{stage}", whole["generated"].count(b"\n")
    process = Script(ROOT / "recipes" / "evaluate.py", *SETTINGS, f"run.directory=runs/{name}")
    part = Path(f"runs/{name}/predictions") / f"{FILE.format('generated')}.part-00000"
    while not (part.exists() and part.read_bytes().count(b"\n") >= (5 if stage == "replies" else turns + 5)):
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.read_bytes()
    lines = kept.count(b"\n")
    assert 5 <= lines < turns if stage == "replies" else turns + 5 <= lines < 2 * turns
    part.write_bytes(kept[:-9])  # as if the last line had not been written to its end
    recipe().main(compose("evaluate", [f"run=runs/{name}", "resume=true"]))
    assert predictions(name) == whole
    assert not part.exists()
    assert answers["asked"] == (turns - lines + 1 if stage == "replies" else 0)
    assert answers["amended"] >= (turns if stage == "replies" else 2 * turns - lines)


@pytest.mark.slow
def test_what_was_lost_of_a_finished_run_is_found_out_and_predicted_again(workplace, whole, answers):
    directory = Path("runs/lost")
    shutil.copytree("runs/whole", directory)
    for file in (directory / "resolved.yaml", directory / "run.json"):
        file.write_text(file.read_text("utf-8").replace("runs/whole", "runs/lost"), "utf-8")
    path = directory / "predictions" / FILE.format("reference")
    path.write_bytes(b"".join(whole["reference"].splitlines(keepends=True)[:-3])[:-9])
    with pytest.raises(InputError, match=r"trained, reference context: 4 of .* run=runs/lost resume=true$"):
        recipe().main(compose("evaluate", ["run=runs/lost", "score_only=True"]))
    recipe().main(compose("evaluate", ["run=runs/lost", "resume=true"]))
    assert answers["asked"] == 4
    assert predictions("lost") == whole
    recipe().main(compose("evaluate", ["run=runs/lost", "resume=true"]))
    assert answers["asked"] == 4


def test_other_weights_are_another_system(workplace):
    """Under one manifest, such as that of a training of which several states are exported."""
    tokenizer = small_tokenizer("qwen2_5")
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    manifests = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5))
        save_final_model("again", model, tokenizer, template.chat_template, manifest_of(template))
        manifests.append(read_manifest("again"))
    assert manifests[0] == manifests[1] != manifests[2]
    assert len(manifests[0].weights_hash) == 64


class Flaky(hf_generator.HFGenerator):
    """A model whose answers are lost at the third supporter turn."""

    def run(self, queue):
        complete = queue.complete

        def lose(request, outcome):
            lost = request.dialogue.supporter_turns[2:3]
            complete(request, request.failure("timeout", "60 s") if request.turn in lost else outcome)

        queue.complete = lose
        super().run(queue)


@pytest.mark.slow
def test_failed_turns_are_counted_end_with_status_1_and_are_tried_again(workplace, whole, monkeypatch, capsys):
    monkeypatch.setattr(hf_generator, "HFGenerator", Flaky)
    with pytest.raises(SystemExit) as stop:
        recipe().main(compose("evaluate", [*SETTINGS, "run.directory=runs/flaky"]))
    monkeypatch.undo()
    assert stop.value.code == 1
    outcomes = {context: read_outcomes(f"runs/flaky/predictions/{FILE.format(context)}") for context in CONTEXTS}
    failed = {context: [each for each in some if hasattr(each, "kind")] for context, some in outcomes.items()}
    assert len(failed["generated"]) > len(failed["reference"]) > 0
    for context in CONTEXTS:
        assert len(outcomes[context]) == whole[context].count(b"\n")
        counts = json.loads(Path("runs/flaky/results.json").read_text())["results"]["trained"][context]["counts"]
        assert counts["failed"] == len(failed[context])
        assert counts["turns"] + counts["failed"] == len(outcomes[context])
    said = capsys.readouterr().out
    total = sum(map(len, failed.values()))
    assert f"{total} turns failed (" in said and "run=runs/flaky resume=true" in said
    table = Path("runs/flaky/table.md").read_text()
    assert f"{len(failed['reference'])} more failed ({len(failed['reference'])} timeout) and are not scored" in table
    assert "\n| trained † |" in table and "trained, reference context" in table and "bigram †" not in table
    record = json.loads(Path("runs/flaky/run.json").read_text())
    assert (record["finished"], record["status"]) == (None, "incomplete") and f"{total} turns failed" in record["error"]
    recipe().main(compose("evaluate", ["run=runs/flaky", "resume=true"]))
    assert predictions("flaky") == whole
    record = json.loads(Path("runs/flaky/run.json").read_text())
    assert record["finished"] and "crashed" not in record


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_the_file_of_one(workplace, whole):
    done = run_script(ROOT / "recipes" / "evaluate.py", *SETTINGS, "run.directory=runs/two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert predictions("two") == whole
    assert done.stdout.count("report: ") == 1
