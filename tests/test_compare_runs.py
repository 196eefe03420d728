"""What recipes/compare_runs.py prints of many runs of different kinds, and how it is told which."""

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import load_recipe
from rich.cells import cell_len

from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.runs.comparison import find_runs

MODELS = ("qwen2_5_7b", "llama3_1_8b", "qwen3_4b_instruct_2507", "demo_qwen2")
METRICS = ("ACC", "B-2", "B-4", "R-1", "R-2", "R-L", "R-L char", "BLEU zh")
ERROR = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def write_run(directory, number, **record):
    """A run whose model, data, adapter and trainer depend on its number."""
    settings = {
        "model": {"name": MODELS[number % 4], "path": f"/models/{'x' * 30}/{number % 4}"},
        "data": {"train": {"path": f"a folder/客服对话/{'deep/' * 6}dialogues-{number % 3}.jsonl"}},
        "adapter": {"kind": "lora" if number % 2 else "full", "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "template": {"mode": ("joint", "given", "reply_only")[number % 3]},
        "trainer": {
            "learning_rate": 1e-5 * (1 + number % 5),
            "gradient_checkpointing": ("off", "full")[number > 9],
            "seed": 7,
        },
    }
    directory.mkdir(parents=True)
    (directory / "resolved.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    record = {"recipe": "sft", "status": "finished", "finished": "now", "error": None} | record
    (directory / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "loss": 3 / step, "eval_loss": 2 + number / 64 + 1 / step} for step in (1, 2)]
    (directory / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def many(tmp_path, monkeypatch):
    """20 runs in several folders, of which three are evaluated, one failed, and one more that cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    for number in range(20):
        failed = {"status": "failed", "finished": None, "error": ERROR} if number == 3 else {}
        write_run(Path(f"runs/{'sweeps/lr/' if number > 15 else ''}run-{number:02}"), number, **failed)
    for number, checkpoint in ((1, "model"), (6, ""), (17, "model")):
        run = Path(f"runs/{'sweeps/lr/' if number > 15 else ''}run-{number:02}")
        (run / "evaluation").mkdir()
        (run / "evaluation/resolved.yaml").write_text(f"checkpoint: {run / checkpoint}\n")
        (run / "evaluation/run.json").write_text('{"recipe": "evaluate"}')
        scores = {name: {"value": 10.125 + number} for name in METRICS}
        results = {"trained": {context: {"profiles": {"paper": scores}} for context in ("reference", "generated")}}
        (run / "evaluation/results.json").write_text(json.dumps({"results": results}))
    Path("runs/torn").mkdir()
    Path("runs/torn/resolved.yaml").write_text("a: 1\n")
    Path("runs/torn/run.json").write_text("{")
    return tmp_path


def shown(capsys, *arguments):
    """What the recipe prints, in lines."""
    load_recipe("compare_runs").main(compose("compare_runs", [*arguments, "run.directory=out"]))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 60, 132])
def test_twenty_runs_of_different_kinds_are_readable(many, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(capsys)
    place = len(lines) - lines[::-1].index("")
    table_lines, errors = lines[:place], lines[place:]
    assert max(map(cell_len, table_lines)) <= width
    text = "\n".join(table_lines)
    assert "…" not in text
    for number in range(20):
        assert f"run-{number:02}" in text
    # Names and numbers are whole, in the order of the metric; the failed run is last.
    order = [line.split()[1][-2:] for line in table_lines if "run-" in line]
    assert order == [f"{number:02}" for number in range(20) if number != 3] + ["03"]
    for word in ("eval_loss", "finished", "2.516", "11.12", "reference", "trainer.learning_rate"):
        assert word in text or (word.startswith("trainer") and width == 60), word  # long keys are folded
    # A setting's value with the numbers of the runs that have it.
    row = next(line for line in table_lines if " lora " in line).split()
    assert row[row.index("lora") + 1 :][:7] == ["2", "5", "7", "9", "11", "13", "15"]
    assert any(line.split()[-2:] == ["1-9", "20"] for line in table_lines)
    assert "seed" not in text and ERROR not in text.replace("\n", " ")
    assert [line.split(": ")[0] for line in errors[:2]] == ["#20 failed", "not read"] and ERROR in errors[0]


@pytest.mark.slow
def test_runs_and_folders_are_taken_by_name(many, capsys):
    lines = shown(capsys, "runs/run-03", str(many / "runs/run-05"), "runs/sweeps", "runs/run-05/")
    written = json.loads(Path("out/runs.json").read_text())
    names = [Path(run["directory"]).name for run in written["runs"]]
    assert sorted(names) == ["run-03", "run-05", "run-16", "run-17", "run-18", "run-19"]
    assert any(line.startswith("#6 failed: OutOfMemoryError") for line in lines)
    text = Path("out/runs.md").read_text(encoding="utf-8")
    assert f"- #6 failed: {ERROR}" in text and text.index("runs.svg") < text.index(ERROR)


@pytest.mark.slow
def test_settings_that_fit_are_columns(many, capsys):
    for number in range(2):
        write_run(Path(f"few/{number}"), 4 * number)
        settings = yaml.safe_load(Path(f"few/{number}/resolved.yaml").read_text("utf-8"))
        settings |= {"data": {}, "template": {}, "adapter": {"kind": "full"}}
        Path(f"few/{number}/resolved.yaml").write_text(yaml.safe_dump(settings))
    lines = shown(capsys, "few")
    (header,) = [line for line in lines if "eval_loss" in line]
    assert "trainer.learning_rate" in header and "setting" not in "".join(lines)


def test_a_name_without_a_run_is_refused(many):
    for names, message in (
        (["runs/run-01", "nowhere"], "nowhere: no such folder"),
        (["runs/run-01", "runs/run-01/evaluation"], "runs/run-01/evaluation: holds no training run"),
    ):
        with pytest.raises(InputError, match=message):
            find_runs([Path(name) for name in names])
    assert not os.path.exists("out")


@pytest.mark.slow
def test_a_folder_of_broken_runs_is_told_without_a_table(many, capsys):
    lines = shown(capsys, "runs/torn")
    assert lines[-2].startswith("not read: runs/torn: runs/torn/run.json: broken JSON")
