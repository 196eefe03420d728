"""The cache of encoded dialogues: what it returns, when it is found, and what becomes of a broken one."""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from conftest import ROOT, SMALL_OF
from processes import TIMEOUT_S
from workers import tokenize_dialogues
from workers.tokenize_dialogues import CHUNK, dialogues, template

from csc_train import tokenized_cache
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.languages import LANGUAGES
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import MODES, TokenizationConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tokenized_cache import ARRAYS, MANIFEST, tokenize


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenized_cache, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    """The arrays of `dialogues()`, by name, put together without the cache."""
    examples = list(template().encode_all(dialogues()))
    prefix = examples[0].turn_offsets[0]
    sizes = [(0, 0), *((len(e.input_ids) - prefix, len(e.strategies)) for e in examples)]
    arrays = {
        "prefix": examples[0].input_ids[:prefix],
        "input_ids": numpy.concatenate([e.input_ids[prefix:] for e in examples]),
        "token_types": numpy.concatenate([e.token_types[prefix:] for e in examples]),
        "turn_offsets": numpy.concatenate([e.turn_offsets for e in examples]),
        "strategies": numpy.concatenate([e.strategies for e in examples]),
        "offsets": numpy.cumsum(sizes, axis=0, dtype=numpy.int64),
    }
    assert list(arrays) == list(ARRAYS)
    return {name: array.tobytes() for name, array in arrays.items()}


def entry(cache: Path) -> Path:
    """The only thing in a cache beside its lock."""
    (directory,) = (path for path in cache.iterdir() if path.name != ".lock")
    return directory


def contents(cache: Path) -> dict[str, bytes]:
    return {name: (entry(cache) / f"{name}.bin").read_bytes() for name in ARRAYS}


def same(one, other) -> bool:
    pairs = [(numpy.asarray(part), numpy.asarray(getattr(one, name))) for name, part in vars(other).items()]
    return all(numpy.array_equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in pairs)


@pytest.mark.parametrize("settings", [{}, {"mode": "given"}, {"mode": "reply_only", "language": "en"}], ids=str)
def test_cached_dialogues_equal_those_of_the_template(tmp_path, settings):
    examples = tokenize(dialogues(), template(**settings), TokenizationConfig(str(tmp_path)))
    fresh = list(template(**settings).encode_all(dialogues()))
    assert len(examples) == len(fresh) == 40
    assert all(map(same, examples, fresh))
    assert same(examples[-1], fresh[-1])
    assert not same(examples[0], fresh[1])
    with pytest.raises(IndexError):
        examples[40]


@pytest.mark.parametrize("workers", [1, 4])
def test_chats_keep_their_own_prefix_beside_dialogues(tmp_path, monkeypatch, workers):
    (short, long), (first, *rest) = dialogues()[:2], dialogues()[2:6]
    chats = [replace(short, kind="chat"), replace(long, kind="chat", system="You are brief. " * 300)]
    mixed = [first, *chats, *rest]
    monkeypatch.setattr(tokenized_cache, "CHUNK", 1)
    examples = tokenize(mixed, template(), TokenizationConfig(str(tmp_path), workers))
    fresh = list(template().encode_all(mixed))
    assert len({len(each.input_ids[: each.turn_offsets[0]]) for each in fresh}) == 3
    assert all(map(same, examples, fresh)) and len(examples) == len(mixed)


def test_the_files_hold_the_dialogues_end_to_end(tmp_path, expected):
    tokenize(dialogues(), template(), TokenizationConfig(str(tmp_path)))
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_write_the_same_and_get_chunks_as_they_are_wanted(tmp_path, expected, monkeypatch, workers):
    submitted, threads = [], set()

    class Pool(tokenized_cache.ThreadPoolExecutor):
        def submit(self, function, start):
            submitted.append(start)
            return super().submit(lambda: (threads.add(threading.current_thread()), function(start))[1])

    monkeypatch.setattr(tokenized_cache, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(tokenized_cache, "CHUNK", 1)
    chunks = tokenized_cache._encode(dialogues(), template(), workers, len(template().prefix_ids))
    first = next(chunks)
    assert len(submitted) == 2 * workers
    (tmp_path / "entry").mkdir()
    tokenized_cache._write(
        tmp_path / "entry", template().prefix_ids, itertools.chain([first], chunks), lambda count: None
    )
    assert submitted == list(range(40))
    assert contents(tmp_path) == expected
    assert 1 <= len(threads) <= workers and threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_in_a_thread_ends_all_and_leaves_nothing(tmp_path, monkeypatch):
    threads, encode_all = set(), DialogueTemplate.encode_all

    def failing(self, given, targets=None):
        threads.add(threading.current_thread())
        if given[0].id == "21":
            raise MemoryError("no room")
        return encode_all(self, given, targets)

    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    named = [replace(dialogue, id=str(number)) for number, dialogue in enumerate(dialogues())]
    maker = template()
    monkeypatch.setattr(DialogueTemplate, "encode_all", failing)
    with pytest.raises(MemoryError, match="no room"):
        tokenize(named, maker, TokenizationConfig(str(tmp_path), 3))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not any(thread.is_alive() for thread in threads)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == parallelism


def test_packs_of_the_cache_are_those_of_the_template(tmp_path):
    examples = tokenize(dialogues(), template(), TokenizationConfig(str(tmp_path)))
    for packing in (PackingConfig(max_length=1300), PackingConfig("best_fit", max_length=1300)):
        for loss in (LossConfig(), LossConfig("turns", strategy_weight=2)):
            packs, report = pack_dialogues(examples, packing, loss)
            fresh, fresh_report = pack_dialogues(list(template().encode_all(dialogues())), packing, loss)
            assert report == fresh_report
            assert packs.pack_items == fresh.pack_items
            for row, fresh_row in zip(packs, fresh, strict=True):
                assert all(numpy.array_equal(row[name], fresh_row[name]) for name in fresh_row)


def test_a_second_call_finds_the_first_ones_files_and_writes_nothing(tmp_path, said):
    def state():
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [tmp_path, *tmp_path.rglob("*")]}

    settings = TokenizationConfig(str(tmp_path))
    tokenize(dialogues(), template(), settings)
    (line,) = said
    assert f"tokenized {entry(tmp_path)}: 40 dialogues encoded in " in line
    manifest = entry(tmp_path) / MANIFEST
    os.utime(manifest, (0, 0))
    before = state()
    tokenize(dialogues(), template(), settings)
    assert said[1:] == [f"tokenized {entry(tmp_path)}: hit, 40 dialogues"]
    assert {path for path, now in state().items() if now != before[path]} == {manifest}  # the time of its last use


@pytest.mark.slow
def test_whatever_decides_the_ids_leads_to_another_entry(tmp_path, monkeypatch):
    def entries(*arguments):
        tokenize(*arguments, TokenizationConfig(str(tmp_path)))
        return sum(path.is_dir() for path in tmp_path.iterdir())

    first, *rest = dialogues()
    other = Dialogue(first.id, (Turn(first.turns[0].speaker, "您好吗", first.turns[0].strategy), *first.turns[1:]))
    assert entries([first, *rest], template()) == 1
    assert entries([other, *rest], template()) == 2
    assert entries([*rest, first], template()) == 3
    assert entries([first, *rest], template(mode="given")) == 4
    assert entries([first, *rest], template(language="en")) == 5
    assert entries([first, *rest], template("qwen3")) == 6
    grown = template()
    grown.tokenizer.add_tokens(["订单"])
    assert entries([first, *rest], grown) == 7
    assert entries([first, *rest], template()) == 7
    monkeypatch.setattr("tokenizers.__version__", "0.0")
    assert entries([first, *rest], template()) == 8


PINNED = {1: "48f5eb9bda03bb77d6fd302aec8cd8d93fc9ff96c409cd23b2125fa52b238a7b"}
"""SHA-256 of what `FIXED` is tokenized into, by ENCODING_VERSION."""
FIXED = Dialogue(
    "fixed",
    (
        Turn(Speaker.SUPPORTER, "您好，很高兴为您服务！", STRATEGIES[0]),
        Turn(Speaker.CUSTOMER, "Hi, 我的订单123还没到<|im_end|>!"),
        Turn(Speaker.SUPPORTER, "[订单号]已查到，请放心。", STRATEGIES[4]),
    ),
)


@pytest.mark.slow
def test_a_changed_encoding_needs_a_new_version():
    found = hashlib.sha256()
    for name in sorted(SMALL_OF):
        for mode in MODES:
            for language in LANGUAGES:
                one = template(name, mode=mode, language=language).encode(FIXED)
                for array in list(vars(one).values())[:-1]:  # the id behind them is not encoded
                    found.update(array.tobytes())
    assert {tokenized_cache.ENCODING_VERSION: found.hexdigest()} == PINNED, (
        "raise ENCODING_VERSION, and pin the new hash"
    )


DAMAGE = {
    "truncated": lambda data: data[:-2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "flipped": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "zeroed": lambda data: bytes(len(data)),
    "removed": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_entry_is_built_again_and_logged(tmp_path, expected, said, kind):
    settings = TokenizationConfig(str(tmp_path))
    tokenize(dialogues(), template(), settings)
    for name in (*(f"{array}.bin" for array in ARRAYS), tokenized_cache.MANIFEST):
        file = entry(tmp_path) / name
        whole = file.read_bytes()
        if kind == "removed":
            file.unlink()
        else:
            file.write_bytes(DAMAGE[kind](whole))
        said.clear()
        tokenize(dialogues(), template(), settings)
        first, second = said
        assert first.startswith(f"tokenized {entry(tmp_path)}: ") and first.endswith(", so it is built again")
        assert " 40 dialogues encoded in " in second
        assert file.read_bytes() == whole
        assert contents(tmp_path) == expected


def builder(cache: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, tokenize_dialogues.__file__, str(cache), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_an_interrupted_tokenization_is_built_again(tmp_path, expected, end):
    one = builder(tmp_path, "2", "pause")
    assert one.stdout.readline() == "half-way\n"
    half = entry(tmp_path)
    assert half.name.startswith(".")
    if end == signal.SIGINT:
        os.killpg(one.pid, end)  # as a terminal does at Ctrl-C
    else:
        one.kill()
    rest, _ = one.communicate(timeout=TIMEOUT_S)
    assert rest == ""
    assert one.returncode != 0
    assert half.exists() == (end == signal.SIGKILL)
    tokenize(dialogues(), template(), TokenizationConfig(str(tmp_path)))
    assert not half.exists()
    assert contents(tmp_path) == expected


@pytest.mark.slow
def test_of_two_processes_one_encodes_and_the_other_waits(tmp_path, expected):
    one = builder(tmp_path, "1", "pause")
    assert one.stdout.readline() == "half-way\n"
    two = builder(tmp_path, "1")
    assert two.stdout.readline() == f"waiting for another process that tokenizes dialogues in {tmp_path}\n"
    first, _ = one.communicate("go on\n", timeout=TIMEOUT_S)
    second, _ = two.communicate(timeout=TIMEOUT_S)
    assert " 40 dialogues encoded in " in first
    assert second == f"tokenized {entry(tmp_path)}: hit, 40 dialogues\n"
    assert contents(tmp_path) == expected


def test_written_chunks_are_released(tmp_path):
    class Array(numpy.ndarray):
        """An array that can stand in a set."""

        __hash__ = object.__hash__

    alive, counts = weakref.WeakSet(), []
    maker = template()

    def chunks():
        for _ in range(20):
            examples = maker.encode_all(dialogues()[:3])
            chunk = [array.view(Array) for array in tokenized_cache._flatten(examples, len(maker.prefix_ids))]
            alive.update(chunk)
            counts.append(len(alive))
            yield chunk
            del chunk

    tokenized_cache._write(tmp_path, maker.prefix_ids, chunks(), lambda count: None)
    assert counts == [5, *[10] * 19]  # a chunk as it comes, and the one before it
    assert len(tokenized_cache.TokenizedDataset(tmp_path, [""] * 60)) == 60


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"cache: cannot write: File exists"):
        tokenize(dialogues(), template(), TokenizationConfig(str(tmp_path / "cache")))
    with pytest.raises(InputError, match=r"tokenization\.num_workers=0: must be at least 1"):
        TokenizationConfig(num_workers=0)
