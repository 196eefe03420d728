"""The state of a chat: turns, key-value cache, and the model's replies as they grow."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from csc_train.chat.config import ChatConfig
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import GREETING, OTHERS, STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.inference.hf import HFGenerator
from csc_train.inference.kv_cache import RewindableCache, common_prefix_length
from csc_train.invisible import is_blank, strip_invisible
from csc_train.template.likelihood import log_likelihoods_from_kv_cache
from csc_train.template.reply import Reply
from csc_train.thoughts import without_thoughts

NUM_ALTERNATIVES = 3
"""Strategies shown with their probabilities."""


@dataclass(frozen=True)
class ChatReply:
    """A supporter's turn, complete or still growing.

    Attributes:
        strategy: None if the reply names none, or not yet.
        response: the reply without its strategy.
        top_strategies: the likeliest strategies with their probabilities; empty if the model chooses none.
        forced: whether the user chose the strategy.
        token_ids: tokens of the turn, without header and end.
    """

    strategy: Strategy | None
    response: str
    top_strategies: tuple[tuple[Strategy, float], ...]
    forced: bool
    token_ids: tuple[int, ...]


class Conversation:
    """A chat in which customer and supporter take turns; `ChatConfig.opening` says who opens it.

    At temperature 0 and without forced strategies, replies equal those of an evaluation in generated context.

    Attributes:
        turns: supporter turns (`ChatReply`) and customer turns (`str`), alternating. Read them between replies only.
        template: the model's dialogue template.
        supporter_opens: whether the supporter is to speak first.
    """

    def __init__(self, generator: HFGenerator, config: ChatConfig):
        self.turns: list[ChatReply | str] = []
        self.template = generator.template
        self._generator, self._model = generator, generator.model
        self._config = config
        self.supporter_opens = config.opening == "supporter"
        self._samplers = LogitsProcessorList([TopPLogitsWarper(config.top_p)])
        if config.temperature > 0:
            self._samplers.insert(0, TemperatureLogitsWarper(config.temperature))
        self._cache = RewindableCache(self._model.config)
        self._cached_ids: list[int] = []
        self._stopped = False
        self._id = _new_id()
        self._saved: set[Path] = set()

    @torch.inference_mode()
    def reply(self, message: str | None = None, strategy: Strategy | None = None) -> Iterator[ChatReply]:
        """Yield the supporter's reply as it grows.

        When the iterator ends, is closed or fails, the reply so far becomes a turn. If it is empty, the customer's
        message is removed too.

        Args:
            message: the customer's message; None opens the conversation.
            strategy: strategy to reply with; None lets the model choose. A model of mode `given` needs one for every
                reply but the opening, which is a greeting.

        Raises:
            InputError: it is not the supporter's turn, the message is empty, the strategy does not fit the model's
                mode, or the conversation is longer than the model's context.
        """
        mode = self.template.config.mode
        if mode == "given" and message is None:
            strategy = strategy or GREETING
        if mode == "given" and strategy is None:
            raise InputError("this model needs a strategy for each reply: choose one")
        if mode == "reply_only" and strategy is not None:
            raise InputError("this model was trained without strategies: none can be chosen")
        self._add_message(message)
        reply = ChatReply(strategy, "", (), strategy is not None, ())
        try:
            history = [Turn(Speaker.CUSTOMER, turn) if isinstance(turn, str) else turn.token_ids for turn in self.turns]
            prompt = self.template.prompt_ids(history)
            strategy_ids = self.template.label_ids[strategy.number] if strategy else []
            self._check_length(len(prompt))
            self._stopped = False
            logits = self._prefill(prompt)
            if mode == "joint":
                reply = replace(reply, top_strategies=self._top_strategies(logits))
            if strategy_ids:
                logits = self._forward(strategy_ids)
            yield reply
            for ids, complete in self._generate(logits):
                text = self._parse(ids, strategy, complete)
                reply = replace(reply, strategy=text.strategy, response=text.response, token_ids=(*strategy_ids, *ids))
                yield reply
        finally:
            if reply.response:
                self.turns.append(reply)
            elif message is not None:
                self.turns.pop()

    def interrupt_reply(self) -> None:
        """End the current reply at its next token. Safe in signal handlers and other threads."""
        self._stopped = True

    def undo(self) -> str:
        """Remove the last reply and the customer's message before it; return that message.

        Raises:
            InputError: there is no customer message.
        """
        if len(self.turns) < 2:
            raise InputError("nothing to undo: there is no customer message")
        *self.turns, message, _ = self.turns
        return str(message)

    def restart(self) -> None:
        """Start a new conversation."""
        self.turns = []
        self._id = _new_id()
        self._saved = set()

    def dialogue(self) -> Dialogue:
        """The conversation so far. A reply without a strategy gets `其它`, since a dialogue needs one.

        Raises:
            InputError: the conversation is empty.
        """
        if not self.turns:
            raise InputError("the conversation is empty")
        turns = [
            Turn(Speaker.CUSTOMER, turn)
            if isinstance(turn, str)
            else Turn(Speaker.SUPPORTER, turn.response, turn.strategy or OTHERS)
            for turn in self.turns
        ]
        return Dialogue(self._id, tuple(turns), "chat", {"checkpoint": self._model.name_or_path})

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a `.jsonl` or `.parquet` file; only its own earlier file is overwritten.

        Raises:
            InputError: the conversation is empty, the file exists, or it cannot be written.
        """
        dialogue, path = self.dialogue(), Path(path).resolve()
        if path not in self._saved and path.exists():
            raise InputError(f"{path}: exists: choose another file")
        write_dialogues(path, [dialogue])
        self._saved.add(path)

    def _add_message(self, message: str | None) -> None:
        if message is None:
            if self.turns or not self.supporter_opens:
                raise InputError("it is the customer's turn: write a message")
            return
        if not self.turns and self.supporter_opens:
            raise InputError("the supporter speaks first: restart the conversation")
        text = message.encode(errors="replace").decode()  # a terminal and a browser may send lone surrogates
        if is_blank(text):
            raise InputError("the message is empty: write something")
        self.turns.append(text.strip())

    def _check_length(self, length: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and length + self._config.max_new_tokens > limit:
            raise InputError(
                f"the conversation has {length} tokens; with a reply of {self._config.max_new_tokens} it exceeds the "
                f"model's context of {limit}: undo a turn or restart"
            )

    def _prefill(self, prompt: list[int]) -> torch.Tensor:
        """Bring the cache to a prompt, reusing their common prefix. Returns the next token's logits, [vocabulary]."""
        # The last token is always computed, for its logits.
        kept = self._cache.rewind(min(common_prefix_length(self._cached_ids, prompt), len(prompt) - 1))
        self._cache.mark()
        self._cached_ids = self._cached_ids[:kept]
        return self._forward(prompt[kept:])

    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Append tokens to the cache. Returns the next token's logits, [vocabulary]."""
        cached, self._cached_ids = self._cached_ids, []  # if the model fails, the cache's content is unknown
        input_ids = torch.tensor([ids], device=self._model.device)
        logits = self._model(input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        self._cached_ids = cached + ids
        return logits

    def _top_strategies(self, logits: torch.Tensor) -> tuple[tuple[Strategy, float], ...]:
        likelihoods = log_likelihoods_from_kv_cache(self._model, self.template, self._cache, logits)
        values, order = likelihoods.softmax(0).topk(NUM_ALTERNATIVES)
        return tuple((STRATEGIES[index], value) for index, value in zip(order.tolist(), values.tolist(), strict=True))

    def _generate(self, logits: torch.Tensor) -> Iterator[tuple[list[int], bool]]:
        """Yield a reply's tokens after each new one, and whether the reply is complete."""
        ids: list[int] = []
        while len(ids) < self._config.max_new_tokens and not self._stopped:
            if self._config.temperature == 0:
                token = logits.argmax().item()
            else:
                token = torch.multinomial(self._samplers(None, logits[None].float()).softmax(-1)[0], 1).item()
            if token in self._generator.stop_ids:
                break
            ids.append(token)
            yield ids, False
            logits = self._forward([token])
        yield ids, True

    def _parse(self, ids: list[int], strategy: Strategy | None, complete: bool) -> Reply:
        """The reply so far, without an incomplete character or strategy label at its end."""
        text = without_thoughts(self._generator.decode(ids))
        if not complete:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
        if strategy is not None:
            return Reply(strategy, text.strip())
        shown = strip_invisible(text)
        if not complete and self.template.config.mode == "joint" and shown.startswith("[") and "]" not in shown:
            return Reply(None, "")
        return self.template.parse(text)


def _new_id() -> str:
    return f"chat-{uuid.uuid4().hex[:12]}"
