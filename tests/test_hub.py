"""Reading from the hub: what a user is told when it refuses, and how soon."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, SMALL_TOKENIZERS

from csc_train.errors import InputError
from csc_train.hub import looks_local, readable
from csc_train.training.tokenizer import load_tokenizer

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
REFUSALS = {
    MODEL: (401, "GatedRepo"),
    "owner/not-granted": (403, "GatedRepo"),
    "owner/absent": (401, "RepoNotFound"),
    "owner/revised": (404, "RevisionNotFound"),
}
PROGRAM = """
import sys, time
from csc_train.errors import InputError
from csc_train.training.tokenizer import load_tokenizer
for model in sys.argv[1:]:
    start = time.monotonic()
    try:
        load_tokenizer(model)
    except InputError as error:
        print(f"{time.monotonic() - start:.2f}|{error}")
"""
"""Loads tokenizers in a process of its own: the hub's address and the offline switch are read on import."""


class RefusingHub(http.server.ThreadingHTTPServer):
    """Answers as `REFUSALS` says, without ever asking for patience, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        self.asked = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def refuse(self):
                hub.asked.append((self.command, self.path))
                status, code = next((REFUSALS[model] for model in REFUSALS if model in self.path), (404, ""))
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD = refuse

            def log_message(self, *arguments):
                """Silent."""

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


def load_elsewhere(models, hub, home, offline):
    """Load each tokenizer without a token: ({model: (seconds, message)}, stderr)."""
    foreign = ("hf_", "hugging", "transformers_", "http_proxy", "https_proxy", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if not name.lower().startswith(foreign)}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *models],
        cwd=home,
        env=environment | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(models), done.stdout
    return {model: (float(time), text) for model, (time, text) in zip(models, lines, strict=True)}, done.stderr


def test_a_refusal_of_the_hub_comes_at_once_with_what_to_do(tmp_path):
    with RefusingHub() as hub:
        answers, stderr = load_elsewhere(REFUSALS, hub, tmp_path, offline="0")
    assert "Retrying" not in stderr
    gated = "accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`, or give a local directory"
    messages = {
        MODEL: f" is gated: {gated}",
        "owner/not-granted": f" is gated: {gated}",
        "owner/absent": ": no such model on the hub, or a private one without HF_TOKEN",
        "owner/revised": ": its hub page has no such branch, tag or commit; check the revision",
    }
    for model, (seconds, message) in answers.items():
        assert ("HEAD", f"/{model}/resolve/main/config.json") in hub.asked
        assert message == model + messages[model]
        assert seconds < 5


def test_offline_with_an_empty_cache_asks_nobody(tmp_path):
    with RefusingHub() as hub:
        answers, _ = load_elsewhere([MODEL], hub, tmp_path, offline="1")
    seconds, message = answers[MODEL]
    assert hub.asked == []
    assert message == (
        f"{MODEL}: cannot load the tokenizer: HF_HUB_OFFLINE is set and the cache has no copy; "
        "give a local directory, or download it"
    )
    assert seconds < 5


def test_a_directory_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere", "a/b/c", "nowhere"):
        started = time.monotonic()
        with pytest.raises(InputError) as caught:
            load_tokenizer(path)
        assert str(caught.value) == f"{path}: no such model directory"
        assert time.monotonic() - started < 1


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


def test_a_directory_is_known_from_a_hub_id(tmp_path, monkeypatch):
    assert not looks_local(MODEL)
    assert all(looks_local(path) for path in ("./a", "/a/b", "~/a", "../a", "a", "a/b/c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert looks_local("owner/model")
    assert load_tokenizer(str(SMALL_TOKENIZERS / "qwen2")).is_fast


def test_only_failures_to_read_are_explained():
    """A bug in what runs inside must not be reported as a missing model."""
    with pytest.raises(ZeroDivisionError), readable(str(SMALL_TOKENIZERS), "model"):
        raise ZeroDivisionError
    reason = r"holds no model that can be read \(OSError\)"
    with pytest.raises(InputError, match=reason), readable(str(SMALL_TOKENIZERS), "model"):
        raise OSError
