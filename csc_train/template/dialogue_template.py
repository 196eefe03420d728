"""A dialogue as token ids with a loss weight on each, for one tokenizer, chat template, mode and language."""

import enum
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import tokenizers
from transformers import PreTrainedTokenizerBase

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.template.chat_templates import load_chat_template
from csc_train.template.config import TemplateConfig
from csc_train.template.reply import Reply, format_reply, parse_reply
from csc_train.template.system_prompt import system_prompt


class TokenType(enum.IntEnum):
    """What a token is to the loss: context that is not trained, or part of a trained strategy or reply."""

    CONTEXT = 0
    STRATEGY = 1
    REPLY = 2
    """The end-of-turn token included."""


@dataclass(frozen=True)
class TokenizedDialogue:
    """A dialogue ready for training.

    Attributes:
        input_ids: int32 [length].
        token_types: uint8 [length]; the `TokenType` of each token.
        turn_offsets: int32 [turns + 1]; where each turn starts, then the length. `turn_offsets[0]` is the length of the
            prefix (everything up to the end of the system prompt).
        strategies: uint8 [turns]; the number of each turn's strategy, 0 for a customer's turn.
    """

    input_ids: numpy.ndarray
    token_types: numpy.ndarray
    turn_offsets: numpy.ndarray
    strategies: numpy.ndarray

    @property
    def trained(self) -> numpy.ndarray:
        """bool [length]; which tokens the model learns to predict."""
        return self.token_types != TokenType.CONTEXT


@dataclass(frozen=True)
class Segments:
    """The text around each kind of message, read off a chat template by rendering marks through it."""

    system_header: str
    system_footer: str
    supporter_header: str
    supporter_footer: str
    customer_header: str
    customer_footer: str


def chat_messages(turns: Iterable[Turn], config: TemplateConfig) -> list[dict[str, str]]:
    """The chat messages of a dialogue: the system prompt, then `{"role", "content"[, "strategy"]}` for each turn."""
    result = [{"role": "system", "content": system_prompt(config.mode, config.language)}]
    for turn in turns:
        if turn.speaker is Speaker.CUSTOMER:
            result.append({"role": "user", "content": turn.text})
        elif config.mode == "reply_only":
            result.append({"role": "assistant", "content": turn.text})
        else:
            strategy = turn.strategy.name(config.language)
            result.append({"role": "assistant", "strategy": strategy, "content": turn.text})
    return result


class DialogueTemplate:
    """Renders dialogues segment by segment: what repeats is encoded once, and texts are encoded literally.

    The ids equal those of the Jinja chat template, rendered as one text and tokenized, for any dialogue whose texts
    contain no control string. A control string inside a text (`<|im_end|>`, `</think>`, ...) is encoded as the plain
    characters it is made of, so that a customer cannot end a turn.

    Rendering is prefix-stable: the ids of a turn do not depend on later turns.

    Raises:
        InputError: the chat template cannot be rendered by segments, or does not fit the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_name: str, config: TemplateConfig):
        self.config = config
        # An absolute path, since a manifest names it.
        own = chat_template_name.endswith(".jinja")
        self.chat_template_name = os.path.abspath(chat_template_name) if own else chat_template_name
        self.chat_template = load_chat_template(chat_template_name)
        self.tokenizer = tokenizer
        self._literal = _literal_encoder(tokenizer)
        segments = self._read_segments()
        self.prefix_ids = self._control_ids(segments.system_header)
        self.prefix_ids += self.literal_ids(system_prompt(config.mode, config.language))
        self.prefix_ids += self._control_ids(segments.system_footer)
        self.supporter_header_ids = self._control_ids(segments.supporter_header)
        self.supporter_footer_ids = self._control_ids(segments.supporter_footer)
        self.customer_header_ids = self._control_ids(segments.customer_header)
        self.customer_footer_ids = self._control_ids(segments.customer_footer)
        self._labels = {s.number: format_reply(Reply(s, ""), config.language) for s in STRATEGIES}
        self.label_ids = {number: self.literal_ids(label) for number, label in self._labels.items()}
        self.end_of_turn_id = self.supporter_footer_ids[0]
        if self.end_of_turn_id not in tokenizer.added_tokens_decoder:
            raise InputError(
                f"chat template {chat_template_name} ends a turn with {segments.supporter_footer!r}, "
                "which is no control token of this tokenizer"
            )
        self._check_against_jinja()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the text of a rendering: chat template, system prompt, mode, language."""
        prompt = system_prompt(self.config.mode, self.config.language)
        return digest([self.chat_template, prompt, self.config.mode, self.config.language])

    def encode(self, dialogue: Dialogue, targets: Sequence[int] | None = None) -> TokenizedDialogue:
        """Encode one dialogue; `targets` as in `encode_all`."""
        return next(self.encode_all([dialogue], targets))

    def encode_all(
        self, dialogues: Iterable[Dialogue], targets: Sequence[int] | None = None
    ) -> Iterator[TokenizedDialogue]:
        """Encode dialogues, in order.

        The trained tokens are those of the strategy, the reply and the end-of-turn token of each target turn; in mode
        `given` the strategy's are not. Where a token spans the closing bracket and the first characters of the reply
        (`]"`, `][`), it counts as the strategy's.

        Args:
            dialogues: what to encode; consumed in batches.
            targets: indices into `Dialogue.turns` of the supporter turns to train on; all by default.
        """
        for batch in _batches(dialogues, 256):
            contents = [content for dialogue in batch for content in map(self._content, dialogue.turns)]
            # Without offsets, which take a quarter of the time and are looked at for few turns.
            encodings = iter(self._literal.encode_batch_fast(contents, add_special_tokens=False))
            for dialogue in batch:
                ids = [encoding.ids for encoding in itertools.islice(encodings, len(dialogue.turns))]
                yield self._assemble(dialogue, ids, targets)

    def prompt_ids(self, history: Sequence[Turn | Sequence[int]], given: Strategy | None = None) -> list[int]:
        """The ids from which the next supporter turn is generated.

        Args:
            history: the turns so far. A supporter turn may be the ids that a model generated for it (without header
                and end-of-turn token): they enter as they are, since rendering their text again could split it
                differently.
            given: the strategy to hand in, in mode `given`.
        """
        ids = list(self.prefix_ids)
        for turn in history:
            if not isinstance(turn, Turn):
                ids += [*self.supporter_header_ids, *turn, *self.supporter_footer_ids]
            elif turn.speaker is Speaker.SUPPORTER:
                ids += [*self.supporter_header_ids, *self.literal_ids(self._content(turn)), *self.supporter_footer_ids]
            else:
                ids += [*self.customer_header_ids, *self.literal_ids(turn.text), *self.customer_footer_ids]
        ids += self.supporter_header_ids
        if given is not None:
            ids += self.literal_ids(format_reply(Reply(given, ""), self.config.language))
        return ids

    def parse(self, text: str) -> Reply:
        """The reply that a model's text holds: no strategy is looked for in modes `given` and `reply_only`."""
        return parse_reply(text, self.config.mode)

    def render(self, turns: Iterable[Turn], **options) -> str:
        """The turns as one text, by the Jinja chat template; `options` go to `apply_chat_template`."""
        return self.tokenizer.apply_chat_template(
            chat_messages(turns, self.config), chat_template=self.chat_template, tokenize=False, **options
        )

    def _content(self, turn: Turn) -> str:
        """The content of a turn's message, as the chat template writes it."""
        if turn.speaker is Speaker.CUSTOMER or self.config.mode == "reply_only":
            return turn.text
        return format_reply(Reply(turn.strategy, turn.text), self.config.language)

    def _assemble(
        self, dialogue: Dialogue, contents: list[list[int]], targets: Sequence[int] | None
    ) -> TokenizedDialogue:
        """Put a dialogue together from the ids of its turns' contents."""
        ids = list(self.prefix_ids)
        turn_offsets = [len(ids)]
        trained = []
        for index, (turn, content) in enumerate(zip(dialogue.turns, contents, strict=True)):
            if turn.speaker is Speaker.CUSTOMER:
                ids += self.customer_header_ids
                ids += content
                ids += self.customer_footer_ids
            else:
                ids += self.supporter_header_ids
                if targets is None or index in targets:
                    start, end = len(ids), len(ids) + len(content) + 1
                    reply = start + self._strategy_length(turn, content)
                    trained.append((start, reply, end))
                ids += content
                ids += self.supporter_footer_ids
            turn_offsets.append(len(ids))
        token_types = numpy.zeros(len(ids), dtype=numpy.uint8)  # TokenKind.CONTEXT
        for start, reply, end in trained:
            token_types[start:reply] = TokenType.CONTEXT if self.config.mode == "given" else TokenType.STRATEGY
            token_types[reply:end] = TokenType.REPLY
        return TokenizedDialogue(
            numpy.array(ids, dtype=numpy.int32),
            token_types,
            numpy.array(turn_offsets, dtype=numpy.int32),
            numpy.array([turn.strategy.number if turn.strategy else 0 for turn in dialogue.turns], dtype=numpy.uint8),
        )

    def _strategy_length(self, turn: Turn, content: list[int]) -> int:
        """How many leading tokens of a supporter turn's content belong to its `[strategy]`."""
        if self.config.mode == "reply_only":
            return 0
        label_ids = self.label_ids[turn.strategy.number]
        if content[: len(label_ids)] == label_ids:
            # These tokens spell the label, so the next one starts behind it: no need to ask where each token starts.
            return len(label_ids)
        label = self._labels[turn.strategy.number]
        encoding = self._literal.encode(self._content(turn), add_special_tokens=False)
        return sum(start < len(label) for start, _ in encoding.offsets)

    def literal_ids(self, text: str) -> list[int]:
        """The ids of a text in which a control string is plain characters."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def _control_ids(self, text: str) -> list[int]:
        # Not by the backend itself: it would truncate or pad as whoever used the tokenizer last wanted.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _read_segments(self) -> Segments:
        system, reply, question = "⟦system⟧", "⟦reply⟧", "⟦question⟧"
        chat = [
            {"role": "system", "content": system},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": question},
        ]

        def render(length: int, **options) -> str:
            return self.tokenizer.apply_chat_template(
                chat[:length], chat_template=self.chat_template, tokenize=False, **options
            )

        def added(shorter: str, longer: str) -> str:
            if not longer.startswith(shorter):
                raise InputError(f"chat template {self.chat_template_name} is not prefix-stable")
            return longer[len(shorter) :]

        one, two, three = render(1), render(2), render(3)
        system_header, system_footer = one.split(system)
        supporter_header, supporter_footer = added(one, two).split(reply)
        customer_header, customer_footer = added(two, three).split(question)
        if added(one, render(1, add_generation_prompt=True)) != supporter_header:
            raise InputError(
                f"chat template {self.chat_template_name}: the generation prompt is not the reply's header"
            )
        return Segments(
            system_header, system_footer, supporter_header, supporter_footer, customer_header, customer_footer
        )

    def _check_against_jinja(self) -> None:
        """Refuse a tokenizer on which segments and whole text part ways, before anything is trained on it."""
        turns = (
            Turn(Speaker.SUPPORTER, "您好", STRATEGIES[0]),
            Turn(Speaker.CUSTOMER, "Hi, 我的订单123还没到!"),
            Turn(Speaker.SUPPORTER, "[订单号]已查到", STRATEGIES[6]),
        )
        whole = self._control_ids(self.render(turns))
        if whole != self.encode(Dialogue("probe", turns)).input_ids.tolist():
            raise InputError(
                f"chat template {self.chat_template_name} does not fit this tokenizer: "
                "rendering by segments and rendering as a whole give different ids"
            )


@functools.lru_cache(maxsize=4)
def _literal_encoder(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the tokenizer's backend that knows no added tokens: control strings are plain text to it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(backend))


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
