"""Chat in a terminal, or line by line through a pipe."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import ChatReply, Conversation
from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import STRATEGIES, Strategy, nearest_label, parse_strategy
from csc_train.errors import InputError, suggestion
from csc_train.inference.hf import HFGenerator

COMMAND_HELP = {
    "/strategy NAME": "set the strategy of the next reply by name, number or code; without NAME, list all",
    "/undo": "remove your last message and its reply",
    "/save FILE": "save the conversation to a new dialogue file (.jsonl or .parquet)",
    "/restart": "start a new conversation",
    "/help": "show this list",
    "/quit": "quit (also Ctrl-D); Ctrl-C stops a reply",
}
# Control characters, which a reply must not send to the terminal.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


def run_terminal(generator: HFGenerator, config: ChatConfig) -> None:
    """Chat until the user quits.

    Raises:
        InputError: as `Terminal`.
    """
    Terminal(Conversation(generator, config), config.save).run()


class Terminal:
    """Reads messages and commands (see `COMMAND_HELP`) from standard input and prints replies as they grow.

    Without a terminal it prints the input too, so the output is the whole conversation.

    Args:
        save: new dialogue file for all conversations of this session, updated after each turn; None saves nothing.

    Raises:
        InputError: the file `save` exists.
    """

    def __init__(self, conversation: Conversation, save: str | None = None):
        if save is not None and Path(save).exists():
            raise InputError(f"save={save}: the file exists: choose another one")
        self._conversation = conversation
        self._save_path = save
        self._earlier: list[Dialogue] = []
        self._strategy: Strategy | None = None
        self._language = conversation.template.config.language
        self._supporter, self._customer = (each.title(self._language) for each in Speaker)
        self._interactive = sys.stdin.isatty()
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/strategy": self._set_strategy,
            "/undo": self._undo,
            "/save": self._save,
            "/restart": self._restart,
            "/help": self._help,
        }

    def run(self) -> None:
        """Chat until the user quits."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (enables line editing and history of `input`)
        if self._interactive:
            self._note("Write as the customer. /help lists the commands, Ctrl-D quits.")
        self._run_command(self._open, None)
        for line in self._lines():
            name, _, argument = line.partition(" ")
            if name == "/quit":
                return
            if not name.startswith("/"):
                self._run_command(self._reply, line)
            elif name in self._commands:
                self._run_command(self._commands[name], argument.strip())
            else:
                self._note(f"{name}: no such command.{suggestion(name, self._commands)} /help lists them", "red")

    def _lines(self) -> Iterator[str]:
        """Input lines, without empty ones."""
        while True:
            self._console.print()
            strategy = f" [{self._strategy.name(self._language)}]" if self._strategy else ""
            prompt = f"{self._customer}{strategy}> "
            try:
                line = input(prompt if self._interactive else "").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                self._note("Ctrl-D or /quit quits")
                continue
            if line:
                if not self._interactive:
                    self._console.print(Text((prompt + line).translate(_CONTROLS)))
                yield line

    def _run_command(self, command: Callable, argument: str | None) -> None:
        try:
            command(argument)
        except InputError as error:
            self._note(str(error), "red")

    def _open(self, _: str | None) -> None:
        if self._conversation.supporter_opens:
            self._reply(None)

    def _reply(self, message: str | None) -> None:
        printed = None
        with _stop_on_interrupt(self._conversation):
            for reply in self._conversation.reply(message, self._strategy):
                if printed is None and (reply.strategy or reply.response):
                    self._console.print(self._header(reply))
                    printed = ""
                if printed is not None:
                    self._console.print(Text(reply.response[len(printed) :].translate(_CONTROLS)), end="")
                    printed = reply.response
        if not printed:
            self._note(f"the reply is empty{'' if message is None else '; your message is removed'}")
            return
        self._console.print()
        self._strategy = None
        self._autosave()

    def _header(self, reply: ChatReply) -> Text:
        """Speaker, strategy, and the model's likeliest strategies."""
        strategy = reply.strategy.name(self._language) if reply.strategy else ""
        shares = "  ".join(f"{each.name(self._language)} {share:.0%}" for each, share in reply.top_strategies)
        return Text.assemble(
            (self._supporter, "bold"),
            (f" [{strategy}]" if strategy else "", "bold green"),
            (" forced" if reply.forced else "", "yellow"),
            (f"   {shares}" if shares else "", "bright_black"),
        )

    def _set_strategy(self, name: str) -> None:
        if not name:
            table = Table("number", "strategy", "name", "code", box=None)
            for strategy in STRATEGIES:
                table.add_row(str(strategy.number), strategy.name(self._language), strategy.en, strategy.code)
            self._console.print(table)
            return
        try:
            self._strategy = parse_strategy(name)
        except ValueError as error:
            raise InputError(f"{error}.{nearest_label(name)} /strategy lists them") from error
        self._note(f"strategy of the next reply: {self._strategy.numbered(self._language)}")

    def _undo(self, _: str) -> None:
        self._note(f"removed: {self._conversation.undo()}")
        self._autosave()

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save FILE: the file name is missing: give one, such as dialogue.jsonl")
        self._conversation.save(file)
        self._note(f"saved: {file}")

    def _restart(self, _: str) -> None:
        if self._conversation.turns:
            self._earlier.append(self._conversation.dialogue())
        self._conversation.restart()
        self._open(None)

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False)
        for command, meaning in COMMAND_HELP.items():
            table.add_row(command, meaning)
        self._console.print(table)

    def _autosave(self) -> None:
        if self._save_path is not None:
            current = [self._conversation.dialogue()] if self._conversation.turns else []
            write_dialogues(self._save_path, [*self._earlier, *current])

    def _note(self, text: str, style: str = "bright_black") -> None:
        self._console.print(Text(text.translate(_CONTROLS), style))


@contextlib.contextmanager
def _stop_on_interrupt(conversation: Conversation) -> Iterator[None]:
    """Let Ctrl-C stop the reply instead of the program."""
    before = signal.signal(signal.SIGINT, lambda *_: conversation.interrupt_reply())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
