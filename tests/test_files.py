"""Files are whole or not there: what happens to the target, to an older file and to temporaries when writing fails."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import TIMEOUT_S

from csc_train.errors import InputError
from csc_train.files import atomic_path, digest, file_digest, read_json, write_json, write_text

LIMITED = """
import resource, sys
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.data.strategies import GREETING

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
text = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(500))
dialogues = [Dialogue(str(i), (Turn(Speaker.SUPPORTER, text[i:] + str(i), GREETING),)) for i in range(200)]
try:
    write_dialogues(sys.argv[1], dialogues)
except InputError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("older", [b"an older file", None])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_file_size_limit_leaves_nothing_half_written(tmp_path, name, older):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if older is not None:
        path.write_bytes(older)
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, cwd=root, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{path}: cannot write: ") and "too large" in line
    left = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert left == ({} if older is None else {name: older})


def test_a_directory_without_write_permission():
    root = os.geteuid() == 0
    # Not tmp_path: its parents are closed to the other user that root has to become, as root may write anywhere.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        path = Path(directory) / "a.txt"
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(InputError) as refusal:
                write_text(path, "x")
        finally:
            if root:
                os.seteuid(0)
        assert str(refusal.value) == f"{path}: cannot write: Permission denied"
        assert os.listdir(directory) == []


def test_a_parent_that_is_a_file_cannot_be_written_into(tmp_path):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(InputError, match=r"/parent/a\.txt: cannot write: "):
        write_text(tmp_path / "parent" / "a.txt", "x")
    assert (tmp_path / "parent").read_text() == "a file"


def test_parents_are_made_and_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "一")
    write_text(path, "二")
    assert path.read_bytes() == "二".encode()
    assert [file.name for file in path.parent.iterdir()] == ["c.txt"]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failure_while_writing_keeps_the_older_file(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("older")
    with (
        pytest.raises(InputError if isinstance(failure, OSError) else type(failure)),
        atomic_path(path) as temporary,
    ):
        temporary.write_text("half")
        raise failure
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "older"}


# The second name is one that the older directory might be moved aside to.
@pytest.mark.parametrize("name", ["checkpoint", "replaced"])
def test_a_directory_replaces_an_older_one_as_a_whole(tmp_path, name):
    for version in ("1", "2"):
        with atomic_path(tmp_path / name, stale=["[12]"]) as temporary:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / version).write_text(version)
    assert [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))] == [
        name,
        f"{name}/sub",
        f"{name}/sub/2",
    ]


def test_somebody_elses_files_in_a_replaced_directory_are_kept_beside_it(tmp_path):
    for version in ("1", "2"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(version)
        (tmp_path / "model" / "notes").write_text(version)
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("3")
    found = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"model/weights": "3", "model.replaced-1/notes": "1", "model.replaced-2/notes": "2"}


def test_a_failed_directory_keeps_the_older_one(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "weights").write_text("older")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise RuntimeError
    assert (path / "weights").read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_never_takes_the_place_of_a_directory(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    (path / "weights").write_text("precious")
    with pytest.raises(InputError, match=r"/runs: cannot write: Is a directory"):
        write_text(path, "x")
    assert (path / "weights").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_keeps_chinese_readable(tmp_path):
    value = {"策略": ["情感管理", 1, None, 0.5]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "情感管理" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1,\n "b": }', "broken JSON at line 2, column 7: Expecting value"),
        (b"", "broken JSON at line 1, column 1: Expecting value"),
        ('"情'.encode()[:-1], "cannot read: not UTF-8 at byte 1"),
    ],
)
def test_an_unreadable_json_file_is_named_with_the_place(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_json(path)
    assert str(refusal.value) == f"{path}: {reason}"


def test_a_missing_file_is_named(tmp_path):
    for read in (read_json, file_digest):
        with pytest.raises(InputError) as refusal:
            read(tmp_path / "none.json")
        assert str(refusal.value) == f"{tmp_path / 'none.json'}: cannot read: No such file or directory"


def test_digests():
    # The SHA-256 of "abc" is an example of FIPS 180-2.
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest({"a": 1, "b": "情"}) == digest({"b": "情", "a": 1}) == digest(json.loads('{"b": "\\u60c5", "a": 1}'))
    assert digest([1, 2]) != digest([2, 1])


def test_a_file_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes("情\r\n".encode())
    assert file_digest(tmp_path / "a") == digest("情\r\n".encode())


WRITER = """
import sys
from csc_train.files import atomic_path
with atomic_path(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_write_and_not_while_it_lives(tmp_path):
    path = tmp_path / "out.json"
    other = tmp_path / ".out.jsonl.writing-abcd1234"
    other.mkdir()
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        (staging,) = tmp_path.glob(".out.json.writing-*")
        write_text(path, "1")
        assert staging.exists()
        writer.kill()
    assert staging.exists()
    write_text(path, "2")
    assert sorted(tmp_path.iterdir()) == [other, path] and path.read_text() == "2"
