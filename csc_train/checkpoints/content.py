"""Identity of model files by content: SHA-256, remembered so that an unchanged file is read once, and what differs."""

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from csc_train.errors import InputError
from csc_train.files import digest, file_digest, os_errors, read_json
from csc_train.models.hub import find_file

REMEMBERED_BYTES = 2**24
"""Size from which the hash of a file is remembered: reading a smaller one takes no time."""
WEIGHTS = ("*.safetensors", "*.bin")


class FileHash(TypedDict):
    """A file's size in bytes and its SHA-256 (hex)."""

    size: int
    sha256: str


FileHashes = dict[str, FileHash]
"""By path in the directory."""


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. A hub cache names a large file by its hash; of others, that of large ones is remembered.

    Raises:
        InputError: the file cannot be read.
    """
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    memory = _memory(path)
    if memory is not None:
        with contextlib.suppress(OSError):
            if len(known := memory.read_text()) == 64:
                return known
    found = file_digest(path)
    remember(path, found)
    return found


def remember(path: Path, found: str) -> None:
    """Remember the hash of a large file until it changes; does nothing if the cache cannot be written."""
    if (memory := _memory(path)) is not None:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(found)


def _memory(path: Path) -> Path | None:
    """The file that remembers the hash of another; None for a small one. The time of the last change of an inode
    (ctime) also moves where a copy keeps the modification time."""
    with os_errors(path, "cannot read"):
        status = path.stat()
    if status.st_size < REMEMBERED_BYTES:
        return None
    key = [os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return user_cache_path("csc_train") / "sha256" / digest(key)


def hash_files(directory: Path, patterns: Iterable[str] = ("**/*",)) -> FileHashes:
    """Hashes of the files in a directory, several read at a time.

    Raises:
        InputError: a file cannot be read.
    """
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256, paths))
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, hashes, strict=True)
    }


def first_difference(directory: Path, recorded: FileHashes) -> str | None:
    """What differs first from the recorded files, in words that name the file; None if they are all the same.

    Files of another size are found before any is read.
    """
    for name, known in recorded.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (size := (directory / name).stat().st_size) != known["size"]:
            return f"{name} has {size} bytes, not {known['size']}"
    now = hash_files(directory, recorded)
    for name, known in recorded.items():
        if now[name]["sha256"] != known["sha256"]:
            return f"{name} has the SHA-256 {now[name]['sha256'][:12]}, not {known['sha256'][:12]}"
    return None


def check_recorded_files(directory: Path, recorded: FileHashes) -> None:
    """Check that a directory of a model is no half copy: all recorded files are there, and none is cut.

    Raises:
        InputError: names the file.
    """
    advice = "the copy of the model is incomplete: copy it again"
    adapter = (directory / "adapter_config.json").is_file()
    for name in {**recorded, "adapter_config.json" if adapter else "config.json": None}:
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: no such file: {advice}")
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole weights file ({error}): {advice}") from error
    for path in sorted(directory.glob("*.json")):
        try:
            read_json(path)
        except InputError as error:
            raise InputError(f"{error}: {advice}") from error
    for index in directory.glob("*.safetensors.index.json"):
        for name in sorted(set(read_json(index)["weight_map"].values())):
            if not (directory / name).is_file():
                raise InputError(f"{directory / name}: no such file: {advice}")


def base_files(path: str, revision: str | None) -> FileHashes:
    """Hashes of the weights and the configuration of a base model, which must be on disk.

    Args:
        path: a directory, or a hub id whose files are in the hub's cache; else the result is empty.
    """
    directory = Path(path)
    if not directory.is_dir():
        if (cached := find_file(path, "config.json", revision)) is None:
            return {}
        directory = cached.parent
    weights = WEIGHTS[:1] if any(directory.glob(WEIGHTS[0])) else WEIGHTS[1:]
    return hash_files(directory, [*weights, "config.json"])
