"""The mock backend: the sample grammar answers for the roles, through the same engine, schemas and filters.

The whole conversation of a dialogue is drawn from its id, and each answer is read off it, so answers depend on the
question only. A share of the dialogues gets a flaw on purpose, so that every filter rule has something to drop.
"""

import asyncio
import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from csc_train.data.dialogue import Turn
from csc_train.data.sample_grammar import SAMPLE_SOURCE, SERVICE_PROBLEMS, ServiceProblem, generate_turns
from csc_train.errors import InputError
from csc_train.llm.client import LLMError, RequestAttempt
from csc_train.synthesis.config import CRITERIA
from csc_train.synthesis.rolecs.backends import Backend, RoleCall
from csc_train.synthesis.rolecs.personas import DialogueAttempt
from csc_train.templates import read_yaml

FLAWS = ("unknown_strategy", "overused_strategy", "private_data", "copy", "judged_down", "malformed")
"""The flaws of dialogues: the assistant names an unknown strategy, or one a third time; a text has a phone number; the
dialogue copies another; the judge withholds a point; an answer is malformed."""
FLAW_SHARE = 0.12
"""Share of the dialogues with a flaw."""
DIRECTIONS = read_yaml("csc_train.synthesis.rolecs", "mock_directions.yaml")
"""Directions by the customer assistant, by customer act of the sample grammar."""


@dataclass(frozen=True)
class _Conversation:
    """The conversation drawn for a dialogue; `flawed_turn` is the supporter turn, from 0, with the flaw."""

    problem: ServiceProblem
    acts: tuple[str, ...]
    turns: tuple[Turn, ...]
    flaw: str | None
    flawed_turn: int


@functools.lru_cache(maxsize=4096)
def _draw_conversation(slot: DialogueAttempt) -> _Conversation:
    rng = random.Random(f"script:{slot.id}")
    flaw = rng.choice(FLAWS) if rng.random() < FLAW_SHARE else None
    problem = rng.choice([problem for problem in SERVICE_PROBLEMS if problem.topic == slot.topic])
    if flaw == "copy":
        rng = random.Random(f"copy:{problem.name}:{slot.mood}")
    acts, turns = generate_turns(rng, problem, slot.mood)
    return _Conversation(problem, tuple(acts), tuple(turns), flaw, rng.randrange(2, len(acts) - 1))


class MockBackend(Backend):
    """A backend without a model. It counts each character as a token, for budgets and progress."""

    source = SAMPLE_SOURCE
    concurrency = 8

    def __init__(self, language: str):
        if language != "zh":
            raise InputError(f"synthesis.language={language}: llm=mock supports zh only")

    async def __aexit__(self, *_) -> None:
        pass

    def model(self, role: str) -> str:
        """The model name of recorded answers."""
        return "mock"

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Always free."""
        return 0.0

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `backends.Backend`)."""
        await asyncio.sleep(0)  # lets other tasks run, as a server would
        value = _persona(call) if call.slot is None else getattr(_Answers(call), call.role.rstrip("_0123456789"))()
        text = "" if value is None else json.dumps(value, ensure_ascii=False)
        tokens = sum(len(message["content"]) for message in call.messages), len(text)
        observe(RequestAttempt({"model": "mock"}, 1, None, "", text, *tokens, 0.0))
        if value is None:
            raise LLMError("malformed", "a flaw on purpose", 1, *tokens)
        return call.schema.model_validate(value)


def _persona(call: RoleCall) -> dict[str, Any]:
    facts = "，".join(f"{name}{value}" for name, value in call.fields["profile"].items())
    return {"description": f"你的情况是：{facts}。"}


class _Answers:
    """The answer of each role to a call; None for a malformed one."""

    def __init__(self, call: RoleCall):
        self.fields = call.fields
        self.drawn = _draw_conversation(call.slot)
        self.slot = call.slot
        self.turn = len(self.fields.get("history", ())) // 2

    def _flawed(self, flaw: str, turn: int = 0) -> bool:
        """Whether the conversation has this flaw at this turn, counted from the flawed turn."""
        return self.drawn.flaw == flaw and self.turn == self.drawn.flawed_turn + turn

    def planner(self) -> dict[str, Any]:
        said = [turn.text for turn in self.drawn.turns[1::2]]
        told = [text for act, text in zip(self.drawn.acts, said, strict=True) if act in ("problem", "detail")]
        scenario = f"客户为{self.drawn.problem.name}的事来电，心情{self.slot.mood}。客户会这样说：{''.join(told)}"
        return {"scenario": scenario, "goal": f"弄清{self.drawn.problem.name}的问题并得到处理。"}

    def supporter_assistant(self) -> dict[str, Any]:
        own = self.drawn.turns[2 * self.turn].strategy
        if self._flawed("unknown_strategy"):
            return {"strategy": "转移话题"}
        if self._flawed("overused_strategy") or (self._flawed("overused_strategy", 1) and not self.fields["rejected"]):
            own = self.fields["history"][-2].strategy
        return {"strategy": own.zh}

    def supporter(self) -> dict[str, Any] | None:
        return None if self._flawed("malformed") else {"text": self.drawn.turns[2 * self.turn].text}

    def customer_assistant(self) -> dict[str, Any]:
        return {"direction": DIRECTIONS[self.drawn.acts[self.turn]]}

    def customer(self) -> dict[str, Any]:
        text = self.drawn.turns[2 * self.turn + 1].text
        if self._flawed("private_data"):
            text += f"我的手机是1380000{int(self.slot.id[:4], 16) % 10_000:04d}。"
        return {"text": text, "finished": self.drawn.acts[self.turn] == "bye"}

    def rolecs_check(self) -> dict[str, Any]:
        points = dict.fromkeys(CRITERIA, 1)
        if self.drawn.flaw == "judged_down":
            points[CRITERIA[self.drawn.flawed_turn % len(CRITERIA)]] = 0
        return {"reason": "", **points}
