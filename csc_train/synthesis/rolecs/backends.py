"""Where answers come from: one interface, behind which stands a model on a server, or a script (see `scripted`)."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from csc_train.files import digest
from csc_train.llm.client import Client, Message, RequestAttempt
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import ask_structured
from csc_train.synthesis.config import RolesConfig
from csc_train.synthesis.rolecs.personas import DialogueSlot

WRITING_TEMPERATURE = 0.8
"""The paper's, for every role that writes."""
MAX_TOKENS = 1024


@dataclass(frozen=True)
class RoleCall:
    """One question to a role.

    Attributes:
        owner: the id of the dialogue or persona that it is asked for.
        key: tells the owner's questions apart; those of the engine sort in their order.
        form: the schema of the answer.
        seed: of the sampling; the same for the same question.
        fields, unit: what the prompt was made of and the dialogue to be, for a backend that reads no prompts.
    """

    owner: str
    key: str
    role: str
    messages: Sequence[Message]
    form: type[BaseModel]
    seed: int
    fields: dict[str, Any]
    unit: DialogueSlot | None = None

    @property
    def prompt(self) -> str:
        """SHA-256 (hex) of the messages."""
        return digest(list(self.messages))


def call_seed(owner: str, key: str, seed: int) -> int:
    """The seed of a question, 31 bits: what servers take everywhere."""
    return int(digest([owner, key, seed])[:8], 16) >> 1


class Backend(Protocol):
    """Whoever answers calls; an async context."""

    source: str
    """The `source` of the dialogues that come of the answers."""
    concurrency: int
    """How many calls it takes at a time."""

    def model(self, role: str) -> str:
        """The name of the model that answers for a role."""

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What tokens of a role's model cost; None where no price is known."""

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call; every attempt at it is told to `observe` as soon as it is over.

        Raises:
            AuthenticationError: the server does not serve this key.
            LLMError: no answer within the budget of attempts.
        """


def model_of(role: str, shared: LLMConfig, roles: RolesConfig) -> LLMConfig:
    """The model of a role (its own, else the one that all share), with the role's temperature and longest answer."""
    own = getattr(roles, role)
    llm = own.llm or shared
    usual = 0.0 if role.startswith("rolecs_check") else WRITING_TEMPERATURE
    temperature = next(value for value in (own.temperature, llm.temperature, usual) if value is not None)
    return replace(llm, temperature=temperature, max_tokens=own.max_tokens or llm.max_tokens or MAX_TOKENS)


class ServedModels:
    """The models behind OpenAI-compatible servers; roles with the same configuration share a client and its limits."""

    source = "synthetic"

    def __init__(self, shared: LLMConfig, roles: RolesConfig):
        self._models = {role: model_of(role, shared, roles) for role in vars(roles)}
        self._clients: list[Client] = []
        for role in self._models:
            if all(client.config != self._server(role) for client in self._clients):
                self._clients.append(Client(self._server(role)))
        self.concurrency = sum(client.config.concurrency for client in self._clients)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "ServedModels":
        for client in self._clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_) -> None:
        await self._stack.aclose()

    def model(self, role: str) -> str:
        """The name of the model that answers for a role."""
        return self._models[role].model

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What tokens of a role's model cost; None where no price is known."""
        return self._models[role].cost(prompt_tokens, completion_tokens)

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `Backend`)."""
        settings = self._settings(call)
        return (
            await ask_structured(self._client(call.role), call.messages, call.form, observe=observe, **settings)
        ).value

    def request(self, call: RoleCall) -> dict[str, Any]:
        """The body of a request for a call, for who sends it in another way."""
        return self._client(call.role).body(**self._settings(call)) | {"messages": list(call.messages)}

    def _server(self, role: str) -> LLMConfig:
        """The configuration of a role's client, which roles that differ in these two only share, and its limits."""
        return replace(self._models[role], temperature=None, max_tokens=None)

    def _client(self, role: str) -> Client:
        return next(client for client in self._clients if client.config == self._server(role))

    def _settings(self, call: RoleCall) -> dict[str, Any]:
        model = self._models[call.role]
        return {"seed": call.seed, "temperature": model.temperature, "max_tokens": model.max_tokens}
