"""What a synthesis would take, before anything is asked: a few dialogues by the script, through the real prompts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from csc_train.llm.config import LLMConfig
from csc_train.synthesis.config import BudgetConfig, DuplicatesConfig, RoleCSCheckConfig, SynthesisConfig
from csc_train.synthesis.rolecs.backends import model_of
from csc_train.synthesis.rolecs.mock_backend import MockBackend
from csc_train.synthesis.rolecs.personas import make_profiles
from csc_train.synthesis.rolecs.runner import Runner
from csc_train.synthesis.rolecs.store import SynthesisStore

DIALOGUES = 30
"""Dialogues that the estimate is made from."""
PROMPT_TOKENS, ANSWER_TOKENS = 0.72, 0.49
"""Tokens per character of Chinese prompts and JSON answers, counted on the script's by the tokenizer of Llama 3.1;
Qwen2.5's counts 0.63 and 0.44."""


@dataclass(frozen=True)
class RoleEstimate:
    """What one role is expected to take, over the whole synthesis; `cost` is None where its price is not known."""

    role: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def estimate(
    config: SynthesisConfig, rolecs_check: RoleCSCheckConfig, llm: LLMConfig, target: int, personas: int
) -> list[RoleEstimate]:
    """What `target` accepted dialogues are expected to take, by role.

    The script's dialogues are of about 23 utterances, and about one in nine is rejected; a model's may differ in both.
    It speaks Chinese, so for English prompts the Chinese ones stand in.
    """
    short = replace(config, language="zh", topics=[], moods=[])
    places = min(target, DIALOGUES)
    store = SynthesisStore(":memory:", {})
    profiles = make_profiles(min(personas, places), config.seed, "zh")
    arguments = (short, rolecs_check, DuplicatesConfig(), profiles, MockBackend("zh"), store, places, BudgetConfig())
    asyncio.run(_run(arguments))
    shares = []
    for role, spent in store.spent().items():
        # Every persona is written once, however many dialogues it is in.
        scale = min(personas, target) / spent.calls if role == "persona" else target / places
        model = model_of(role, llm, config.roles)
        prompt, completion = (
            round(count * scale * rate)
            for count, rate in ((spent.prompt_tokens, PROMPT_TOKENS), (spent.completion_tokens, ANSWER_TOKENS))
        )
        cost = model.cost(prompt, completion)
        shares.append(RoleEstimate(role, model.model, round(spent.calls * scale), prompt, completion, cost))
    store.close()
    return shares


def estimate_table(shares: Sequence[RoleEstimate]) -> Table:
    """An estimate for the terminal."""
    table = Table(title="estimate", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("role", "model"):
        table.add_column(name)
    for name in ("calls", "prompt tokens", "answer tokens", "cost"):
        table.add_column(name, justify="right")
    costs = [share.cost for share in shares]
    sums = [sum(getattr(share, name) for share in shares) for name in ("calls", "prompt_tokens", "completion_tokens")]
    total = RoleEstimate("all", "", *sums, None if None in costs else sum(costs))
    for share in (*shares, total):
        counts = (f"{count:,}" for count in (share.calls, share.prompt_tokens, share.completion_tokens))
        table.add_row(share.role, share.model, *counts, "n/a" if share.cost is None else f"{share.cost:,.2f}")
    return table


async def _run(arguments: tuple) -> None:
    await Runner(*arguments).run()
