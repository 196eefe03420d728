"""Replies of a model on an OpenAI-compatible server: many requests at a time, greedy by default."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from csc_train.data.dialogue import ROLES, Turn
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import TurnQueue, TurnRequest
from csc_train.inference.predictions import Prediction, TurnOutcome
from csc_train.llm.client import Client, LLMError, Message, Observer, Sampling, UnusableServerError
from csc_train.llm.config import LLMConfig
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, chat_messages, labelled_text
from csc_train.template.reply import parse_reply
from csc_train.template.segments import LAYOUTS, Layout
from csc_train.template.system_prompt import system_prompt


class OpenAIGenerator:
    """A served model.

    A final model is prompted with token ids if the server accepts them. Text would turn customer text that looks like a
    control token into one, and add a second BOS token for Llama. Otherwise, and for any other model, prompts are chat
    messages with our system prompt. With token ids, the server also computes likelihoods if it supports them.

    Args:
        llm: model and server. A temperature in it replaces greedy decoding.
        observe: called with every request as soon as it ends.
        template: template of the served final model, or mode and language for another model.
        model_hash: SHA-256 (hex) that identifies the served weights.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: InferenceConfig,
        template: DialogueTemplate | TemplateConfig,
        model_hash: str = "",
        observe: Observer | None = None,
    ):
        self._llm, self._config, self._observe = llm, config, observe
        self._template = template if isinstance(template, DialogueTemplate) else None
        self._settings = template.config if isinstance(template, DialogueTemplate) else template
        own = self._template and not llm.user_first
        self._layout = self._template.layout if own else Layout(llm.user_first)
        self.predicts_strategy = self._settings.mode == "joint"
        prompt = self._template.fingerprint if self._template else digest(chat_messages([], self._settings))
        settings = [self._settings.mode, self._settings.language, llm.user_first]
        decoding = [llm.temperature, llm.top_p, llm.max_tokens, llm.extra_body, config.max_new_tokens, config.seed]
        self.config_hash = digest([model_hash, llm.model, prompt, *settings, *decoding])
        # What the server supports; None until `_probe_server`.
        self._takes_token_ids: bool | None = None
        self._returns_likelihoods: bool | None = None

    def run(self, queue: TurnQueue) -> None:
        """Reply at every turn, with as many concurrent requests as `LLMConfig.concurrency` allows.

        Raises:
            InputError: the server cannot be reached at the start, refuses the key, or takes no token ids in mode
                `given`.
        """
        asyncio.run(self._run(queue))

    async def _run(self, queue: TurnQueue) -> None:
        async with Client(self._llm, self._observe) as client:
            await self._probe_server(client)
            if self._settings.mode == "given" and not self._takes_token_ids:
                raise InputError(
                    "template.mode=given: needs a server that takes token ids, such as vLLM; this one does not"
                )
            in_flight: dict[asyncio.Task, TurnRequest] = {}
            refused: UnusableServerError | None = None
            try:
                while True:
                    for request in queue.pop(0 if refused else self._llm.concurrency - len(in_flight)):
                        in_flight[asyncio.create_task(self._predict(client, request))] = request
                    if not in_flight:
                        break
                    done, _ = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        request = in_flight.pop(task)
                        try:
                            queue.complete(request, task.result())
                        except UnusableServerError as failure:  # requests in flight may still succeed
                            refused = failure
            finally:
                for task in in_flight:
                    task.cancel()
                await asyncio.gather(*in_flight, return_exceptions=True)
            if refused:
                raise refused

    async def _probe_server(self, client: Client) -> None:
        """Ask the server for the first time; what it supports then decides the format of all prompts."""
        prompt = self._template.prompt_ids([]) if self._template else []
        counted = await _supported(client.count_tokens(prompt)) if prompt else None
        if self._takes_token_ids is None:
            self._takes_token_ids = counted == len(prompt)
        if not self._takes_token_ids:
            await client.check()
        if self._returns_likelihoods is None:
            wanted = self._takes_token_ids and self._config.likelihoods
            advice = "; evaluation.likelihoods=false skips likelihoods"
            self._returns_likelihoods = wanted and (
                await _supported(client.log_likelihoods(prompt), advice) is not None
            )

    async def _predict(self, client: Client, request: TurnRequest) -> TurnOutcome:
        """The model's reply, with likelihoods if the server returns them."""
        seed = int(digest([self._config.seed, request.dialogue.id, request.turn])[:7], 16)
        decoding: Sampling = {"seed": seed, "temperature": 0, "max_tokens": self._config.max_new_tokens}
        given = request.given_strategy(self._settings.mode)
        details: dict[str, Any] = {"prompt_format": "token_ids" if self._takes_token_ids else "messages"}
        try:
            if self._takes_token_ids:
                prompt = request.prompt_ids(self._template)
                answer = await client.complete(prompt, **decoding)
                details["token_ids"] = self._turn_ids(answer.text, answer.token_ids, given)
                if self._returns_likelihoods:
                    details |= await self._likelihoods(client, request, prompt)
            else:
                prompt = build_messages(request.history, self._settings, self._layout)
                answer = await client.chat(prompt, **decoding)
        except LLMError as failure:
            return request.failure(failure.kind, failure.message)
        if answer.cut_off and self._template is None:
            # The limit of a final model is part of it, as it is locally; that of another model is ours.
            return request.failure("cut_off", "the limit of tokens came before the end of the reply")
        details |= {"served_model": answer.model, "cut_off": answer.cut_off}
        return request.prediction(answer.text, parse_reply(answer.text, self._settings.mode), digest(prompt), **details)

    async def _likelihoods(self, client: Client, request: TurnRequest, prompt: Sequence[int]) -> dict[str, Any]:
        """Likelihoods of the 12 strategies and of the reference turn, as fields of `Prediction`."""
        details: dict[str, Any] = {}
        if self.predicts_strategy:
            prompts = [[*prompt, *self._template.label_ids[strategy.number]] for strategy in STRATEGIES]
            found = await asyncio.gather(*map(client.log_likelihoods, prompts))
            details["label_log_likelihoods"] = tuple(round(sum(each[len(prompt) - 1 :]), 4) for each in found)
        if request.context == "reference":
            example = self._template.encode(request.dialogue)
            start, end = example.turn_offsets[request.turn : request.turn + 2]
            (trained,) = example.trained[start:end].nonzero()
            found = await client.log_likelihoods(example.input_ids[:end].tolist())
            nll = [-found[index - 1] for index in (start + trained).tolist()]
            details |= {"reference_nll": round(sum(nll), 4), "reference_tokens": len(nll)}
        return details

    def _turn_ids(self, text: str, returned: Sequence[int] | None, given: Strategy | None) -> tuple[int, ...]:
        """The tokens of a turn: those that the server returned, or else the encoded text."""
        end = self._template.end_of_turn_id
        ids = list(returned) if returned is not None else self._template.reply_ids(text, given)
        label = self._template.label_ids[given.number] if given else []
        return (*label, *(ids[: ids.index(end)] if end in ids else ids))


async def _supported(request: Coroutine, advice: str = "") -> Any:
    """The answer to a probe; None if the server refuses this kind of request."""
    try:
        return await request
    except LLMError as failure:
        if failure.kind != "bad_request":
            raise InputError(f"llm: {failure.message} ({failure.kind}){advice}") from failure
        return None


def build_messages(
    history: Sequence[Turn | Prediction], config: TemplateConfig, layout: Layout = LAYOUTS[0]
) -> list[Message]:
    """A history as chat messages with `role` and `content`."""
    chat = []
    for turn in history:
        if isinstance(turn, Turn):
            chat.append({"role": ROLES[turn.speaker], "content": labelled_text(turn, config)})
        else:
            chat.append({"role": "assistant", "content": turn.raw_text})
    return layout.arrange(system_prompt(config.mode, config.language), get_language(config.language).opening, chat)
