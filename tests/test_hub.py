"""Reading from the hub: what a user is told when it refuses, and how soon."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_TOKENIZERS, small_tokenizer, tiny_config
from processes import TIMEOUT_S, free_port
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from csc_train.errors import InputError
from csc_train.models.hub import hub_errors, is_local_path, load_causal_lm
from csc_train.models.tokenizer import load_tokenizer

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
REFUSALS = {
    MODEL: (401, "GatedRepo"),
    "owner/not-granted": (403, "GatedRepo"),
    "owner/absent": (401, "RepoNotFound"),
    "owner/revised": (404, "RevisionNotFound"),
}
COMMIT = "1" * 40
PROGRAM = """
import sys, time
waits = []
time.sleep = waits.append
from csc_train.errors import InputError
from csc_train.models.tokenizer import load_tokenizer
for model in sys.argv[1:]:
    waits.clear()
    try:
        load_tokenizer(model)
    except InputError as error:
        print(f"{sum(waits)}|{error}")
"""
"""Loads tokenizers in a separate process: the hub's address and the offline switch are read on import."""


PUSH = """
import sys
from csc_train.errors import InputError
from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import push
try:
    push(ExportConfig(source="unused", output=sys.argv[1], push_to_hub=sys.argv[2]))
except InputError as error:
    print(error)
"""


FETCH = """
import sys
from csc_train.errors import InputError
from csc_train.models.hub import snapshot
for model in sys.argv[1:]:
    try:
        print(snapshot(model, "metric model"))
    except InputError as error:
        print(error)
"""


class Hub(http.server.ThreadingHTTPServer):
    """Refuses to be read as `REFUSALS` says, without ever asking for patience, and keeps what it was asked. Takes the
    files that are uploaded with the token `accepted`, and gives those of `served`, by model and name."""

    daemon_threads = True

    def __init__(self):
        self.asked = []
        self.created = []
        self.files = {}
        self.served = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def refuse(self):
                hub.asked.append((self.command, self.path))
                status, code = next((REFUSALS[model] for model in REFUSALS if model in self.path), (404, ""))
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):
                for model, files in hub.served.items():
                    if self.path.startswith(f"/api/models/{model}/revision/"):
                        siblings = [{"rfilename": name} for name in files]
                        return self.give(json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode())
                    if self.path.startswith(f"/api/models/{model}/tree/"):
                        rows = [
                            {"type": "file", "path": name, "size": len(content), "oid": name}
                            for name, content in files.items()
                        ]
                        return self.give(json.dumps(rows).encode())
                    for name, content in files.items():
                        if self.path.startswith(f"/{model}/resolve/") and self.path.endswith(f"/{name}"):
                            hub.asked.append((self.command, self.path))
                            return self.give(content)
                return self.refuse()

            do_HEAD = do_GET

            def give(self, content):
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b"".join(self.chunks())
                if self.headers.get("Authorization") != "Bearer accepted":
                    return self.refuse()
                answer = json.dumps(self.take(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                return None

            def chunks(self):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()

            def take(self, body):
                page = f"http://127.0.0.1:{hub.server_port}/owner/trained"
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    return {"url": page, "name": "owner/trained"}
                if "/preupload/" in self.path:
                    files = [each["path"] for each in json.loads(body)["files"]]
                    return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
                if "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    return {"commitUrl": f"{page}/commit/0", "commitOid": "0" * 40, "success": True}
                return {"errors": [], "warnings": []}

            def log_message(self, *arguments):
                """Silent."""

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


def run_elsewhere(program, arguments, hub, home, **environment):
    """Run a program that knows no hub but `hub`, without a token."""
    foreign = ("hf_", "hugging", "transformers_", "http_proxy", "https_proxy", "all_proxy")
    own = {name: value for name, value in os.environ.items() if not name.lower().startswith(foreign)}
    own |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=home,
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done


def load_elsewhere(models, hub, home, offline):
    """Load each tokenizer: ({model: (seconds waited between attempts, message)}, stderr)."""
    done = run_elsewhere(PROGRAM, models, hub, home, HF_HUB_OFFLINE=offline)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(models), done.stdout
    return {model: (float(time), text) for model, (time, text) in zip(models, lines, strict=True)}, done.stderr


@pytest.mark.slow
def test_a_refusal_of_the_hub_comes_at_once_with_what_to_do(tmp_path):
    with Hub() as hub:
        answers, stderr = load_elsewhere(REFUSALS, hub, tmp_path, offline="0")
    assert "Retrying" not in stderr
    gated = "accept its licence on its hub page, and set HF_TOKEN or run `hf auth login`, or give a local directory"
    messages = {
        MODEL: f": the model is gated: {gated}",
        "owner/not-granted": f": the model is gated: {gated}",
        "owner/absent": ": no such model on the hub: check the name; a private model needs HF_TOKEN",
        "owner/revised": ": the hub repository has no such branch, tag or commit: check the revision",
    }
    for model, (seconds, message) in answers.items():
        assert ("HEAD", f"/{model}/resolve/main/config.json") in hub.asked
        assert message == model + messages[model]
        assert seconds == 0


@pytest.mark.slow
def test_an_exported_directory_is_uploaded_whole_into_a_private_repository(tmp_path):
    (tmp_path / "exported").mkdir()
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "csc_manifest.json": b'{"a": 1}'}
    for name, content in files.items():
        (tmp_path / "exported" / name).write_bytes(content)
    with Hub() as hub:
        done = run_elsewhere(PUSH, ["exported", "owner/trained"], hub, tmp_path, HF_TOKEN="accepted")
        assert done.stdout == ""
        assert hub.files == files
        ((created, private),) = [(each["name"], each["visibility"]) for each in hub.created]
        assert (created, private) == ("trained", "private")
        hub.files.clear()
        done = run_elsewhere(PUSH, ["exported", "owner/trained"], hub, tmp_path, HF_TOKEN="refused")
        assert done.stdout.startswith("owner/trained: cannot upload exported (")
        assert "Traceback" not in done.stderr and hub.files == {}


@pytest.mark.slow
def test_a_model_of_the_hub_is_downloaded_once_in_one_form_of_its_weights(tmp_path):
    weights = {"model.safetensors": b"s" * 9, "pytorch_model.bin": b"b" * 9, "tf_model.h5": b"h" * 9}
    facts = {"config.json": b"{}", "vocab.txt": b"v", "README.md": b"---\nlicense: mit\n---\n"}
    with Hub() as hub:
        hub.served = {"owner/both": facts | weights, "owner/old": facts | {"pytorch_model.bin": b"b" * 9}}
        models = {"owner/both": "model.safetensors", "owner/old": "pytorch_model.bin"}
        printed = run_elsewhere(FETCH, [*models], hub, tmp_path).stdout.splitlines()
        for found, expected in zip(printed, models.values(), strict=True):
            files = {file.name: file.read_bytes() for file in Path(found).iterdir()}
            assert files == facts | {expected: weights[expected]}
        hub.asked.clear()
        *again, refused = run_elsewhere(FETCH, [*models, "owner/absent"], hub, tmp_path).stdout.splitlines(True)
        offline = run_elsewhere(FETCH, [*models], hub, tmp_path, HF_HUB_OFFLINE="1").stdout.splitlines()
        assert [path.strip() for path in again] == offline == printed
        assert not [path for command, path in hub.asked if command == "GET" and "resolve" in path]
    assert refused == "owner/absent: no such model on the hub: check the name; a private model needs HF_TOKEN\n"


@pytest.mark.slow
def test_offline_with_an_empty_cache_sends_no_request(tmp_path):
    with Hub() as hub:
        answers, _ = load_elsewhere([MODEL], hub, tmp_path, offline="1")
    seconds, message = answers[MODEL]
    assert hub.asked == []
    assert message == (
        f"{MODEL}: cannot load the tokenizer: HF_HUB_OFFLINE is set and the cache has no copy: "
        "check the name, give a local directory, or download it"
    )
    assert seconds == 0


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://no-such-name.invalid"])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(address, tmp_path):
    endpoint = address.format(free_port())
    with Hub() as hub:
        hub.served = {"owner/cached": {"config.json": b"{}", "model.safetensors": b"s"}}
        (cached,) = run_elsewhere(FETCH, ["owner/cached"], hub, tmp_path).stdout.splitlines()
    done = run_elsewhere(PROGRAM, ["owner/mistyped"], hub, tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout == (
        f"0|owner/mistyped: cannot load the tokenizer: {endpoint} cannot be reached and the cache has no copy: "
        "check the name, give a local directory, or download it\n"
    )
    done = run_elsewhere(FETCH, ["owner/cached"], hub, tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout.splitlines() == [cached] and "Retrying" not in done.stderr


def test_a_directory_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", None)  # no attempt is repeated
    for path in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere", "a/b/c", "nowhere"):
        with pytest.raises(InputError) as caught:
            load_tokenizer(path)
        assert str(caught.value) == f"{path}: no such model directory"


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
    assert not is_local_path(MODEL)
    assert all(is_local_path(path) for path in ("./a", "/a/b", "~/a", "../a", "a", "a/b/c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert is_local_path("owner/model")
    assert load_tokenizer(str(SMALL_TOKENIZERS / "qwen2")).is_fast


def test_a_model_that_lacks_weights_is_refused_not_made_up(tmp_path):
    model = Qwen2ForCausalLM(tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.5))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    whole = load_causal_lm(str(tmp_path)).state_dict()
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], value) for name, value in model.state_dict().items())
    lost = [name for name in weights if "layers.1.mlp" in name]
    save_file({name: value for name, value in weights.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{len(lost)} tensors of the model are missing, the first .*layers\.1\.mlp"):
        load_causal_lm(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="has no readable model"):
        load_causal_lm(str(tmp_path))


def test_only_failures_to_read_are_explained():
    """A bug in what runs inside must not be reported as a missing model."""
    with pytest.raises(ZeroDivisionError), hub_errors(str(SMALL_TOKENIZERS), "model"):
        raise ZeroDivisionError
    reason = r"has no readable model \(OSError\)"
    with pytest.raises(InputError, match=reason), hub_errors(str(SMALL_TOKENIZERS), "model"):
        raise OSError
