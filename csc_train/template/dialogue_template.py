"""Tokenize dialogues by a chat template, and mark which tokens are trained."""

import enum
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


def chat_messages(turns: Iterable[Turn], config: TemplateConfig) -> list[dict[str, str]]:
    """Chat messages of a dialogue: the system prompt, then `{"role", "content"[, "strategy"]}` for each turn."""
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
    """Tokenizes dialogues segment by segment: repeated segments are encoded once, and texts are encoded literally.

    The ids equal those of the rendered chat template for any dialogue whose texts contain no control string. A control
    string inside a text (`<|im_end|>`, `</think>`) is encoded as plain characters, so a customer cannot end a turn.

    Tokenization is prefix-stable: the ids of a turn do not depend on later turns.

    Attributes:
        chat_template_name: a name, or the absolute path of a user's file.
        chat_template: the Jinja source.
        prefix_ids: the ids of the system prompt, with its header and footer.
        label_ids: the ids of `[strategy]`, by strategy number.
        end_of_turn_id: the control token that ends a reply.

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
        system, supporter, customer = ([*map(self._control_ids, each)] for each in self._headers_and_footers())
        self.prefix_ids = [*system[0], *self.literal_ids(system_prompt(config.mode, config.language)), *system[1]]
        self.supporter_header_ids, self.supporter_footer_ids = supporter
        self.customer_header_ids, self.customer_footer_ids = customer
        self._header_and_footer = {Speaker.SUPPORTER: supporter, Speaker.CUSTOMER: customer}
        self._labels = {s.number: format_reply(Reply(s, ""), config.language) for s in STRATEGIES}
        self.label_ids = {number: self.literal_ids(label) for number, label in self._labels.items()}
        self.end_of_turn_id = self.supporter_footer_ids[0]
        if self.end_of_turn_id not in tokenizer.added_tokens_decoder:
            raise InputError(
                f"chat template {chat_template_name} ends a turn with {tokenizer.decode(self.supporter_footer_ids)!r}, "
                "which is no control token of this tokenizer: choose the template of the tokenizer's model family"
            )
        self._check_against_jinja()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of chat template, system prompt, mode and language."""
        prompt = system_prompt(self.config.mode, self.config.language)
        return digest([self.chat_template, prompt, self.config.mode, self.config.language])

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
        for batch in _batches(dialogues, 256):
            contents = [content for dialogue in batch for content in map(self._content, dialogue.turns)]
            # Offsets take a quarter of the time, and few turns need them.
            encodings = iter(self._literal.encode_batch_fast(contents, add_special_tokens=False))
            for dialogue in batch:
                ids = [encoding.ids for encoding in itertools.islice(encodings, len(dialogue.turns))]
                yield self._assemble(dialogue, ids, targets)

    def prompt_ids(self, history: Sequence[Turn | Sequence[int]], given: Strategy | None = None) -> list[int]:
        """The prompt for the next supporter turn.

        Args:
            history: the turns so far. A supporter turn may be the ids that a model generated, without header and
                end-of-turn token: they are used as they are, since their text could be tokenized differently.
            given: the strategy of the turn, in mode `given`.
        """
        ids = list(self.prefix_ids)
        for turn in history:
            if isinstance(turn, Turn):
                speaker, content = turn.speaker, self.literal_ids(self._content(turn))
            else:
                speaker, content = Speaker.SUPPORTER, turn
            header, footer = self._header_and_footer[speaker]
            ids += [*header, *content, *footer]
        return [*ids, *self.supporter_header_ids, *(self.label_ids[given.number] if given else ())]

    def parse(self, text: str) -> Reply:
        """Parse the text that a model generated (see `reply.parse_reply`)."""
        return parse_reply(text, self.config.mode)

    def render(self, turns: Iterable[Turn], **options) -> str:
        """Render the turns by the Jinja chat template; `options` go to `apply_chat_template`."""
        return self._render(chat_messages(turns, self.config), **options)

    def _render(self, messages: list[dict[str, str]], **options) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False, **options)

    def _content(self, turn: Turn) -> str:
        """The content of a turn's message in the chat template."""
        if turn.speaker is Speaker.CUSTOMER or self.config.mode == "reply_only":
            return turn.text
        return format_reply(Reply(turn.strategy, turn.text), self.config.language)

    def _assemble(
        self, dialogue: Dialogue, contents: list[list[int]], targets: Sequence[int] | None
    ) -> TokenizedDialogue:
        """Assemble a dialogue from the ids of its turns' contents."""
        ids = list(self.prefix_ids)
        turn_offsets = [len(ids)]
        trained = []
        for index, (turn, content) in enumerate(zip(dialogue.turns, contents, strict=True)):
            header, footer = self._header_and_footer[turn.speaker]
            ids += header
            if turn.speaker is Speaker.SUPPORTER and (targets is None or index in targets):
                start, end = len(ids), len(ids) + len(content) + 1
                trained.append((start, start + self._strategy_length(turn, content), end))
            ids += content
            ids += footer
            turn_offsets.append(len(ids))
        token_types = numpy.zeros(len(ids), dtype=numpy.uint8)  # TokenType.CONTEXT
        for start, reply, end in trained:
            token_types[start:reply] = TokenType.CONTEXT if self.config.mode == "given" else TokenType.STRATEGY
            token_types[reply:end] = TokenType.REPLY
        return TokenizedDialogue(
            numpy.array(ids, dtype=numpy.int32),
            token_types,
            numpy.array(turn_offsets, dtype=numpy.int32),
            numpy.array([turn.strategy.number if turn.strategy else 0 for turn in dialogue.turns], dtype=numpy.uint8),
            dialogue.id,
        )

    def _strategy_length(self, turn: Turn, content: list[int]) -> int:
        """The number of leading tokens of a supporter turn's content that belong to its `[strategy]`."""
        if self.config.mode == "reply_only":
            return 0
        label_ids = self.label_ids[turn.strategy.number]
        if content[: len(label_ids)] == label_ids:
            # These tokens spell the label, so the next one starts behind it: offsets are not needed.
            return len(label_ids)
        label = self._labels[turn.strategy.number]
        encoding = self._literal.encode(self._content(turn), add_special_tokens=False)
        return sum(start < len(label) for start, _ in encoding.offsets)

    def literal_ids(self, text: str) -> list[int]:
        """The ids of a text, with control strings as plain characters."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def _control_ids(self, text: str) -> list[int]:
        # The backend itself would truncate or pad by the settings of the last caller.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _headers_and_footers(self) -> list[list[str]]:
        """The text before and behind the content of a system, supporter and customer message."""
        chat = [{"role": role, "content": f"⟦{role}⟧"} for role in ("system", "assistant", "user")]
        texts = ["", *(self._render(chat[:length]) for length in (1, 2, 3))]
        found = []
        for before, after, message in zip(texts[:-1], texts[1:], chat, strict=True):
            if not after.startswith(before):
                raise InputError(f"chat template {self.chat_template_name} is not prefix-stable: use another one")
            found.append(after[len(before) :].split(message["content"]))
        if self._render(chat[:1], add_generation_prompt=True) != texts[1] + found[1][0]:
            raise InputError(
                f"chat template {self.chat_template_name}: the generation prompt differs from the header of a reply"
            )
        return found

    def _check_against_jinja(self) -> None:
        """Check on a sample that ids by segments equal ids of the whole rendered text."""
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


@functools.lru_cache(maxsize=8)
def _literal_encoder(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the tokenizer's backend without added tokens, to which control strings are plain text."""
    fast: Any = tokenizer.backend_tokenizer
    backend = json.loads(fast.to_str())
    backend |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(backend))


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
