"""A conversation on a web page: each page that is opened is a conversation of its own with the one model."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import ChatReply, Conversation
from csc_train.chat.terminal import SPEAKERS
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.inference.hf import HFGenerator
from csc_train.templates import read_text, render

# Read when gradio is imported: it would report every start of a page to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio
    import uvicorn
    from fastapi import FastAPI
except ImportError as missing:
    raise InputError("ui=web needs gradio: pip install -r requirements-web.txt") from missing

PORTS = 100
"""How many ports are tried."""
REFRESH = 0.05
"""Seconds between two states of a growing reply, which would pile up in front of a browser that is slower."""


def talk(generator: HFGenerator, config: ChatConfig) -> None:
    """Serve the page until the process is interrupted; prints where it is.

    Raises:
        InputError: the address cannot be listened on, or none of the ports is free.
    """
    listener = listen(config.host, config.port)
    app = gradio.mount_gradio_app(
        FastAPI(),
        page(generator, config),
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
    # Told to end, it would wait for open pages, whose connections never close; a daemon ends with this thread.
    serving = threading.Thread(target=server.run, args=([listener],), daemon=True)
    serving.start()
    serving.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket on the first free port from `port` on.

    Raises:
        InputError: as `talk`.
    """
    for candidate in range(port, min(port + PORTS, 65536)):
        try:
            return socket.create_server((host, candidate), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"host={host} port={candidate}: cannot listen: {error.strerror or error}") from error
    raise InputError(f"port={port}: this and the {PORTS - 1} ports after it are in use; choose another")


def page(generator: HFGenerator, config: ChatConfig) -> gradio.Blocks:
    """The page, not yet served."""
    template = generator.template.config
    choices = [("the model chooses" if template.mode == "joint" else "none", 0)]
    if template.mode != "reply_only":
        choices += [(each.name(template.language), each.number) for each in STRATEGIES]

    def begin() -> Iterator[tuple]:
        conversation = Conversation(generator, config)
        yield conversation, *[gradio.skip()] * 2
        for shown in _speak(conversation, None, 0):
            yield gradio.skip(), *shown

    def send(conversation: Conversation, said: str, number: int) -> Iterator[tuple]:
        for shown in _speak(conversation, said, number):
            yield *shown, ""

    def undo(conversation: Conversation) -> tuple:
        with _shown_errors():
            said = conversation.undo()
        return transcript(conversation), gradio.skip(), said

    def restart(conversation: Conversation) -> Iterator[tuple]:
        conversation.restart()
        yield from _speak(conversation, None, 0)

    with gradio.Blocks(title="CSC Train: chat", analytics_enabled=False) as blocks:
        gradio.Markdown(f"Talking to `{generator.model.name_or_path}`")
        conversation = gradio.State()
        said_so_far = gradio.HTML(autoscroll=True, max_height="65vh")
        label = f"Write as the customer ({SPEAKERS[template.language][1]})"
        box = gradio.Textbox(label=label, max_lines=6, submit_btn="Send", autofocus=True)
        choice = gradio.Dropdown(choices, value=0, label="Strategy of the next reply")
        with gradio.Row():
            stop, back, again = (gradio.Button(name, size="sm", min_width=80) for name in ("Stop", "Undo", "Restart"))
        unlisted = {"api_visibility": "private"}
        # One reply at a time: all pages share the model.
        turn = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden", **unlisted}
        shown = [said_so_far, choice]
        blocks.load(begin, None, [conversation, *shown], **turn)
        box.submit(send, [conversation, box, choice], [*shown, box], **turn)
        back.click(undo, conversation, [*shown, box], **turn)
        again.click(restart, conversation, shown, **turn)
        stop.click(Conversation.stop, conversation, queue=False, **unlisted)
    return blocks


def transcript(conversation: Conversation, heard: ChatReply | None = None) -> str:
    """The HTML of a conversation, and of a reply that is still growing; when it has ended, with a link to save it."""
    file = ""
    if heard is None and conversation.turns:
        file = json.dumps(conversation.dialogue().row(), ensure_ascii=False) + "\n"
    language = conversation.template.config.language
    values = {"turns": conversation.turns, "heard": heard, "file": file}
    return render(__package__, "transcript.html.jinja", **values, speakers=SPEAKERS[language], language=language)


def _speak(conversation: Conversation, said: str | None, number: int) -> Iterator[tuple[str, int]]:
    """Let the supporter reply. Yields the transcript as it grows, and the chosen strategy, which then is none again."""
    strategy = STRATEGIES[number - 1] if number else None
    with _shown_errors():
        due = 0.0
        for heard in conversation.reply(said, strategy):
            if time.monotonic() >= due:
                yield transcript(conversation, heard), gradio.skip()
                due = time.monotonic() + REFRESH
    yield transcript(conversation), 0


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise gradio.Error(str(error), print_exception=False) from error
