"""The recipes as a user starts them: whole runs in separate processes."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from processes import Script, run_script

from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import accuracy_ceiling, generate_sample
from csc_train.errors import InputError
from csc_train.packing.dataset import PackingReport
from csc_train.runs.directory import Run

SMALL = [
    "experiment=demo",
    "data.sample_dialogues=420",
    "model.tokenizer_vocab_size=1600",
    "model.architecture.hidden_size=96",
    "model.architecture.intermediate_size=256",
    "model.architecture.num_hidden_layers=3",
    "trainer.packs_per_step=1",
    "trainer.micro_batch_size=1",
    "trainer.learning_rate=4e-3",
    "trainer.profile=true",
    "run.if_exists=reuse",
]


def start(
    *arguments: str, cwd: Path, processes: int = 1, largest_file: int | None = None
) -> subprocess.CompletedProcess:
    """Run a recipe to its end; `arguments` start with its file name."""
    recipe = ROOT / "recipes" / arguments[0]
    return run_script(recipe, *arguments[1:], cwd=cwd, ranks=processes, largest_file=largest_file)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory in which a small version of the demo was run."""
    directory = tmp_path_factory.mktemp("workplace")
    trained = start("sft.py", *SMALL, "run.directory=runs/demo", cwd=directory)
    assert trained.returncode == 0, trained.stderr
    assert " dialogues encoded in " in trained.stdout
    return directory


def start_by_torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a recipe on two ranks as the README says."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run_script(*torchrun, ROOT / "recipes" / arguments[0], *arguments[1:], cwd=cwd, forks=True)


def evaluate(directory: Path) -> subprocess.CompletedProcess:
    return start(
        "evaluate.py", "checkpoint=runs/demo/model", "run.directory=runs/evaluation", "run.if_exists=reuse",
        "evaluation.max_new_tokens=12", "evaluation.batch_size=64", cwd=directory,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(workplace):
    done = evaluate(workplace)
    assert done.returncode == 0, done.stderr
    return done


def accuracies(workplace: Path) -> dict[str, dict[str, float]]:
    results = json.loads((workplace / "runs/evaluation/results.json").read_text())["results"]
    return {
        system: {context: scores["profiles"]["paper"]["ACC"]["value"] for context, scores in contexts.items()}
        for system, contexts in results.items()
    }


@pytest.mark.slow
def test_a_small_trained_model_beats_the_untrained_one_and_the_bigram(workplace, evaluation):
    accuracy = accuracies(workplace)
    for context in ("reference", "generated"):
        assert accuracy["untrained base"][context] < 15
        assert accuracy["trained"][context] > accuracy["strategy bigram"][context] + 15
    assert accuracy["strategy bigram"]["reference"] < 50
    assert accuracy["trained"]["reference"] < accuracy_ceiling(generate_sample(420, 0)) + 5


@pytest.mark.slow
def test_the_table_is_printed_and_every_turn_is_kept(workplace, evaluation):
    for name in ("most frequent", "strategy bigram", "untrained base", "trained", "ACC", "ceiling of ACC"):
        assert name in evaluation.stdout
    predictions = workplace / "runs/evaluation/predictions/trained-generated.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    results = json.loads((workplace / "runs/evaluation/results.json").read_text())["results"]
    assert len(lines) == results["trained"]["generated"]["counts"]["turns"]
    assert {line["context"] for line in lines} == {"generated"}
    assert all(len(line["prompt_hash"]) == 64 for line in lines)
    assert "| trained |" in (workplace / "runs/evaluation/table.md").read_text()


@pytest.mark.slow
def test_the_demo_speaks_english(tmp_path):
    tiny = ["experiment=demo_en", "debug=cpu_tiny", "data.sample_dialogues=30", "trainer.max_steps=1"]
    trained = start("sft.py", *tiny, "run.directory=runs/demo_en", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    short = ["evaluation.max_new_tokens=2", "evaluation.contexts=[reference]", "evaluation.base=false"]
    evaluated = start("evaluate.py", "checkpoint=runs/demo_en/model", *short, "run.directory=runs/e", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    test_set = read_dialogues(tmp_path / "runs/e/dialogues.jsonl")
    assert all(dialogue.text.isascii() for dialogue in test_set)
    assert f"ceiling of ACC, by the rule that wrote the sample dialogues: {accuracy_ceiling(test_set, 'en'):.2f}" in (
        evaluated.stdout
    )


@pytest.mark.slow
def test_a_second_run_reuses_what_is_unchanged_and_says_so(workplace, evaluation):
    before = (workplace / "runs/demo/model/model.safetensors").stat().st_mtime_ns
    trained = start("sft.py", *SMALL, "run.directory=runs/demo", cwd=workplace)
    assert trained.returncode == 0
    assert "reused runs/demo/model" in trained.stdout
    assert (workplace / "runs/demo/model/model.safetensors").stat().st_mtime_ns == before
    again = evaluate(workplace)
    assert "reused runs/evaluation" in again.stdout
    assert "| trained |" in again.stdout


@pytest.mark.slow
def test_prepare_makes_what_training_asks_for_and_reports_the_same(workplace):
    """A tokenizer that is trained again included: where sft has been there before, prepare finds its files."""
    entries = [path for path in (workplace / "runs/tokenized").iterdir() if path.is_dir()]
    assert len(entries) == 2  # the training dialogues and the validation dialogues
    done = start("prepare.py", *SMALL, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert all(f"tokenized runs/tokenized/{entry.name}: hit, " in done.stdout for entry in entries)
    report = json.loads((workplace / "runs/demo/metrics.json").read_text())["packing"]
    assert f"packs of the training: {PackingReport(**report)}\n" in done.stdout


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten_by_default(workplace):
    refused = start("sft.py", *SMALL[:-1], "run.directory=runs/demo", cwd=workplace)
    assert refused.returncode == 2
    assert "runs/demo holds a run" in refused.stderr
    assert (workplace / "runs/demo/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("if_exists", ["reuse", "replace"])
def test_a_directory_of_other_files_is_not_touched(workplace, tmp_path, if_exists):
    """Replacing it would delete what another recipe, or the user, keeps there: here the final model to be evaluated."""
    settings = {"run": {"directory": str(workplace / "runs" / "demo"), "if_exists": if_exists}}
    with pytest.raises(InputError, match=r"runs/demo holds a run of sft: choose another run\.directory"):
        Run("evaluate", settings)
    (tmp_path / "model").mkdir()
    settings["run"]["directory"] = str(tmp_path)
    with pytest.raises(InputError, match=r"holds model but no run\.json"):
        Run("sft", settings, ["model"])
    assert (workplace / "runs/demo/model/model.safetensors").exists()
    assert (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_final_models_weights_are_as_readable_as_its_configuration(workplace):
    files = [workplace / "runs/demo" / name for name in ("model/model.safetensors", "base/model.safetensors")]
    assert {file.stat().st_mode for file in files} == {(files[0].parent / "config.json").stat().st_mode}


@pytest.mark.slow
def test_the_run_directory_says_what_was_done(workplace):
    record = json.loads((workplace / "runs/demo/run.json").read_text())
    assert record["recipe"] == "sft"
    assert record["finished"]
    assert set(record["provenance"]) == {"commit", "dirty", "python", "versions"}
    assert "packs_per_step: 1" in (workplace / "runs/demo/resolved.yaml").read_text()
    manifest = json.loads((workplace / "runs/demo/model/csc_manifest.json").read_text())
    assert manifest["data_hash"] == record["inputs"]["train"]
    assert manifest["config"]["data"]["sample_dialogues"] == 420
    assert "profile/trace.json.gz" in record["files"]


@pytest.mark.slow
def test_a_final_model_with_another_template_is_refused(workplace):
    path = workplace / "runs/demo/model/csc_manifest.json"
    original = path.read_text()
    path.write_text(original.replace('"mode": "joint"', '"mode": "given"', 1))
    try:
        refused = start("evaluate.py", "checkpoint=runs/demo/model", cwd=workplace)
    finally:
        path.write_text(original)
    assert refused.returncode == 2
    assert "the model was trained with another template" in refused.stderr


def history(run: Path) -> list[dict]:
    """What was logged of the steps of a training, validation metrics aside."""
    lines = map(json.loads, (run / "history.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


@pytest.mark.distributed
def test_two_processes_make_one_run_directory(tmp_path):
    weights = ["loss=by_strategy", "loss.strategy_factors.GT=0"]
    done = start_by_torchrun("sft.py", "debug=cpu_tiny", *weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("sft-*")
    trained = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["packing"]["strategies"]
    assert "礼貌问候" not in trained and "感谢与告别" in trained
    assert (run / "model" / "model.safetensors").exists()
    assert done.stdout.count("\nmodel: ") == 1
    assert done.stdout.count("trained 6 steps in ") == 1
    assert [line["step"] for line in history(run)] == [1, 2, 3, 4, 5, 6]
    assert done.stdout.count(" dialogues encoded in ") == 2  # the training and the validation dialogues
    for report in (
        "training on ",
        "share of the loss by strategy",
        "slowest over mean rank",
    ):
        assert done.stdout.count(report) == 1, report
    again = start("sft.py", f"from={run}", "run.directory=runs/again", cwd=tmp_path, processes=2)
    assert again.returncode == 0, again.stderr
    assert [line["loss"] for line in history(tmp_path / "runs" / "again")] == [line["loss"] for line in history(run)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.path=bad.json"], "bad.json: broken JSON at line 1, column 13"),
        (["packing.max_length=20"], "packing.max_length=20 leaves no room beside the system prompt"),
    ],
    ids=["broken-json", "max-length"],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, overrides, message):
    (tmp_path / "bad.json").write_text('[{"dialogue"')
    done = start("sft.py", "debug=cpu_tiny", "data.strict=true", *overrides, *_own_file(overrides), cwd=tmp_path)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in error
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/model"))


def _own_file(overrides: list[str]) -> list[str]:
    return ["data.sample_dialogues=null"] if any("train.path" in override for override in overrides) else []


@pytest.mark.slow
def test_a_training_checkpoint_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    done = start("sft.py", "debug=cpu_tiny", "run.directory=runs/full", cwd=tmp_path, largest_file=600_000)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search("runs/full/checkpoints.*: cannot write", error)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "full" / "model").exists()


@pytest.mark.slow
def test_a_run_killed_after_a_checkpoint_resumes_from_it(tmp_path):
    arguments = ["debug=cpu_tiny", "run.directory=runs/killed", "run.if_exists=reuse", "trainer.save_steps=2"]
    whole = start("sft.py", *arguments, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "killed"
    first = (run / "model" / "model.safetensors").read_bytes()
    # As a kill at step 5 leaves it, in the middle of writing a state: no end, no checkpoint, a torn last state.
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": None, "status": "running"}))
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    again = start("sft.py", *arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "trained 2 steps in " in again.stdout  # steps 5 and 6
    assert [line["step"] for line in history(run)] == [1, 2, 3, 4, 5, 6]
    assert "runs/killed crashed" in again.stdout
    assert (run / "model" / "model.safetensors").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reached", "said"),
    [
        (lambda run, output: "training on " in output, ": nothing was saved"),
        (lambda run, output: (run / "checkpoints" / "checkpoint-2").exists(), "; to resume: run=run resume=true"),
    ],
    ids=["before the first step", "after a checkpoint"],
)
def test_ctrl_c_says_what_is_saved(tmp_path, reached, said):
    arguments = ["debug=cpu_tiny", "run.directory=run", "trainer.max_steps=400", "trainer.save_steps=2"]
    process = Script(ROOT / "recipes" / "sft.py", *arguments, cwd=tmp_path)
    while process.poll() is None and not reached(tmp_path / "run", process.stdout):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130, done.stderr
    assert f"interrupted{said}\n" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_users_file_is_never_overwritten_by_the_sample(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    refused = start("write_sample.py", "data.train.path=mine.jsonl", cwd=tmp_path)
    assert refused.returncode == 2
    assert "mine.jsonl: exists and is no sample" in refused.stderr
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_a_model_that_cannot_be_written_is_named_and_not_left_half_written(tmp_path):
    done = start("sft.py", "debug=cpu_tiny", "run.directory=runs/full", cwd=tmp_path, largest_file=300_000)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "runs/full/base: cannot write" in error
    assert "File too large" in error
    assert "Traceback" not in done.stderr
    names = {path.name for path in (tmp_path / "runs" / "full").iterdir()} - {"code.diff"}
    assert names == {"resolved.yaml", "run.json", "tokenizer"}
    record = json.loads((tmp_path / "runs/full/run.json").read_text())
    assert record["status"] == "failed" and "runs/full/base: cannot write" in record["error"]
