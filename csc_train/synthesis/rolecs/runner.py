"""The RoleCS runner: fills the quota slots with accepted dialogues, resumable and within a budget.

The result does not depend on timing. Quota slots have a fixed order. Each slot tries one dialogue after another until
one passes every rule. Near-duplicates are decided in the order of the slots, however early a dialogue was finished.
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
from csc_train.llm.client import LLMError, Message, RequestAttempt, UnusableServerError
from csc_train.llm.config import LLMConfig
from csc_train.synthesis.config import BudgetConfig, DuplicatesConfig, RoleCSCheckConfig, SynthesisConfig
from csc_train.synthesis.filters.llm_checks import check_rolecs
from csc_train.synthesis.filters.rules import DuplicateFilter, FilterVerdict, check_private_data
from csc_train.synthesis.rolecs.backends import Backend, RoleCall, call_seed, role_llm
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
    DialogueAttempt,
    Profile,
    ScenarioQuota,
    dialogue_attempt,
    draw_behaviour,
    resolve_choices,
    scenario_quotas,
)
from csc_train.synthesis.rolecs.roles import RolePrompts
from csc_train.synthesis.rolecs.store import ACCEPTED, FAILED, FINISHED, REJECTED, SETTLED, SynthesisStore
from csc_train.synthesis.utterances import utterances_of

ROLECS_RULES = ("answers", "ended", "private data", "five criteria", "near-duplicates")
"""The rules for a dialogue, in order. answers: no answer is missing. ended: the dialogue came to an end."""
TRANSIENT_ERRORS = ("connection", "timeout", "rate_limit", "server_error", "interrupted")
"""Errors that say nothing about a dialogue; it is resumed where it stopped."""
MAX_TRANSIENT_ERRORS = 3
"""Transient errors of one question after which its dialogue fails."""
SLOTS_AHEAD = 16
"""Slots in progress beyond the earliest unsettled one, per concurrent call."""


@dataclass
class SynthesisProgress:
    """The progress of a synthesis.

    Attributes:
        accepted: accepted dialogues, those of earlier starts included.
        empty: quota slots for which no dialogue was found.
        running: dialogues in progress.
        dropped: counts of (rule, reason) of the dialogues dropped by this start.
        tokens, cost: usage so far, earlier starts included; cost is None without prices.
        new_tokens, new_accepted: of this start only.
        started: time by `time.monotonic`.
        stopped: the reason to stop (`budget`, `interrupted`, `server`, `unusable`) and a message.
    """

    target: int
    accepted: int = 0
    empty: int = 0
    running: int = 0
    dropped: collections.Counter = field(default_factory=collections.Counter)
    tokens: int = 0
    cost: float | None = 0.0
    new_tokens: int = 0
    new_accepted: int = 0
    started: float = field(default_factory=time.monotonic)
    stopped: tuple[str, str] | None = None


def generation_settings(
    config: SynthesisConfig, rolecs_check: RoleCSCheckConfig, duplicates: DuplicatesConfig, llm: LLMConfig
) -> dict[str, Any]:
    """Everything that determines the dialogues, except personas, which are part of the dialogues' ids.

    Addresses, limits and prices of servers are not included.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in ("roles", "personas")}
    roles = [role for role in vars(config.roles) if not role.startswith("rolecs_check_")]
    roles += [f"rolecs_check_{number}" for number in range(2, rolecs_check.judges + 1)]
    names = ("backend", "model", "temperature", "top_p", "max_tokens", "extra_body")
    models = {role: role_llm(role, llm, config.roles) for role in roles}
    return {
        "synthesis": settings,
        "rolecs_check": asdict(rolecs_check),
        "duplicates": asdict(duplicates),
        "models": {role: {name: getattr(model, name) for name in names} for role, model in models.items()},
        "prompts": RolePrompts(config.language, config.layout, config.compact).digest,
    }


class SynthesisStopped(Exception):
    """No more questions are asked; everything so far is kept."""


class SynthesisRunner:
    """One start of a synthesis.

    Attributes:
        progress: for a display.
        language: of the dialogues.
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
        """Prepare the synthesis; nothing is asked yet.

        Raises:
            InputError: a topic or mood is unknown in this language, or a budget of money lacks prices.
        """
        self._config = config
        self.language = config.language
        self._check = rolecs_check
        self._profiles = {profile.id: profile for profile in profiles}
        self._topics = resolve_choices("synthesis.topics", config.topics, TOPICS[config.language])
        self._moods = resolve_choices("synthesis.moods", config.moods, MOODS[config.language])
        self._prompts = RolePrompts(config.language, config.layout, config.compact)
        self._backend = backend
        self._store = store
        self._budget = budget
        self._duplicates = DuplicateFilter(duplicates, config.seed)
        self._permits = asyncio.Semaphore(backend.concurrency)
        self._persona_locks = collections.defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task] = set()
        self._consecutive_errors = 0
        self._bug: BaseException | None = None
        self.accepted: list[str] = []
        self.progress = SynthesisProgress(target)
        for role, usage in store.usage().items():
            self._count_tokens(role, usage["prompt_tokens"], usage["completion_tokens"])
        self.progress.new_tokens = 0
        if budget.money is not None and any(backend.cost(role, 1, 1) is None for role in vars(config.roles)):
            raise InputError(
                f"budget.money={budget.money}: needs llm.price_per_million_input and ..._output of each role"
            )

    def quotas(self) -> Iterator[ScenarioQuota]:
        """The quota slots to fill, in order."""
        return itertools.islice(scenario_quotas(list(self._profiles), self._topics, self._moods), self.progress.target)

    async def run(self) -> None:
        """Fill the slots, until all are filled or `progress.stopped` is set.

        The first Ctrl-C waits for the calls in flight, the second does not.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ValueError, RuntimeError):  # only the main thread receives signals
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, self._on_interrupt)
                    stack.callback(loop.remove_signal_handler, number)
            async with self._backend:
                await self._fill()
        if self._bug is not None:
            raise self._bug

    async def _fill(self) -> None:
        window = asyncio.Semaphore(SLOTS_AHEAD * self._backend.concurrency)
        previous = None
        for quota in self.quotas():
            await window.acquire()
            if self.progress.stopped:
                break
            previous = asyncio.create_task(self._fill_slot(quota, previous))
            self._tasks.add(previous)
            previous.add_done_callback(lambda _: window.release())
            previous.add_done_callback(self._on_task_end)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_task_end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug = self._bug or task.exception()
            self._stop("error", str(task.exception()), at_once=True)

    def _on_interrupt(self) -> None:
        self._stop("interrupted", "interrupted", at_once=self.progress.stopped is not None)

    def _stop(self, reason: str, message: str, at_once: bool = False) -> None:
        """Ask no more questions; `at_once` also cancels the calls in flight."""
        self.progress.stopped = self.progress.stopped or (reason, message)
        if at_once:
            for task in self._tasks:
                task.cancel()

    async def _fill_slot(self, quota: ScenarioQuota, previous: asyncio.Task | None) -> bool:
        """Try dialogues for one slot until one is accepted; False if the synthesis stops before."""
        config, profile = self._config, self._profiles[quota.persona]
        try:
            for attempt in range(config.attempts):
                slot = dialogue_attempt(
                    quota, profile, attempt, config.attempts, config.seed, self._store.settings_hash
                )
                status = self._store.status(slot.id)
                if status not in (FINISHED, *SETTLED):
                    async with self._permits:
                        status = await self._generate(slot)
                if status not in (FINISHED, ACCEPTED):
                    continue
                # In the order of the slots, so that a dialogue repeats earlier ones only.
                if previous is not None and not await asyncio.shield(previous):
                    return False
                if self._settle(slot.id, status):
                    return True
            if previous is not None and not await asyncio.shield(previous):
                return False
            self.progress.empty += 1
            return True
        except (SynthesisStopped, PendingBatch):
            return False

    def _settle(self, dialogue_id: str, status: str) -> bool:
        """Accept a finished dialogue, unless it repeats an earlier one."""
        dialogue = self._store.dialogue(dialogue_id, self._backend.source)
        verdict = self._duplicates.check(dialogue, dialogue.extra["scenario"])
        if status == FINISHED:
            self._record_verdicts(dialogue_id, ACCEPTED if verdict.keep else REJECTED, [verdict])
            self.progress.new_accepted += verdict.keep
        if verdict.keep:
            self.accepted.append(dialogue_id)
            self.progress.accepted += 1
        return verdict.keep

    async def _generate(self, slot: DialogueAttempt) -> str:
        """Generate a dialogue and filter it; returns its status."""
        self.progress.running += 1
        try:
            errors, answers = 0, -1
            while True:
                try:
                    return await self._filter(slot, await self._converse(slot))
                except UnusableServerError as failure:
                    self._stop("unusable", str(failure), at_once=True)
                    raise SynthesisStopped from failure
                except LLMError as failure:
                    self._stop_if_server_fails(failure)
                    before, answers = answers, self._store.count_answers(slot.id)
                    errors = 1 if answers > before else errors + 1
                    if failure.kind not in TRANSIENT_ERRORS or errors == MAX_TRANSIENT_ERRORS:
                        verdict = FilterVerdict("answers", False, failure.kind, failure.message)
                        return self._record_verdicts(slot.id, FAILED, [verdict])
        finally:
            self.progress.running -= 1

    def _stop_if_server_fails(self, failure: LLMError) -> None:
        """Stop when all calls fail, because further errors would count against dialogues."""
        if failure.kind in TRANSIENT_ERRORS:
            self._consecutive_errors += 1
            if self._consecutive_errors >= self._backend.concurrency + MAX_TRANSIENT_ERRORS:
                self._stop("server", str(failure))
                raise SynthesisStopped from failure

    async def _converse(self, slot: DialogueAttempt) -> DialogueState:
        """Ask the roles until the dialogue is over; recorded answers are replayed."""
        if self._store.status(slot.id) is None:
            self._store.add_dialogue(slot)
        behaviour = draw_behaviour(self._config.behaviour, slot.id)
        start = Scenario(await self._persona(slot.persona), slot.topic, slot.mood, behaviour)
        state = DialogueState(start, self._config.max_utterances)
        recorded = self._store.turns(slot.id)
        steps = itertools.count()
        while (question := next_question(state)) is not None:
            call = self._call(slot.id, f"{next(steps):04d}", question, slot)
            state = advance(state, await self._answer(call, state))
            if state.turns[: len(recorded)] != recorded[: len(state.turns)]:
                raise InputError(
                    f"dialogue {slot.id}: its recorded answers give other turns, since the code has changed: "
                    "set new_run=true"
                )
        return state

    def _call(self, owner: str, key: str, question: RoleQuestion, slot: DialogueAttempt | None) -> RoleCall:
        messages, schema = self._prompts.messages(question), self._prompts.schema(question)
        seed = call_seed(owner, key, self._config.seed)
        return RoleCall(owner, key, question.role, messages, schema, seed, question.fields, slot)

    def _persona_owner(self, name: str) -> str:
        return f"persona-{digest([self._profiles[name].digest, self._store.settings_hash])[:16]}"

    def persona_description(self, persona: str) -> str:
        """The description of a profile's customer, as the roles got it."""
        return self._store.answer(self._persona_owner(persona), "persona")["description"]

    async def _persona(self, name: str) -> str:
        """The description of a profile's customer in the second person, written once."""
        question = RoleQuestion("persona", {"profile": self._profiles[name].values})
        call = self._call(self._persona_owner(name), "persona", question, None)
        async with self._persona_locks[name]:
            return (await self._answer(call)).description

    async def _filter(self, slot: DialogueAttempt, state: DialogueState) -> str:
        """Filter a dialogue that is over, the judges last; returns its status."""
        stuck = stop_reason(state) == "no_strategy"
        verdicts = [
            FilterVerdict("answers", True), FilterVerdict("ended", not stuck, "no strategy left" if stuck else "")
        ]  # fmt: skip
        utterances = utterances_of(Dialogue(slot.id, state.turns))
        if not stuck:
            verdicts.append(check_private_data(utterances))
        if verdicts[-1].keep:
            ask, scenario = self._judge_fn(slot), state.plan.scenario
            verdict, _ = await check_rolecs(utterances, scenario, ask, self._config.language, self._check)
            verdicts.append(verdict)
        status = FINISHED if verdicts[-1].keep else REJECTED
        return self._record_verdicts(slot.id, status, verdicts, dialogue_outcome(state))

    def _judge_fn(self, slot: DialogueAttempt):
        """The function that asks judges about a dialogue; recorded answers are reused."""

        async def ask(task: str, messages: list[Message], schema: type[BaseModel]) -> BaseModel:
            seed = call_seed(slot.id, task, self._config.seed)
            return await self._answer(RoleCall(slot.id, task, task, messages, schema, seed, {}, slot))

        return ask

    def _record_verdicts(
        self, dialogue_id: str, status: str, verdicts: list[FilterVerdict], extra: dict[str, Any] | None = None
    ) -> str:
        self._store.record_verdicts(dialogue_id, status, verdicts, extra)
        self.progress.dropped.update((each.rule, each.reason) for each in verdicts if not each.keep)
        return status

    async def _answer(self, call: RoleCall, state: DialogueState | None = None) -> Any:
        """The recorded answer to a call; otherwise asks, and records the answer with the turn that it adds to `state`.

        Raises:
            SynthesisStopped: no more questions are asked.
            LLMError: there is no usable answer.
        """
        if (saved := self._store.answer(call.owner, call.key)) is not None:
            with self._store.errors():
                return call.schema.model_validate(saved)
        if self.progress.stopped:
            raise SynthesisStopped
        model = self._backend.model(call.role)
        attempts: list[RequestAttempt] = []

        def observe(attempt: RequestAttempt) -> None:
            attempts.append(attempt)
            self._count_tokens(call.role, attempt.prompt_tokens, attempt.completion_tokens)

        try:
            answer = await self._backend.ask(call, observe)
        except BaseException:  # cancelled ones too: their requests are paid for
            if attempts:
                self._store.record_call(call, model, attempts)
            raise
        self._consecutive_errors = 0
        before = state.turns if state else ()
        new = advance(state, answer).turns[len(before) :] if state else ()
        self._store.record_call(call, model, attempts, answer.model_dump(), *new, number=len(before))
        return answer

    def _count_tokens(self, role: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count tokens and cost, and stop when the budget is used up."""
        progress = self.progress
        progress.tokens += prompt_tokens + completion_tokens
        progress.new_tokens += prompt_tokens + completion_tokens
        cost = self._backend.cost(role, prompt_tokens, completion_tokens)
        progress.cost = None if cost is None or progress.cost is None else progress.cost + cost
        for name, used in (("tokens", progress.tokens), ("money", progress.cost)):
            limit = getattr(self._budget, name)
            if limit is not None and used is not None and used >= limit:
                self._stop("budget", f"budget.{name}={limit:g} is used up")
