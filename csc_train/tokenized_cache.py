"""A cache of tokenized dialogues on disk: tokenized once for all ranks and runs, and memory-mapped by training.

An entry is a directory of flat arrays and a manifest:

    prefix.bin        int32 [prefix]             the ids that all dialogues begin with; none if there are chats
    input_ids.bin     int32 [tokens]             the ids behind the prefix, one dialogue after the other
    token_types.bin   uint8 [tokens]             the `TokenType` of each of them
    turn_offsets.bin  int32 [turns + dialogues]  `TokenizedDialogue.turn_offsets`
    strategies.bin    uint8 [turns]              `TokenizedDialogue.strategies`
    offsets.bin       int64 [dialogues + 1, 2]   where each dialogue starts in `input_ids` and in `strategies`

Loss weights are not stored: they follow from token types and strategies, so changing them costs nothing.
"""

import collections
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy
import tokenizers

from csc_train.data.dialogue import Dialogue, data_digest
from csc_train.errors import InputError
from csc_train.files import atomic_path, digest, file_digest, os_errors, read_json, remove_directory, write_json
from csc_train.progress import ProgressBar
from csc_train.runs.distributed import distributed_state, world_size
from csc_train.template.config import TokenizationConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue

logger = logging.getLogger(__name__)
ANY_RANK = {"any_rank": True}
"""Marks a log record that is shown although its process is not the main one (see `config.cli`)."""

ARRAYS = {
    "prefix": numpy.int32,
    "input_ids": numpy.int32,
    "token_types": numpy.uint8,
    "turn_offsets": numpy.int32,
    "strategies": numpy.uint8,
    "offsets": numpy.int64,
}
MANIFEST = "manifest.json"
ENCODING_VERSION = 1
"""Raise it with every change of the code that changes token ids, token types or offsets: it is part of the key."""
KEY = 16
"""Hexadecimal digits of an entry's name, a hash of its key."""
CHUNK = 50
"""Dialogues that a worker encodes, and that are written, at a time."""
MAX_DEFAULT_WORKERS = 6
"""Threads by default: Python's own part, a sixth of the time, is done by one at a time."""


class TokenizedDataset(Sequence[TokenizedDialogue]):
    """The tokenized dialogues of a cache entry, memory-mapped."""

    def __init__(self, directory: str | os.PathLike, ids: Sequence[str]):
        """Map the arrays without checking them; `tokenize` does.

        Args:
            ids: of the dialogues, in order.
        """
        self._names = ids
        arrays = {
            # As plain arrays: slicing a numpy.memmap takes many times longer.
            name: numpy.memmap(_file(directory, name), dtype, "r").view(numpy.ndarray)
            for name, dtype in ARRAYS.items()
            if name != "prefix"
        }
        self._prefix = numpy.fromfile(_file(directory, "prefix"), ARRAYS["prefix"])  # it may be empty: no map can be
        self._ids, self._token_types, self._turn_offsets, self._strategies, offsets = arrays.values()
        self._offsets = offsets.reshape(-1, 2)
        self._context = numpy.zeros(len(self._prefix), ARRAYS["token_types"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> TokenizedDialogue:
        number = range(len(self))[index]
        (token, turn), (last_token, last_turn) = self._offsets[number : number + 2].tolist()
        return TokenizedDialogue(
            numpy.concatenate([self._prefix, self._ids[token:last_token]]),
            numpy.concatenate([self._context, self._token_types[token:last_token]]),
            self._turn_offsets[turn + number : last_turn + number + 1],
            self._strategies[turn:last_turn],
            self._names[number],
        )


def tokenize(dialogues: Sequence[Dialogue], template: DialogueTemplate, config: TokenizationConfig) -> TokenizedDataset:
    """Tokenize dialogues by `template`, in order, or find them in the cache.

    The key holds the dialogues, the tokenizer, the template (with mode and language) and `ENCODING_VERSION`. A damaged
    entry, by the hashes of its files, is built again.

    All ranks of a job must call this at once. The first of each node looks for the entry. If it is not there, the first
    rank to lock the cache encodes; the others wait for the lock and then find the entry, on one file system or on many.
    None waits in a collective operation meanwhile, which would time out.

    Raises:
        InputError: the cache cannot be written.
    """
    directory, inputs = _entry(dialogues, template, config)
    with contextlib.suppress(OSError):
        os.utime(directory / MANIFEST)  # the time of the last use, for recipes/clean.py
    if _faults(directory, inputs):
        with _lock(directory.parent):
            # A process that is killed leaves its temporary directory behind; none is in use while we hold the lock.
            for leftover in directory.parent.glob(f".{'[0-9a-f]' * KEY}.*/"):
                shutil.rmtree(leftover, ignore_errors=True)
            fault = _fault(directory, inputs)  # again: another process may have written it
            if fault is not None:
                if directory.exists():
                    logger.info("tokenized %s: %s, so it is built again", directory, fault, extra=ANY_RANK)
                return _build(directory, inputs, dialogues, template, config.num_workers)
    logger.info(f"tokenized {directory}: hit, {len(dialogues):,} dialogues")
    return TokenizedDataset(directory, [dialogue.id for dialogue in dialogues])


def find_cached(dialogues: Sequence[Dialogue], template: DialogueTemplate, config: TokenizationConfig) -> Path | None:
    """The cache entry of these dialogues; None if `tokenize` would have to encode them."""
    directory, inputs = _entry(dialogues, template, config)
    return directory if _fault(directory, inputs) is None else None


def cache_entries(cache: Path) -> list[Path]:
    """The entries of a cache that hold nothing but what `tokenize` writes."""
    known = {MANIFEST, *(_file("", name).name for name in ARRAYS)}
    found = []
    for path in sorted(cache.glob("[0-9a-f]" * KEY)):
        _, folders, files = next(os.walk(path), ("", [], []))  # nothing of a file, or of what may not be read
        found += [path] * (not path.is_symlink() and MANIFEST in files and {*folders, *files} <= known)
    return found


def remove_entry(entry: Path, unused_days: float) -> None:
    """Remove a cache entry; a kill leaves it whole or not there.

    Args:
        unused_days: since its last use, when that was last looked at.

    Raises:
        InputError: it was used meanwhile, or the cache cannot be written.
    """
    with _lock(entry.parent), os_errors(entry, "cannot remove"):
        if time.time() - (entry / MANIFEST).stat().st_mtime < unused_days * 86_400:
            raise InputError(f"{entry}: used meanwhile")
        remove_directory(entry)


def _entry(
    dialogues: Sequence[Dialogue], template: DialogueTemplate, config: TokenizationConfig
) -> tuple[Path, dict[str, str]]:
    """The cache entry for these dialogues, and the parts of its key."""
    from csc_train.models.tokenizer import tokenizer_hash  # recipes/clean.py needs no transformers

    inputs = {
        "data": data_digest(dialogues),
        "tokenizer": tokenizer_hash(template.tokenizer),
        "template": template.fingerprint,
        "encoding": f"version {ENCODING_VERSION}, tokenizers {tokenizers.__version__}",
    }
    return Path(config.cache_dir) / digest(inputs)[:KEY], inputs


def _build(
    directory: Path,
    inputs: dict[str, str],
    dialogues: Sequence[Dialogue],
    template: DialogueTemplate,
    num_workers: int | None,
) -> TokenizedDataset:
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)
    prefix = [] if any(dialogue.kind == "chat" for dialogue in dialogues) else template.prefix_ids
    start = time.perf_counter()
    with (
        atomic_path(directory) as temporary,
        contextlib.closing(_encode(dialogues, template, num_workers, len(prefix))) as chunks,
        ProgressBar(desc="tokenizing", total=len(dialogues), unit="dialogue") as bar,
    ):
        temporary.mkdir()
        _write(temporary, prefix, chunks, bar.update)
        write_json(temporary / MANIFEST, _manifest(temporary, inputs))
    seconds = time.perf_counter() - start
    logger.info(
        f"tokenized {directory}: {len(dialogues):,} dialogues encoded in {seconds:.1f} s "
        f"({len(dialogues) / seconds:,.0f} a second, workers: {num_workers})",
        extra=ANY_RANK,
    )
    return TokenizedDataset(directory, [dialogue.id for dialogue in dialogues])


def _write(
    directory: Path, prefix_ids: list[int], chunks: Iterable[list[numpy.ndarray]], done: Callable[[int], object]
) -> None:
    """Append chunks, as `_flatten` makes them, to the files of a directory, and release them.

    Args:
        done: called after each chunk with its number of dialogues.
    """
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(_file(directory, name), "wb")) for name in ARRAYS}
        end = numpy.zeros((1, 2), ARRAYS["offsets"])
        files["prefix"].write(numpy.array(prefix_ids, ARRAYS["prefix"]))
        files["offsets"].write(end)
        for *arrays, sizes in chunks:
            offsets = end + sizes.cumsum(axis=0, dtype=end.dtype)
            for name, array in zip(list(ARRAYS)[1:], [*arrays, offsets], strict=True):
                files[name].write(array)
            end = offsets[-1:]
            done(len(sizes))


def _encode(
    dialogues: Sequence[Dialogue], template: DialogueTemplate, num_workers: int, prefix: int
) -> Iterator[list[numpy.ndarray]]:
    """Encode and flatten the dialogues chunk by chunk, in order. The tokenizer lets other threads run meanwhile."""

    def encode(start: int) -> list[numpy.ndarray]:
        return _flatten(template.encode_all(dialogues[start : start + CHUNK]), prefix)

    with _one_thread():
        pool = ThreadPoolExecutor(num_workers)
        pending: collections.deque[Future] = collections.deque()
        try:
            for start in range(0, len(dialogues), CHUNK):
                if len(pending) == 2 * num_workers:  # enough to keep all busy while one chunk is written
                    yield pending.popleft().result()
                pending.append(pool.submit(encode, start))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _flatten(examples: Iterable[TokenizedDialogue], prefix: int) -> list[numpy.ndarray]:
    """Join dialogues into `input_ids`, `token_types`, `turn_offsets` and `strategies`, without the prefix of all.

    The fifth array is int64 [dialogues, 2]: the number of ids and of turns of each.
    """
    parts = [(e.input_ids[prefix:], e.token_types[prefix:], e.turn_offsets, e.strategies) for e in examples]
    sizes = numpy.array([(len(ids), len(strategies)) for ids, _, _, strategies in parts])
    return [*map(numpy.concatenate, zip(*parts, strict=True)), sizes]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizer from starting threads of its own: the workers share the cores out already."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _file(directory: str | os.PathLike, name: str) -> Path:
    return Path(directory) / f"{name}.bin"


def _manifest(directory: Path, inputs: dict[str, str]) -> dict[str, dict[str, str]]:
    """The manifest of an entry: the parts of its key, and the hash of each of its files."""
    return {"inputs": inputs, "files": {name: file_digest(_file(directory, name)) for name in ARRAYS}}


def _fault(directory: Path, inputs: dict[str, str]) -> str | None:
    """Why a directory is not a complete entry of these `inputs`; None if it is one."""
    try:
        # The manifest first: mostly there is none, and nothing to hash.
        same = read_json(directory / MANIFEST) == _manifest(directory, inputs)
    except InputError as error:
        return str(error)
    return None if same else "its files do not match its manifest"


def _faults(directory: Path, inputs: dict[str, str]) -> list[str]:
    """The `_fault` that the first process of each node finds, on all processes: the others hash nothing."""
    if world_size() == 1:
        found = [_fault(directory, inputs)]
    else:
        from accelerate.utils import gather_object

        found = gather_object([_fault(directory, inputs) if distributed_state().is_local_main_process else None])
    return [fault for fault in found if fault is not None]


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Hold the cache's lock. The operating system releases it when its holder ends, even if killed."""
    lock = filelock.FileLock(cache / ".lock")
    with os_errors(cache, "cannot write"):
        cache.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that tokenizes dialogues in %s", cache)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
