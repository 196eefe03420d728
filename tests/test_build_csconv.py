"""Calls -> dialogues: the bundled calls through every rule, what is kept over a crash, and the recipe on a server."""

import asyncio
import dataclasses
import itertools
import json
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict

import pytest
from conftest import ROOT
from processes import TIMEOUT_S, Script
from servers.faults import Fault

from csc_train.data.dialogue import Speaker
from csc_train.data.readers import read_dialogues
from csc_train.errors import InputError
from csc_train.jsonl import JsonlLog
from csc_train.llm import client as client_module
from csc_train.llm.answer_log import AnswerLog
from csc_train.llm.client import LLMError, RequestAttempt, UnusableServerError
from csc_train.synthesis.config import CallFilterConfig, DuplicatesConfig, RewriteFilterConfig
from csc_train.synthesis.csconv.build import (
    BUNDLED_CALLS,
    CSCONV_RULES,
    RewrittenCall,
    ask_mock,
    build_csconv,
    read_calls,
)
from csc_train.synthesis.filters.funnel import filter_funnel
from csc_train.synthesis.filters.llm_checks import CallCheck, QualityCheck

CALLS, SCRIPT = read_calls(BUNDLED_CALLS["zh"]), ask_mock("zh")
FORMS = {"call_check": CallCheck, "rewrite": RewrittenCall, "quality": QualityCheck}
ANSWERS = 34
"""Questions that the bundled calls take."""


def built(ask, calls=CALLS, language="zh", concurrency=4, **settings):
    defaults = {"call": CallFilterConfig(), "rewrite": RewriteFilterConfig(), "duplicates": DuplicatesConfig()}
    settings = defaults | {"language": language, "concurrency": concurrency} | settings
    return asyncio.run(build_csconv(calls, ask, **settings))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_bundled_calls_meet_every_rule_and_each_drops_one(language):
    outcomes = built(ask_mock(language), read_calls(BUNDLED_CALLS[language]), language=language)
    rows = filter_funnel((outcome.verdicts for outcome in outcomes), CSCONV_RULES)
    assert [row["rule"] for row in rows] == list(CSCONV_RULES)
    assert {row["rule"] for row in rows if not row["dropped"]} == set()
    assert rows[0]["entered"] == len(CALLS) == 20 and rows[-1]["kept"] == 4
    kept = [outcome.dialogue("x") for outcome in outcomes if outcome.accepted]
    assert [each.id for each in kept] == ["parking-charged-twice", "broadband-down", "annual-fee", "coupon-refused"]
    assert not any(notice in each.text for each in kept for notice in ("挂断", "通话结束", "hung up", "call ended"))
    assert language == "zh" or all(each.text.isascii() for each in kept)


def test_a_dropped_call_is_recorded_with_its_reason_and_without_its_private_data():
    rows = {outcome.id: outcome.row() for outcome in built(ask_mock("zh")) if not outcome.accepted}
    assert rows["wrong-number"] == {
        "id": "wrong-number", "rule": "rounds", "reason": "fewer than 3 rounds", "detail": "2 rounds",
    }  # fmt: skip
    assert rows["broadband-down-again"]["detail"].endswith("like broadband-down")
    assert len(rows["flight-delayed"]["rewritten"]) == 11
    assert "15912345678" not in json.dumps(rows) and "02586641207" not in json.dumps(rows)


def test_outcomes_do_not_depend_on_who_answers_first():
    script, rng = ask_mock("zh"), random.Random(0)

    async def late(task, prompt, form):
        await asyncio.sleep(rng.random() / 100)
        return await script(task, prompt, form)

    assert built(late, concurrency=19) == built(script, concurrency=1)


def test_concurrency_limits_the_calls_in_flight():
    script, running, most = ask_mock("zh"), [0], [0]

    async def watched(task, prompt, form):
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.001)
        running[0] -= 1
        return await script(task, prompt, form)

    built(watched, concurrency=3)
    assert most == [3]


def test_a_call_without_an_answer_is_neither_kept_nor_dropped_and_the_others_continue():
    script = ask_mock("zh")

    async def failing(task, prompt, form):
        if task == "rewrite" and "年费" in prompt[-1]["content"]:
            raise LLMError("timeout", "no answer within 1 s")
        return await script(task, prompt, form)

    outcomes = {outcome.id: outcome for outcome in built(failing)}
    failed = [outcome for outcome in outcomes.values() if outcome.failure]
    assert [(each.id, each.failure, each.accepted) for each in failed] == [
        ("annual-fee", "timeout: no answer within 1 s", False)
    ]
    assert sum(outcome.accepted for outcome in outcomes.values()) == 3


def test_a_refused_key_ends_it_at_once():
    asked = []

    async def refused(task, prompt, form):
        asked.append(task)
        await asyncio.sleep(0)
        raise UnusableServerError("authentication", "HTTP 401")

    with pytest.raises(UnusableServerError):
        built(refused, concurrency=2)
    assert len(asked) == 2


def test_the_mock_model_answers_only_the_bundled_calls(tmp_path):
    path = tmp_path / "calls.jsonl"
    turns = [{"speaker": "客服", "text": "您好请讲"}, {"speaker": "客户", "text": "我想问一下"}] * 4
    path.write_text(json.dumps({"turns": turns}), encoding="utf-8")
    with pytest.raises(InputError, match=r"^llm=mock: answers about the bundled calls only"):
        built(ask_mock("zh"), read_calls(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"turns": []}', "{"], r"1 of 2 rows are rejected, above max_rejected=0\.1; the first: \S+calls\.jsonl, "
         r"row 2, field row: broken JSON \(column 2: Expecting.*: correct the rows, or raise max_rejected$"),
        (["[1]"], r"row 1, field row: not an object \(list\)"),
        (['{"id": "a", "turn": []}'], r"row 1, field turns: Field required; fields found: id, turn; .* mean 'turn'"),
        (['{"turns": [{"speaker": "客服"}]}'], r"row 1, field turns\.0\.text: Field required"),
        (
            ['{"turns": [{"speaker": "客服", "text": 5}]}'],
            r"row 1, field turns\.0\.text: Input should be a valid string",
        ),
        (['{"id": "a", "turns": [{"speaker": "客服", "text": "\\ud83d"}]}'], "row 1, field turns: lone surrogate"),
        (
            ['{"id": "a", "turns": []}', "", '{"id": "a", "turns": []}'],
            r"calls\.jsonl, row 3, field id: used by an earlier row \('a', \S+calls\.jsonl, row 1\)",
        ),
        ([""], "no rows"),
    ],
)  # fmt: skip
def test_a_file_of_calls_that_cannot_be_read_is_refused(tmp_path, rows, message):
    (tmp_path / "calls.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_calls(tmp_path / "calls.jsonl")


def test_bad_calls_are_listed_with_place_and_reason_but_without_the_call(tmp_path, caplog):
    """In a folder of parts in another encoding; the id of the last row is that of a row of the other part."""
    rows = BUNDLED_CALLS["zh"].read_text(encoding="utf-8").splitlines()
    last = json.dumps(
        json.loads(rows[0]) | {"turns": [{"speaker": "客户", "text": "电话15912345678"}]}, ensure_ascii=False
    )
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls/a.jsonl").write_text("\n".join(rows), encoding="gb18030")
    (tmp_path / "calls/b.jsonl").write_text(f'{{"turns": 1, "phone": "15912345678"}}\n{last}', encoding="gb18030")
    with caplog.at_level("INFO"):
        calls = read_calls(tmp_path / "calls", encoding="gb18030", rejected_path=tmp_path / "rejected-calls.jsonl")
    assert len(calls) == 20 and f"{tmp_path}/calls: 22 rows, 20 accepted, 2 rejected" in caplog.text
    text = (tmp_path / "rejected-calls.jsonl").read_text()
    one, other = map(json.loads, text.splitlines())
    assert (one["file"], one["row"]) == (f"{tmp_path}/calls/b.jsonl", 1) and "15912345678" not in text
    assert one["issues"][0]["reason"] == "field turns: Input should be a valid list" and one["record"] is None
    name = json.loads(rows[0])["id"]
    assert (
        other["issues"][0]["reason"] == f"field id: used by an earlier row ({name!r}, {tmp_path}/calls/a.jsonl, row 1)"
    )
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: not UTF-8 .* \(convert, build_csconv: encoding\)"):
        read_calls(tmp_path / "calls")
    with pytest.raises(InputError, match=r"2 of 22 rows are rejected, above max_rejected=0\.05"):
        read_calls(tmp_path / "calls", encoding="gb18030", max_rejected=0.05)


def test_calls_are_read(tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"turns": [{"speaker": "customer", "text": " 在吗 "}]}\n', encoding="utf-8")
    (call,) = read_calls(path)
    assert [(each.speaker, each.text) for each in call.utterances] == [(Speaker.CUSTOMER, " 在吗 ")]
    assert len(call.id) == 16 and call.third_speaker is None
    with pytest.raises(InputError, match=r"missing\.jsonl: cannot read"):
        read_calls(tmp_path / "missing.jsonl")


def test_a_third_speaker_drops_its_call_alone(tmp_path):
    path, said = tmp_path / "calls.jsonl", {"speaker": "action", "text": "account pulled up"}
    rows = [json.loads(line) for line in BUNDLED_CALLS["zh"].read_text(encoding="utf-8").splitlines()[:2]]
    rows[0]["turns"].insert(1, said)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcomes = built(ask_mock("zh"), read_calls(path))
    assert [outcome.accepted for outcome in outcomes] == [False, True]
    assert outcomes[0].row() == {
        "id": rows[0]["id"], "rule": "speakers", "reason": "a third speaker", "detail": "action",
    }  # fmt: skip
    (row, *_) = filter_funnel((outcome.verdicts for outcome in outcomes), CSCONV_RULES)
    assert (row["entered"], row["dropped"], row["reasons"]) == (2, 1, {"a third speaker": 1})


class Crash(BaseException):
    """Stands for the end of the process."""


def counted(ask, asked, crash_after=None):
    """For `AnswerLog.cached`."""

    async def counting(task, prompt, form, observe):
        if len(asked) == crash_after:
            raise Crash
        asked.append((task, prompt[-1]["content"]))
        return await ask(task, prompt, form)

    return counting


@pytest.mark.slow
def test_after_a_crash_at_any_answer_nothing_is_asked_twice_and_the_outcome_is_the_same(tmp_path):
    script = ask_mock("zh")
    expected = built(script)
    for crash_after in range(ANSWERS):
        path, first, second = tmp_path / f"{crash_after}.jsonl", [], []
        with pytest.raises(Crash):
            built(AnswerLog(path).cached(counted(script, first, crash_after)))
        assert built(AnswerLog(path).cached(counted(script, second))) == expected
        assert len(first) == crash_after and len(first + second) == len(set(first + second)) == ANSWERS


@pytest.mark.slow
def test_killed_between_a_request_and_its_record_it_counts_the_request_once(tmp_path, monkeypatch):
    script = ask_mock("zh")

    async def served(task, prompt, form, observe):
        observe(RequestAttempt({}, 1, "malformed", "", "", 3, 2, 0.1))
        observe(RequestAttempt({}, 2, None, "", "", 5, 4, 0.1))
        return await script(task, prompt, form)

    append = JsonlLog.append
    for kill_at in range(0, ANSWERS, 5):
        left = kill_at

        def dying(self, row):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            append(self, row)

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(JsonlLog, "append", dying)
            built(AnswerLog(tmp_path / f"{kill_at}.jsonl").cached(served))
        log = AnswerLog(tmp_path / f"{kill_at}.jsonl")
        built(log.cached(served))
        assert log.usage == {
            "requests": 2 * ANSWERS, "failed": ANSWERS, "prompt_tokens": 8 * ANSWERS, "completion_tokens": 6 * ANSWERS,
        }  # fmt: skip


def test_equal_questions_at_once_are_asked_once(tmp_path):
    asked = []
    ask = AnswerLog(tmp_path / "answers.jsonl").cached(counted(ask_mock("zh"), asked))
    calls = [CALLS[-1], dataclasses.replace(CALLS[-1], id="again")]
    one, again = built(ask, calls, duplicates=DuplicatesConfig(dialogue=None, opening=None))
    assert len(asked) == len(set(asked)) and one.verdicts == again.verdicts
    AnswerLog(tmp_path / "answers.jsonl")


def test_a_log_that_ends_within_a_line_is_good_up_to_there(tmp_path):
    path, script = tmp_path / "answers.jsonl", ask_mock("zh")
    built(AnswerLog(path).cached(script))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in (last, last + 1, (last + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        asked = []
        built(AnswerLog(path).cached(counted(script, asked)))
        assert len(asked) == 1 and path.read_bytes() == whole


def test_another_prompt_or_form_is_another_question(tmp_path):
    log, asked = AnswerLog(tmp_path / "answers.jsonl"), []
    ask = log.cached(counted(lambda task, prompt, form: asyncio.sleep(0, form(turns=[])), asked))
    other = type("Other", (RewrittenCall,), {"__annotations__": {"reason": str}, "reason": ""})
    for prompt, form in itertools.product(("a", "b", "a"), (RewrittenCall, other)):
        asyncio.run(ask("rewrite", [{"role": "user", "content": prompt}], form))
    assert len(asked) == 4


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        AnswerLog(tmp_path / "file" / "answers.jsonl")


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Start the recipe in this process: its exit status, and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client_module, "INITIAL_BACKOFF_S", 0.01)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["build_csconv.py", *arguments])
        status = 0
        try:
            runpy.run_path(str(ROOT / "recipes" / "build_csconv.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return start


@pytest.mark.slow
def test_the_recipe_shows_the_filter_funnel_without_a_model(tmp_path, recipe):
    status, said = recipe("run.directory=run")
    assert status == 0, said
    assert "4 of 20 calls are kept" in said and "source=synthetic-sample" in said
    run = tmp_path / "run"
    dialogues = read_dialogues(run / "dialogues.jsonl", strict=True)
    assert dialogues == read_dialogues(run / "dialogues.parquet", strict=True)
    assert {each.source for each in dialogues} == {"synthetic-sample"} and len(dialogues) == 4
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    rows = json.loads((run / "filter_funnel.json").read_text())
    assert Counter(row["rule"] for row in rejected) == {row["rule"]: row["dropped"] for row in rows}
    assert json.loads((run / "quality.json").read_text())["filter_funnel"] == rows
    assert (run / "quality.html").read_text().count("<svg") == 1
    # A finished run is left as it is; another directory is not asked for twice.
    assert recipe("run.directory=run")[0] == 2
    assert recipe("run=run", "resume=true") == (0, "run is finished; nothing to do\n")
    assert recipe("run.directory=run", "run.if_exists=reuse") == (0, "run is finished; nothing to do\n")


@pytest.mark.slow
def test_the_recipe_keeps_to_thresholds_and_refuses_wrong_ones(tmp_path, recipe):
    status, said = recipe("run.directory=run", "rewrite.required_strategies=[1]", "duplicates.dialogue=null",
                          "duplicates.opening=null")  # fmt: skip
    # Two more: the second call about the same broadband, and one in which nobody is identified.
    assert status == 0 and "6 of 20 calls are kept" in said, said
    assert recipe("call.min_rounds=40")[0] == 2
    status, said = recipe("call.min_round=4")
    assert status == 2 and "Did you mean 'call.min_rounds'?" in said
    status, said = recipe("calls=missing.jsonl")
    assert status == 2 and "missing.jsonl: cannot read" in said
    (tmp_path / "calls.jsonl").write_text('{"turns": []}\n{', encoding="utf-16")
    settings = ["calls=calls.jsonl", "run.directory=calls"]
    status, said = recipe(*settings, "encoding=utf-16")
    assert status == 2 and "1 of 2 rows are rejected, above max_rejected=0.1" in said
    status, said = recipe(*settings, "encoding=utf-16", "max_rejected=1")
    assert status == 0 and "0 of 1 calls are kept" in said, said
    assert json.loads((tmp_path / "calls/rejected-calls.jsonl").read_text())["row"] == 2
    assert "Did you mean 'utf_16'" in recipe(*settings, "encoding=utf_61")[1]


def reply(body):
    """What the script would say to a request."""
    content = body["messages"][0]["content"]
    task = "call_check" if "abusive" in content else "rewrite" if '{"turns"' in content else "quality"
    return asyncio.run(SCRIPT(task, body["messages"][:1], FORMS[task])).model_dump_json()


def on_server(server, *more):
    return (
        "llm=openai", f"llm.base_url={server.base_url}", "llm.model=small", "llm.api_key_env=null", "llm.max_retries=2",
        "llm.price_per_million_input=1", "llm.price_per_million_output=2", "run.directory=run", *more,
    )  # fmt: skip


@pytest.mark.slow
def test_the_recipe_on_a_server_that_fails_then_answers(tmp_path, recipe, fault_server):
    deaf = "年费"
    fault_server.answer = lambda body: "不知道" if deaf and deaf in body["messages"][0]["content"] else reply(body)
    fault_server.script += [Fault(500), Fault(429, retry_after=0.01), "{torn", "抱歉"]
    status, said = recipe(*on_server(fault_server, "llm.concurrency=2"))
    assert status == 1 and "1 calls got no answer, the first: annual-fee: malformed" in said, said
    assert "3 of 20 calls are kept" in said
    before = len(fault_server.requests)
    deaf = None
    status, said = recipe("run=run", "resume=true")
    assert status == 0 and "4 of 20 calls are kept" in said, said
    # What had been answered was not asked for again: only the call's manners, its rewriting and its quality.
    assert len(fault_server.requests) - before == 3
    report = json.loads((tmp_path / "run" / "quality.json").read_text())
    tokens = {"requests": before + 3, "prompt_tokens": 10 * (before + 1), "completion_tokens": 5 * (before + 1)}
    # The two faults were requests without tokens.
    assert {name: report["usage"][name] for name in tokens} == tokens and report["usage"]["failed"] == 2
    assert report["usage"]["cost"] == pytest.approx((before + 1) * 20 / 1e6)
    assert report["per_accepted"]["requests"] == (before + 3) / 4


def test_the_recipe_stops_at_a_refused_key(recipe, fault_server):
    fault_server.answer = lambda body: Fault(401)
    status, said = recipe(*on_server(fault_server, "llm.concurrency=1"))
    assert status == 1 and "stopped: llm.api_key_env=None: " in said and "resume=true" in said, said
    assert len(fault_server.requests) == 1


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_resume_and_resumes(recipe, fault_server):
    def interrupting(body):
        if len(fault_server.requests) == 9:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return reply(body)

    fault_server.answer = interrupting
    status, said = recipe(*on_server(fault_server, "llm.concurrency=1"))
    assert status == 130 and said.endswith("interrupted; to resume: run=run resume=true\n"), said
    status, said = recipe("run=run", "resume=true")
    assert status == 0 and "4 of 20 calls are kept" in said
    # The one that was under way is asked again.
    assert len(fault_server.requests) == ANSWERS + 1


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_files(tmp_path, recipe, fault_server):
    def slow(body):
        time.sleep(0.05)
        return reply(body)

    fault_server.answer = slow
    answers = tmp_path / "run" / "answers.jsonl"
    process = Script(ROOT / "recipes" / "build_csconv.py", *on_server(fault_server, "llm.concurrency=2"), cwd=tmp_path)
    for _ in range(100 * TIMEOUT_S):
        if process.poll() is not None or (answers.exists() and answers.read_bytes().count(b"\n") >= 20):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait().returncode == -9
    fault_server.answer = reply
    assert recipe("run=run", "resume=true")[0] == 0
    asked = Counter(body["messages"][0]["content"] for body in fault_server.bodies)
    # At most the two that were under way are asked again.
    assert len(asked) == ANSWERS and ANSWERS <= sum(asked.values()) <= ANSWERS + 2
    assert recipe("run.directory=whole")[0] == 0
    for name in ("dialogues.jsonl", "rejected.jsonl", "filter_funnel.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_configurations_have_the_thresholds_of_the_paper():
    assert asdict(CallFilterConfig()) == {
        "min_rounds": 3, "max_rounds": 30, "max_characters": 500, "customer_share": 0.5, "short_characters": 3,
        "long_share": 0.7,
    }  # fmt: skip
    assert asdict(RewriteFilterConfig()) == {
        "min_utterances": 10,
        "max_utterances": 50,
        "required_strategies": [1, 2, 11],
    }
