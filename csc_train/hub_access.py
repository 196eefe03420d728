"""Whether the Hugging Face hub can be reached: without it, its libraries read their caches at once."""

import contextlib
import functools
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from huggingface_hub import constants

COMMIT = r"[0-9a-f]{40}"
"""A commit of a hub repository."""


@contextlib.contextmanager
def offline_without_hub() -> Iterator[str]:
    """Let the hub's libraries read the cache if the hub does not answer; else they would ask it for 45 s.

    Yields:
        Why they only read the cache; empty if they ask the hub.
    """
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_answers()
    try:
        unreachable = f"{constants.ENDPOINT} cannot be reached" if constants.HF_HUB_OFFLINE else ""
        yield "HF_HUB_OFFLINE is set" if offline else unreachable
    finally:
        constants.HF_HUB_OFFLINE = offline


def is_pinned(value: str, asked: str) -> bool:
    """Whether a value is the commit of what was asked for, by OWNER/NAME or OWNER/NAME@BRANCH."""
    (place, commit), (asked_place, revision) = split_revision(value), split_revision(asked)
    if place != asked_place or re.fullmatch(COMMIT, revision or ""):
        return False
    return re.fullmatch(COMMIT, commit or "") is not None


def split_revision(path: str) -> tuple[str, str | None]:
    """OWNER/NAME and REVISION of OWNER/NAME@REVISION; a path that exists, or that names no revision, and None."""
    name, _, revision = path.partition("@")
    return (path, None) if os.path.exists(path) else (name, revision or None)


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub, or a proxy on the way to it, can be connected to."""
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        if not urllib.request.getproxies():
            socket.create_connection((hub.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True
