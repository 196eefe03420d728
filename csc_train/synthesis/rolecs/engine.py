"""One RoleCS dialogue as a pure state machine: `next_question(state)` and `advance(state, answer)`.

planner -> supporter assistant -> supporter -> customer assistant -> customer -> supporter assistant -> ... The engine
does no I/O and draws no random numbers. Equal answers give equal dialogues, so a restart can replay recorded answers.
"""

from dataclasses import dataclass, replace
from typing import Any

from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import CLOSURE, OTHERS, Strategy, parse_strategy
from csc_train.synthesis.config import MAX_UTTERANCES

DIALOGUE_ROLES = ("planner", "supporter_assistant", "supporter", "customer_assistant", "customer")
"""The roles of a dialogue, in the order of a round."""
MAX_CONSECUTIVE = 2
"""Most consecutive supporter turns with the same strategy."""
MAX_STRATEGY_ATTEMPTS = 2
"""Most answers of the supporter assistant for one turn; then the strategy becomes 其它."""


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of a dialogue's customer; the prompts put each value into words."""

    patience: str = "ordinary"
    disclosure: str = "when_asked"
    misunderstanding: str = "none"
    demands: str = "reasonable"


@dataclass(frozen=True)
class Scenario:
    """The start of a dialogue.

    Attributes:
        persona: description of the customer in the second person.
        topic: topic of the call, in the dialogue's language.
        mood: the customer's mood at the start, in the dialogue's language.
    """

    persona: str
    topic: str
    mood: str
    behaviour: Behaviour = Behaviour()


@dataclass(frozen=True)
class DialoguePlan:
    """The planner's answer: the events before the call, and the customer's goal."""

    scenario: str
    goal: str


@dataclass(frozen=True)
class DialogueState:
    """A dialogue up to the last answer.

    Attributes:
        strategy: strategy of the supporter's next turn, once chosen.
        direction: direction of the customer's next utterance, once given.
        rejected: labels that were rejected for the strategy of the next turn.
        unknown, overused: number of strategies that became 其它 because the label was unknown, or came a third time.
        finished: the customer has ended the conversation.
        stuck: no strategy is left.
    """

    start: Scenario
    max_utterances: int = MAX_UTTERANCES
    plan: DialoguePlan | None = None
    turns: tuple[Turn, ...] = ()
    strategy: Strategy | None = None
    direction: str | None = None
    rejected: tuple[str, ...] = ()
    unknown: int = 0
    overused: int = 0
    finished: bool = False
    stuck: bool = False

    @property
    def exhausted(self) -> Strategy | None:
        """The strategy of all last `MAX_CONSECUTIVE` supporter turns, which the next turn may not use."""
        last = [turn.strategy for turn in self.turns if turn.strategy][-MAX_CONSECUTIVE:]
        return last[0] if len(last) == MAX_CONSECUTIVE and len(set(last)) == 1 else None


@dataclass(frozen=True)
class RoleQuestion:
    """A question to a role; `fields` hold everything that the role may see.

    The fields of the customer and its assistant contain no strategy.
    """

    role: str
    fields: dict[str, Any]


def stop_reason(state: DialogueState) -> str | None:
    """Why the dialogue is over: `farewell`, `customer_finished`, `length` or `no_strategy`; None if it is not.

    A customer who has finished gets exactly one farewell turn, unless `max_utterances` is reached.
    """
    if state.turns and state.turns[-1].strategy is CLOSURE and not state.finished:
        return "farewell"
    full = len(state.turns) >= state.max_utterances
    if state.finished and (full or state.turns[-1].speaker is Speaker.SUPPORTER):
        return "customer_finished"
    if full:
        return "length"
    return "no_strategy" if state.stuck else None


def next_question(state: DialogueState) -> RoleQuestion | None:
    """The next question; None once the dialogue is over."""
    if stop_reason(state):
        return None
    start = state.start
    if state.plan is None:
        return RoleQuestion("planner", {"persona": start.persona, "topic": start.topic, "mood": start.mood})
    if not state.turns or state.turns[-1].speaker is Speaker.CUSTOMER:
        known = {"topic": start.topic, "history": state.turns}
        if state.strategy is None:
            choice = {"exhausted": state.exhausted, "rejected": state.rejected}
            return RoleQuestion("supporter_assistant", known | choice)
        return RoleQuestion("supporter", known | {"strategy": state.strategy})
    known = {
        "persona": start.persona,
        "mood": start.mood,
        "behaviour": start.behaviour,
        "scenario": state.plan.scenario,
        "goal": state.plan.goal,
        "history": tuple(Turn(turn.speaker, turn.text) for turn in state.turns),
    }
    if state.direction is None:
        return RoleQuestion("customer_assistant", known)
    return RoleQuestion("customer", known | {"direction": state.direction})


def advance(state: DialogueState, answer: Any) -> DialogueState:
    """The state after the answer to `next_question(state)`; `answer` matches the role's schema (see `roles`)."""
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
        case _:  # the customer
            state = replace(state, turns=(*state.turns, Turn(Speaker.CUSTOMER, answer.text)), direction=None)
            # The farewell is fixed, so the supporter assistant is not asked.
            return replace(state, finished=True, strategy=CLOSURE) if answer.finished else state


def _choose(state: DialogueState, label: str) -> DialogueState:
    """Take the strategy of `label`, or reject it; after the last attempt fall back to 其它 and count the reason."""
    try:
        strategy = parse_strategy(label)
    except ValueError:
        strategy = None
    if strategy is not None and strategy is not state.exhausted:
        return replace(state, strategy=strategy, rejected=())
    if len(state.rejected) + 1 < MAX_STRATEGY_ATTEMPTS:
        return replace(state, rejected=(*state.rejected, label))
    count = {"unknown": state.unknown + 1} if strategy is None else {"overused": state.overused + 1}
    if state.exhausted is OTHERS:
        return replace(state, stuck=True, **count)
    return replace(state, strategy=OTHERS, rejected=(), **count)


def dialogue_outcome(state: DialogueState) -> dict[str, Any]:
    """The extra columns of a finished dialogue."""
    known = {"scenario": state.plan.scenario, "goal": state.plan.goal, "stop": stop_reason(state)}
    counts = {"unknown_strategies": state.unknown, "overused_strategies": state.overused}
    return known | vars(state.start.behaviour) | counts
