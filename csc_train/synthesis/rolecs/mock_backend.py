"""A backend without a model: the sample grammar speaks for the roles, through the same engine, schemas and filters.

The whole conversation of a dialogue is drawn at its first question, from its id alone, and each question is answered
from its place in it; so an answer depends on nothing but the question. A share of the dialogues is spoilt on purpose,
in a different way each, so that every rule has something to find.
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
from csc_train.data.sample_grammar import SAMPLE_SOURCE, SERVICE_PROBLEMS, ServiceProblem, write_turns
from csc_train.errors import InputError
from csc_train.llm.client import LLMError, RequestAttempt
from csc_train.synthesis.config import CRITERIA
from csc_train.synthesis.rolecs.backends import RoleCall
from csc_train.synthesis.rolecs.personas import DialogueSlot

FLAWS = ("unknown_strategy", "overused_strategy", "private_data", "copy", "judged_down", "malformed")
"""What may be wrong with a dialogue: the assistant keeps naming a strategy that does not exist, or the same one a third
time; a phone number is left in a text; the dialogue repeats another; the judge finds a criterion unmet; an answer has
no form that can be read."""
FLAWED = 0.12
"""Share of the dialogues with a flaw."""
DIRECTIONS = {
    # customer act of the grammar: the direction that the customer's assistant gives
    "problem": "说出遇到的问题", "vague": "先笼统地提一下来意", "account": "请客服查看登记情况",
    "smalltalk": "说一句闲话",
    "hold": "请客服等一等", "identity": "报出身份资料", "question_identity": "问为什么要核对身份",
    "confirm": "确认客服的理解",
    "correct": "指出客服漏听了什么", "recheck": "请客服复述一遍", "detail": "回答客服问的细节", "why": "追问原因",
    "how": "问该怎么办", "doit": "请客服直接办理", "agree": "同意客服的办法", "wait": "等客服办理并问进度",
    "fails": "说明还没有解决", "done": "说明已经解决", "await": "表示愿意等消息", "self": "表示会自己处理",
    "good": "给出好评", "bad": "给出差评", "interest": "问今后的服务", "join": "问怎样参加", "bye": "结束通话",
    "upset": "表达情绪",
}  # fmt: skip


@dataclass(frozen=True)
class _Drawn:
    """A conversation drawn for one dialogue; `spoilt` is the supporter turn, from 0, that its flaw is about."""

    problem: ServiceProblem
    acts: tuple[str, ...]
    turns: tuple[Turn, ...]
    flaw: str | None
    spoilt: int


@functools.lru_cache(maxsize=4096)
def _drawn(unit: DialogueSlot) -> _Drawn:
    rng = random.Random(f"script:{unit.id}")
    flaw = rng.choice(FLAWS) if rng.random() < FLAWED else None
    problem = rng.choice([problem for problem in SERVICE_PROBLEMS if problem.topic == unit.topic])
    if flaw == "copy":
        rng = random.Random(f"copy:{problem.name}:{unit.mood}")
    acts, turns = write_turns(rng, problem, unit.mood)
    return _Drawn(problem, tuple(acts), tuple(turns), flaw, rng.randrange(2, len(acts) - 1))


class MockBackend:
    """The backend. It counts a character as a token, so that budgets and progress have something to count."""

    source = SAMPLE_SOURCE
    concurrency = 8

    def __init__(self, language: str):
        if language != "zh":
            raise InputError(f"synthesis.language={language}: llm=mock speaks zh only")

    async def __aenter__(self) -> "MockBackend":
        return self

    async def __aexit__(self, *_) -> None:
        pass

    def model(self, role: str) -> str:
        """The name under which the script's answers are recorded."""
        return "mock"

    def cost(self, role: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Nothing."""
        return 0.0

    async def ask(self, call: RoleCall, observe: Callable[[RequestAttempt], None]) -> BaseModel:
        """The answer to a call (see `backends.Backend`)."""
        await asyncio.sleep(0)  # as a server would: lets others go on
        value = _persona(call) if call.unit is None else getattr(_Answers(call), call.role.rstrip("_0123456789"))()
        text = "" if value is None else json.dumps(value, ensure_ascii=False)
        tokens = sum(len(message["content"]) for message in call.messages), len(text)
        observe(RequestAttempt({"model": "mock"}, 1, None, "", text, *tokens, 0.0))
        if value is None:
            raise LLMError("malformed", "the script spoils this answer", 1, *tokens)
        return call.form.model_validate(value)


def _persona(call: RoleCall) -> dict[str, Any]:
    return {
        "description": "你的情况是："
        + "，".join(f"{name}{value}" for name, value in call.fields["profile"].items())
        + "。"
    }


class _Answers:
    """What each role says to a call; None where the answer is spoilt."""

    def __init__(self, call: RoleCall):
        self.fields = call.fields
        self.form = call.form
        self.drawn = _drawn(call.unit)
        self.unit = call.unit
        self.turn = len(self.fields.get("history", ())) // 2

    def _flawed(self, flaw: str, turn: int = 0) -> bool:
        """Whether the conversation has this flaw at this turn, counted from the spoilt one."""
        return self.drawn.flaw == flaw and self.turn == self.drawn.spoilt + turn

    def planner(self) -> dict[str, Any]:
        said = [turn.text for turn in self.drawn.turns[1::2]]
        told = [text for act, text in zip(self.drawn.acts, said, strict=True) if act in ("problem", "detail")]
        scenario = f"客户为{self.drawn.problem.name}的事来电，心情{self.unit.mood}。客户会这样说：{''.join(told)}"
        return {"scenario": scenario, "goal": f"弄清{self.drawn.problem.name}的问题并得到处理。"}

    def supporter_assistant(self) -> dict[str, Any]:
        own = self.drawn.turns[2 * self.turn].strategy
        if self._flawed("unknown_strategy"):
            return {"strategy": "转移话题"}
        if self._flawed("overused_strategy") or (self._flawed("overused_strategy", 1) and not self.fields["refused"]):
            own = self.fields["history"][-2].strategy
        return {"strategy": own.zh}

    def supporter(self) -> dict[str, Any] | None:
        return None if self._flawed("malformed") else {"text": self.drawn.turns[2 * self.turn].text}

    def customer_assistant(self) -> dict[str, Any]:
        return {"direction": DIRECTIONS[self.drawn.acts[self.turn]]}

    def customer(self) -> dict[str, Any]:
        text = self.drawn.turns[2 * self.turn + 1].text
        if self._flawed("private_data"):
            text += f"我的手机是1380000{int(self.unit.id[:4], 16) % 10_000:04d}。"
        return {"text": text, "finished": self.drawn.acts[self.turn] == "bye"}

    def rolecs_check(self) -> dict[str, Any]:
        points = dict.fromkeys(CRITERIA, 1)
        if self.drawn.flaw == "judged_down":
            points[CRITERIA[self.drawn.spoilt % len(CRITERIA)]] = 0
        return {"reason": "", **points}
