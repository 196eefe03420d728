"""A conversation in a terminal, or line by line through a pipe."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import ChatReply, Conversation
from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import STRATEGIES, Strategy, parse_strategy
from csc_train.errors import InputError, suggestion
from csc_train.inference.hf import HFGenerator

SPEAKERS = {"zh": ("客服", "客户"), "en": ("Supporter", "Customer")}
"""Supporter and customer, by the language of the model's labels."""
HELP = {
    "/strategy NAME": "the strategy of the next reply: a name, number or code; without NAME, list them",
    "/undo": "take back your last message and the reply to it",
    "/save FILE": "write the conversation to a new dialogue file (.jsonl)",
    "/restart": "begin a new conversation",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D. Ctrl-C stops a reply",
}
# What a text could do to the terminal is shown, not done.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


def talk(generator: HFGenerator, config: ChatConfig) -> None:
    """Talk until the customer leaves.

    Raises:
        InputError: as `Terminal`.
    """
    Terminal(Conversation(generator, config), config.save).run()


class Terminal:
    """Reads what the customer says from standard input, and prints replies as they grow.

    A line that begins with `/` is a command (see `HELP`). Where standard input is no terminal, what is read is printed
    too, so that the output is the whole conversation.

    Args:
        save: a dialogue file that is kept up to date, with every conversation of this session; None for none.

    Raises:
        InputError: there is such a file already.
    """

    def __init__(self, conversation: Conversation, save: str | None = None):
        if save is not None and Path(save).exists():
            raise InputError(f"save={save}: there is such a file already; choose another")
        self._conversation = conversation
        self._save = save
        self._earlier: list[Dialogue] = []
        self._forced: Strategy | None = None
        self._language = conversation.template.config.language
        self._supporter, self._customer = SPEAKERS[self._language]
        self._interactive = sys.stdin.isatty()
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/strategy": self._choose,
            "/undo": self._undo,
            "/save": self._write,
            "/restart": self._restart,
            "/help": self._help,
        }

    def run(self) -> None:
        """Talk until the customer leaves."""
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import lets `input` edit a line and recall earlier ones)
        if self._interactive:
            self._note("Write as the customer. /help lists the commands, Ctrl-D ends.")
        self._attempt(self._answer, None)
        for line in self._lines():
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return
            if not name.startswith("/"):
                self._attempt(self._answer, line)
            elif name in self._commands:
                self._attempt(self._commands[name], rest.strip())
            else:
                self._note(f"{name}: no such command.{suggestion(name, self._commands)} /help lists them", "red")

    def _lines(self) -> Iterator[str]:
        """What is typed, line by line, empty lines left out."""
        while True:
            self._console.print()
            forced = f" [{self._forced.name(self._language)}]" if self._forced else ""
            prompt = f"{self._customer}{forced}> "
            try:
                line = input(prompt if self._interactive else "").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                self._note("Ctrl-D or /quit ends")
                continue
            if line:
                if not self._interactive:
                    self._console.print(Text((prompt + line).translate(_CONTROLS)))
                yield line

    def _attempt(self, do: Callable, argument: str | None) -> None:
        try:
            do(argument)
        except InputError as error:
            self._note(str(error), "red")

    def _answer(self, said: str | None) -> None:
        written = None
        with _interrupts(self._conversation):
            for answer in self._conversation.reply(said, self._forced):
                if written is None and (answer.strategy or answer.response):
                    self._console.print(self._header(answer))
                    written = ""
                if written is not None:
                    more = answer.response[len(written) :].translate(_CONTROLS)
                    self._console.print(Text(more), end="")
                    written = answer.response
        if not written:
            taken_back = "" if said is None else "; what you said is taken back"
            self._note(f"the model says nothing{taken_back}")
            return
        self._console.print()
        self._forced = None
        self._keep()

    def _header(self, answer: ChatReply) -> Text:
        """Who speaks, by which strategy, and what the model would choose."""
        strategy = answer.strategy.name(self._language) if answer.strategy else ""
        shares = "  ".join(f"{each.name(self._language)} {share:.0%}" for each, share in answer.likeliest)
        return Text.assemble(
            (self._supporter, "bold"),
            (f" [{strategy}]" if strategy else "", "bold green"),
            (" forced" if answer.forced else "", "yellow"),
            (f"   {shares}" if shares else "", "bright_black"),
        )

    def _choose(self, name: str) -> None:
        if not name:
            table = Table("number", "strategy", "name", "code", box=None)
            for strategy in STRATEGIES:
                table.add_row(str(strategy.number), strategy.zh, strategy.en, strategy.code)
            self._console.print(table)
            return
        try:
            self._forced = parse_strategy(name)
        except ValueError as error:
            names = [strategy.name(self._language) for strategy in STRATEGIES]
            raise InputError(f"{error}.{suggestion(name, names)} /strategy lists them") from error
        self._note(f"the next reply: {self._forced}")

    def _undo(self, _: str) -> None:
        self._note(f"taken back: {self._conversation.undo()}")
        self._keep()

    def _write(self, file: str) -> None:
        if not file:
            raise InputError("/save FILE: say which file, such as dialogue.jsonl")
        self._conversation.save(file)
        self._note(f"saved: {file}")

    def _restart(self, _: str) -> None:
        if self._conversation.turns:
            self._earlier.append(self._conversation.dialogue())
        self._conversation.restart()
        self._answer(None)

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False)
        for command, meaning in HELP.items():
            table.add_row(command, meaning)
        self._console.print(table)

    def _keep(self) -> None:
        """Bring the file that is kept up to date."""
        if self._save is not None:
            write_dialogues(self._save, [*self._earlier, self._conversation.dialogue()])

    def _note(self, text: str, style: str = "bright_black") -> None:
        self._console.print(Text(text.translate(_CONTROLS), style))


@contextlib.contextmanager
def _interrupts(conversation: Conversation) -> Iterator[None]:
    """Let Ctrl-C stop the reply instead of the program."""
    before = signal.signal(signal.SIGINT, lambda *_: conversation.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
