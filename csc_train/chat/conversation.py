"""A conversation with a model: the supporter speaks first, then the customer and the supporter in turns."""

import itertools
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from csc_train.chat.config import ChatConfig
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import GREETING, OTHERS, STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.inference.hf import HFGenerator
from csc_train.template.likelihood import cached_log_likelihoods
from csc_train.template.reply import Reply

NUM_ALTERNATIVES = 3
"""How many strategies are shown with their probabilities."""


@dataclass(frozen=True)
class ChatReply:
    """What the supporter says at a turn, as far as it is known.

    Attributes:
        strategy: None where it is not known yet, and where the reply names none.
        response: the reply without its strategy.
        likeliest: strategies and their probabilities among the 12, the likeliest first; empty where the model chooses
            none.
        forced: whether the strategy was handed in.
        ids: the turn in later prompts, without header and end.
    """

    strategy: Strategy | None
    response: str
    likeliest: tuple[tuple[Strategy, float], ...]
    forced: bool
    ids: tuple[int, ...]


class Conversation:
    """What was said so far, and the model's cache of it.

    The same texts get the same replies as in an evaluation in generated context, as long as no strategy is forced and
    the temperature is 0.

    Attributes:
        turns: an Answer and a customer's text in turns, an Answer first. Whoever lets the model speak reads them only
            after it has ended.
        template: through which the model talks.
    """

    def __init__(self, generator: HFGenerator, config: ChatConfig):
        self.turns: list[ChatReply | str] = []
        self.template = generator.template
        self._model = generator.model
        self._stops = generator.stop_ids
        self._config = config
        self._warpers = LogitsProcessorList([TopPLogitsWarper(config.top_p)])
        if config.temperature > 0:
            self._warpers.insert(0, TemperatureLogitsWarper(config.temperature))
        self._cache = DynamicCache()
        self._cached: list[int] = []
        self._stopping = False
        self._id = _new_id()
        self._saved: set[Path] = set()

    @torch.inference_mode()
    def reply(self, said: str | None = None, strategy: Strategy | None = None) -> Iterator[ChatReply]:
        """Let the supporter speak, and hear the reply grow; each response begins with the one before.

        When the iterator ends, is closed or fails, what was heard stays in the conversation. If that is nothing, what
        the customer said is taken back as well.

        Args:
            said: by the customer; None where the supporter opens the conversation.
            strategy: to reply with, instead of the one that the model would choose. A model that was trained with
                strategies handed in opens with the greeting, and needs one for every other reply.

        Raises:
            InputError: it is not the supporter's turn, nothing was said, the strategy does not fit the mode in which
                the model was trained, or the conversation is longer than the model can read.
        """
        if self.template.config.mode == "given" and said is None:
            strategy = strategy or GREETING
        self._check_strategy(strategy)
        self._hear(said)
        heard = ChatReply(strategy, "", (), strategy is not None, ())
        try:
            prompt = self._prompt()
            handed_in = self._prompt(strategy)[len(prompt) :]
            self._check_length(len(prompt))
            self._stopping = False
            logits = self._reach(prompt)
            if self.template.config.mode == "joint":
                heard = replace(heard, likeliest=self._likeliest(logits))
            if handed_in:
                logits = self._feed(handed_in)
            yield heard
            for ids, whole in self._generate(logits):
                reply = self._read(ids, strategy, whole)
                heard = replace(heard, strategy=reply.strategy, response=reply.response, ids=(*handed_in, *ids))
                yield heard
        finally:
            if heard.response:
                self.turns.append(heard)
            elif said is not None:
                self.turns.pop()

    def stop(self) -> None:
        """End the reply that is being made at its next token. May be called from a signal handler or a thread."""
        self._stopping = True

    def undo(self) -> str:
        """Take back the last reply and what the customer said before it; returns that.

        What the cache holds of them is dropped when the model speaks next.

        Raises:
            InputError: the customer has said nothing.
        """
        if len(self.turns) < 2:
            raise InputError("there is nothing to take back")
        *self.turns, said, _ = self.turns
        return said

    def restart(self) -> None:
        """Begin a new conversation."""
        self.turns = []
        self._id = _new_id()
        self._saved = set()

    def dialogue(self) -> Dialogue:
        """The conversation so far. A reply that names no strategy has `其它`, since a dialogue needs one.

        Raises:
            InputError: nothing was said.
        """
        if not self.turns:
            raise InputError("nothing was said yet")
        turns = [
            Turn(Speaker.CUSTOMER, turn)
            if isinstance(turn, str)
            else Turn(Speaker.SUPPORTER, turn.response, turn.strategy or OTHERS)
            for turn in self.turns
        ]
        return Dialogue(self._id, tuple(turns), "chat", {"checkpoint": self._model.name_or_path})

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a `.jsonl` or `.parquet` dialogue file; a later state of it may take its place.

        Raises:
            InputError: nothing was said, there is such a file already, or it cannot be written.
        """
        dialogue, path = self.dialogue(), Path(path)
        if path.resolve() not in self._saved and path.exists():
            raise InputError(f"{path} exists: choose another file")
        write_dialogues(path, [dialogue])
        self._saved.add(path.resolve())

    def _check_strategy(self, strategy: Strategy | None) -> None:
        mode = self.template.config.mode
        if mode == "given" and strategy is None:
            raise InputError("this model was trained with strategies handed in: choose one for each reply")
        if mode == "reply_only" and strategy is not None:
            raise InputError("this model was trained without strategies: none can be chosen")

    def _hear(self, said: str | None) -> None:
        if said is None:
            if self.turns:
                raise InputError("it is the customer's turn")
            return
        if not self.turns:
            raise InputError("the supporter speaks first: start again")
        text = said.encode(errors="replace").decode().strip()  # a terminal and a browser may send lone surrogates
        if not text:
            raise InputError("say something")
        self.turns.append(text)

    def _prompt(self, strategy: Strategy | None = None) -> list[int]:
        history = [Turn(Speaker.CUSTOMER, turn) if isinstance(turn, str) else turn.ids for turn in self.turns]
        return self.template.prompt_ids(history, strategy)

    def _check_length(self, length: int) -> None:
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and length + self._config.max_new_tokens > most:
            raise InputError(
                f"the conversation is {length} tokens long, and with a reply of {self._config.max_new_tokens} "
                f"longer than the {most} that the model reads: take something back, or start again"
            )

    def _reach(self, prompt: list[int]) -> torch.Tensor:
        """Make the cache hold a prompt; what they have in common is kept. Returns the logits, [vocabulary]."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._cached, prompt, strict=False))
        kept = min(sum(1 for _ in pairs), len(prompt) - 1)  # the last token is always computed, for its logits
        if kept:
            self._cache.crop(kept - len(self._cached))
        else:
            self._cache = DynamicCache()
        self._cached = self._cached[:kept]
        return self._feed(prompt[kept:])

    def _feed(self, ids: list[int]) -> torch.Tensor:
        """Append ids to the cache. Returns the logits behind them, [vocabulary]."""
        cached, self._cached = self._cached, []  # where the model fails, nothing is known of the cache
        input_ids = torch.tensor([ids], device=self._model.device)
        logits = self._model(input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        self._cached = cached + ids
        return logits

    def _likeliest(self, logits: torch.Tensor) -> tuple[tuple[Strategy, float], ...]:
        likelihoods = cached_log_likelihoods(self._model, self.template, self._cache, logits)
        values, order = likelihoods.softmax(0).topk(NUM_ALTERNATIVES)
        return tuple((STRATEGIES[index], value) for index, value in zip(order.tolist(), values.tolist(), strict=True))

    def _generate(self, logits: torch.Tensor) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of a reply each time it has grown, and whether it is whole."""
        ids: list[int] = []
        while len(ids) < self._config.max_new_tokens and not self._stopping:
            token = self._choose(logits)
            if token in self._stops:
                break
            ids.append(token)
            yield ids, False
            logits = self._feed([token])
        yield ids, True

    def _choose(self, logits: torch.Tensor) -> int:
        if self._config.temperature == 0:
            return logits.argmax().item()
        return torch.multinomial(self._warpers(None, logits[None].float()).softmax(-1)[0], 1).item()

    def _read(self, ids: list[int], strategy: Strategy | None, whole: bool) -> Reply:
        """What a reply says so far, without what may still turn out otherwise."""
        text = self.template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not whole:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
        if strategy is not None:
            return Reply(strategy, text.strip())
        if not whole and self.template.config.mode == "joint" and text.lstrip().startswith("[") and "]" not in text:
            return Reply(None, "")
        return self.template.parse(text)


def _new_id() -> str:
    return f"chat-{uuid.uuid4().hex[:12]}"
