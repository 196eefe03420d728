"""`transformers serve` on loopback, as a context that gives its address."""

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from processes import TIMEOUT_S, Script, free_port


@contextlib.contextmanager
def transformers_serve(*options: str) -> Iterator[str]:
    """Serve on this machine's CPU.

    Args:
        options: further ones of its command line.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = Script(
        "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--host", "127.0.0.1", "--port", port,
        *options, env=os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"},
    )  # fmt: skip
    try:
        for _ in range(10 * TIMEOUT_S):
            if process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{address}/health") as answer:
                    assert json.load(answer) == {"status": "ok"}
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        else:
            pytest.fail(f"the server does not start:\n{process.stderr}")
        assert process.poll() is None, process.stderr
        yield address
    finally:
        process.kill()
        process.wait()


def ask(address: str, model: str | os.PathLike, chat: list[dict[str, str]], **options) -> tuple[str, str, int]:
    """The answer of a server to a chat: text, why it ended, tokens of the prompt."""
    body = {"model": str(model), "messages": chat} | options
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        completion = json.load(answer)
    (choice,) = completion["choices"]
    return choice["message"]["content"], choice["finish_reason"], completion["usage"]["prompt_tokens"]
