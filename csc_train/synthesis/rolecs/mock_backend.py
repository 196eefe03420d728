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
from csc_train.data.sample_grammar import SAMPLE_SOURCE, ServiceProblem, generate_turns, sample_grammar
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
TEXTS = read_yaml("csc_train.synthesis.rolecs", "mock_texts.yaml")
"""What the roles say beside the sample grammar, by language."""


@dataclass(frozen=True)
class _Conversation:
    """The conversation drawn for a dialogue; `flawed_turn` is the supporter turn, from 0, with the flaw."""

    problem: ServiceProblem
    acts: tuple[str, ...]
    turns: tuple[Turn, ...]
    flaw: str | None
    flawed_turn: int


@functools.lru_cache(maxsize=4096)
def _draw_conversation(slot: DialogueAttempt, language: str) -> _Conversation:
    grammar = sample_grammar(language)
    rng = random.Random(f"script:{slot.id}")
    flaw = rng.choice(FLAWS) if rng.random() < FLAW_SHARE else None
    problem = rng.choice([problem for problem in grammar.problems if problem.topic == slot.topic])
    if flaw == "copy":
        rng = random.Random(f"copy:{problem.name}:{slot.mood}")
    acts, turns = generate_turns(grammar, rng, problem, slot.mood)
    return _Conversation(problem, tuple(acts), tuple(turns), flaw, rng.randrange(2, len(acts) - 1))


class MockBackend(Backend):
    """A backend without a model. It counts each character as a token, for budgets and progress."""

    source = SAMPLE_SOURCE
    concurrency = 8

    def __init__(self, language: str):
        self.language = language

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
        answers = _Answers(call, self.language)
        value = getattr(answers, call.role.rstrip("_0123456789"))()
        text = "" if value is None else json.dumps(value, ensure_ascii=False)
        tokens = sum(len(message["content"]) for message in call.messages), len(text)
        observe(RequestAttempt({"model": "mock"}, 1, None, "", text, *tokens, 0.0))
        if value is None:
            raise LLMError("malformed", "a flaw on purpose", 1, *tokens)
        return call.schema.model_validate(value)


class _Answers:
    """The answer of each role to a call; None for a malformed one."""

    def __init__(self, call: RoleCall, language: str):
        self.fields, self.slot = call.fields, call.slot
        self.language, self.texts = language, TEXTS[language]
        if call.slot is not None:  # else the persona's, who may call about anything
            self.drawn = _draw_conversation(call.slot, language)
        self.turn = len(self.fields.get("history", ())) // 2

    def _flawed(self, flaw: str, turn: int = 0) -> bool:
        """Whether the conversation has this flaw at this turn, counted from the flawed turn."""
        return self.drawn.flaw == flaw and self.turn == self.drawn.flawed_turn + turn

    def persona(self) -> dict[str, Any]:
        items = self.fields["profile"].items()
        facts = self.texts["fact_join"].join(self.texts["fact"].format(name=name, value=value) for name, value in items)
        return {"description": self.texts["persona"].format(facts=facts)}

    def planner(self) -> dict[str, Any]:
        texts = [turn.text for turn in self.drawn.turns[1::2]]
        told = [text for act, text in zip(self.drawn.acts, texts, strict=True) if act in ("problem", "detail")]
        fields = {
            "problem": self.drawn.problem.name,
            "mood": self.slot.mood,
            "said": self.texts["said_join"].join(told),
        }
        return {name: self.texts[name].format_map(fields) for name in ("scenario", "goal")}

    def supporter_assistant(self) -> dict[str, Any]:
        own = self.drawn.turns[2 * self.turn].strategy
        if self._flawed("unknown_strategy"):
            return {"strategy": self.texts["unknown_strategy"]}
        if self._flawed("overused_strategy") or (self._flawed("overused_strategy", 1) and not self.fields["rejected"]):
            own = self.fields["history"][-2].strategy
        return {"strategy": own.name(self.language)}

    def supporter(self) -> dict[str, Any] | None:
        return None if self._flawed("malformed") else {"text": self.drawn.turns[2 * self.turn].text}

    def customer_assistant(self) -> dict[str, Any]:
        return {"direction": self.texts["directions"][self.drawn.acts[self.turn]]}

    def customer(self) -> dict[str, Any]:
        text = self.drawn.turns[2 * self.turn + 1].text
        if self._flawed("private_data"):
            text += self.texts["mobile"].format(tail=f"{int(self.slot.id[:4], 16) % 10_000:04d}")
        return {"text": text, "finished": self.drawn.acts[self.turn] == "bye"}

    def rolecs_check(self) -> dict[str, Any]:
        points = dict.fromkeys(CRITERIA, 1)
        if self.drawn.flaw == "judged_down":
            points[CRITERIA[self.drawn.flawed_turn % len(CRITERIA)]] = 0
        return {"reason": "", **points}
