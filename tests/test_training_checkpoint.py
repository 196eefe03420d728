"""A training checkpoint proves itself: a damaged one is passed over and named, and a killed training loses nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, full_disk
from faults import FAULTS, flip_byte
from processes import run_script, start_ranks

from csc_train.checkpoints.locate import locate_checkpoint
from csc_train.checkpoints.manifest import MANIFEST_FILE
from csc_train.checkpoints.training_checkpoint import (
    CHECKPOINT_FILE,
    PARTIAL_FOLDER,
    CheckpointRecord,
    can_resume,
    check_whole,
    checkpoint_to_resume,
    commit,
    list_checkpoints,
    newest_whole,
    prune,
    read_record,
    stamp_files,
)
from csc_train.errors import InputError

# Seven steps of four in an epoch: the end is in the middle of an epoch, and no multiple of any interval.
ARGUMENTS = [
    "debug=cpu_tiny", "run.directory=run", "data.sample_dialogues=30", "trainer.max_steps=7", "trainer.save_steps=2",
    "trainer.logging_steps=4",
]  # fmt: skip
KINDS = {"full": [], "lora": ["adapter=lora"]}


OTHERS_FILL_DISK = Path(__file__).parent / "workers" / "others_fill_disk.py"


def sft(*arguments: str, cwd: Path, **options):
    return run_script(ROOT / "recipes" / "sft.py", *arguments, cwd=cwd, **options)


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory) -> Path:
    """A directory with a finished run, which has checkpoints of steps 6 and 7."""
    place = tmp_path_factory.mktemp(request.param)
    done = sft(*ARGUMENTS, *KINDS[request.param], cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def killed(place: Path, target: Path, checkpoints: tuple[str, ...] = ("checkpoint-6", "checkpoint-7")) -> Path:
    """A copy of a finished run as a kill leaves it that comes after these checkpoints."""
    shutil.copytree(place, target, dirs_exist_ok=True)
    run = target / "run"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": None, "status": "running"}))
    shutil.rmtree(run / "model")
    (run / "metrics.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name not in checkpoints:
            shutil.rmtree(checkpoint)
    return run


# Damage


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_is_used(place, fault, tmp_path, said):
    original = place / "run" / "checkpoints"
    names = [str(path.relative_to(original / "checkpoint-7")) for path in (original / "checkpoint-7").rglob("*.*")]
    assert {"rng_state.pth", "scheduler.pt", "optimizer.pt", "trainer_state.json", CHECKPOINT_FILE} < set(names)
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(original, run / "checkpoints")
        (run / MANIFEST_FILE).touch()  # every run has one, and other programs' checkpoints have none
        newest = run / "checkpoints" / "checkpoint-7"
        FAULTS[fault](newest / name)
        said.clear()
        assert checkpoint_to_resume(run / "checkpoints") == str(newest.with_name("checkpoint-6")), name
        (line,) = said
        assert f"skipped checkpoint-7/{name}: " in line and "\n" not in line
        assert locate_checkpoint(str(run)) == newest.with_name("checkpoint-6")
        with pytest.raises(InputError, match=rf"checkpoint-7/{name}: "):
            locate_checkpoint(str(newest))
        shutil.rmtree(newest.with_name("checkpoint-6"))
        with pytest.raises(InputError, match=rf"no checkpoint can be used \(checkpoint-7/{name}: .* move the folder"):
            checkpoint_to_resume(run / "checkpoints")


def checkpoint_in(directory: Path, step: int, files: dict[str, bytes], hashed: bool = True) -> Path:
    """A checkpoint of these files, as it is saved now or, without hashes, as an earlier version saved it."""
    final = directory / f"checkpoint-{step}"
    written = directory / PARTIAL_FOLDER / final.name
    for name, content in files.items():
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_bytes(content)
    record = {"packs_per_step": 4, "processes": 1, "stage": None}
    if hashed:
        commit(written, CheckpointRecord(**record, files=stamp_files(written, files)), final)
    else:
        (written / CHECKPOINT_FILE).write_text(json.dumps(record | {"wandb_run_id": "0123abcd"}))
        written.rename(final)
        written.parent.rmdir()
    return final


FILES = {
    "model.safetensors": b"weights" * 99, "optimizer.pt": b"moments" * 99, "scheduler.pt": b"rate",
    "rng_state.pth": b"random", "trainer_state.json": b'{"global_step": 1}', "global_step1/a/b": b"", "latest": b"",
}  # fmt: skip


@pytest.mark.parametrize("hashed", [True, False])
def test_a_best_checkpoint_of_weights_only_is_whole_but_not_resumed(tmp_path, hashed, said):
    for step in (3, 4, 5):
        checkpoint_in(tmp_path, step, FILES, hashed)
    prune(tmp_path, 1, best_step=3)
    best, last = tmp_path / "checkpoint-3", tmp_path / "checkpoint-5"
    assert sorted(tmp_path.iterdir()) == [best, last]
    assert {path.name for path in best.iterdir()} == {"model.safetensors", "trainer_state.json", CHECKPOINT_FILE}
    assert not can_resume(best)
    check_whole(best)
    assert newest_whole(tmp_path, resume=True) == last
    assert any("has no hashes" in line for line in said) != hashed
    flip_byte(last / CHECKPOINT_FILE)
    assert newest_whole(tmp_path) == best
    with pytest.raises(InputError, match="checkpoint-3: holds weights only"):
        newest_whole(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "trainer_state.json"])
def test_an_earlier_versions_checkpoint_is_used_unless_a_file_is_missing(tmp_path, name, said):
    for step in (3, 4):
        checkpoint_in(tmp_path, step, FILES, hashed=False)
    assert newest_whole(tmp_path, resume=True) == tmp_path / "checkpoint-4"
    assert "checkpoint-4 has no hashes of its files" in said.pop()
    (tmp_path / "checkpoint-4" / name).unlink()
    assert newest_whole(tmp_path, resume=True) == tmp_path / "checkpoint-3"
    assert f"skipped checkpoint-4/{name}: " in said[0]


def test_checkpoints_ahead_of_a_training_are_neither_counted_nor_removed(tmp_path):
    """They are damaged ones, which the training saves again."""
    for step in (3, 4, 5):
        checkpoint_in(tmp_path, step, FILES)
    prune(tmp_path, 1, step=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-4", "checkpoint-5"]
    (tmp_path / "checkpoint-5" / "scheduler.pt").unlink()
    checkpoint_in(tmp_path, 5, FILES)
    assert check_whole(tmp_path / "checkpoint-5") == read_record(tmp_path / "checkpoint-5")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-4", "checkpoint-5"]


def test_other_folders_are_no_checkpoints(tmp_path):
    (tmp_path / "checkpoint-5-copy").mkdir()
    assert newest_whole(tmp_path) is newest_whole(tmp_path / "none") is None


# Kills


TIMES = ("time", "second", "skew", "trained_tokens_per")


def without_times(entries) -> list[dict]:
    return [{key: value for key, value in entry.items() if not any(word in key for word in TIMES)} for entry in entries]


def results(run: Path) -> dict:
    """All that a run leaves, times aside."""
    metrics = json.loads((run / "metrics.json").read_text())
    tables = {name: (run / name).read_text().splitlines() for name in ("history.jsonl", "samples.jsonl")}
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "log": without_times(metrics["log"]),
        "validation": without_times([metrics["validation"]]),
        **{name: without_times(map(json.loads, lines)) for name, lines in tables.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("end", ["after the last checkpoint", "before it", "last checkpoint damaged"])
def test_a_killed_training_ends_as_one_that_was_not(place, end, tmp_path):
    left = ("checkpoint-6",) if end == "before it" else ("checkpoint-6", "checkpoint-7")
    run = killed(place, tmp_path, left)
    (run / "checkpoints" / PARTIAL_FOLDER / "checkpoint-7").mkdir(parents=True)
    if end == "last checkpoint damaged":
        (weights,) = (run / "checkpoints" / "checkpoint-7").glob("*model.safetensors")
        flip_byte(weights)
    done = sft("run=run", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"trained {0 if end == 'after the last checkpoint' else 1} steps in" in done.stdout
    skipped = r"skipped checkpoint-7/(adapter_)?model.safetensors: changed since it was saved"
    assert bool(re.search(skipped, done.stdout)) == (end == "last checkpoint damaged")
    assert results(run) == results(place / "run")


@pytest.mark.slow
def test_a_training_without_a_whole_checkpoint_is_refused_in_one_line(place, tmp_path):
    run = killed(place, tmp_path, ("checkpoint-7",))
    (run / "checkpoints" / "checkpoint-7" / "scheduler.pt").unlink()
    done = sft("run=run", "resume=true", cwd=tmp_path)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "run/checkpoints: no checkpoint can be used (checkpoint-7/scheduler.pt: cannot read: No such file" in error


@pytest.mark.distributed
@pytest.mark.parametrize("place", ["full"], indirect=True)
def test_all_ranks_end_where_the_main_one_finds_no_whole_checkpoint(place, tmp_path):
    run = killed(place, tmp_path, ("checkpoint-7",))
    (run / "checkpoints" / "checkpoint-7" / "scheduler.pt").unlink()
    ranks = start_ranks(ROOT / "recipes" / "sft.py", "run=run", "resume=true", ranks=2, cwd=tmp_path)
    done = [rank.wait() for rank in ranks]
    assert [each.returncode for each in done] == [2, 2] and not any("Traceback" in each.stderr for each in done)
    assert "no checkpoint can be used" in done[0].stderr and "error:" not in done[1].stderr


# Writes that fail


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["checkpoints/writing", "history.jsonl", "samples.jsonl", "metrics.json", "model", "history.csv"]
)
@pytest.mark.parametrize("place", ["full"], indirect=True)
def test_a_write_that_fails_is_named_with_the_way_on_and_loses_nothing(place, name, tmp_path):
    run = killed(place, tmp_path, ("checkpoint-6",))
    original, blocked = tmp_path / "original", run / name
    if blocked.exists():
        blocked.rename(original)
    if name in ("checkpoints/writing", "model"):  # a file in the place of a directory, or the reverse
        blocked.write_text("")
    else:
        (blocked / "folder").mkdir(parents=True)
    done = sft("run=run", "resume=true", cwd=tmp_path)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    place_named = str(Path(name).parent if "/" in name else name)
    assert re.fullmatch(
        rf"error: run/{place_named}: cannot (read|write): .*; when that is mended: run=run resume=true", error
    )
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not list(run.rglob(".*"))
    check_whole(run / "checkpoints" / "checkpoint-6")
    blocked.unlink() if blocked.is_file() else shutil.rmtree(blocked)
    if original.exists():
        original.rename(blocked)
    done = sft("run=run", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(run) == results(place / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("kilobytes", "left"), [(1200, 0), (2400, 1), (4100, 2)])
@pytest.mark.parametrize("place", ["full"], indirect=True)
def test_a_disk_that_fills_up_keeps_the_whole_checkpoints(place, kilobytes, left, tmp_path):
    with full_disk(tmp_path / "disk", kilobytes) as disk:
        mounted = disk.is_mount()
        # Where no small disk can be mounted, a file of a limited size stands for it: the first checkpoint meets it.
        limit, left = (None, left) if mounted else (700_000, 0)
        (tmp_path / "run").symlink_to(disk / "run")
        (disk / "run").mkdir()
        words = [OTHERS_FILL_DISK, ROOT / "recipes" / "sft.py", *ARGUMENTS]
        done = run_script(*words, cwd=tmp_path, largest_file=limit)
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.fullmatch(
            r"error: run/checkpoints: cannot write: .*; when that is mended: run=run resume=true", error
        )
        whole = list_checkpoints(disk / "run" / "checkpoints")
        assert [check_whole(checkpoint).packs_per_step for checkpoint in whole] == [4] * left
        assert not [*disk.rglob(".*"), *disk.rglob(PARTIAL_FOLDER)]
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        done = sft("run=run", "resume=true", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert results(disk / "run") == results(place / "run")
