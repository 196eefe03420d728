"""What may happen to a file on a disk."""

from collections.abc import Callable
from pathlib import Path


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file; its size and the rest stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut a file off in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "flipped byte": flip_byte,
}
