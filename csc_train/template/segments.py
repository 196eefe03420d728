"""Find the text that a chat template writes around the contents of messages, whatever the contents are."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from csc_train.data.dialogue import ROLES, Speaker

Messages = list[dict[str, str]]
SEAM = "\n\n"
"""Between the system prompt and the customer's first text, in one message."""
ODD_TEXT = "<think> </think> \"'&<b> {{x}} {% y %}\n\n \\"
"""Stands in the contents of the sample messages: a template must not change it."""


@dataclass(frozen=True)
class Layout:
    """How a chat template takes the system prompt, and a supporter who opens.

    Attributes:
        user_first: a user's message, the language's opening, stands before the opening of a supporter.
        system_in_user: the system prompt heads the first user message, since there is no system role.
    """

    user_first: bool = False
    system_in_user: bool = False

    def arrange(self, system: str, opening: str, chat: Messages) -> Messages:
        """The messages to render for the turns of a chat."""
        if self.user_first and not (chat and chat[0]["role"] == "user"):
            chat = [{"role": "user", "content": opening}, *chat]
        if self.system_in_user:
            return [{"role": "user", "content": system + SEAM + chat[0]["content"]}, *chat[1:]]
        return [{"role": "system", "content": system}, *chat]


LAYOUTS = (Layout(), Layout(user_first=True), Layout(user_first=True, system_in_user=True))


@dataclass(frozen=True)
class Segments:
    """The text that a chat template writes around contents.

    Spaces at the end of a header merge with the text behind it, so they belong to that text: in a reply, the model
    generates them.

    Attributes:
        prefix: text of the template, the system prompt, text of the template.
        headers, footers: around the text of a turn, by speaker.
        first_headers: the headers of the first turn, by speaker, which may hold another message before it: text of the
            template, the opening, text of the template.
    """

    layout: Layout
    prefix: tuple[str, ...]
    headers: dict[Speaker, str]
    footers: dict[Speaker, str]
    first_headers: dict[Speaker, tuple[str, ...]]


def find_segments(render: Callable[..., str], system: str, opening: str, odd: str = "") -> Segments:
    """Find the segments of a chat template from renderings of sample chats, in the first layout that it takes.

    Args:
        render: takes messages, and `add_generation_prompt`.
        system: the system prompt.
        opening: the first user message if a supporter opens and the template wants the user first.
        odd: more text that the template must not change.

    Raises:
        ValueError: the template does not render chats turn by turn; says why.
    """
    reason = ValueError()
    for layout in LAYOUTS:

        def render_turns(chat: Messages, layout: Layout = layout, **options: bool) -> str:
            return render(layout.arrange(system, opening, chat), **options)

        try:
            _segments(render_turns, layout, system, opening, "")
            return _segments(render_turns, layout, system, opening, odd + ODD_TEXT)
        except ValueError as error:
            reason = error
        except Exception as error:  # of any kind: a template is a program, and may know no system role
            reason = ValueError(f"it cannot be rendered ({' '.join(str(error).split())})")
    raise reason


def _segments(render: Callable[..., str], layout: Layout, system: str, opening: str, odd: str) -> Segments:
    first: dict[Speaker, str] = {}  # all text before the first turn's content, by its speaker
    headers: dict[Speaker, str] = {}
    footers: dict[Speaker, str] = {}
    prompts: list[tuple[str, str]] = []  # a generation prompt, and the text before it
    for speakers in itertools.permutations(Speaker):
        chat: Messages = []
        text = ""
        for index, speaker in enumerate(speakers * 2):
            if speaker is Speaker.SUPPORTER:
                prompts.append((render(chat, add_generation_prompt=True), text))
            chat.append({"role": ROLES[speaker], "content": f"⟦{index} {odd}⟧"})
            before, text = text, render(chat)
            if not text.startswith(before):
                raise ValueError("it is not prefix-stable: a later message changes how earlier ones read")
            head, *tail = text[len(before) :].split(chat[-1]["content"])
            if len(tail) != 1:
                raise ValueError(f"it changes, drops or repeats the content of {ROLES[speaker]} messages")
            known = (headers if index else first).setdefault(speaker, head), footers.setdefault(speaker, tail[0])
            if known != (head, tail[0]):
                raise ValueError(f"it writes {ROLES[speaker]} messages differently from place to place")
    user, reply = headers[Speaker.CUSTOMER], headers[Speaker.SUPPORTER]
    for prompt, text in prompts:
        if prompt != (text + reply if text else first[Speaker.SUPPORTER]).rstrip(" "):
            raise ValueError("its generation prompt differs from the header of a reply")
    before, *after = first[Speaker.CUSTOMER].split(system)
    if len(after) != 1:
        raise ValueError("it changes, drops or repeats the system prompt")
    if layout.system_in_user:
        prefix, user = (before, system + after[0]), ""
    else:
        prefix = (before, system, after[0].removesuffix(user))
    opened = (user, opening, footers[Speaker.CUSTOMER] + reply) if layout.user_first else (reply,)
    found = Segments(layout, prefix, headers, footers, {Speaker.SUPPORTER: opened, Speaker.CUSTOMER: (user,)})
    if any(first[speaker] != "".join(prefix + header) for speaker, header in found.first_headers.items()):
        raise ValueError("it writes the first message differently from later ones")
    return found
