"""Sources of the roles' answers: the interface of a backend, and the backend of models on servers."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from csc_train.files import digest
from csc_train.llm.client import Client, Message, RequestAttempt, Sampling
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import ask_structured
from csc_train.synthesis.config import RolesConfig
from csc_train.synthesis.rolecs.personas import DialogueAttempt

WRITING_TEMPERATURE = 0.8
"""The paper's temperature of every writing role."""
MAX_TOKENS = 1024


@dataclass(frozen=True)
class RoleCall:
    """One question to a role, as a backend gets it.

    Attributes:
        owner: id of the dialogue or persona that the question belongs to.
        key: distinguishes the owner's questions; those of the engine sort in their order.
        schema: the schema of the answer.
        seed: of the sampling; equal for equal questions.
        fields, slot: the prompt's variables and the dialogue, for a backend that reads no prompts.
    """

    owner: str
    key: str
    role: str
    messages: Sequence[Message]
    schema: type[BaseModel]
    seed: int
    fields: dict[str, Any]
    slot: DialogueAttempt | None = None

    @property
    def prompt_digest(self) -> str:
        """SHA-256 (hex) of the messages."""
        return digest(list(self.messages))


def call_seed(owner: str, key: str, seed: int) -> int:
    """The seed of a question: 31 bits, which every server accepts."""
    return int(digest([owner, key, seed])[:8], 16) >> 1


class Backend(contextlib.AbstractAsyncContextManager, Protocol):
    """A source of answers; an async context."""

    source: str
    """The `source` of the generated dialogues."""
    concurrency: int
    """Most calls in flight."""

    def model(self, role: str) -> str:
        """The name of a role's model."""
        ...

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of tokens of a role's model; None without prices."""

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call; `observe` is called with every attempt as soon as it ends.

        Raises:
            UnusableServerError: the server rejects the key or cannot be reached.
            LLMError: no usable answer after all retries.
        """
        ...


def role_llm(role: str, shared: LLMConfig, roles: RolesConfig) -> LLMConfig:
    """The model of a role (its own or the shared one), with the role's temperature and longest answer."""
    config = getattr(roles, role)
    llm = config.llm or shared
    default = 0.0 if role.startswith("rolecs_check") else WRITING_TEMPERATURE
    temperature = next(value for value in (config.temperature, llm.temperature, default) if value is not None)
    return replace(llm, temperature=temperature, max_tokens=config.max_tokens or llm.max_tokens or MAX_TOKENS)


class ServerBackend:
    """Models on OpenAI-compatible servers; roles with equal servers share a client and its limits."""

    source = "synthetic"

    def __init__(self, shared: LLMConfig, roles: RolesConfig):
        self._models = {role: role_llm(role, shared, roles) for role in vars(roles)}
        self._asked_roles = list(self._models)
        self._clients: dict[str, Client] = {}
        for role, model in self._models.items():
            server = replace(model, temperature=None, max_tokens=None)  # without the settings of single roles
            equal = (client for client in self._clients.values() if client.config == server)
            self._clients[role] = next(equal, None) or Client(server)
        self.concurrency = sum(client.config.concurrency for client in {*self._clients.values()})
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "ServerBackend":
        async with contextlib.AsyncExitStack() as stack:
            asked = [self._clients[role] for role in self._asked_roles]
            for client in dict.fromkeys(self._clients.values()):
                await stack.enter_async_context(client)
                if client in asked:
                    await client.check()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_) -> None:
        await self._stack.aclose()

    def model(self, role: str) -> str:
        """The name of a role's model."""
        return self._models[role].model

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of tokens of a role's model; None without prices."""
        return self._models[role].cost(prompt_tokens, completion_tokens)

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `Backend`)."""
        client, settings = self._clients[call.role], self._sampling(call)
        answer = await ask_structured(client, call.messages, call.schema, observe=observe, **settings)
        return answer.value

    def request_body(self, call: RoleCall) -> dict[str, Any]:
        """The body of a call's request, for a batch file."""
        return self._clients[call.role].body(**self._sampling(call)) | {"messages": list(call.messages)}

    def _sampling(self, call: RoleCall) -> Sampling:
        model = self._models[call.role]
        return {"seed": call.seed, "temperature": model.temperature, "max_tokens": model.max_tokens}
