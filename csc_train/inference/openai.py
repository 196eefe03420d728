"""A model on an OpenAI-compatible server as the system under evaluation: greedy decoding, many requests at a time."""

import asyncio
from collections.abc import Sequence
from typing import Any

from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import Generation, GenerationError, TurnQueue, TurnRequest
from csc_train.llm.client import AuthenticationFailure, Client, LLMFailure, Message
from csc_train.llm.config import LLMConfig
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, chat_messages
from csc_train.template.reply import Reply, format_reply, parse_reply
from csc_train.template.system_prompt import OPENING


class OpenAIGenerator:
    """Replies of a served model.

    With the template of a checkpoint, the server is asked by token ids where it takes them: a text would turn what
    looks like a control string into one, and give Llama a second BOS. It is asked by chat messages where it does not,
    and where the model is none of ours: it is then told what to do by our system prompt alone. By token ids it is also
    asked how likely the 12 labels and the reference's turns are, where it tells that.

    Args:
        llm: the model and its server. Where it names a temperature, decoding is not greedy.
        config: how replies are generated.
        template: of the checkpoint that is served, or the mode and language in which a foreign model is asked.
        origin: SHA-256 (hex) of what says which checkpoint is served.
    """

    def __init__(
        self, llm: LLMConfig, config: InferenceConfig, template: DialogueTemplate | TemplateConfig, origin: str = ""
    ):
        self._llm, self._config = llm, config
        self._template = template if isinstance(template, DialogueTemplate) else None
        self._settings = self._template.config if self._template else template
        self.predicts_strategy = self._settings.mode == "joint"
        prompt = self._template.fingerprint if self._template else digest(chat_messages([], self._settings))
        asked = [self._settings.mode, self._settings.language, llm.user_first]
        decoding = [llm.temperature, llm.top_p, llm.max_tokens, llm.extra_body, config.max_new_tokens, config.seed]
        self.config_hash = digest([origin, llm.model, prompt, *asked, *decoding])
        # What the server can do, once it was asked.
        self._by_ids: bool | None = None
        self._likelihoods_told: bool | None = None

    def run(self, queue: TurnQueue) -> None:
        """Answer every turn, as many at a time as the server bears.

        Raises:
            InputError: the server is not there when the work begins, does not serve the key, or takes no token ids
                where a strategy is to be handed in.
        """
        asyncio.run(self._run(queue))

    async def _run(self, queue: TurnQueue) -> None:
        async with Client(self._llm) as client:
            await self._ask_abilities(client)
            if self._settings.mode == "given" and not self._by_ids:
                raise InputError("template.mode=given: a strategy is handed in by token ids, and the server takes none")
            under_way: dict[asyncio.Task, TurnRequest] = {}
            refused: AuthenticationFailure | None = None
            try:
                while True:
                    for request in queue.pop(0 if refused else self._llm.concurrency - len(under_way)):
                        under_way[asyncio.create_task(self._reply(client, request, queue.context))] = request
                    if not under_way:
                        break
                    done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        request = under_way.pop(task)
                        try:
                            queue.complete(request, task.result())
                        except AuthenticationFailure as failure:  # what is under way was asked, and may be answered
                            refused = failure
            finally:
                for task in under_way:
                    task.cancel()
                await asyncio.gather(*under_way, return_exceptions=True)
            if refused:
                raise refused

    async def _ask_abilities(self, client: Client) -> None:
        """Find out what the server can do, once: all turns are asked for in one way."""
        if self._by_ids is None:
            self._by_ids = await self._takes_ids(client)
        if self._likelihoods_told is None:
            wanted = self._by_ids and self._config.likelihoods
            self._likelihoods_told = wanted and await self._tells_likelihoods(client)

    async def _takes_ids(self, client: Client) -> bool:
        """Whether the server takes token ids, and the very ones it is sent."""
        if self._template is None:
            return False
        probe = self._template.prompt_ids([])
        try:
            answer = await client.complete(probe, temperature=0, max_tokens=1)
        except AuthenticationFailure:
            raise
        except LLMFailure as failure:
            if failure.kind != "bad_request":
                raise InputError(f"llm: {failure.message} ({failure.kind})") from failure
            return False
        return answer.prompt_tokens == len(probe)

    async def _tells_likelihoods(self, client: Client) -> bool:
        """Whether the server tells how likely the tokens of a prompt are."""
        try:
            await client.log_likelihoods(self._template.prompt_ids([]))
        except AuthenticationFailure:
            raise
        except LLMFailure as failure:
            if failure.kind != "bad_request":
                advice = "evaluation.likelihoods=false does without the likelihoods of a prompt"
                raise InputError(f"llm: {failure.message} ({failure.kind}); {advice}") from failure
            return False
        return True

    async def _reply(self, client: Client, request: TurnRequest, context: str) -> Generation | GenerationError:
        """What the model says, and how likely it finds what else could be said, where the server tells that."""
        seed = int(digest([self._config.seed, request.dialogue.id, request.turn])[:7], 16)
        decoding = {"seed": seed, "temperature": 0, "max_tokens": self._config.max_new_tokens}
        given = request.dialogue.turns[request.turn].strategy if self._settings.mode == "given" else None
        told: dict[str, Any] = {}
        try:
            if self._by_ids:
                history = [turn if isinstance(turn, Turn) else turn.ids for turn in request.history]
                prompt = self._template.prompt_ids(history, given)
                answer = await client.complete(prompt, **decoding)
                if self._likelihoods_told:
                    told = await self._likelihoods(client, request, prompt, context)
            else:
                prompt = chat_of(request.history, self._settings, self._llm.user_first)
                answer = await client.chat(prompt, **decoding)
        except AuthenticationFailure:
            raise
        except LLMFailure as failure:
            return GenerationError(failure.kind, failure.message)
        return Generation(
            answer.text,
            parse_reply(answer.text, self._settings.mode),
            digest(prompt),
            self._ids(answer.text, answer.token_ids, given) if self._by_ids else (),
            prompt_format="ids" if self._by_ids else "messages",
            served_model=answer.model,
            **told,
        )

    async def _likelihoods(
        self, client: Client, request: TurnRequest, prompt: Sequence[int], context: str
    ) -> dict[str, Any]:
        """How likely the model finds the 12 labels and the reference's turn, as fields of `Generation`."""
        facts: dict[str, Any] = {}
        if self.predicts_strategy:
            labelled = [[*prompt, *self._template.label_ids[strategy.number]] for strategy in STRATEGIES]
            found = await asyncio.gather(*map(client.log_likelihoods, labelled))
            facts["label_log_likelihoods"] = tuple(round(sum(each[len(prompt) - 1 :]), 4) for each in found)
        if context == "reference":
            example = self._template.encode(request.dialogue)
            start, end = example.turn_offsets[request.turn : request.turn + 2]
            (trained,) = example.trained[start:end].nonzero()
            found = await client.log_likelihoods(example.input_ids[:end].tolist())
            own = [-found[place - 1] for place in (start + trained).tolist()]
            facts |= {"reference_nll": round(sum(own), 4), "reference_tokens": len(own)}
        return facts

    def _ids(self, text: str, told: Sequence[int] | None, given: Strategy | None) -> tuple[int, ...]:
        """The tokens of a turn: as the server tells them, else those that its text is encoded as."""
        end = self._template.end_of_turn_id
        own = list(told) if told is not None else self._template.literal_ids(text)
        handed_in = self._template.label_ids[given.number] if given else []
        return (*handed_in, *(own[: own.index(end)] if end in own else own))


def chat_of(history: Sequence[Turn | Generation], config: TemplateConfig, user_first: bool = False) -> list[Message]:
    """A history as chat messages of role and content, which is all that a server hands to its chat template.

    Args:
        user_first: see `LLMConfig.user_first`.
    """
    chat = chat_messages([], config)
    if user_first:
        chat.append({"role": "user", "content": OPENING[config.language]})
    for turn in history:
        if not isinstance(turn, Turn):
            chat.append({"role": "assistant", "content": turn.raw_text})
        elif turn.speaker is Speaker.CUSTOMER:
            chat.append({"role": "user", "content": turn.text})
        else:
            strategy = None if config.mode == "reply_only" else turn.strategy
            chat.append({"role": "assistant", "content": format_reply(Reply(strategy, turn.text), config.language)})
    return chat
