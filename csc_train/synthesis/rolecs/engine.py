"""One RoleCS dialogue as a pure state machine: `state -> question`, `state + answer -> state`, nothing else.

planner -> supporter assistant -> supporter -> customer assistant -> customer -> supporter assistant -> ... No I/O and
no chance: the same answers always give the same dialogue, which is what lets a restart replay committed answers.
"""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import CLOSURE, OTHERS, Strategy, parse_strategy

ROLES = ("planner", "supporter_assistant", "supporter", "customer_assistant", "customer")
"""Who is asked, in the order of a round."""
MOST_UTTERANCES = 50
RUN_LENGTH = 2
"""How often the same strategy may be used running."""
STRATEGY_ATTEMPTS = 2
"""How often the supporter assistant is asked for one turn's strategy before it becomes 其它."""
STOPS = ("farewell", "customer_finished", "length", "no_strategy")


@dataclass(frozen=True)
class Behaviour:
    """How the customer of one dialogue behaves; each knob is a name that the prompts put into words."""

    patience: str = "ordinary"
    disclosure: str = "when_asked"
    misunderstanding: str = "none"
    demands: str = "reasonable"


@dataclass(frozen=True)
class Scenario:
    """What a dialogue begins with.

    Attributes:
        persona: who the customer is, told to them in the second person.
        topic: what the call is about, in the dialogue's language.
        mood: how the customer feels at the start, in the dialogue's language.
    """

    persona: str
    topic: str
    mood: str
    behaviour: Behaviour = Behaviour()


@dataclass(frozen=True)
class DialoguePlan:
    """The planner's answer: what happened before the call, and what the customer wants of it."""

    scenario: str
    goal: str


@dataclass(frozen=True)
class DialogueState:
    """A dialogue up to the last answer.

    Attributes:
        strategy: what the supporter is to say next, once chosen.
        direction: where the customer's next utterance goes, once given.
        refused: the labels that were refused for the strategy now asked for.
        unknown, overused: how many strategies became 其它 because none was known, or the same came a third time.
        finished: the customer has ended the talk.
        stuck: no strategy was left to choose.
    """

    scene: Scenario
    most_utterances: int = MOST_UTTERANCES
    plan: DialoguePlan | None = None
    turns: tuple[Turn, ...] = ()
    strategy: Strategy | None = None
    direction: str | None = None
    refused: tuple[str, ...] = ()
    unknown: int = 0
    overused: int = 0
    finished: bool = False
    stuck: bool = False

    @property
    def spent(self) -> Strategy | None:
        """The strategy that may not be used now, because the last `RUN_LENGTH` supporter turns all had it."""
        last = [turn.strategy for turn in self.turns if turn.strategy][-RUN_LENGTH:]
        return last[0] if len(last) == RUN_LENGTH and len(set(last)) == 1 else None


@dataclass(frozen=True)
class RoleQuestion:
    """What is asked next, of whom, and all that this role may see.

    `fields` of the customer and its assistant hold no strategy anywhere.
    """

    role: str
    fields: dict[str, Any]


def stop_reason(state: DialogueState) -> str | None:
    """Why the dialogue is over, one of `STOPS`, or None; asked after every utterance, and the first reason wins.

    A customer who has finished gets exactly one farewell turn, unless there is no utterance left for it: no dialogue is
    longer than `most_utterances`.
    """
    if state.turns and state.turns[-1].strategy is CLOSURE and not state.finished:
        return "farewell"
    full = len(state.turns) >= state.most_utterances
    if state.finished and (full or state.turns[-1].speaker is Speaker.SUPPORTER):
        return "customer_finished"
    if full:
        return "length"
    return "no_strategy" if state.stuck else None


def next_question(state: DialogueState) -> RoleQuestion | None:
    """What is asked next; None once the dialogue is over."""
    if stop_reason(state):
        return None
    scene = state.scene
    if state.plan is None:
        return RoleQuestion("planner", {"persona": scene.persona, "topic": scene.topic, "mood": scene.mood})
    if len(state.turns) % 2 == 0:
        known = {"topic": scene.topic, "history": state.turns}
        if state.strategy is None:
            choice = {"spent": state.spent, "refused": state.refused}
            return RoleQuestion("supporter_assistant", known | choice)
        return RoleQuestion("supporter", known | {"strategy": state.strategy})
    known = {
        "persona": scene.persona,
        "mood": scene.mood,
        "behaviour": scene.behaviour,
        "scenario": state.plan.scenario,
        "goal": state.plan.goal,
        "history": tuple(Turn(turn.speaker, turn.text) for turn in state.turns),
    }
    if state.direction is None:
        return RoleQuestion("customer_assistant", known)
    return RoleQuestion("customer", known | {"direction": state.direction})


def advance(state: DialogueState, answer: BaseModel) -> DialogueState:
    """The state after `answer` (an instance of the asked role's schema, see `roles`) to `next_question(state)`."""
    match next_question(state).role:
        case "planner":
            return replace(state, plan=DialoguePlan(answer.scenario, answer.goal))
        case "supporter_assistant":
            return _choose(state, answer.strategy)
        case "supporter":
            turn = Turn(Speaker.SUPPORTER, answer.text, state.strategy)
            return replace(state, turns=(*state.turns, turn), strategy=None)
        case "customer_assistant":
            return replace(state, direction=answer.direction)
        case "customer":
            state = replace(state, turns=(*state.turns, Turn(Speaker.CUSTOMER, answer.text)), direction=None)
            # The farewell is not a choice any more, so nobody is asked for it.
            return replace(state, finished=True, strategy=CLOSURE) if answer.finished else state


def _choose(state: DialogueState, label: str) -> DialogueState:
    """Take the strategy that `label` names, ask once more, or fall back to 其它 and count why."""
    try:
        strategy = parse_strategy(label)
    except ValueError:
        strategy = None
    if strategy is not None and strategy is not state.spent:
        return replace(state, strategy=strategy, refused=())
    if len(state.refused) + 1 < STRATEGY_ATTEMPTS:
        return replace(state, refused=(*state.refused, label))
    count = {"unknown": state.unknown + 1} if strategy is None else {"overused": state.overused + 1}
    if state.spent is OTHERS:
        return replace(state, stuck=True, **count)
    return replace(state, strategy=OTHERS, refused=(), **count)


def dialogue_outcome(state: DialogueState) -> dict[str, Any]:
    """What a finished dialogue's row says besides its turns."""
    known = {"scenario": state.plan.scenario, "goal": state.plan.goal, "stop": stop_reason(state)}
    counts = {"unknown_strategies": state.unknown, "overused_strategies": state.overused}
    return known | vars(state.scene.behaviour) | counts
