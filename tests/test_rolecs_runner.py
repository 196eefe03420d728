"""The runner and its store: what comes out does not depend on timing, and nothing that was paid for is lost."""

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT

from csc_train.config.compose import compose
from csc_train.data.dialogue import Speaker
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.sample_grammar import PRECONDITIONS, SAMPLE_SOURCE, accuracy_ceiling
from csc_train.data.strategies import parse_strategy
from csc_train.errors import InputError
from csc_train.llm.client import LLMError, RequestAttempt, UnusableServerError
from csc_train.synthesis.config import BudgetConfig, DuplicatesConfig, RoleCSCheckConfig, SynthesisConfig
from csc_train.synthesis.filters.privacy import find_private_data
from csc_train.synthesis.rolecs import mock_backend
from csc_train.synthesis.rolecs.estimate import estimate_usage
from csc_train.synthesis.rolecs.mock_backend import TEXTS, MockBackend
from csc_train.synthesis.rolecs.personas import MOODS, TOPICS, generate_profiles
from csc_train.synthesis.rolecs.results import write_synthesis
from csc_train.synthesis.rolecs.runner import MAX_TRANSIENT_ERRORS, ROLECS_RULES, SynthesisRunner
from csc_train.synthesis.rolecs.store import SynthesisStore

SMALL = SynthesisConfig(max_utterances=6)
SETTINGS = {"made": "for tests"}


def start(path, target, backend=None, config=SMALL, settings=SETTINGS, judges=1, budget=None):
    """A runner, and the store at `path` that it works on."""
    store = SynthesisStore(path, settings)
    check, profiles = RoleCSCheckConfig(judges=judges), generate_profiles(3, 0, config.language)
    backend, budget = backend or MockBackend(config.language), budget or BudgetConfig()
    try:
        return SynthesisRunner(config, check, DuplicatesConfig(), profiles, backend, store, target, budget), store
    except InputError:
        store.close()
        raise


def run(path, target, **options):
    """What a run came to: its progress, the accepted ids, and the accepted dialogues."""
    runner, store = start(path, target, **options)
    try:
        asyncio.run(runner.run())
        return runner.progress, runner.accepted, [store.dialogue(each, SAMPLE_SOURCE) for each in runner.accepted]
    finally:
        store.close()


def parquet(path, dialogues):
    """The bytes of the file that dialogues are written to."""
    file = path.with_suffix(".parquet")
    write_dialogues(file, dialogues)
    return file.read_bytes()


def rows(path, query):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run with its results: directory, progress."""
    directory = tmp_path_factory.mktemp("whole")
    runner, store = start(directory / "synthesis.db", 150, config=SynthesisConfig(seed=1))
    asyncio.run(runner.run())
    write_synthesis(directory, runner, store, MockBackend("zh"), [], 0)
    store.close()
    return directory, runner


@pytest.mark.slow
def test_the_target_number_of_dialogues_is_accepted_and_trains(whole):
    directory, runner = whole
    for name in ("dialogues.jsonl", "dialogues.parquet"):
        dialogues = read_dialogues(directory / name, source="synthetic-sample", strict=True)
        assert [dialogue.id for dialogue in dialogues] == runner.accepted
    assert len(set(runner.accepted)) == 150 == runner.progress.accepted
    for name, known in (("topic", TOPICS), ("mood", MOODS)):
        shares = Counter(dialogue.extra[name] for dialogue in dialogues)
        assert set(shares) == set(known["zh"]) and max(shares.values()) - min(shares.values()) <= 4
    assert {dialogue.extra["stop"] for dialogue in dialogues} == {"farewell", "customer_finished"}
    for dialogue in dialogues:
        strategies = [turn.strategy for turn in dialogue.turns if turn.strategy]
        assert all(len(list(group)) <= 2 for _, group in itertools.groupby(strategies))


@pytest.mark.slow
def test_the_grammar_speaks_through_the_engine(whole):
    """What no flaw was put into is a conversation of the sample grammar, turn by turn."""
    directory, _ = whole
    own = []
    for dialogue in read_dialogues(directory / "dialogues.jsonl"):
        with contextlib.suppress(InputError):
            own.append(accuracy_ceiling([dialogue]))
    assert 0.9 * 150 < len(own) < 150  # an unknown or overused strategy is not the grammar's


@pytest.mark.slow
def test_the_grammar_speaks_english(tmp_path):
    _, accepted, dialogues = run(tmp_path / "s.db", 30, config=SynthesisConfig(seed=2, language="en"))
    own = []
    for dialogue in dialogues:
        with contextlib.suppress(InputError):
            own.append(accuracy_ceiling([dialogue], "en"))
    assert len(accepted) == 30 and len(own) > 24
    assert all(dialogue.text.isascii() for dialogue in dialogues)


@pytest.mark.slow
def test_a_dialogue_costs_about_the_same_in_each_language():
    tokens = {}
    for language in ("zh", "en"):
        config = compose("synthesize_rolecs", [f"synthesis.language={language}", "llm=gpt_4o"])
        estimates = estimate_usage(config.synthesis, RoleCSCheckConfig(), config.llm, 10, 3)
        tokens[language] = sum(each.prompt_tokens + each.completion_tokens for each in estimates) / 10
    assert tokens["en"] == pytest.approx(tokens["zh"], rel=0.2) and 20_000 < tokens["zh"] < 30_000


def test_the_mock_backend_has_its_flaws_in_each_language():
    for texts in TEXTS.values():
        assert texts.keys() == TEXTS["zh"].keys() and texts["directions"].keys() == PRECONDITIONS.keys()
        assert find_private_data("Hello." + texts["mobile"].format(tail="0042"))
        with pytest.raises(ValueError, match="unknown strategy"):
            parse_strategy(texts["unknown_strategy"])


@pytest.mark.slow
def test_what_cannot_be_is_refused():
    for overrides, message in (
        (["batch.roles=[planner]"], "batch.roles: llm=mock answers at once"),
        (
            ["llm=gpt_4o", "batch.roles=[customer]"],
            "batch.roles=customer: choose one of persona, planner, rolecs_check",
        ),
        (["rolecs_check.judges=4"], "rolecs_check.judges=4: must be between 1 and 3"),
        (["synthesis.max_utterances=51"], "synthesis.max_utterances=51: must be between 2 and 50"),
        (["budget.tokens=-1"], "budget.tokens=-1: must be at least 0"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            compose("synthesize_rolecs", overrides)


@pytest.mark.slow
def test_every_rule_finds_something(whole):
    directory, _ = whole
    funnel = {row["rule"]: row for row in json.loads((directory / "filter_funnel.json").read_text())}
    assert list(funnel) == list(ROLECS_RULES)
    assert {rule for rule, row in funnel.items() if row["dropped"]} == set(ROLECS_RULES) - {"ended"}
    assert funnel["near-duplicates"]["kept"] == 150
    account = json.loads((directory / "synthesis.json").read_text())
    assert account["unknown_strategies"] > 0
    assert (account["target"], account["accepted"], account["empty"]) == (150, 150, 0)
    assert account["dialogues"]["accepted"] == 150
    rejected = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == sum(row["dropped"] for row in funnel.values()) == sum(account["dialogues"].values()) - 150


@pytest.mark.slow
def test_an_overused_strategy_is_asked_again(whole):
    directory, _ = whole
    asked = rows(directory / "synthesis.db", "SELECT count(*) FROM answers WHERE role = 'supporter_assistant'")
    spoken = rows(directory / "synthesis.db", "SELECT count(*) FROM answers WHERE role = 'supporter'")
    chosen = rows(
        directory / "synthesis.db",
        "SELECT count(*) FROM answers WHERE role = 'customer' AND json_extract(answer, '$.finished')",
    )
    # Each supporter turn was asked for once, but the farewells, and those that were asked for again.
    assert asked[0][0] > spoken[0][0] - chosen[0][0]


@pytest.mark.slow
def test_everything_is_on_record(whole):
    directory, _ = whole
    database = directory / "synthesis.db"
    assert rows(database, "SELECT count(*) FROM calls WHERE failure IS NULL AND model = 'mock'") == rows(
        database, "SELECT count(*) + (SELECT count(*) FROM dialogues WHERE status = 'failed') FROM answers"
    )
    assert rows(database, "SELECT count(*) FROM calls WHERE length(prompt) != 64 OR prompt_tokens = 0") == [(0,)]
    seeds, calls = rows(database, "SELECT count(DISTINCT seed), count(*) FROM calls")[0]
    assert seeds > 0.999 * calls
    turns = rows(database, "SELECT number % 2, strategy IS NULL, count(*) FROM turns GROUP BY 1, 2")
    assert [turn[:2] for turn in turns] == [(0, 0), (1, 1)]
    page = (directory / "quality.html").read_text()
    assert "synthetic-sample" in page


class Jittery(MockBackend):
    """Answers in an order of its own."""

    def __init__(self, seed, concurrency):
        super().__init__("zh")
        self.concurrency = concurrency
        self.random = random.Random(seed)

    async def ask(self, call, observe):
        for _ in range(self.random.randrange(12)):
            await asyncio.sleep(0)
        return await super().ask(call, observe)


@pytest.mark.slow
def test_timing_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(mock_backend, "FLAW_SHARE", 0.7)
    monkeypatch.setattr(mock_backend, "FLAWS", ("copy", "judged_down", "malformed"))
    # Not those that other tests have drawn, and these not for others.
    monkeypatch.setattr(
        mock_backend, "_draw_conversation", functools.lru_cache(mock_backend._draw_conversation.__wrapped__)
    )
    config = SynthesisConfig(max_utterances=8, topics=["产品咨询"], moods=["平静"], attempts=30)
    found = set()
    for seed, concurrency in ((0, 1), (1, 2), (2, 7)):
        path = tmp_path / f"{seed}.db"
        progress, _, dialogues = run(path, 25, backend=Jittery(seed, concurrency), config=config)
        assert sum(count for (rule, _), count in progress.dropped.items() if rule == "near-duplicates") > 5
        found.add(parquet(path, dialogues))
    assert len(found) == 1


class Killed(BaseException):
    """The process is dead: it writes nothing any more."""


@pytest.mark.slow
def test_killed_at_every_commit_it_comes_to_the_same(tmp_path, monkeypatch):
    _, _, dialogues = run(tmp_path / "whole.db", 2)
    expected = parquet(tmp_path / "whole.db", dialogues)
    calls = rows(tmp_path / "whole.db", "SELECT owner, key, count(*) FROM calls GROUP BY 1, 2 ORDER BY 1, 2")
    write = SynthesisStore._write
    for point in itertools.count():
        left = point

        def dying(self, *statements):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            write(self, *statements)

        path = tmp_path / f"{point}.db"
        with monkeypatch.context() as patch:
            patch.setattr(SynthesisStore, "_write", dying)
            try:
                run(path, 2)
                break
            except Killed:
                pass
        _, _, dialogues = run(path, 2)
        assert parquet(path, dialogues) == expected, point
        # A call is on record with its answer or not at all, so it counts once.
        assert rows(path, "SELECT owner, key, count(*) FROM calls GROUP BY 1, 2 ORDER BY 1, 2") == calls
    assert point > 30


CHILD = """
import asyncio, sys
from csc_train.synthesis.config import BudgetConfig, SynthesisConfig
from csc_train.synthesis.config import DuplicatesConfig
from csc_train.synthesis.config import RoleCSCheckConfig
from csc_train.synthesis.rolecs.personas import generate_profiles
from csc_train.synthesis.rolecs.runner import SynthesisRunner
from csc_train.synthesis.rolecs.mock_backend import MockBackend
from csc_train.synthesis.rolecs.store import SynthesisStore
store = SynthesisStore(sys.argv[1], {"made": "for tests"})
profiles = generate_profiles(3, 0, "zh")
rest = RoleCSCheckConfig(), DuplicatesConfig(), profiles, MockBackend("zh"), store, 12, BudgetConfig()
runner = SynthesisRunner(SynthesisConfig(max_utterances=6), *rest)
print("begun", flush=True)
asyncio.run(runner.run())
"""


@pytest.mark.slow
def test_killed_for_real_it_comes_to_the_same(tmp_path):
    _, accepted, dialogues = run(tmp_path / "whole.db", 12)
    expected = parquet(tmp_path / "whole.db", dialogues)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rng, path, cut = random.Random(0), tmp_path / "killed.db", 0
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], env=environment, stdout=subprocess.PIPE)
        try:
            assert child.stdout.readline() == b"begun\n"
            time.sleep(rng.uniform(0.01, 0.15))
        finally:
            child.send_signal(signal.SIGKILL)
            cut += child.wait() == -signal.SIGKILL
    assert cut
    _, again, dialogues = run(path, 12)
    assert (again, parquet(path, dialogues)) == (accepted, expected)


def test_a_larger_target_adds_to_what_is_there(tmp_path):
    _, first, _ = run(tmp_path / "s.db", 4)
    made = rows(tmp_path / "s.db", "SELECT count(*) FROM calls")[0][0]
    _, second, _ = run(tmp_path / "s.db", 9)
    assert second[:4] == first and len(second) == 9
    _, third, _ = run(tmp_path / "other.db", 9)
    assert third == second
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM calls WHERE number > 0") == [(0,)]
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM calls")[0][0] > made
    _, smaller, _ = run(tmp_path / "s.db", 4)
    assert smaller == first


def test_a_budget_stops_it_and_a_larger_one_resumes(tmp_path):
    expected = run(tmp_path / "whole.db", 6)
    spent = expected[0].tokens
    path, before = tmp_path / "s.db", 0
    for share in (0.3, 0.6):
        limit = int(share * spent)
        progress, _, _ = run(path, 6, budget=BudgetConfig(tokens=limit))
        assert progress.stopped == ("budget", f"budget.tokens={limit} is used up")
        # What was under way came to its end: a call for each dialogue.
        largest = rows(path, "SELECT max(prompt_tokens + completion_tokens) FROM calls")[0][0]
        assert before < limit <= progress.tokens < limit + MockBackend.concurrency * largest
        before = progress.tokens
        assert run(path, 6, budget=BudgetConfig(tokens=limit))[0].tokens == before  # nothing more is asked
    progress, accepted, dialogues = run(path, 6)
    assert (accepted, progress.tokens, progress.stopped) == (expected[1], spent, None)
    assert parquet(path, dialogues) == parquet(tmp_path / "whole.db", expected[2])


class Priced(MockBackend):
    """Costs a millionth a token, or nobody knows what."""

    price = 1e-6

    def cost(self, role, prompt_tokens, completion_tokens):
        return None if self.price is None else self.price * (prompt_tokens + completion_tokens)


def test_a_budget_of_money_needs_prices(tmp_path, monkeypatch):
    progress, _, _ = run(tmp_path / "s.db", 6, backend=Priced("zh"), budget=BudgetConfig(money=0.01))
    assert progress.stopped == ("budget", "budget.money=0.01 is used up") and progress.cost >= 0.01
    monkeypatch.setattr(Priced, "price", None)
    assert run(tmp_path / "t.db", 1, backend=Priced("zh"))[0].cost is None
    with pytest.raises(InputError, match=r"budget\.money=0\.01: needs llm\.price"):
        start(tmp_path / "u.db", 6, backend=Priced("zh"), budget=BudgetConfig(money=0.01))


class Failing(MockBackend):
    """Fails as it is told: `plan` says of the number of a call what it is answered with, or None."""

    def __init__(self, plan, concurrency=1):
        super().__init__("zh")
        self.plan, self.made, self.concurrency = plan, 0, concurrency

    async def ask(self, call, observe):
        self.made += 1
        if kind := self.plan(self.made):
            await asyncio.sleep(0)
            observe(RequestAttempt({}, 1, kind, "planned", "", 7, 0, 0.0))
            raise (UnusableServerError if kind == "authentication" else LLMError)(kind, "planned", 1, 7, 0)
        return await super().ask(call, observe)


def test_a_key_that_is_refused_stops_it_at_once(tmp_path):
    expected = run(tmp_path / "whole.db", 5)[1]
    backend = Failing(lambda number: "authentication" if number >= 20 else None, concurrency=4)
    progress, _, _ = run(tmp_path / "s.db", 5, backend=backend)
    assert progress.stopped == ("unusable", "planned")
    assert backend.made < 20 + 4
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM dialogues WHERE status = 'failed'") == [(0,)]
    assert run(tmp_path / "s.db", 5)[1] == expected


def test_passing_failures_do_not_count_against_a_dialogue(tmp_path):
    expected = run(tmp_path / "whole.db", 3)
    backend = Failing(lambda number: ("timeout", "rate_limit")[number % 2] if number % 7 in (0, 1) else None)
    progress, accepted, dialogues = run(tmp_path / "s.db", 3, backend=backend)
    assert (accepted, progress.stopped) == (expected[1], None)
    assert parquet(tmp_path / "s.db", dialogues) == parquet(tmp_path / "whole.db", expected[2])
    failed = rows(tmp_path / "s.db", "SELECT count(*), sum(prompt_tokens) FROM calls WHERE failure IS NOT NULL")[0]
    assert failed[0] > 5 and failed[1] == 7 * failed[0]
    assert progress.tokens == expected[0].tokens + failed[1]  # failed attempts are paid for


def test_a_server_that_only_fails_stops_it(tmp_path):
    backend = Failing(lambda number: "connection" if number > 30 else None)
    progress, _, _ = run(tmp_path / "s.db", 3, backend=backend)
    assert progress.stopped == ("server", "connection: planned")
    assert backend.made == 30 + backend.concurrency + MAX_TRANSIENT_ERRORS
    # One dialogue was tried often enough to fail; the next one is taken up where it stopped.
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM dialogues WHERE status = 'failed'") == [(1,)]
    assert len(run(tmp_path / "s.db", 3)[1]) == 3


def test_an_answer_that_cannot_be_had_fails_its_dialogue_only(tmp_path):
    backend = Failing(lambda number: "refused" if number in (3, 40) else None)
    progress, accepted, _ = run(tmp_path / "s.db", 3, backend=backend)
    assert len(accepted) == 3 and progress.dropped["answers", "refused"] == 2
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM dialogues WHERE status = 'failed'")[0][0] >= 2


def test_a_quota_slot_that_nothing_fits_stays_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(MockBackend, "concurrency", 2)
    monkeypatch.setattr(mock_backend._Answers, "rolecs_check", lambda self: {"reason": "", **dict.fromkeys(
        ("strategy_followed", "unreasonable_requests", "natural", "varied", "roles_kept"), 0)})  # fmt: skip
    progress, accepted, _ = run(tmp_path / "s.db", 3, config=SynthesisConfig(max_utterances=4, attempts=2))
    assert (progress.empty, accepted) == (3, [])
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM dialogues") == [(6,)]


def test_a_panel_judges_and_the_report_shows_its_agreement(tmp_path):
    runner, store = start(tmp_path / "s.db", 2, judges=3)
    with contextlib.closing(store):
        asyncio.run(runner.run())
        write_synthesis(tmp_path, runner, store, MockBackend("zh"), [], 0)
    agreement = json.loads((tmp_path / "synthesis.json").read_text(encoding="utf-8"))["agreement"]
    assert json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))["agreement"] == agreement
    assert "Fleiss" in (tmp_path / "quality.html").read_text(encoding="utf-8")
    asked = rows(tmp_path / "s.db", "SELECT role, count(*) FROM answers WHERE role LIKE 'rolecs%' GROUP BY role")
    assert [role for role, _ in asked] == ["rolecs_check", "rolecs_check_2", "rolecs_check_3"]
    assert len({count for _, count in asked}) == 1


def test_an_interrupted_synthesis_resumes(tmp_path):
    expected = run(tmp_path / "whole.db", 6)

    class Interrupting(MockBackend):
        asked = 0

        async def ask(self, call, observe):
            self.asked += 1
            if self.asked == 50:
                os.kill(os.getpid(), signal.SIGINT)
            return await super().ask(call, observe)

    backend = Interrupting("zh")
    progress, _, _ = run(tmp_path / "s.db", 6, backend=backend)
    assert progress.stopped == ("interrupted", "interrupted")
    assert 50 <= backend.asked <= 50 + 2 * backend.concurrency
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, _, dialogues = run(tmp_path / "s.db", 6)
    assert parquet(tmp_path / "s.db", dialogues) == parquet(tmp_path / "whole.db", expected[2])
    assert rows(tmp_path / "s.db", "SELECT count(*) FROM calls WHERE number > 0") == [(0,)]


def test_other_settings_are_refused_unless_asked_for(tmp_path):
    path = tmp_path / "s.db"
    _, first, _ = run(path, 3)
    with pytest.raises(
        InputError, match=r"\(made: 'for tests' then, 'other' now\): choose another run\.directory, or set new_"
    ):
        SynthesisStore(path, {"made": "other"})
    SynthesisStore(path, {"made": "other"}, new_run=True).close()
    _, second, _ = run(path, 3, settings={"made": "other"})
    assert not set(first) & set(second)
    with pytest.raises(InputError, match="'other' then, 'for tests' now"):
        SynthesisStore(path, SETTINGS)
    SynthesisStore(path, SETTINGS, new_run=True).close()
    assert run(path, 3)[1] == first
    assert rows(path, "SELECT count(*) FROM calls WHERE number > 0") == [(0,)]  # it was all there


def test_the_settings_are_what_decides_the_dialogues():
    from dataclasses import replace

    from csc_train.llm.config import LLMConfig
    from csc_train.synthesis.rolecs.runner import generation_settings

    llm = LLMConfig(base_url="http://one/v1", model="m", api_key_env="ONE_KEY")
    check, duplicates = RoleCSCheckConfig(), DuplicatesConfig()
    settings = generation_settings(SMALL, check, duplicates, llm)
    elsewhere = replace(llm, base_url="http://two/v1", api_key_env="TWO_KEY", concurrency=2, price_per_million_input=1)
    assert generation_settings(SMALL, check, duplicates, elsewhere) == settings
    others = [
        generation_settings(replace(SMALL, seed=1), check, duplicates, llm),
        generation_settings(replace(SMALL, layout="faithful"), check, duplicates, llm),
        generation_settings(SMALL, RoleCSCheckConfig(points=4), duplicates, llm),
        generation_settings(SMALL, check, DuplicatesConfig(opening=None), llm),
        generation_settings(SMALL, check, duplicates, replace(llm, model="n")),
        generation_settings(SMALL, check, duplicates, replace(llm, temperature=0.1)),
    ]
    assert len({json.dumps(each) for each in [settings, *others]}) == 7


def test_one_process_at_a_time(tmp_path):
    store = SynthesisStore(tmp_path / "s.db", SETTINGS)
    with pytest.raises(InputError, match="another process uses it"):
        SynthesisStore(tmp_path / "s.db", SETTINGS)
    store.close()
    SynthesisStore(tmp_path / "s.db", SETTINGS).close()


def test_another_file_is_not_touched(tmp_path):
    path = tmp_path / "s.db"
    path.write_text("not a database, but somebody's text " * 50)
    with pytest.raises(InputError, match="is damaged: file is not a database: restore"):
        SynthesisStore(path, SETTINGS)
    assert path.read_text().startswith("not a database")


def test_turns_that_other_code_made_are_noticed(tmp_path):
    runner, store = start(tmp_path / "s.db", 2, budget=BudgetConfig(tokens=3000))
    asyncio.run(runner.run())
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        changed = connection.execute(
            "UPDATE turns SET text = '别的' WHERE number = 0 "
            "AND dialogue IN (SELECT id FROM dialogues WHERE status = 'open')"
        ).rowcount
        connection.commit()
    assert changed
    with pytest.raises(InputError, match="recorded answers give other turns"):
        run(tmp_path / "s.db", 2)


def test_the_customer_is_never_told_a_strategy(tmp_path):
    """In all that is asked of the customer's side, of a dialogue whose supporter says its strategies aloud."""
    read = []

    class Loose(MockBackend):
        async def ask(self, call, observe):
            if call.role in ("customer", "customer_assistant", "planner", "persona"):
                read.append(call.messages)
            answer = await super().ask(call, observe)
            if call.role == "supporter":
                said = f"[{call.fields['strategy'].zh}]{answer.text}"
                return call.schema(text=said)
            return answer

    _, _, dialogues = run(tmp_path / "s.db", 3, backend=Loose("zh"))
    names = {turn.strategy.zh for dialogue in dialogues for turn in dialogue.turns if turn.speaker is Speaker.SUPPORTER}
    text = json.dumps(read, ensure_ascii=False)
    assert len(read) > 15 and len(names) > 3
    assert not [name for name in names if name in text]
