"""The origin of a result: commit, uncommitted changes, package versions and a digest of the code."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

from csc_train.files import digest, file_digest

PACKAGE = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "hydra-core")


def provenance() -> dict[str, Any]:
    """Commit, whether the tree has uncommitted changes, and package versions; None if unknown."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "commit": commit and commit.strip(),
        "dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def code_digest() -> str:
    """SHA-256 (hex) of the package's source, templates included."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja", ".yaml"))
    return digest([[str(path.relative_to(PACKAGE)), file_digest(path)] for path in files])


def uncommitted_diff() -> str:
    """The tracked files' difference from the commit, as `git diff` writes it; empty if unknown."""
    return _git("diff", "--binary", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    if not (PACKAGE.parent / ".git").exists():  # installed: a repository around it is not ours
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
