"""The scripts of examples/ run as their docstrings say."""

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import ROOT
from processes import run_script

from csc_train.evaluation.metrics import registry
from csc_train.plugins import load_plugins

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Their folder on the path; metrics that they add are forgotten."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(registry, "METRICS", list(registry.METRICS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if re.match(r"add_a_metric", name):
            del sys.modules[name]


def test_the_page_lists_every_example_in_at_most_100_lines():
    listed = re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert sorted(listed) == [path.name for path in scripts]
    assert {path.name for path in scripts if len(path.read_text(encoding="utf-8").splitlines()) > 100} == set()


@pytest.mark.slow
def test_the_metric_is_in_the_table_and_is_a_plugin():
    result = run_script(EXAMPLES / "add_a_metric.py")
    assert result.returncode == 0, result.stderr
    assert "polite" in result.stdout and "strategy bigram" in result.stdout
    load_plugins([str(EXAMPLES / "add_a_metric.py")])
    assert [spec.name for spec in registry.METRICS[-1:]] == ["polite"]


@pytest.mark.slow
def test_a_model_is_trained_without_recipes_then_chats(tmp_path):
    import serve_and_chat
    import train_without_recipes

    first = train_without_recipes.train(tmp_path, steps=20, dialogues=60)
    assert 0 < first < 7
    model = str(tmp_path / "model")
    messages = ["我的订单还没到！", "好的"]
    replies = serve_and_chat.chat(model, messages, max_new_tokens=8)
    assert len(replies) == 3
    body = serve_and_chat.request_body(model, replies, messages)
    roles = [each["role"] for each in body["messages"]]
    assert roles == ["system", "assistant", "user", "assistant", "user"]
    assert [each["content"] for each in body["messages"][1:]] == [replies[0], messages[0], replies[1], messages[1]]
    assert serve_and_chat.ask_server(answering_server(), body) == "[礼貌问候]您好"


def answering_server() -> str:
    """The address of an OpenAI-compatible server that answers one request, always the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write('{"choices": [{"message": {"content": "[礼貌问候]您好"}}]}'.encode())

        def log_message(self, *_): ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
