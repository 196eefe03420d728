"""The estimate of a synthesis before its start: calls, tokens and cost by role.

A few dialogues of the mock backend run through the real prompts.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from csc_train.llm.config import LLMConfig
from csc_train.synthesis.config import BudgetConfig, DuplicatesConfig, RoleCSCheckConfig, SynthesisConfig
from csc_train.synthesis.rolecs.backends import role_llm
from csc_train.synthesis.rolecs.mock_backend import MockBackend
from csc_train.synthesis.rolecs.personas import generate_profiles
from csc_train.synthesis.rolecs.runner import SynthesisRunner
from csc_train.synthesis.rolecs.store import SynthesisStore
from csc_train.terminal_tables import result_table

NUM_DIALOGUES = 30
"""Dialogues that the estimate is based on."""
TOKENS_PER_CHARACTER = {"zh": (0.72, 0.49), "en": (0.23, 0.28)}
"""Of prompts and of JSON answers, by language, counted on the mock backend's by the tokenizer of Llama 3.1; Qwen2.5's
counts 0.63 and 0.44 in Chinese, and 0.23 and 0.26 in English."""


@dataclass(frozen=True)
class RoleEstimate:
    """The expected use of one role over the whole synthesis; `cost` is None without prices."""

    role: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def estimate_usage(
    config: SynthesisConfig, rolecs_check: RoleCSCheckConfig, llm: LLMConfig, target: int, personas: int
) -> list[RoleEstimate]:
    """The expected use of `target` accepted dialogues, by role.

    The mock backend's dialogues have about 23 utterances, and one in nine is rejected; a model's may differ in both.
    """
    sample = min(target, NUM_DIALOGUES)
    store = SynthesisStore(":memory:", {})
    profiles = generate_profiles(min(personas, sample), config.seed, config.language)
    rest = MockBackend(config.language), store, sample, BudgetConfig()

    async def run() -> None:
        await SynthesisRunner(config, rolecs_check, DuplicatesConfig(), profiles, *rest).run()

    asyncio.run(run())
    estimates = []
    per_prompt, per_answer = TOKENS_PER_CHARACTER[config.language]
    for role, usage in store.usage().items():
        # Every persona is written once, however many dialogues it is in.
        scale = min(personas, target) / usage["calls"] if role == "persona" else target / sample
        model = role_llm(role, llm, config.roles)
        prompt = round(usage["prompt_tokens"] * scale * per_prompt)
        answer = round(usage["completion_tokens"] * scale * per_answer)
        calls = round(usage["calls"] * scale)
        estimates.append(RoleEstimate(role, model.model, calls, prompt, answer, model.cost(prompt, answer)))
    store.close()
    return estimates


def estimate_table(estimates: Sequence[RoleEstimate]) -> Table:
    """Estimates as a table for the terminal."""
    costs = [each.cost for each in estimates]
    calls, prompt, answer = (
        sum(getattr(each, name) for each in estimates) for name in ("calls", "prompt_tokens", "completion_tokens")
    )
    cost = None if None in costs else sum(filter(None, costs))
    total = RoleEstimate("all", "", calls, prompt, answer, cost)
    rows = []
    for each in (*estimates, total):
        counts = (f"{count:,}" for count in (each.calls, each.prompt_tokens, each.completion_tokens))
        rows.append([each.role, each.model, *counts, "n/a" if each.cost is None else f"{each.cost:,.2f}"])
    header = ("role", "model", "calls", "prompt tokens", "answer tokens", "cost")
    return result_table("estimate", header, rows, numbers=range(2, 6))
