"""Chat on a web page; each open page has its own conversation with the one model."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import ChatReply, Conversation
from csc_train.data.dialogue import Speaker
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.inference.hf import HFGenerator
from csc_train.templates import read_text, render

# Gradio reads this on import; by default it reports each start of a page to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio
    import uvicorn
    from fastapi import FastAPI
except ImportError as missing:
    raise InputError("ui=web needs gradio: pip install 'csc-train[web]'") from missing

MAX_PORTS = 100
"""Number of ports to try."""
REFRESH_SECONDS = 0.05
"""Minimum time between two updates of a growing reply, which would pile up in front of a slow browser."""


def serve_page(generator: HFGenerator, config: ChatConfig) -> None:
    """Print the page's address and serve it until the process is interrupted.

    Raises:
        InputError: the host is not an address of this machine, or no port is free.
    """
    listener = listen(config.host, config.port)
    app = gradio.mount_gradio_app(
        FastAPI(),
        build_page(generator, config),
        path="/",
        css=read_text(__package__, "page.css"),
        theme=gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    port = listener.getsockname()[1]
    if port != config.port:
        print(f"port {config.port} is in use")
    print(f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    # On shutdown uvicorn waits for open pages, whose connections never close. A daemon thread ends with this one.
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    thread.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket on the first free port, starting at `port`.

    Raises:
        InputError: as `serve_page`.
    """
    for candidate in range(port, min(port + MAX_PORTS, 65536)):
        try:
            return socket.create_server((host, candidate), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"host={host} port={candidate}: cannot listen: {error.strerror or error}") from error
    raise InputError(f"port={port}: it and the {MAX_PORTS - 1} ports after it are in use: choose another one")


def build_page(generator: HFGenerator, config: ChatConfig) -> gradio.Blocks:
    """The page: transcript, message box, strategy choice, and buttons."""
    template = generator.template.config
    choices = [("the model chooses" if template.mode == "joint" else "none", 0)]
    if template.mode != "reply_only":
        choices += [(each.name(template.language), each.number) for each in STRATEGIES]

    def open_page() -> Iterator[tuple]:
        conversation = Conversation(generator, config)
        yield conversation, gradio.skip(), gradio.skip()
        for update in _open(conversation):
            yield gradio.skip(), *update

    def send(conversation: Conversation, message: str, number: int) -> Iterator[tuple]:
        for update in _reply(conversation, message, number):
            yield *update, ""

    def undo(conversation: Conversation) -> tuple:
        with _page_errors():
            message = conversation.undo()
        return transcript_html(conversation), gradio.skip(), message

    def restart(conversation: Conversation) -> Iterator[tuple]:
        conversation.restart()
        yield from _open(conversation)

    with gradio.Blocks(title="CSC Train: chat", analytics_enabled=False) as blocks:
        gradio.Markdown(f"Chat with `{generator.model.name_or_path}`")
        conversation = gradio.State()
        transcript = gradio.HTML(autoscroll=True, max_height="65vh")
        label = f"Write as the customer ({Speaker.CUSTOMER.title(template.language)})"
        box = gradio.Textbox(label=label, max_lines=6, submit_btn="Send", autofocus=True)
        choice = gradio.Dropdown(choices, value=0, label="Strategy of the next reply")
        with gradio.Row():
            buttons = (gradio.Button(name, size="sm", min_width=80) for name in ("Stop", "Undo", "Restart"))
            stop_button, undo_button, restart_button = buttons
        private: dict[str, Any] = {"api_visibility": "private"}
        # One reply at a time: all pages share the model.
        options: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "hidden",
            **private,
        }
        outputs = [transcript, choice]
        blocks.load(open_page, None, [conversation, *outputs], **options)
        box.submit(send, [conversation, box, choice], [*outputs, box], **options)
        undo_button.click(undo, conversation, [*outputs, box], **options)
        restart_button.click(restart, conversation, outputs, **options)
        stop_button.click(Conversation.interrupt_reply, conversation, queue=False, **private)
    return blocks


def transcript_html(conversation: Conversation, growing: ChatReply | None = None) -> str:
    """The HTML of a conversation with a growing reply, or else with a link to save it."""
    file = ""
    if growing is None and conversation.turns:
        file = json.dumps(conversation.dialogue().row(), ensure_ascii=False) + "\n"
    language = conversation.template.config.language
    values = {"turns": conversation.turns, "growing": growing, "file": file, "language": language}
    return render(__package__, "transcript.html.jinja", **values, speakers=[each.title(language) for each in Speaker])


def _open(conversation: Conversation) -> Iterator[tuple[str, Any]]:
    """Let the supporter open a conversation, unless the customer does; yields as `_reply`."""
    return _reply(conversation, None, 0) if conversation.supporter_opens else iter([(transcript_html(conversation), 0)])


def _reply(conversation: Conversation, message: str | None, number: int) -> Iterator[tuple[str, Any]]:
    """Let the supporter reply. Yields the growing transcript and the strategy choice, which the end resets to 0."""
    strategy = STRATEGIES[number - 1] if number else None
    with _page_errors():
        next_update = 0.0
        for reply in conversation.reply(message, strategy):
            if time.monotonic() >= next_update:
                yield transcript_html(conversation, reply), gradio.skip()
                next_update = time.monotonic() + REFRESH_SECONDS
    yield transcript_html(conversation), 0


@contextlib.contextmanager
def _page_errors() -> Iterator[None]:
    """Show errors of the user's input on the page."""
    try:
        yield
    except InputError as error:
        raise gradio.Error(str(error), print_exception=False) from error
