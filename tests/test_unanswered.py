"""Recipes on a server that says nothing, or is not there: turns without a reply are counted, shown and asked again."""

import asyncio
import json
from pathlib import Path

import pytest
from conftest import load_recipe, sampled
from processes import free_port
from servers.faults import NO_REPLIES, Say

from csc_train.config.compose import compose
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.inference.generator import generate_predictions
from csc_train.inference.openai import OpenAIGenerator
from csc_train.inference.predictions import read_outcomes, write_predictions
from csc_train.llm.config import LLMConfig
from csc_train.synthesis.config import BatchConfig, RoleConfig, RolesConfig
from csc_train.synthesis.rolecs.batch_api import BatchBackend, read_batch_results
from csc_train.template.config import TemplateConfig

DIALOGUES = generate_sample(4, seed=3)
TURNS = sum(len(dialogue.supporter_turns) for dialogue in DIALOGUES)
WHOLE = "[情感管理]非常抱歉"


@pytest.fixture
def command(fault_server, tmp_path, monkeypatch):
    """The arguments of an evaluation of a served model, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    write_dialogues("train.jsonl", generate_sample(20, seed=6))
    write_dialogues("evaluation.jsonl", DIALOGUES)
    return [
        "llm=openai", "llm.model=m", f"llm.base_url={fault_server.base_url}", "llm.api_key_env=null",
        "llm.max_retries=0", "data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl",
        "evaluation.contexts=[reference]", "metrics.bootstrap_resamples=100", "run.directory=run",
    ]  # fmt: skip


def evaluate(*arguments):
    """The exit status of the recipe."""
    try:
        load_recipe("evaluate").main(compose("evaluate", list(arguments)))
    except SystemExit as end:
        return end.code
    return 0


def written():
    """The counts of the served model and the status of the run."""
    results, record = (json.loads(Path(f"run/{name}.json").read_text("utf-8")) for name in ("results", "run"))
    return results["results"]["m"]["reference"]["counts"], record["status"]


@pytest.mark.parametrize("context", ["reference", "generated"])
@pytest.mark.parametrize(
    ("kind", "reply"), sampled([(kind, reply) for kind, some in NO_REPLIES.items() for reply in some], 4)
)
def test_a_turn_without_a_reply_fails(kind, reply, context, fault_server):
    fault_server.answer = lambda body: reply
    llm = LLMConfig(base_url=fault_server.base_url, model="m", max_retries=0)
    generator = OpenAIGenerator(llm, EvaluationConfig(), TemplateConfig())
    failures = generate_predictions(DIALOGUES, generator, context)
    kinds = [each.kind for each in failures]
    assert len(failures) == TURNS
    assert kinds.count(kind) == (TURNS if context == "reference" else len(DIALOGUES))
    assert set(kinds) <= {kind, "earlier_turn_failed"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_REPLIES)
def test_an_evaluation_without_replies_ends_incomplete(kind, command, fault_server, capsys):
    fault_server.answer = lambda body: NO_REPLIES[kind][0]
    assert evaluate(*command) == 1
    counts, status = written()
    assert status == "incomplete" and counts["incomplete"] and counts["failures"] == {kind: TURNS}
    said, table, page = capsys.readouterr().out, Path("run/table.md").read_text(), Path("run/report.html").read_text()
    larger = " llm.retry_max_tokens=1024" if kind in ("cut_off", "empty") else ""
    reason = f"incomplete: {TURNS} turns failed ({TURNS} {kind}); to retry the failed part: run=run resume=true{larger}"
    assert said.endswith(f"{reason}\n")
    assert (
        f"turns: m, reference context: 0 (0 unparsed, 0 empty, 0 cut off), {TURNS} more failed ({TURNS} {kind})" in said
    )
    assert "†: incomplete; more turns than evaluation.max_failed" in said
    assert all("m † " in shown and "bigram †" not in shown for shown in (said, table))
    assert "<strong>†: incomplete" in page and f"{TURNS} more failed ({TURNS} {kind})" in page


@pytest.mark.slow
def test_answers_that_were_cut_off_are_asked_again_with_a_larger_limit(command, fault_server, capsys):
    """As the recipe says, and the others are kept."""

    def answer(body):
        return WHOLE if body["max_tokens"] > 256 or len(body["messages"]) > 4 else Say(WHOLE, "length")

    fault_server.answer = answer
    assert evaluate(*command) == 1
    failed = written()[0]["failed"]
    assert 0 < failed < TURNS and len(fault_server.requests) == TURNS
    advice = capsys.readouterr().out.splitlines()[-1].rpartition("to retry the failed part: ")[2]
    fault_server.requests.clear()
    assert evaluate(*advice.split()) == 0
    assert len(fault_server.requests) == 2 * failed
    counts, status = written()
    assert (status, counts["turns"], counts["failures"], counts["incomplete"]) == ("finished", TURNS, {}, False)
    assert "†" not in Path("run/table.md").read_text() and "†" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("share", "status"), [(0.0, "incomplete"), (1 / TURNS, "finished"), (1.0, "finished")])
def test_the_share_of_turns_that_may_fail_is_a_setting(share, status, command, fault_server, capsys):
    fault_server.answer = lambda body: WHOLE
    fault_server.script.append(Say(None))
    assert evaluate(*command, f"evaluation.max_failed={share}") == (status == "incomplete")
    counts, ended = written()
    assert (ended, counts["failed"], counts["turns"]) == (status, 1, TURNS - 1)
    assert "1 more failed (1 empty) and are not scored" in capsys.readouterr().out
    if status == "incomplete":  # what was paid for is accepted, and what failed is asked again all the same
        fault_server.script.append(Say(None))
        assert evaluate("run=run", "resume=true", "evaluation.max_failed=0.5") == 0
        assert written()[1] == "finished" and len(fault_server.requests) == TURNS + 1


SERVED = {
    "evaluate": ["data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl"],
    "judge": ["a", "b", "judge.tasks=[rubric]"],
    "build_csconv": [],
    "synthesize_rolecs": ["target=2", "synthesis.personas.count=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://127.0.0.1:{}/v1", "http://no-such-name.invalid/v1"])
@pytest.mark.parametrize("recipe", SERVED)
def test_a_server_that_is_not_there_is_said_at_once(recipe, address, command, fault_server, capsys, monkeypatch):
    fault_server.answer = lambda body: WHOLE
    assert evaluate(*command) == 0
    for name in "ab":
        outcomes = read_outcomes("run/predictions/m-reference.jsonl")
        write_predictions(Path(name) / "predictions" / "m-reference.jsonl", outcomes)
        write_dialogues(Path(name) / "dialogues.jsonl", DIALOGUES)
    url = address.format(free_port())
    server = ["llm=openai", "llm.model=m", f"llm.base_url={url}", "llm.api_key_env=null", "run.directory=down"]
    monkeypatch.setattr(asyncio, "sleep", None)  # nothing is waited for
    with pytest.raises((InputError, SystemExit)) as ended:
        load_recipe(recipe).main(compose(recipe, [*SERVED[recipe], *server]))
    said = capsys.readouterr().out + str(ended.value)
    assert f"llm.base_url={url}: [Errno " in said and "start the server, or correct the address" in said


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind, some in NO_REPLIES.items() for reply in some])
def test_a_batch_result_without_a_reply_is_no_answer(kind, reply, tmp_path):
    """Nor is a draft in thoughts that do not end, which holds an object of the right form."""
    message = {"content": f'{reply.text}{{"text": "好"}}' if "<think>" in (reply.text or "")[:7] else reply.text}
    if "</think>" in (reply.text or ""):
        message = {"content": reply.text}
    choice = {"message": message | {"refusal": reply.refusal}, "finish_reason": reply.finish_reason}
    row = {"custom_id": "a", "response": {"status_code": 200, "body": {"choices": [choice]}}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row), "utf-8")
    answer, _ = read_batch_results([tmp_path / "results.jsonl"])["a"]
    assert answer["fault"][0] == kind


def test_the_server_of_each_role_is_asked_before_work_starts_except_for_batches(fault_server):
    shared = LLMConfig(base_url=fault_server.base_url, model="m")
    down = LLMConfig(base_url=f"http://127.0.0.1:{free_port()}/v1", model="judge")

    async def enter(**batch):
        async with BatchBackend(shared, RolesConfig(rolecs_check=RoleConfig(llm=down)), BatchConfig(**batch)):
            return fault_server.requests

    with pytest.raises(InputError, match=rf"^llm\.base_url={down.base_url}: "):
        asyncio.run(enter())
    assert asyncio.run(enter(roles=["rolecs_check"])) == []
