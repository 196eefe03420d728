"""What recipes/clean.py lists and deletes, and what it never touches."""

import fcntl
import os
import time
from pathlib import Path

import pytest
from conftest import load_recipe, sampled

from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.runs.cleanup import find_ended_runs, remove_run, remove_weights
from csc_train.runs.directory import Run
from csc_train.tokenized_cache import ARRAYS, MANIFEST, cache_entries, remove_entry


def make_run(place: Path, days: float = 40, finished: bool = True, recipe: str = "sft", **changed) -> Path:
    """A training as it leaves its directory."""
    (place / "model").mkdir(parents=True)
    for name in ("model/weights", "history.jsonl", "output.log", "resolved.yaml"):
        (place / name).write_text("x" * 1000)
    record = {"recipe": recipe, "finished": "now" if finished else None, "outputs": ["model", "history.jsonl"]}
    write_json(place / "run.json", record | {"files": ["history.jsonl", "model/weights"]} | changed)
    age(place, days)
    return place


def make_entry(cache: Path, name: str, days: float = 40) -> Path:
    """An entry of the cache of tokenized dialogues."""
    (entry := cache / name).mkdir(parents=True)
    for array in ARRAYS:
        (entry / f"{array}.bin").write_bytes(b"x" * 100)
    write_json(entry / MANIFEST, {})
    age(entry, days)
    return entry


def age(place: Path, days: float) -> None:
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (time.time() - 86400 * days,) * 2)


@pytest.fixture
def clean(tmp_path, monkeypatch, capsys):
    """Runs the recipe on tmp_path; what it prints, in one line per row of its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> str:
        load_recipe("clean").main(compose("clean", list(arguments)))
        return capsys.readouterr().out

    return run


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if not path.is_dir() or path.is_symlink()}


def test_nothing_is_deleted_unless_asked_for(clean, said):
    make_run(Path("runs/old"))
    make_entry(Path("runs/tokenized"), "0123456789abcdef")
    before = files()
    printed = clean()
    assert files() == before
    rows = [line.split() for line in printed.splitlines() if "would be deleted" in line]
    assert [row[:4] for row in rows] == [
        ["runs/old", "sft", "40", "0.000"], ["runs/tokenized/0123456789abcdef", "tokenized", "40", "0.000"],
    ]  # fmt: skip
    assert said[-1] == "delete=true deletes 0.000 GB; 0 others are younger or smaller"


def test_what_is_old_and_large_goes_and_the_rest_stays(clean, said):
    make_run(Path("runs/old"))
    make_run(Path("runs/sweeps/lr/trial-0"))
    (evaluation := make_run(Path("runs/old/evaluation"), recipe="evaluate")).joinpath("model/weights")
    young = [make_run(Path("runs/young"), days=20), make_entry(Path("runs/tokenized"), "0" * 16, days=20)]
    make_run(Path("runs/evaluated"))
    make_run(Path("runs/evaluated/evaluation"), days=1, recipe="evaluate")
    small = make_run(Path("runs/small"))
    (small / "model/weights").write_text("")
    age(small, 40)
    make_entry(Path("runs/tokenized"), "1" * 16)
    Path("runs/sweeps/lr/study.log").touch()
    clean("delete=true", "larger_than_gb=0.0000035")
    left = {path.partition("runs/")[2].partition("/")[0] for path in files()}
    assert left == {"young", "evaluated", "small", "sweeps", "tokenized"}
    assert not evaluation.exists() and not Path("runs/old").exists()
    assert os.listdir("runs/sweeps/lr") == ["study.log"]
    assert all(place.exists() for place in young)
    assert sorted(os.listdir("runs/tokenized")) == ["0" * 16, "1" * 16]  # the second is small
    clean("delete=true")
    assert sorted(os.listdir("runs/tokenized")) == [".lock", "0" * 16]
    assert not small.exists()


@pytest.mark.parametrize(
    "inside", sampled(["runs/sweeps/lr/trial-0", "runs/sweeps/lr", "runs/sweeps/lr/trial-0/evaluation"], 3)
)
def test_a_run_in_use_stays(clean, inside):
    run = make_run(Path("runs/sweeps/lr/trial-0"))
    make_run(run / "evaluation", recipe="evaluate")
    (lock := Path(inside) / ".lock").touch()
    before = files()
    with open(lock, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "kept: in use" in clean("delete=true", "unfinished=true")
        assert "kept: in use" in clean("delete=true", "directory=runs/sweeps/lr/trial-0")
        assert files() == before
    assert "deleted" in clean("delete=true")
    assert files() <= {"runs/sweeps/lr/.lock"}


def test_an_unfinished_run_stays_unless_asked_for(clean):
    make_run(Path("runs/stopped"), finished=False)
    crashed = make_run(Path("runs/crashed"), finished=False)
    record = {"recipe": "sft", "finished": None, "outputs": ["model", "history.jsonl"], "status": "running"}
    write_json(crashed / "run.json", record)
    (crashed / "notes.txt").write_text("mine")
    write_json(make_run(Path("runs/ancient")) / "run.json", {"recipe": "sft", "finished": None})
    for name in ("crashed", "ancient"):
        age(Path("runs") / name, 40)
    before = files()
    assert clean("delete=true").count("kept: unfinished: unfinished=true removes it, too") == 3
    assert files() == before
    printed = clean("delete=true", "unfinished=true")
    assert "deleted, but for 1 files that it did not write" in printed
    assert "kept: does not say what it wrote" in printed
    assert {path for path in files() if "ancient" not in path} == {"runs/crashed/notes.txt"}


def test_what_no_run_wrote_and_links_stay(clean, tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (outside / "weights").write_text("precious")
    run = make_run(
        Path("runs/old"), files=["history.jsonl", "model/weights", "linked/weights", "../../outside/weights"]
    )
    (run / "linked").symlink_to(outside)
    (run / "model/mine.txt").write_text("mine")
    make_run(tmp_path / "elsewhere")
    Path("runs/link").symlink_to(tmp_path / "elsewhere")
    (entry := make_entry(Path("runs/tokenized"), "2" * 16)).joinpath("mine.txt").write_text("mine")
    (Path("runs/tokenized") / ("3" * 16)).symlink_to(make_entry(tmp_path / "cache", "3" * 16))
    Path("runs/mine").mkdir()
    Path("runs/mine/file").touch()
    write_json(Path("runs/broken/run.json"), {})
    Path("runs/broken/run.json").write_text("{")
    make_run(Path("runs/[/odd]"), files=None)
    Path("runs/tokenized", "4" * 16).touch()
    age(Path("runs"), 40)
    printed = clean("delete=true", "unfinished=true")
    assert "kept: not read: runs/broken/run.json: broken JSON" in printed
    (odd,) = [line for line in printed.splitlines() if "runs/[/odd]" in line]
    assert odd.rstrip().endswith("kept: does not say what it wrote") and Path("runs/[/odd]/model/weights").exists()
    assert {path for path in files() if path.startswith("runs/old")} == {"runs/old/linked", "runs/old/model/mine.txt"}
    assert (outside / "weights").exists() and (tmp_path / "elsewhere/run.json").exists()
    assert (entry / MANIFEST).exists() and (tmp_path / "cache" / ("3" * 16) / MANIFEST).exists()
    assert Path("runs/mine/file").exists() and Path("runs/broken/run.json").exists()


def test_an_entry_that_cannot_be_read_stays_out_of_the_way(clean, monkeypatch):
    entry, other = (make_entry(Path("runs/tokenized"), each * 16) for each in "56")
    scan = os.scandir

    def denied(path="."):
        if Path(path) == other:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "listdir", lambda path: [each.name for each in denied(path)])
    assert cache_entries(Path("runs/tokenized")) == [entry]


def test_a_run_that_is_written_to_meanwhile_stays(clean):
    run = make_run(Path("runs/old"))
    (found,) = find_ended_runs(Path("runs"), unfinished=False)
    (run / "history.jsonl").write_text("more")
    with pytest.raises(InputError, match=r"^runs/old: written to meanwhile$"):
        remove_run(found, unfinished=False)
    assert (run / "model/weights").exists()


def test_a_killed_removal_is_completed(clean, monkeypatch):
    run, unlink, count = make_run(Path("runs/old")), Path.unlink, 0

    def killed(path, missing_ok=False):
        nonlocal count
        if (count := count + 1) > 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        clean("delete=true")
    assert (run / "run.json").exists()
    clean("delete=true")
    assert files() == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs: no such folder"),
        (["directory=null", "cache_dir=nowhere"], "cache_dir=nowhere: no such folder"),
        (["older_than_days=-1"], "older_than_days=-1.0: must be at least 0"),
        (["older_then_days=1"], "unknown key 'older_then_days' for recipe clean. Did you mean 'older_than_days'?"),
    ],
)
def test_bad_input_is_refused_in_one_line(clean, arguments, message):
    with pytest.raises(InputError) as caught:
        clean(*arguments)
    assert str(caught.value) == message


def test_a_run_records_what_it_may_write(tmp_path):
    run = Run("sft", {"run": {"directory": str(tmp_path / "run"), "if_exists": "error"}}, ["model"])
    run.start({})
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model/weights").touch()
    run.claim.release()
    (found,) = find_ended_runs(tmp_path, unfinished=True)
    assert found.reason is None
    assert remove_run(found, unfinished=True) == 0
    assert not (tmp_path / "run").exists()


def test_a_run_whose_model_was_removed_is_not_taken_for_finished(tmp_path):
    config = {"run": {"directory": str(tmp_path / "run"), "if_exists": "resume"}}
    for status in ("new", "finished"):
        run = Run("sft", config, ["model"])
        assert run.start({}) == status
        run.finish() if status == "new" else None
        run.claim.release()
    (tmp_path / "run/model").mkdir()
    remove_weights(tmp_path / "run", "sweep.keep=best")
    run = Run("sft", config, ["model"])
    with pytest.raises(InputError, match=r"its model was removed by sweep.keep=best: start over by run.if_exists="):
        run.start({})


def test_a_cache_entry_that_is_used_meanwhile_stays(tmp_path):
    entry = make_entry(tmp_path, "0" * 16, days=40)
    os.utime(entry / MANIFEST)  # a training found it
    with pytest.raises(InputError, match=r"used meanwhile$"):
        remove_entry(entry, 40)
    assert cache_entries(tmp_path) == [entry]
    age(entry, 40)
    remove_entry(entry, 40)
    assert cache_entries(tmp_path) == []
