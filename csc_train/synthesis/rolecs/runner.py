"""Makes dialogues until so many are accepted: bounded concurrency, a budget, and nothing lost when it is stopped.

Which dialogues come out does not depend on timing. The places of the quotas have a fixed order; each place tries one
dialogue after the other until one passes every rule; and whether a dialogue repeats another is decided in the order of
the places, however early it was finished.
"""

import asyncio
import collections
import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel

from csc_train.data.dialogue import Dialogue
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.llm.client import AuthenticationError, LLMError, Message, RequestAttempt
from csc_train.llm.config import LLMConfig
from csc_train.synthesis.config import BudgetConfig, DuplicatesConfig, RoleCSCheckConfig, SynthesisConfig
from csc_train.synthesis.filters.llm_checks import check_rolecs
from csc_train.synthesis.filters.rules import DuplicateFilter, FilterVerdict, check_private_data
from csc_train.synthesis.rolecs.backends import Backend, RoleCall, call_seed, model_of
from csc_train.synthesis.rolecs.batch_api import PendingBatch
from csc_train.synthesis.rolecs.engine import (
    DialogueState,
    RoleQuestion,
    Scenario,
    advance,
    dialogue_outcome,
    next_question,
    stop_reason,
)
from csc_train.synthesis.rolecs.personas import (
    MOODS,
    TOPICS,
    DialogueSlot,
    Profile,
    QuotaSlot,
    chosen,
    dialogue_slot,
    draw_behaviour,
    quota_slots,
)
from csc_train.synthesis.rolecs.roles import Prompts
from csc_train.synthesis.rolecs.store import ACCEPTED, FAILED, FINISHED, REJECTED, SETTLED, SynthesisStore
from csc_train.synthesis.utterances import utterances_of

RULES = ("answers", "ended", "private data", "five criteria", "near-duplicates")
"""What a dialogue goes through, in order; the first two are whether every answer could be had, and an end was found."""
PASSING = ("connection", "timeout", "rate_limit", "server_error")
"""Failures that say nothing about a dialogue: it is taken up again where it stopped."""
TRIES = 3
"""How often a question may fail so before it counts against its dialogue."""
AHEAD = 16
"""Places begun, per call at a time, before the earliest of them is settled."""


@dataclass
class Progress:
    """How far a synthesis is.

    Attributes:
        accepted: dialogues accepted, those of earlier starts included.
        empty: places of the quotas that no dialogue was found for.
        running: dialogues under way.
        dropped: (rule, reason) of the dialogues that did not pass in this start, counted.
        tokens, cost: spent so far, by earlier starts as well; cost is None where a price is not known.
        fresh_tokens, fresh_accepted: of this start alone.
        started: by `time.monotonic`.
        stopped: why no more is asked (`budget`, `interrupted`, `server`, `authentication`), and in words.
    """

    target: int
    accepted: int = 0
    empty: int = 0
    running: int = 0
    dropped: collections.Counter = field(default_factory=collections.Counter)
    tokens: int = 0
    cost: float | None = 0.0
    fresh_tokens: int = 0
    fresh_accepted: int = 0
    started: float = field(default_factory=time.monotonic)
    stopped: tuple[str, str] | None = None


def recipe_of(
    config: SynthesisConfig, rolecs_check: RoleCSCheckConfig, duplicates: DuplicatesConfig, llm: LLMConfig
) -> dict[str, Any]:
    """All that decides which dialogues come about, personas aside: they are in the dialogues' own ids.

    Where the models are served, how fast and at what price is not part of it.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in ("roles", "personas")}
    asked = [role for role in vars(config.roles) if not role.startswith("rolecs_check_")]
    asked += [f"rolecs_check_{number}" for number in range(2, rolecs_check.judges + 1)]
    told = ("backend", "model", "temperature", "top_p", "max_tokens", "extra_body")
    models = {role: model_of(role, llm, config.roles) for role in asked}
    return {
        "synthesis": settings,
        "rolecs_check": asdict(rolecs_check),
        "duplicates": asdict(duplicates),
        "models": {role: {name: getattr(model, name) for name in told} for role, model in models.items()},
        "prompts": Prompts(config.language, config.layout, config.compact).digest,
    }


class Stopped(Exception):
    """Nothing more is asked; what is there stays as it is."""


class Runner:
    """One start of a synthesis.

    Attributes:
        progress: how far it is, for whoever watches.
        accepted: ids of the accepted dialogues, in the order of the quotas.
    """

    def __init__(
        self,
        config: SynthesisConfig,
        rolecs_check: RoleCSCheckConfig,
        duplicates: DuplicatesConfig,
        profiles: list[Profile],
        backend: Backend,
        store: SynthesisStore,
        target: int,
        budget: BudgetConfig,
    ):
        """Nothing is asked yet.

        Raises:
            InputError: a topic or mood that is not there in this language, or a budget in money without prices.
        """
        self._config = config
        self._check = rolecs_check
        self._profiles = {profile.id: profile for profile in profiles}
        self._topics = chosen("synthesis.topics", config.topics, TOPICS[config.language])
        self._moods = chosen("synthesis.moods", config.moods, MOODS[config.language])
        self._prompts = Prompts(config.language, config.layout, config.compact)
        self._backend = backend
        self._store = store
        self._budget = budget
        self._duplicates = DuplicateFilter(duplicates, config.seed)
        self._permits = asyncio.Semaphore(backend.concurrency)
        self._persona_locks = collections.defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task] = set()
        self._failures_in_a_row = 0
        self._bug: BaseException | None = None
        self.accepted: list[str] = []
        self.progress = Progress(target)
        for role, spent in store.spent().items():
            self._count(role, spent.prompt_tokens, spent.completion_tokens)
        self.progress.fresh_tokens = 0
        if budget.money is not None and any(backend.cost(role, 1, 1) is None for role in vars(config.roles)):
            raise InputError(
                f"budget.money={budget.money}: needs llm.price_per_million_input and ..._output of each role"
            )

    def places(self) -> Iterator[QuotaSlot]:
        """The places of the quotas that are to be filled, in order."""
        return itertools.islice(quota_slots(list(self._profiles), self._topics, self._moods), self.progress.target)

    def unit(self, cell: QuotaSlot, attempt: int) -> DialogueSlot:
        """The `attempt`-th try at a place."""
        config, profile = self._config, self._profiles[cell.persona]
        return dialogue_slot(cell, profile, attempt, config.attempts, config.seed, self._store.recipe)

    async def run(self) -> None:
        """Fill the places, until they are filled or `progress.stopped` says why not.

        The first Ctrl-C lets the calls under way come to their end, the second does not.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ValueError, RuntimeError):  # only the main thread is sent signals
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, self._interrupted)
                    stack.callback(loop.remove_signal_handler, number)
            async with self._backend:
                await self._fill()
        if self._bug is not None:
            raise self._bug

    async def _fill(self) -> None:
        window = asyncio.Semaphore(AHEAD * self._backend.concurrency)
        previous = None
        for cell in self.places():
            await window.acquire()
            if self.progress.stopped:
                break
            previous = asyncio.create_task(self._place(cell, previous))
            self._tasks.add(previous)
            previous.add_done_callback(lambda _: window.release())
            previous.add_done_callback(self._done)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug = self._bug or task.exception()
            self._stop("error", str(task.exception()), at_once=True)

    def _interrupted(self) -> None:
        self._stop("interrupted", "interrupted", at_once=self.progress.stopped is not None)

    def _stop(self, reason: str, message: str, at_once: bool = False) -> None:
        """Ask no more; with `at_once`, do not wait for the calls under way either."""
        self.progress.stopped = self.progress.stopped or (reason, message)
        if at_once:
            for task in self._tasks:
                task.cancel()

    async def _place(self, cell: QuotaSlot, previous: asyncio.Task | None) -> bool:
        """Try dialogues for one place until one is accepted; False where it was stopped before it was settled."""
        try:
            for attempt in range(self._config.attempts):
                unit = self.unit(cell, attempt)
                status = self._store.status(unit.id)
                if status not in (FINISHED, *SETTLED):
                    async with self._permits:
                        status = await self._converse(unit)
                if status not in (FINISHED, ACCEPTED):
                    continue
                # In the order of the places: what a dialogue repeats is what stands before it.
                if previous is not None and not await asyncio.shield(previous):
                    return False
                if self._settle(unit.id, status):
                    return True
            if previous is not None and not await asyncio.shield(previous):
                return False
            self.progress.empty += 1
            return True
        except (Stopped, PendingBatch):
            return False

    def _settle(self, unit: str, status: str) -> bool:
        """Accept a finished dialogue, unless it repeats one before it."""
        dialogue = self._store.dialogue(unit, self._backend.source)
        verdict = self._duplicates.check(dialogue, dialogue.extra["scenario"])
        if status == FINISHED:
            self._store.judged(unit, ACCEPTED if verdict.keep else REJECTED, [verdict])
            self.progress.fresh_accepted += verdict.keep
            self._dropped([verdict])
        if verdict.keep:
            self.accepted.append(unit)
            self.progress.accepted += 1
        return verdict.keep

    async def _converse(self, unit: DialogueSlot) -> str:
        """Bring a dialogue to its end and let rules look at it; the state that it is in then."""
        self.progress.running += 1
        try:
            tries, known = 0, -1
            while True:
                try:
                    return await self._finish(unit, await self._talk(unit))
                except AuthenticationError as failure:
                    self._stop("authentication", str(failure), at_once=True)
                    raise Stopped from failure
                except LLMError as failure:
                    self._failed(failure)
                    before, known = known, self._store.count_answers(unit.id)
                    tries = 1 if known > before else tries + 1
                    if failure.kind not in PASSING or tries == TRIES:
                        verdict = FilterVerdict("answers", False, failure.kind, failure.message)
                        return self._judged(unit.id, FAILED, [verdict])
        finally:
            self.progress.running -= 1

    def _failed(self, failure: LLMError) -> None:
        """Stop when nothing but failures comes any more: what is tried in vain would count against dialogues."""
        if failure.kind in PASSING:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self._backend.concurrency + TRIES:
                self._stop("server", str(failure))
                raise Stopped from failure

    async def _talk(self, unit: DialogueSlot) -> DialogueState:
        """Ask the roles until the dialogue is over; what was answered before is not asked again."""
        if self._store.status(unit.id) is None:
            self._store.begin_unit(unit)
        state = DialogueState(
            Scenario(
                await self._persona(unit.persona), unit.topic, unit.mood,
                draw_behaviour(self._config.behaviour, unit.id),
            ),
            self._config.max_utterances,
        )  # fmt: skip
        recorded = self._store.turns(unit.id)
        for step in itertools.count():
            question = next_question(state)
            if question is None:
                return state
            key = f"{step:04d}"
            form = self._prompts.schema(question)
            if (saved := self._store.answer(unit.id, key)) is not None:
                state = advance(state, form.model_validate(saved))
                if state.turns != recorded[: len(state.turns)]:
                    raise InputError(
                        f"dialogue {unit.id}: other code made its turns of the same answers; use new_run=true"
                    )
                continue
            call = self._call(unit.id, key, question, form, unit)
            answer = await self._ask(call)
            before, state = state, advance(state, answer)
            new = state.turns[len(before.turns) :]
            self._store.answered(call, answer.model_dump(), *new, number=len(before.turns))

    def _call(
        self, owner: str, key: str, question: RoleQuestion, form: type[BaseModel], unit: DialogueSlot | None
    ) -> RoleCall:
        messages = self._prompts.messages(question)
        seed = call_seed(owner, key, self._config.seed)
        return RoleCall(owner, key, question.role, messages, form, seed, question.fields, unit)

    def _persona_owner(self, name: str) -> str:
        return f"persona-{digest([self._profiles[name].digest, self._store.recipe])[:16]}"

    def description(self, persona: str) -> str:
        """What the customer of this profile was told to be."""
        return self._store.answer(self._persona_owner(persona), "persona")["description"]

    async def _persona(self, name: str) -> str:
        """A customer's description in the second person, written once."""
        owner = self._persona_owner(name)
        async with self._persona_locks[name]:
            saved = self._store.answer(owner, "persona")
            if saved is None:
                question = RoleQuestion("persona", {"profile": self._profiles[name].values})
                call = self._call(owner, "persona", question, self._prompts.schema(question), None)
                saved = (await self._ask(call)).model_dump()
                self._store.answered(call, saved)
        return saved["description"]

    async def _finish(self, unit: DialogueSlot, state: DialogueState) -> str:
        """Let the rules look at a dialogue that is over, the one that costs something last."""
        verdicts = [FilterVerdict("answers", True), _ended(stop_reason(state))]
        dialogue = Dialogue(unit.id, state.turns)
        if verdicts[-1].keep:
            verdicts.append(check_private_data(utterances_of(dialogue)))
        if verdicts[-1].keep:
            verdicts.append(await self._check_rolecs(unit, dialogue, state.plan.scenario))
        return self._judged(unit.id, FINISHED if verdicts[-1].keep else REJECTED, verdicts, dialogue_outcome(state))

    async def _check_rolecs(self, unit: DialogueSlot, dialogue: Dialogue, scenario: str) -> FilterVerdict:
        async def ask(task: str, messages: list[Message], form: type[BaseModel]) -> BaseModel:
            if (saved := self._store.answer(unit.id, task)) is not None:
                return form.model_validate(saved)
            call = RoleCall(unit.id, task, task, messages, form, call_seed(unit.id, task, self._config.seed), {}, unit)
            answer = await self._ask(call)
            self._store.answered(call, answer.model_dump())
            return answer

        verdict, _ = await check_rolecs(utterances_of(dialogue), scenario, ask, self._config.language, self._check)
        return verdict

    def _judged(
        self, unit: str, status: str, verdicts: list[FilterVerdict], extra: dict[str, Any] | None = None
    ) -> str:
        self._store.judged(unit, status, verdicts, extra)
        self._dropped(verdicts)
        return status

    def _dropped(self, verdicts: list[FilterVerdict]) -> None:
        self.progress.dropped.update((each.rule, each.reason) for each in verdicts if not each.keep)

    async def _ask(self, call: RoleCall) -> BaseModel:
        """The answer to a call, each attempt recorded as it comes.

        Raises:
            Stopped: nothing more is to be asked.
            LLMError: there was no answer.
        """
        if self.progress.stopped:
            raise Stopped
        model = self._backend.model(call.role)

        def observe(attempt: RequestAttempt) -> None:
            self._store.attempted(call, model, attempt)
            self._count(call.role, attempt.prompt_tokens, attempt.completion_tokens)

        answer = await self._backend.ask(call, observe)
        self._failures_in_a_row = 0
        return answer

    def _count(self, role: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Account for tokens, and stop asking when the budget is used up."""
        progress = self.progress
        progress.tokens += prompt_tokens + completion_tokens
        progress.fresh_tokens += prompt_tokens + completion_tokens
        cost = self._backend.cost(role, prompt_tokens, completion_tokens)
        progress.cost = None if cost is None or progress.cost is None else progress.cost + cost
        for name, spent in (("tokens", progress.tokens), ("money", progress.cost)):
            limit = getattr(self._budget, name)
            if limit is not None and spent is not None and spent >= limit:
                self._stop("budget", f"budget.{name}={limit:g} is used up")


def _ended(reason: str) -> FilterVerdict:
    """Whether a dialogue came to an end of its own."""
    return (
        FilterVerdict("ended", False, "no strategy left") if reason == "no_strategy" else FilterVerdict("ended", True)
    )
