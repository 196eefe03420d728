"""A real OpenAI-compatible server on loopback whose answers and faults are told in advance.

with FaultServer() as server:
    server.script += [Fault(429, retry_after=0.01), "您好"]
    ... ask server.base_url ...
    assert server.bodies[0]["messages"] == ...
"""

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from csc_train.llm.client import CHECK_MESSAGES


@dataclass(frozen=True)
class Say:
    """An answer: its text, why it ended, the tokens it is said to have taken (prompt, answer), which they are, and how
    likely those of the prompt are."""

    text: str
    finish_reason: str = "stop"
    usage: tuple[int, int] = (10, 5)
    refusal: str | None = None
    token_ids: tuple[int, ...] | None = None
    log_likelihoods: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Fault:
    """An HTTP error."""

    status: int
    retry_after: float | str | None = None
    message: str = "planned"
    code: str | None = None


HANG, DRIP, DROP, TORN, HTML = "<hang>", "<drip>", "<drop>", "<torn>", "<html>"
"""No answer until the server closes; one that sends single bytes until then; a connection that is closed instead; an
answer whose JSON ends in the middle; a page instead of JSON."""


NO_REPLIES = {
    "cut_off": [Say("", "length"), Say(None, "length"), Say("<think>\n先想想", "length"), Say(" \n", "max_tokens")],
    "empty": [Say(""), Say(None), Say("\u200b\n"), Say("\ufeff<think>想"), Say("<think>想</think>\n")],
    "interrupted": [Say("[情", "insufficient_system_resource"), Say("", "tool_calls"), Say("抱", "abort")],
    "refused": [Say("", refusal="I cannot help."), Say("抱", "content_filter")],
}
"""Answers that hold no reply, by kind."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5, connections that come together would be dropped unplanned

    def handle_error(self, *_) -> None:
        """Say nothing: clients that give up are part of the plan."""


class FaultServer:
    """The server, as a context. Each request takes the first of `script`; where that is empty, `answer` is asked.

    Attributes:
        script: what the next requests get: a `Say`, a text, a `Fault`, or one of HANG, DRIP, DROP, TORN and HTML.
        checks: the same for the question by which a client begins; then it is answered.
        answer: request body -> the same, for requests beyond the script.
        requests: (path, headers by lower-case name, body) of every request, in the order of arrival.
        completions: what /v1/completions accepts: `ids` and text, only `text`, or None for no such path.
        echoes: whether it repeats a prompt, with the likelihood of its tokens, instead of refusing to.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = lambda body: "您好", completions: str | None = "ids"):
        self.script = deque()
        self.checks = deque()
        self.answer = answer
        self.completions = completions
        self.echoes = False
        self.requests = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())

    @property
    def base_url(self) -> str:
        """What a client calls its base URL."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the requests."""
        return [body for _, _, body in self.requests]

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Any:
        """What the request gets, scripted or answered."""
        if body.get("messages") == CHECK_MESSAGES:
            return self.checks.popleft() if self.checks else "OK"
        with self._lock:
            self.requests.append((path, headers, body))
            if path == "/v1/completions":
                if self.completions is None:
                    return Fault(404, message="no such path")
                if self.completions == "text" and not isinstance(body["prompt"], str):
                    return Fault(400, message="prompt must be a string.")
                if body.get("echo") and not self.echoes:
                    return Fault(400, message="no prompt is repeated")
            if self.script:
                return self.script.popleft()
        return self.answer(body)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body go out as two writes: each answer would take 40 ms

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = server._reply(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                if isinstance(reply, str) and reply not in (HANG, DRIP, DROP, TORN, HTML):
                    reply = Say(reply)
                if reply == HANG:
                    server._closing.wait()
                    self.close_connection = True
                elif reply == DRIP:
                    self.send(200, b"", length=10**6)
                    while not server._closing.wait(0.05):
                        self.wfile.write(b" ")
                elif reply == DROP:
                    self.close_connection = True
                elif reply == HTML:
                    self.send(200, b"<html>busy</html>", {"Content-Type": "text/html"})
                elif isinstance(reply, Fault):
                    error = {"error": {"message": reply.message, "code": reply.code}}
                    wait = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
                    self.send(reply.status, json.dumps(error).encode(), wait)
                else:
                    whole = json.dumps(self.completion(reply if reply != TORN else Say("..."), body)).encode()
                    self.send(200, whole[: len(whole) // 2] if reply == TORN else whole)

            def completion(self, say: Say, body: dict[str, Any]) -> dict[str, Any]:
                chat = self.path == "/v1/chat/completions"
                message = {"role": "assistant", "content": say.text, "refusal": say.refusal}
                choice = {"index": 0, "finish_reason": say.finish_reason}
                choice |= {"message": message} if chat else {"text": say.text, "token_ids": say.token_ids}
                if say.log_likelihoods is not None:
                    choice["logprobs"] = {"token_logprobs": say.log_likelihoods}
                usage = {"prompt_tokens": say.usage[0], "completion_tokens": say.usage[1]}
                return {"id": "1", "model": body["model"], "choices": [choice], "usage": usage}

            def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int = 0) -> None:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_) -> None:
                pass

        return Handler
