"""A directory has an owner: who may work there, what is never deleted, and what a killed process leaves."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from processes import run_script

from csc_train.checkpoints.manifest import MANIFEST_FILE
from csc_train.errors import InputError
from csc_train.files import atomic_path, write_json
from csc_train.runs import claim as claims
from csc_train.runs import directory as runs
from csc_train.runs.claim import CLAIM_VARIABLE, LOCK_FILE, claim, claim_new, is_claimed
from csc_train.runs.directory import RECORD_FILE, Run, mark_interrupted

CLAIM = """
import os, pathlib, sys, time
from csc_train.errors import InputError
from csc_train.runs.claim import claim
{before}
try:
    held = claim(pathlib.Path({directory!r}), "sft")
    print("claimed", flush=True)
    sys.stdin.read()
except InputError as error:
    print("error:", error, flush=True)
"""
RECIPES = {
    "sft": ["debug=cpu_tiny", "trainer.max_steps=1"],
    "evaluate": ["checkpoint=model", "data=sample"],
    "judge": ["one", "two", "llm=mock"],
    "compare": ["one", "two"],
    "compare_runs": ["one"],
    "inspect_data": ["path=one"],
    "synthesize_rolecs": ["llm=mock", "target=2"],
    "build_csconv": ["llm=mock"],
    "human_eval": ["export", "one", "two"],
}
"""Recipes with a run directory, each with a command line that composes."""
CONTINUED = {
    "checkpoints/checkpoint-2", "predictions/trained-reference.jsonl.part-00000", "answers.jsonl", "judgements.jsonl",
    "synthesis.db",
}  # fmt: skip
"""What a resume continues from, in run directories of several recipes."""


@pytest.fixture
def another(tmp_path):
    """Starts processes that claim `tmp_path / "run"` and keep it until they are killed; each gives its first line."""
    started = []

    def start(before: str = "", **environment: str) -> tuple[subprocess.Popen, str]:
        code = CLAIM.format(before=before, directory=str(tmp_path / "run"))
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | environment,
        )  # fmt: skip
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


# Who works there


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path, another):
    first, said = another()
    assert said == "claimed"
    assert is_claimed(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        claim(tmp_path / "run", "evaluate")
    host = os.uname().nodename
    assert str(caught.value).startswith(f"{tmp_path}/run: in use by sft on {host}, process {first.pid}, since 20")
    assert str(caught.value).endswith(": wait for its end, or choose another directory")


def test_the_lock_of_a_dead_process_is_taken_over_and_said(tmp_path, another, said):
    first, _ = another()
    first.kill()
    first.wait()
    assert not is_claimed(tmp_path / "run")
    with claim(tmp_path / "run", "sft"):
        assert is_claimed(tmp_path / "run")
    (line,) = said
    assert line.startswith(f"note: {tmp_path}/run: took over the lock of sft on ")
    assert f"process {first.pid}, since" in line


def test_a_released_lock_leaves_nothing(tmp_path, said):
    with claim(tmp_path / "run", "sft") as held:
        assert claim(tmp_path / "run", "sft") is held  # twice in one process
        (tmp_path / "run" / "file").touch()
    assert os.listdir(tmp_path / "run") == ["file"]
    with claim(tmp_path / "unused", "sft"):
        pass
    assert not (tmp_path / "unused").exists()
    assert not said


@pytest.mark.slow
def test_a_claim_passes_to_a_process_that_knows_its_token(tmp_path, another):
    held = claim(tmp_path / "run", "launch of sft")
    assert another(**{CLAIM_VARIABLE: "another"})[1].startswith("error:")
    child, said = another(**{CLAIM_VARIABLE: held.token})
    assert said == "claimed"
    held.release()  # the child still works there
    with pytest.raises(InputError, match="in use by launch of sft"):
        claim(tmp_path / "run", "sft")
    child.communicate("")
    claim(tmp_path / "run", "sft").release()


@pytest.mark.slow
def test_the_claim_of_a_killed_launcher_lasts_as_long_as_its_rank(tmp_path, another):
    first, _ = another()
    token = json.loads((tmp_path / "run" / LOCK_FILE).read_text())["token"]
    rank, said = another(**{CLAIM_VARIABLE: token})
    assert said == "claimed"
    first.kill()
    first.wait()
    with pytest.raises(InputError, match="in use by sft"):
        claim(tmp_path / "run", "sft")
    rank.kill()
    rank.wait()
    claim(tmp_path / "run", "sft").release()


@pytest.mark.slow
def test_a_program_that_replaces_the_process_keeps_its_claims(tmp_path, another):
    code = (
        "import os, pathlib, sys\n"
        "from csc_train.runs.claim import claim, pass_on, keep_inherited, release_all\n"
        "if 'again' in sys.argv:\n"
        "    keep_inherited(); print('claimed', flush=True); sys.stdin.readline(); release_all()\n"
        "else:\n"
        "    held = claim(pathlib.Path('run'), 'sft'); environment = dict(os.environ); pass_on(environment)\n"
        "    os.execve(sys.executable, [sys.executable, __file__, 'again'], environment)\n"
    )
    (tmp_path / "program.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "claimed\n"
    with pytest.raises(InputError, match="in use by sft"):
        claim(tmp_path / "run", "sft")
    process.communicate("end\n")
    assert not (tmp_path / "run").exists() or not os.listdir(tmp_path / "run")


def test_a_default_name_that_is_taken_gets_a_number(tmp_path):
    held = [claim_new(tmp_path / "runs" / "sft-1", "sft") for _ in range(3)]
    assert [each.directory.name for each in held] == ["sft-1", "sft-1-2", "sft-1-3"]
    for each in held:
        each.release()


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_heartbeat_decides(tmp_path, another, monkeypatch, said, code):
    patch = (
        "import fcntl, csc_train.runs.claim as claims\n"
        f"def none(*_): raise OSError({code}, 'none here')\n"
        "fcntl.flock, claims.LEASE_S = none, 3.0\n"
    )

    def no_locks(*_):
        raise OSError(code, "none here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(claims, "LEASE_S", 3.0)
    first, line = another(patch)
    assert "note: " not in line and line == "claimed"
    assert is_claimed(tmp_path / "run")
    with pytest.raises(InputError, match=f"in use by sft on .*, process {first.pid},"):
        claim(tmp_path / "run", "sft")
    assert (
        said[0] == f"note: {tmp_path}/run: no locks on this file system (none here): a heartbeat shows who works there"
    )
    first.kill()
    first.wait()
    with claim(tmp_path / "run", "sft"):  # of this machine, so its death is seen at once
        assert is_claimed(tmp_path / "run")
        lease = tmp_path / "run" / f"{LOCK_FILE}-heartbeat"
        before = lease.stat().st_mtime
        while lease.stat().st_mtime == before:
            time.sleep(0.1)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_refuses_a_directory_in_use(tmp_path, another, recipe):
    first, _ = another()
    for name in ("config.json", MANIFEST_FILE):  # what is there at a first look
        write_json(tmp_path / "model" / name, {})
    done = run_script(ROOT / "recipes" / f"{recipe}.py", *RECIPES[recipe], "run.directory=run", cwd=tmp_path)
    assert done.returncode == 2
    assert error_line(done.stderr).startswith(
        f"error: run: in use by sft on {os.uname().nodename}, process {first.pid}, "
    )
    assert os.listdir(tmp_path / "run") == [LOCK_FILE]


def error_line(text: str) -> str:
    """The one error line."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


# What is never deleted


@pytest.mark.parametrize("if_exists", ["error", "reuse", "resume", "replace"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_touches_a_directory_of_other_files(tmp_path, recipe, if_exists):
    settings = {"run": {"directory": str(tmp_path / "run"), "if_exists": if_exists}}
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "weights").write_text("precious")
    with pytest.raises(InputError, match=r"run holds model but no run\.json"):
        Run(recipe, settings, ["model"])
    write_json(tmp_path / "run" / RECORD_FILE, {"recipe": "other"})
    with pytest.raises(InputError, match="run holds a run of other: choose another"):
        Run(recipe, settings, ["model"])
    assert sorted(os.listdir(tmp_path / "run")) == ["model", RECORD_FILE]
    assert (tmp_path / "run" / "model" / "weights").read_text() == "precious"


def finished(directory: Path, if_exists: str = "error", inputs: dict | None = None, **values) -> Run:
    """A run that wrote a model of its `values`."""
    run = Run("sft", {"trainer": values, "run": {"directory": str(directory), "if_exists": if_exists}}, ["model"])
    assert run.start(inputs or {"train": "0"}) == "new"
    write_json(run.directory / "model" / "weights", values)
    run.finish()
    return run


def start(directory: Path, if_exists: str, inputs: dict | None = None, **values) -> str:
    run = Run("sft", {"trainer": values, "run": {"directory": str(directory), "if_exists": if_exists}}, ["model"])
    return run.start(inputs or {"train": "0"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 2}, "trainer.lr=1, not 2"),
        ({"inputs": {"train": "1"}}, "input train"),
        ({"code": "x"}, "code"),
        ({"torch": "x"}, "torch 0, not "),
    ],
)
def test_reuse_keeps_a_run_or_refuses_it_by_what_differs(tmp_path, change, named):
    finished(tmp_path / "run", lr=1)
    assert start(tmp_path / "run", "reuse", lr=1) == "finished"
    record = json.loads((tmp_path / "run" / RECORD_FILE).read_text())
    for name in change.keys() & {"code", "torch"}:
        record["code"][name] = "0"
        write_json(tmp_path / "run" / RECORD_FILE, record)
    with pytest.raises(InputError) as caught:
        start(tmp_path / "run", "reuse", change.get("inputs"), lr=change.get("lr", 1))
    assert f"holds a run that differs ({named}" in str(caught.value)
    assert json.loads((tmp_path / "run/model/weights").read_text()) == {"lr": 1}
    assert json.loads((tmp_path / "run" / RECORD_FILE).read_text()) == record


@pytest.mark.slow
def test_replace_keeps_the_old_run_beside_until_the_new_one_has_finished(tmp_path, said):
    finished(tmp_path / "run", lr=1)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    settings = {"trainer": {"lr": 2}, "run": {"directory": str(tmp_path / "run"), "if_exists": "replace"}}
    run = Run("sft", settings, ["model"])
    run.start({"train": "0"})
    (tmp_path / "run/model/wandb-1").mkdir(parents=True)
    (tmp_path / "run/model/latest").symlink_to("wandb-1")  # as W&B does, to a folder
    aside = tmp_path / "run.replaced-1"
    assert json.loads((aside / "model/weights").read_text()) == {"lr": 1}
    assert json.loads((aside / RECORD_FILE).read_text())["status"] == "finished"
    with pytest.raises(SystemExit):
        run.fail("no luck")
    assert aside.exists() and f"note: the replaced run is kept in {aside}" in said
    del run
    finished(tmp_path / "run", "replace", lr=3)  # replaces both
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert "replaces" not in json.loads((tmp_path / "run" / RECORD_FILE).read_text())


def test_a_killed_run_inside_a_replaced_one_is_deleted_with_it(tmp_path):
    """Such as the evaluation of a training: the kill left a lock file, and no list of the files."""
    finished(tmp_path / "run", lr=1)
    inner = tmp_path / "run" / "model"
    write_json(inner / RECORD_FILE, {"recipe": "evaluate", "status": "running", "outputs": ["results.json"]})
    for name in ("results.json", ".lock"):
        (inner / name).write_text("{}")
    finished(tmp_path / "run", "replace", lr=2)
    assert os.listdir(tmp_path) == ["run"]


def test_files_of_others_in_a_replaced_model_are_kept(tmp_path, said):
    finished(tmp_path / "run", lr=1)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    finished(tmp_path / "run", "replace", lr=2)
    assert (tmp_path / "run.replaced-1" / "model" / "notes.txt").read_text() == "mine"
    assert len([path for path in (tmp_path / "run.replaced-1").rglob("*") if path.is_file()]) == 1
    assert said[-1].startswith(f"note: kept {tmp_path}/run.replaced-1: it holds files")


@pytest.mark.slow
@pytest.mark.parametrize("moves", range(4))
def test_a_replacement_that_is_killed_while_it_moves_goes_on(tmp_path, monkeypatch, moves):
    finished(tmp_path / "run", lr=1)
    rename, done = Path.rename, []

    def killed(self, target):
        if self.parent == tmp_path / "run":
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    try:
        start(tmp_path / "run", "replace", lr=2)
    except KeyboardInterrupt:
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"was interrupted; the run is partly in .*run\.replaced-1: repeat"):
            start(tmp_path / "run", "resume", lr=1)
        assert start(tmp_path / "run", "replace", lr=2) == "new"
    assert json.loads((tmp_path / "run.replaced-1/model/weights").read_text()) == {"lr": 1}
    assert sorted(os.listdir(tmp_path)) == ["run", "run.replaced-1"]


def test_a_run_that_would_replace_what_it_reads_is_refused(tmp_path):
    finished(tmp_path / "run", lr=1)
    for read in (tmp_path / "run/model", tmp_path / "run/model/weights"):
        with pytest.raises(InputError, match=r"run holds trainer\.path=.*, an input: choose another run\.directory"):
            start(tmp_path / "run", "replace", path=str(read))
    assert (tmp_path / "run/model/weights").exists()


# What a killed process leaves


def test_temporary_files_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    for place in (run, run / "predictions"):
        for name in (".curves.png.writing-abcd1234", ".curves.png.abcd1234", ".writing-abcd1234", "x.writing-abcd1234"):
            (place / name).mkdir(parents=True)
    (run / ".a.writing-abcdefgh").write_text("a file")
    working = run / "evaluation" / ".table.md.writing-abcd1234"  # a run inside, maybe at work
    working.mkdir(parents=True)
    write_json(run / "evaluation" / RECORD_FILE, {})
    claim(run, "sft").release()
    for place in (run, run / "predictions"):
        assert not (place / ".curves.png.writing-abcd1234").exists()
        assert (place / ".curves.png.abcd1234").exists() and (place / "x.writing-abcd1234").exists()
    assert working.exists() and (run / ".a.writing-abcdefgh").exists()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_directory_survives_a_kill_while_it_is_replaced(tmp_path, moment):
    model, staging = tmp_path / "run" / "model", tmp_path / "run" / ".model.writing-abcd1234"
    for place in (model, staging / "model"):
        place.mkdir(parents=True)
        (place / "weights").write_text(place.parent.name)
    if moment == "between":
        model.rename(staging / "model.replaced")
    claim(tmp_path / "run", "sft").release()
    assert (model / "weights").read_text() == "run"
    assert os.listdir(tmp_path / "run") == ["model"]


# A directory that is moved


def test_nothing_is_written_where_a_run_was_before_it_was_moved(tmp_path):
    run = Run("sft", {"run": {"directory": str(tmp_path / "run"), "if_exists": "error"}})
    run.start({})
    (tmp_path / "run").rename(tmp_path / "moved")
    message = "{0}/run: moved to {0}/moved during the run: resume it there, by run={0}/moved resume=true"
    with pytest.raises(InputError, match=message.format(tmp_path)), atomic_path(tmp_path / "run" / "metrics.json"):
        pass
    with pytest.raises(SystemExit):
        run.fail("moved")
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "moved" / RECORD_FILE).read_text())["status"] == "failed"
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(InputError, match="deleted during the run"), atomic_path(tmp_path / "run" / "metrics.json"):
        pass


# A run's record


def test_a_resumed_run_loses_its_error_and_lists_each_command_once(tmp_path, monkeypatch):
    settings = {"run": {"directory": str(tmp_path / "run"), "if_exists": "resume"}}
    monkeypatch.setattr(sys, "argv", ["sft.py", "a"])
    with pytest.raises(SystemExit):
        run = Run("sft", settings)
        run.start({})
        run.fail("no luck")
    assert json.loads((tmp_path / "run" / RECORD_FILE).read_text())["error"] == "no luck"
    for arguments in (["sft.py", "b"], ["sft.py", "b"]):
        monkeypatch.setattr(sys, "argv", arguments)
        run = Run("sft", settings)
        assert run.start({}) == "unfinished"
    run.finish()
    record = json.loads((tmp_path / "run" / RECORD_FILE).read_text())
    assert record["status"] == "finished" and not record.keys() & {"error", "stopped"}
    assert record["commands"] == [["sft.py", "a"], ["sft.py", "b"]]


@pytest.mark.parametrize("file", [None, "base/config.json", "checkpoints/.partial/x", *sorted(CONTINUED)])
def test_ctrl_c_says_whether_a_resume_has_something_to_continue_from(tmp_path, monkeypatch, file):
    monkeypatch.setattr(runs, "_ended", False)
    assert mark_interrupted(KeyboardInterrupt()) == ": nothing was saved"  # no run has started
    run = Run("sft", {"run": {"directory": str(tmp_path / "run"), "if_exists": "error"}})
    run.start({})
    if file:
        (run.directory / file).parent.mkdir(parents=True, exist_ok=True)
        (run.directory / file).touch()
    expected = f"; to resume: run={run.directory} resume=true" if file in CONTINUED else ": nothing was saved"
    assert mark_interrupted(KeyboardInterrupt()) == expected
    assert json.loads((run.directory / RECORD_FILE).read_text())["status"] == "failed"
    assert mark_interrupted(KeyboardInterrupt()) == ""  # in what follows a run
