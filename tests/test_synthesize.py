"""recipes/synthesize_rolecs.py as a user runs it: without a model, against servers, by batch files, interrupted."""

import json
import os
import re
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT
from processes import TIMEOUT_S, Script, run_script
from servers.faults import DROP, TORN, Fault, Say

from csc_train.data.readers import read_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.llm import client

KEY = "-".join(("sk", "secret", "0123456789"))  # in parts, as a run directory holds changes of the code, tests included
ANSWERS = {
    "PersonaAnswer": {"description": "你是一位会计。"},
    "PlannerAnswer": {"scenario": "客户的卡丢了，见 https://example.com//a?b=1", "goal": "补卡"},
    "SupporterAnswer": {"text": "请讲。"},
    "CustomerAssistantAnswer": {"direction": "回答"},
    "RoleCSChecklist": {"reason": "", **dict.fromkeys(
        ("strategy_followed", "unreasonable_requests", "natural", "varied", "roles_kept"), 1)},
}  # fmt: skip


def form_of(body):
    """The name of the form that a request asks for."""
    return body["response_format"]["json_schema"]["name"]


def play(body):
    """What a model that does as it is told says."""
    form, text = form_of(body), "".join(message["content"] for message in body["messages"])
    rounds = text.count("客户:")
    if form == "SupporterAssistantAnswer":
        return json.dumps({"strategy": ["礼貌问候", "确认身份", "感谢与告别"][min(rounds, 2)]}, ensure_ascii=False)
    if form == "CustomerAnswer":
        return json.dumps({"text": f"第{rounds}句，{body['seed']}号。", "finished": "false"}, ensure_ascii=False)
    if form == "SupporterAnswer":
        return json.dumps({"text": f"请讲，{body['seed']}。"}, ensure_ascii=False)
    if form == "PlannerAnswer":
        scenario = f"{body['seed']}，" * 6 + ANSWERS[form]["scenario"]
        return json.dumps(ANSWERS[form] | {"scenario": scenario}, ensure_ascii=False)
    return json.dumps(ANSWERS[form], ensure_ascii=False)


def recipe(*arguments, cwd=None, **environment):
    """Run the recipe in a separate process."""
    return run_script(ROOT / "recipes" / "synthesize_rolecs.py", *arguments, cwd=cwd, env=os.environ | environment)


def served(server, **more):
    """The arguments for a model behind `server`, with everything small."""
    given = {"llm": "openai", "llm.base_url": server.base_url, "llm.model": "m", "llm.api_key_env": "TEST_KEY"}
    given |= {
        "llm.concurrency": 2,
        "llm.timeout_s": TIMEOUT_S,
        "synthesis.personas.count": 2,
        "target": 3,
        "run.directory": "r",
    }
    given |= {"duplicates.opening": "null", "duplicates.dialogue": "null"}
    return [f"{key}={value}" for key, value in (given | more).items()]


def rows(path, query):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to run in, in this process, with the key set and no time lost between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(client, "INITIAL_BACKOFF_S", 0.01)
    return tmp_path


def main(*arguments):
    """Run the recipe in this process; its exit status."""
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import synthesize_rolecs

        from csc_train.config.compose import compose

        synthesize_rolecs.main(compose("synthesize_rolecs", list(arguments)))
    except SystemExit as end:
        return end.code
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    return 0


def everything_written(directory):
    """The bytes of all files in a directory."""
    return b"".join(path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file())


@pytest.mark.slow
def test_whatever_a_server_does_the_dialogues_are_made(here, fault_server, capsys):
    fault_server.answer = play
    planned = {
        "PersonaAnswer": [Fault(429, retry_after=0.01), Fault(500), DROP],
        "PlannerAnswer": [TORN, "```json\n" + json.dumps(ANSWERS["PlannerAnswer"], ensure_ascii=False) + "\n```"],
        "SupporterAssistantAnswer": ['{"strategy": "礼貌', '我选 {"strategy": "礼貌问候"} 这个。'],
        "CustomerAnswer": [Say('{"text": "好", "finished": "maybe"}', usage=(100, 50))],
        "RoleCSChecklist": ["没有 JSON", "还是没有", json.dumps(ANSWERS["RoleCSChecklist"])],
    }

    def faulty(body):
        left = planned.get(form_of(body) if "response_format" in body else "", [])
        return left.pop(0) if left else play(body)

    fault_server.answer = faulty
    assert main(*served(fault_server)) == 0
    assert not any(planned.values())
    dialogues = read_dialogues("r/dialogues.parquet", strict=True)
    assert len(dialogues) == 3 and {dialogue.source for dialogue in dialogues} == {"synthetic"}
    assert any("https://example.com//a?b=1" in dialogue.extra["scenario"] for dialogue in dialogues)
    assert {turn.strategy.number for dialogue in dialogues for turn in dialogue.turns if turn.strategy} == {1, 2, 11}
    counted = dict(rows("r/synthesis.db", "SELECT failure, count(*) FROM calls GROUP BY failure"))
    assert {"rate_limit", "server_error", "connection", "malformed"} < set(counted)
    assert sum(counted.values()) == len(fault_server.requests)
    # What could not be used was paid for.
    paid = "SELECT prompt_tokens, completion_tokens FROM calls WHERE prompt_tokens = 100"
    assert rows("r/synthesis.db", paid) == [(100, 50)]
    bodies = fault_server.bodies
    assert {body["temperature"] for body in bodies if form_of(body) != "RoleCSChecklist"} == {0.8}
    assert {body["temperature"] for body in bodies if form_of(body) == "RoleCSChecklist"} == {0.0}
    (choice,) = {json.dumps(body["response_format"]["json_schema"]["schema"]["properties"]["strategy"]["enum"])
                 for body in bodies if form_of(body) == "SupporterAssistantAnswer"}  # fmt: skip
    assert json.loads(choice) == [strategy.zh for strategy in STRATEGIES]
    shown = capsys.readouterr()
    assert KEY.encode() not in everything_written("r") and KEY not in shown.out + shown.err


@pytest.mark.slow
def test_a_refused_key_ends_it_at_once_and_nothing_is_lost(here, fault_server):
    made = []

    def answer(body):
        made.append(body)
        return Fault(401, message=f"bad key {KEY}") if len(made) > 10 else play(body)

    fault_server.answer = answer
    done = recipe(*served(fault_server), cwd=here, TEST_KEY=KEY)
    assert done.returncode == 2
    said = r"error: llm\.api_key_env=TEST_KEY: .*HTTP 401: .*\*\*\*.*; to go on: run=r resume=true\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    assert len(made) <= 12 and KEY not in done.stdout + done.stderr
    assert KEY.encode() not in everything_written(here)
    fault_server.answer = play
    assert main(*served(fault_server)) == 0
    assert rows("r/synthesis.db", "SELECT count(*) FROM calls WHERE failure IS NULL AND number > 1") == [(0,)]
    assert len(read_dialogues("r/dialogues.jsonl", strict=True)) == 3


@pytest.mark.slow
def test_each_role_may_have_another_model(here, fault_server):
    fault_server.answer = play
    own = "+llm@synthesis.roles.customer.llm=openai"
    values = {"base_url": fault_server.base_url, "model": "customers", "api_key_env": "TEST_KEY"}
    changed = [f"synthesis.roles.customer.llm.{key}={value}" for key, value in values.items()]
    more = ["synthesis.roles.customer.temperature=1.1", "synthesis.roles.planner.max_tokens=77"]
    assert main(*served(fault_server, target=1), own, *changed, *more) == 0
    told = {(form_of(body), body["model"], body["temperature"], body["max_tokens"]) for body in fault_server.bodies}
    assert ("CustomerAnswer", "customers", 1.1, 1024) in told and ("PlannerAnswer", "m", 0.8, 77) in told
    assert {model for form, model, _, _ in told if form != "CustomerAnswer"} == {"m"}


def answer_batch(path):
    """What a batch service makes of a file of requests, in another order; one request has expired."""
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    results = []
    for number, request in enumerate(requests):
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        body = {"choices": [{"message": {"content": play(request["body"])}}], "usage": usage}
        response = {"status_code": 200, "body": body}
        expired = number == 0 and len(requests) > 2
        rest = (
            {"response": None, "error": {"code": "batch_expired"}} if expired else {"response": response, "error": None}
        )
        results.append(json.dumps({"id": str(number), "custom_id": request["custom_id"]} | rest))
    answered = path.with_name(f"{path.stem}-results-{len(list(path.parent.iterdir()))}.jsonl")
    answered.write_text("\n".join(reversed(results)))
    return answered


@pytest.mark.slow
def test_batches_answer_what_is_not_asked_at_once(here, fault_server):
    fault_server.answer = play
    assert main(*served(fault_server, **{"run.directory": "direct"})) == 0
    asked = {form_of(body) for body in fault_server.bodies}
    fault_server.requests.clear()
    roles, files, status = "batch.roles=[persona,planner,rolecs_check]", [], 75
    for _ in range(9):
        status = main(*served(fault_server), roles, f"batch.results=[{','.join(map(str, files))}]")
        if status == 0:
            break
        assert status == 75
        files.append(answer_batch(Path("r/batch/requests-1.jsonl")))
    assert status == 0 and len(files) >= 4
    in_batches = {"PersonaAnswer", "PlannerAnswer", "RoleCSChecklist"}
    assert {form_of(body) for body in fault_server.bodies} == asked - in_batches
    assert Path("r/dialogues.parquet").read_bytes() == Path("direct/dialogues.parquet").read_bytes()
    answered = "SELECT role, count(*) FROM answers GROUP BY role"
    assert rows("r/synthesis.db", answered) == rows("direct/synthesis.db", answered)


@pytest.mark.slow
def test_what_a_stopped_run_says_is_the_command_that_resumes_it(here, fault_server, capsys):
    """With results in a batch file whose texts hold line separators of Unicode, behind a byte order mark."""
    fault_server.answer = play
    more = {"target": 1, "synthesis.personas.count": 1, "run.directory": "ba", "budget.tokens": 50}
    assert main(*served(fault_server, **more), "batch.roles=[persona]") == 75
    said = capsys.readouterr().out
    assert "\nstopped; to resume: run=ba resume=true batch.results=[FILE,...]\n" in said and said.count("resume") == 2
    results = answer_batch(Path("ba/batch/requests-1.jsonl"))
    row = json.loads(results.read_text())
    row["response"]["body"]["choices"][0]["message"]["content"] = '{"description": "你是\u2028一位\x85教师"}'
    results.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert main("run=ba", "resume=true", f"batch.results=[{results}]") == 75
    assert "\nstopped; to resume: run=ba resume=true budget.tokens=MORE\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="a run resumes with its own values"):
        main("run=ba", "resume=true", "target=2")
    assert main("run=ba", "resume=true", "budget.tokens=null") == 0
    (answer,) = rows("ba/synthesis.db", "SELECT answer FROM answers WHERE role = 'persona'")
    assert json.loads(answer[0]) == {"description": "你是 一位 教师"}


@pytest.mark.slow
def test_an_estimate_asks_nothing(here, fault_server, capsys):
    prices = {"llm.price_per_million_input": 2, "llm.price_per_million_output": 8, "target": 100}
    assert main(*served(fault_server, **prices), "dry_run=true") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    calls = {role: int(lines[role][2].replace(",", "")) for role in ("persona", "planner", "supporter", "customer")}
    assert calls["persona"] == 2 and 100 <= calls["planner"] < 130 and 900 < calls["customer"] < 1600
    prompt, answer = (int(lines["all"][column].replace(",", "")) for column in (2, 3))
    assert float(lines["all"][4]) == pytest.approx((2 * prompt + 8 * answer) / 1e6, abs=0.02)
    assert fault_server.requests == [] and list(here.iterdir()) == []


@pytest.mark.slow
def test_interrupted_by_the_user_it_resumes(here, capsys):
    assert main("target=30", "run.directory=whole") == 0
    assert "30 of 30 dialogues (source=synthetic-sample)" in capsys.readouterr().out
    process = Script(ROOT / "recipes" / "synthesize_rolecs.py", "target=30")
    log = Path("runs/rolecs/synthesis.db-wal")
    while process.poll() is None and not (log.exists() and log.stat().st_size > 200_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130 and done.stdout.endswith("interrupted; to resume: run=runs/rolecs resume=true\n")
    assert main("target=30") == 0
    for name in ("dialogues.parquet", "dialogues.jsonl", "filter_funnel.json", "rejected.jsonl"):
        assert Path("runs/rolecs", name).read_bytes() == Path("whole", name).read_bytes(), name
    with pytest.raises(InputError, match=r"synthesis\.seed: 0 then, 1 now"):
        main("target=30", "synthesis.seed=1")
    before = read_dialogues("runs/rolecs/dialogues.parquet", strict=True)
    assert main("target=33") == 0
    assert read_dialogues("runs/rolecs/dialogues.parquet", strict=True)[:30] == before
    record = json.loads(Path("runs/rolecs/run.json").read_text())
    assert record["status"] == "finished" and "target: 33\n" in Path("runs/rolecs/resolved.yaml").read_text()


@pytest.mark.slow
def test_a_real_model_plays_all_roles(here, small_model, fault_server):
    """Plumbing, not quality: schemas, Chinese enumerations, usage and seeds; the judge is a model elsewhere."""
    fault_server.answer = play
    Path("profiles.jsonl").write_text('{"id": "me", "职业": "会计"}\n')
    status = main(
        "llm=llama_cpp", f"llm.base_url={small_model}/v1", "llm.concurrency=1", "synthesis=compact",
        "synthesis.max_utterances=4", "synthesis.personas.path=profiles.jsonl", "target=1", "run.directory=r",
        "synthesis.attempts=1", "budget.tokens=15000", "+llm@synthesis.roles.rolecs_check.llm=llama_cpp",
        f"synthesis.roles.rolecs_check.llm.base_url={fault_server.base_url}",
    )  # fmt: skip
    # Whether a rule drops what such a model says is luck.
    assert status in (0, 1)
    dialogues = read_dialogues("r/dialogues.parquet", strict=True) if status == 0 else []
    assert all(len(dialogue.turns) <= 4 and dialogue.extra["persona"] == "me" for dialogue in dialogues)
    assert rows("r/synthesis.db", "SELECT count(DISTINCT number) FROM turns")[0][0] in range(1, 5)
    counted = "SELECT role, min(completion_tokens) FROM calls WHERE failure IS NULL GROUP BY role"
    roles = dict(rows("r/synthesis.db", counted))
    assert {"persona", "planner", "supporter_assistant", "supporter"} <= set(roles) and min(roles.values()) > 0
    chosen = rows(
        "r/synthesis.db", "SELECT json_extract(answer, '$.strategy') FROM answers WHERE role LIKE 'supporter_a%'"
    )
    assert {label for (label,) in chosen} <= {strategy.zh for strategy in STRATEGIES}
