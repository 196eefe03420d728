"""Tokenize dialogues by a chat template, and mark which tokens are trained."""

import contextlib
import copy
import difflib
import enum
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import tokenizers

from csc_train.data.dialogue import ROLES, Dialogue, Speaker, Turn
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.template.chat_templates import AUTO, chat_template_names, load_chat_template
from csc_train.template.config import TemplateConfig
from csc_train.template.reply import Reply, format_reply, parse_reply
from csc_train.template.segments import LAYOUTS, SEAM, Layout, Messages, find_segments
from csc_train.template.system_prompt import system_prompt

if TYPE_CHECKING:  # it takes seconds to load
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
BATCH = 8
"""Dialogues that are encoded at a time: the tokens of more do not stay in a processor's cache, which costs a tenth."""
PROBES = ("您好", "Hi, 我的订单123还没到!", "[订单号]已查到", '"Sorry"', "(1)", "2 days…", "é", "😀 ok", "'s")
"""Texts whose ids by segments are compared with those of the rendered chat template; their first characters differ."""
_CUSTOMER, _SUPPORTER = Speaker.CUSTOMER, Speaker.SUPPORTER  # an enumeration looks its members up, for each turn


class TokenType(enum.IntEnum):
    """The role of a token in the loss: context, which is not trained, or part of a trained strategy or reply."""

    CONTEXT = 0
    STRATEGY = 1
    REPLY = 2
    """Includes the end-of-turn token."""


@dataclass(frozen=True)
class TokenizedDialogue:
    """A dialogue ready for training.

    Attributes:
        input_ids: int32 [length].
        token_types: uint8 [length]; the `TokenType` of each token.
        turn_offsets: int32 [turns + 1]; the start of each turn, then the length. `turn_offsets[0]` is the length of the
            prefix (the system prompt with its header and footer).
        strategies: uint8 [turns]; the strategy number of each turn, 0 for a customer turn.
        id: that of the dialogue, for messages.
    """

    input_ids: numpy.ndarray
    token_types: numpy.ndarray
    turn_offsets: numpy.ndarray
    strategies: numpy.ndarray
    id: str = ""

    @property
    def trained(self) -> numpy.ndarray:
        """bool [length]; the tokens that the model is trained to predict."""
        return self.token_types != TokenType.CONTEXT


class _Frame(NamedTuple):
    """What stands around the text of a turn; the spaces merge with it."""

    spaces: str
    header: list[int]
    footer: list[int]


def labelled_text(turn: Turn, config: TemplateConfig) -> str:
    """The content of a turn's message: a supporter's text behind its `[strategy]`, unless the mode has none."""
    return format_reply(Reply(None if config.mode == "reply_only" else turn.strategy, turn.text), config.language)


def chat_messages(turns: Iterable[Turn], config: TemplateConfig, layout: Layout = LAYOUTS[0]) -> Messages:
    """Chat messages of a dialogue: the system prompt, then `{"role", "content"}` for each turn."""
    chat = [{"role": ROLES[turn.speaker], "content": labelled_text(turn, config)} for turn in turns]
    return layout.arrange(system_prompt(config.mode, config.language), get_language(config.language).opening, chat)


class DialogueTemplate:
    """Tokenizes dialogues segment by segment: repeated segments are encoded once, and texts are encoded literally.

    The ids equal those of the rendered chat template for any dialogue whose texts contain no control string. A control
    string inside a text (`<|im_end|>`, `</think>`) is encoded as plain characters, so a customer cannot end a turn.

    Tokenization is prefix-stable: the ids of a turn do not depend on later turns.

    Attributes:
        chat_template_name: `auto`, a name, or the absolute path of a user's file.
        chat_template: the Jinja source.
        layout: how it takes the system prompt, and a supporter who opens.
        prefix_ids: those that every dialogue begins with: the system prompt, with its header and footer.
        label_ids: the ids of `[strategy]`, by strategy number.
        end_of_turn_id: the control token that ends a reply.

    Raises:
        InputError: the chat template cannot be rendered by segments, or does not fit the tokenizer; names one that does
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template_name: str, config: TemplateConfig):
        self.config = config
        # An absolute path, since a manifest names it.
        own = chat_template_name.endswith(".jinja")
        self.chat_template_name = os.path.abspath(chat_template_name) if own else chat_template_name
        self.chat_template = load_chat_template(chat_template_name, tokenizer)
        self.tokenizer = tokenizer
        self._literal = _literal_encoder(tokenizer)
        try:
            self._find_ids()
        except ValueError as reason:
            raise InputError(f"chat template {chat_template_name}: {reason}: {self._advice()}") from reason
        if self.layout.system_in_user:
            logger.info("note: the chat template has no system role: the system prompt heads the first user message")

    def _find_ids(self) -> None:
        """Find the segments of the chat template, and their ids.

        Raises:
            ValueError: the template does not render chats turn by turn, or does not fit the tokenizer.
        """
        self._system = system_prompt(self.config.mode, self.config.language)
        self._opening = get_language(self.config.language).opening
        controls = {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()}
        found = find_segments(self._render, self._system, self._opening, " ".join(controls.values()))
        self.layout = found.layout
        before, _, after = found.prefix if len(found.prefix) == 3 else (*found.prefix, "")
        self._system_frame = _Frame(_last_spaces(before), self._mixed_ids(before), self._mixed_ids(after))
        self.prefix_ids = self._mixed_ids(*found.prefix)
        self._user_header = found.headers[Speaker.CUSTOMER]
        later, first = (
            {
                speaker: _Frame(
                    _last_spaces(texts[-1]), self._mixed_ids(*texts), self._control_ids(found.footers[speaker])
                )
                for speaker, texts in headers.items()
            }
            for headers in ({speaker: (text,) for speaker, text in found.headers.items()}, found.first_headers)
        )
        self._frames = later, first
        _, self.supporter_header_ids, self.supporter_footer_ids = later[Speaker.SUPPORTER]
        _, self.customer_header_ids, self.customer_footer_ids = later[Speaker.CUSTOMER]
        spaces = later[Speaker.SUPPORTER].spaces
        self._labels = {s.number: spaces + format_reply(Reply(s, ""), self.config.language) for s in STRATEGIES}
        self.label_ids = {number: self.literal_ids(label) for number, label in self._labels.items()}
        self.end_of_turn_id = next(iter(self.supporter_footer_ids), -1)
        if self.end_of_turn_id not in controls:
            end = found.footers[Speaker.SUPPORTER]
            raise ValueError(f"it ends a turn with {end!r}, which is no control token of this tokenizer")
        frames = [*later.values(), *first.values()]
        self._has_spaces = any(frame.spaces for frame in frames)
        written = {*self.prefix_ids, *(number for frame in frames for number in frame.header + frame.footer)}
        for number in written & controls.keys():
            if number in self.literal_ids(controls[number]):
                raise ValueError(f"in any text, the tokenizer takes {controls[number]!r} for a control token")
        self._check_against_jinja()

    def _advice(self) -> str:
        """The chat template that fits the tokenizer: its own, or that of the package which writes the nearest text."""
        fitting: list[tuple[float, str]] = []
        for name in ([AUTO] if self.tokenizer.chat_template else []) + chat_template_names():
            other = copy.copy(self)
            with contextlib.suppress(ValueError):
                other.chat_template = load_chat_template(name, self.tokenizer)
                other._find_ids()
                mine, its = self._sample(), other._sample()
                unlike = 1 - difflib.SequenceMatcher(None, mine, its, autojunk=False).ratio()
                fitting.append(((name != AUTO) * unlike * (len(mine) + len(its)), name))
        if fitting:
            return f"choose {min(fitting)[1]}, which fits this tokenizer"
        return "none of the package's fits this tokenizer: write one (docs/extending.md)"

    def _sample(self) -> str:
        """A short rendered chat, or the source of a template that cannot render it. Some templates trim contents."""
        try:
            return self._render([{"role": role, "content": " - "} for role in ("user", "assistant")])
        except Exception:  # of any kind: a template is a program
            return self.chat_template

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of chat template, system prompt, mode and language, and of the opening if it is used.

        Also of the labels that the system prompt of a plugin's language does not show.
        """
        opening = [self._opening] if self.layout.user_first else []
        labels = [] if self.config.mode == "reply_only" else self._labels.values()
        unsaid = [label for label in labels if label.strip("[]") not in self._system]
        return digest([self.chat_template, self._system, self.config.mode, self.config.language, *opening, *unsaid])

    def encode(self, dialogue: Dialogue, targets: Sequence[int] | None = None) -> TokenizedDialogue:
        """Encode one dialogue; `targets` as in `encode_all`."""
        return next(self.encode_all([dialogue], targets))

    def encode_all(
        self, dialogues: Iterable[Dialogue], targets: Sequence[int] | None = None
    ) -> Iterator[TokenizedDialogue]:
        """Encode dialogues, in order.

        In each target turn, strategy, reply and end-of-turn token are trained; in mode `given`, the strategy is not. A
        token that spans the closing bracket and the first characters of the reply (`]"`, `][`) belongs to the strategy.

        Args:
            dialogues: consumed in batches.
            targets: indices into `Dialogue.turns` of the supporter turns to train; defaults to all.
        """
        for batch in _batches(dialogues, BATCH):
            contents = [
                self._content(turn, index == 0) for dialogue in batch for index, turn in enumerate(dialogue.turns)
            ]
            # Offsets take a quarter of the time, and few turns need them.
            encodings = iter(self._literal.encode_batch_fast(contents, add_special_tokens=False))
            for dialogue in batch:
                ids = [encoding.ids for encoding in itertools.islice(encodings, len(dialogue.turns))]
                yield self._assemble(dialogue, ids, targets)

    def encode_chat(self, messages: Messages) -> tuple[list[int], list[int]]:
        """The ids of any chat as the chat template renders it, and which of them are scored.

        Scored are the tokens of assistant messages, each with the end of its turn.

        Raises:
            ValueError: the template cannot render the messages, or not one by one.
        """
        try:
            text, parts = self._render(messages), []
            for number in (number for number, each in enumerate(messages) if each["role"] == "assistant"):
                before, own = messages[:number], self._render(messages[: number + 1])
                prompt = self._render(before, add_generation_prompt=True)
                if not (own.startswith(prompt) and text.startswith(own)):
                    raise ValueError("later messages change how earlier ones read")
                parts.append((len(prompt), len(own)))
        except Exception as error:  # of any kind: a template is a program
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template cannot render the messages one by one ({reason})") from error
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts, scored = found["input_ids"], [start for start, _ in found["offset_mapping"]], []
        for first, end in parts:
            inside = [place for place, start in enumerate(starts) if first <= start < end]
            scored += inside[: [*(ids[place] for place in inside), self.end_of_turn_id].index(self.end_of_turn_id) + 1]
        return ids, scored

    def prompt_ids(self, history: Sequence[Turn | Sequence[int]], given: Strategy | None = None) -> list[int]:
        """The prompt for the next supporter turn.

        Args:
            history: the turns so far. A supporter turn may be the ids that a model generated, without header and
                end-of-turn token: they are used as they are, since their text could be tokenized differently.
            given: the strategy of the turn, in mode `given`.
        """
        ids = list(self.prefix_ids)
        for index, turn in enumerate(history):
            if isinstance(turn, Turn):
                speaker, content = turn.speaker, self._cached_ids(self._content(turn, index == 0))
            else:
                speaker, content = Speaker.SUPPORTER, turn
            _, header, footer = self._frames[index == 0][speaker]
            ids += [*header, *content, *footer]
        return [*ids, *self.header_ids(len(history)), *(self.label_ids[given.number] if given else ())]

    def header_ids(self, turn: int) -> list[int]:
        """What stands between the start of the supporter turn of this index and its text."""
        return self._frames[turn == 0][Speaker.SUPPORTER].header

    def parse(self, text: str) -> Reply:
        """Parse the text that a model generated (see `reply.parse_reply`)."""
        return parse_reply(text, self.config.mode)

    def reply_ids(self, text: str, given: Strategy | None = None) -> list[int]:
        """The ids of a reply's text; `given` is the strategy that the prompt ends with, if any."""
        spaces = "" if given else self._frames[False][Speaker.SUPPORTER].spaces
        return self.literal_ids(spaces + text.removeprefix(spaces))

    def messages(self, turns: Iterable[Turn]) -> Messages:
        """The chat that the chat template renders to these turns: what a server of the model takes."""
        return chat_messages(turns, self.config, self.layout)

    def render(self, turns: Iterable[Turn], **options) -> str:
        """Render the turns by the Jinja chat template; `options` go to `apply_chat_template`."""
        return self._render(self.messages(turns), **options)

    def _render(self, messages: Messages, **options) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False, **options)

    def _content(self, turn: Turn, first: bool) -> str:
        """The content of a turn's message behind the spaces of its header; `first` in the dialogue."""
        if self._has_spaces:
            return self._frames[first][turn.speaker].spaces + labelled_text(turn, self.config)
        labelled = turn.strategy and self.config.mode != "reply_only"
        return self._labels[turn.strategy.number] + turn.text if labelled else turn.text

    @functools.cached_property
    def _plain_ids(self) -> list[int]:
        """What the template writes before the first turn of a chat without system prompt."""
        probe = "⟦0⟧"
        before = self._render([{"role": "user", "content": probe}]).partition(probe)[0]
        return self._control_ids(before.removesuffix("" if self.layout.system_in_user else self._user_header))

    def _prefix_of(self, dialogue: Dialogue) -> list[int]:
        """The ids before the first turn: a chat has its own system prompt, or what the template writes without one."""
        if dialogue.kind == "csc":
            return self.prefix_ids
        if not dialogue.system:
            return self._plain_ids
        spaces, before, after = self._system_frame
        return [*before, *self.literal_ids(spaces + dialogue.system + SEAM * self.layout.system_in_user), *after]

    def _assemble(
        self, dialogue: Dialogue, contents: list[list[int]], targets: Sequence[int] | None
    ) -> TokenizedDialogue:
        """Assemble a dialogue from the ids of its turns' contents."""
        ids = list(self._prefix_of(dialogue))
        turn_offsets, ends = [len(ids)], []
        strategy = TokenType.CONTEXT if self.config.mode == "given" else TokenType.STRATEGY
        for index, (turn, content) in enumerate(zip(dialogue.turns, contents, strict=True)):
            speaker = turn.speaker
            _, header, footer = self._frames[index == 0][speaker]
            ids += header
            if index and speaker is _CUSTOMER and self.layout.system_in_user:
                turn_offsets[-1] = len(ids)  # as the first turn begins: a dialogue without its first turns is one, too
            if speaker is _SUPPORTER and (targets is None or index in targets):
                start = len(ids)
                ends += (start, start + self._strategy_length(turn, content, index == 0), start + len(content) + 1)
            ids += content
            ids += footer
            turn_offsets.append(len(ids))
        ends.append(len(ids))
        kinds = numpy.array((TokenType.CONTEXT, strategy, TokenType.REPLY) * (len(ends) // 3), numpy.uint8)
        return TokenizedDialogue(
            numpy.fromiter(ids, numpy.int32, len(ids)),  # in less than half the time of numpy.array
            numpy.append(kinds, numpy.uint8(TokenType.CONTEXT)).repeat(numpy.diff(ends, prepend=0)),
            numpy.array(turn_offsets, dtype=numpy.int32),
            numpy.array([turn.strategy.number if turn.strategy else 0 for turn in dialogue.turns], dtype=numpy.uint8),
            dialogue.id,
        )

    def _strategy_length(self, turn: Turn, content: list[int], first: bool) -> int:
        """The number of leading tokens of a supporter turn's content that belong to its `[strategy]`."""
        if self.config.mode == "reply_only" or turn.strategy is None:
            return 0
        label_ids = self.label_ids[turn.strategy.number]
        if content[: len(label_ids)] == label_ids:
            # These tokens spell the label, so the next one starts behind it: offsets are not needed.
            return len(label_ids)
        label = self._labels[turn.strategy.number]
        encoding = self._literal.encode(self._content(turn, first), add_special_tokens=False)
        return sum(start < len(label) for start, _ in encoding.offsets)

    def literal_ids(self, text: str) -> list[int]:
        """The ids of a text, with control strings as plain characters."""
        return self._literal.encode(text, add_special_tokens=False).ids

    @functools.lru_cache(maxsize=8192)  # noqa: B019  # a process has few templates
    def _cached_ids(self, text: str) -> list[int]:
        """`literal_ids`, kept: a dialogue's turns are in the prompt of each later one."""
        return self.literal_ids(text)

    def _control_ids(self, text: str) -> list[int]:
        # The backend itself would truncate or pad by the settings of the last caller.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _mixed_ids(self, *texts: str) -> list[int]:
        """The ids of texts, in turn of the template and of a content; without spaces at the end of the template's."""
        ids, lead = [], ""
        for index, text in enumerate(texts):
            ids += self.literal_ids(lead + text) if index % 2 else self._control_ids(text.rstrip(" "))
            lead = _last_spaces(text)
        return ids

    def _check_against_jinja(self) -> None:
        """Check on samples that ids by segments equal ids of the whole rendered text.

        Raises:
            ValueError: they do not; says where.
        """
        for start, speakers in itertools.product(range(len(PROBES)), itertools.permutations(Speaker)):
            texts = PROBES[start:] + PROBES[:start]
            turns = tuple(
                Turn(speaker, text, STRATEGIES[start] if speaker is Speaker.SUPPORTER else None)
                for speaker, text in zip(itertools.cycle(speakers), texts, strict=False)
            )
            whole = self._control_ids(self.render(turns))
            ours = self.encode(Dialogue("probe", turns)).input_ids.tolist()
            if whole != ours:
                place = next(
                    (index for index, (one, other) in enumerate(zip(whole, ours, strict=False)) if one != other), 0
                )
                text = self.tokenizer.decode(whole[max(0, place - 4) : place + 4])
                raise ValueError(f"the tokenizer merges tokens across its text and contents, at {text!r}")


def _last_spaces(text: str) -> str:
    return " " * (len(text) - len(text.rstrip(" ")))


@functools.lru_cache(maxsize=8)
def _literal_encoder(tokenizer: "PreTrainedTokenizerBase") -> tokenizers.Tokenizer:
    """The tokenizer's backend without added tokens, to which control strings are plain text; both share their model."""
    fast: Any = tokenizer.backend_tokenizer
    rules = tokenizers.Tokenizer(tokenizers.models.BPE())
    rules.normalizer, rules.pre_tokenizer = fast.normalizer, fast.pre_tokenizer
    backend = json.loads(rules.to_str())  # without the vocabulary, which takes seconds
    for part in (split := backend["pre_tokenizer"] or {}).get("pretokenizers", [split]):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"  # a content is never at the start of a text
    literal = tokenizers.Tokenizer.from_str(json.dumps(backend))
    literal.model = fast.model
    return literal


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
