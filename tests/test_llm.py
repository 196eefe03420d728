"""Requests to a real server on loopback that fails as told: what is sent again, what is counted, what is read."""

import asyncio
import enum
import inspect
import threading
import time
import typing

import pydantic
import pytest
from processes import TIMEOUT_S, free_port
from servers.faults import DRIP, DROP, HANG, HTML, NO_REPLIES, TORN, Fault, Say

from csc_train.data.readers import ReadOptions, iter_checked
from csc_train.errors import InputError
from csc_train.llm import client as client_module
from csc_train.llm.client import CallError, Client, LLMError, Sampling, UnusableServerError
from csc_train.llm.config import JSON_MODES, LLMConfig
from csc_train.llm.limits import RateLimiter, RequestLimits
from csc_train.llm.structured import ask_structured, parse_answer

CHAT = [{"role": "system", "content": "你是客服。"}, {"role": "user", "content": "还没到！"}]
SOON = 0.01


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "INITIAL_BACKOFF_S", SOON)


def config_of(server, **settings):
    return LLMConfig(base_url=server.base_url, model="small", **{"max_retries": 2, "timeout_s": TIMEOUT_S} | settings)


def run(config, call):
    """What `call(client)` returns or raises, and the attempts that it made."""
    attempts = []

    async def main():
        async with Client(config) as client:
            return await call(client, attempts.append)

    try:
        return asyncio.run(main()), attempts
    except CallError as failure:
        return failure, attempts


def chat(config, checked=False, **settings):
    """The answer or failure; `checked`: of a server that has answered before."""

    async def call(client, observe):
        if checked:
            await client.check()
        return await client.chat(CHAT, observe=observe, **settings)

    return run(config, call)


def test_an_answer_is_sent_for_once(fault_server):
    fault_server.script.append(Say("[情感管理]抱歉", usage=(31, 7)))
    answer, attempts = chat(config_of(fault_server, top_p=0.9, extra_body={"top_k": 3}), seed=5, temperature=0)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("[情感管理]抱歉", 31, 7)
    assert (answer.attempts, answer.cut_off, answer.model) == (1, False, "small")
    ((path, _, body),) = fault_server.requests
    assert path == "/v1/chat/completions"
    assert body == {"model": "small", "messages": CHAT, "seed": 5, "temperature": 0, "top_p": 0.9, "top_k": 3}
    assert [(each.request, each.number, each.kind, each.text) for each in attempts] == [(body, 1, None, answer.text)]
    assert attempts[0].latency_s > 0


FAULTS = {
    "connection": DROP,
    "timeout": HANG,
    "rate_limit": Fault(429, retry_after=SOON),
    "server_error": Fault(500),
    "malformed": TORN,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "timeout")) for kind in FAULTS]
)
def test_passing_errors_are_retried_within_the_limit(kind, fault_server):
    fault_server.script += [FAULTS[kind]] * 2
    config = config_of(fault_server, timeout_s=3 if kind == "timeout" else TIMEOUT_S)
    answer, attempts = chat(config, checked=True)
    assert (answer.text, answer.attempts) == ("您好", 3)
    assert [(each.number, each.kind) for each in attempts] == [(1, kind), (2, kind), (3, None)]
    assert len({str(body) for body in fault_server.bodies}) == 1

    fault_server.script += [FAULTS[kind]] * 3
    failure, attempts = chat(config, checked=True)
    assert (type(failure), failure.kind, failure.attempts) == (LLMError, kind, 3)
    assert len(fault_server.requests) == 6
    assert "\n" not in failure.message


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (Fault(400, message="too long"), "bad_request", "HTTP 400: Error code: 400 - "),
        (Fault(404, message="no such model"), "bad_request", "no such model"),
        (Say("", refusal="I cannot help with that."), "refused", "I cannot help with that."),
        (Say("抱", finish_reason="content_filter"), "refused", "stopped by a content filter"),
        (Fault(429, retry_after=3600), "rate_limit", "HTTP 429"),
    ],
)
def test_permanent_errors_are_not_retried(reply, kind, words, fault_server):
    fault_server.script.append(reply)
    failure, attempts = chat(config_of(fault_server))
    assert (type(failure), failure.kind, failure.attempts) == (LLMError, kind, 1)
    assert words in failure.message
    used = (10, 5) if isinstance(reply, Say) else (0, 0)  # a refusal is paid for
    assert (failure.prompt_tokens, failure.completion_tokens) == used
    assert [each.kind for each in attempts] == [kind]
    assert len(fault_server.requests) == 1


@pytest.mark.parametrize("fault", [Fault(401), Fault(402), Fault(403), Fault(429, code="insufficient_quota")])
def test_a_key_that_is_not_served_is_its_own_failure(fault, fault_server):
    fault_server.script.append(fault)
    failure, _ = chat(config_of(fault_server))
    assert (type(failure), failure.kind) == (UnusableServerError, "authentication")
    assert len(fault_server.requests) == 1


def test_the_key_is_sent_and_shown_nowhere(fault_server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    config = config_of(fault_server, api_key_env="SOME_KEY")
    fault_server.script.append(Fault(401, message="Incorrect API key provided: sk-very-secret."))
    failure, attempts = chat(config)
    assert fault_server.requests[0][1]["authorization"] == "Bearer sk-very-secret"
    assert "Incorrect API key provided: ***." in failure.message
    assert "secret" not in f"{failure} {attempts} {config}"

    chat(config_of(fault_server))
    assert "sk-" not in str(fault_server.requests[1])
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(InputError, match=r"^llm\.api_key_env=SOME_KEY: this environment variable is not set$"):
        chat(config)


@pytest.mark.slow
def test_an_answer_that_drips_in_is_waited_for_no_longer_than_one_that_does_not_come(fault_server):
    fault_server.script.append(DRIP)
    answer, attempts = chat(config_of(fault_server, timeout_s=3), checked=True)
    assert answer.text == "您好"
    assert [each.kind for each in attempts] == ["timeout", None]


def check(config):
    """What the first question of a client raises, and after how many seconds."""
    started = time.monotonic()

    async def main():
        async with Client(config) as client:
            await client.check()

    with pytest.raises(InputError) as caught:
        asyncio.run(main())
    return caught.value, time.monotonic() - started


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}/v1", "http://localhost:{}/v1", "http://no-such-name.invalid/v1"]
)
def test_a_server_that_is_not_there_is_asked_once(address, monkeypatch):
    monkeypatch.setattr(asyncio, "sleep", None)  # nothing is waited for
    config = LLMConfig(base_url=address.format(free_port()), model="small", max_retries=5)
    failure, attempts = chat(config)
    assert (type(failure), failure.kind, len(attempts)) == (UnusableServerError, "unreachable", 1)
    assert str(failure).startswith(f"llm.base_url={config.base_url}: [Errno ")
    assert str(failure).endswith(": start the server, or correct the address")
    assert str(check(config)[0]) == str(failure)


def test_a_server_that_has_answered_may_be_starting_again(fault_server):
    fault_server.script += ["您好", DROP]

    async def twice(client, observe):
        await client.chat(CHAT, observe=observe)
        fault_server.__exit__()
        await client.chat(CHAT, observe=observe)

    failure, attempts = run(config_of(fault_server), twice)
    assert (type(failure), failure.attempts) == (UnusableServerError, 3)
    assert [each.kind for each in attempts] == [None, "connection", "unreachable", "unreachable"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Fault(404, message="no such model"), "bad_request: HTTP 404: Error code: 404 - "),
        (Fault(401), "rejects it: HTTP 401"),
        (HTML, "malformed: not an answer of this API: "),
        (HANG, "timeout: no answer within 1 s"),
        (Fault(503), "server_error: HTTP 503"),
    ],
)
def test_a_server_is_asked_once_before_work_starts(reply, words, fault_server):
    fault_server.checks.extend([reply] * 3)
    config = config_of(fault_server, timeout_s=1 if reply == HANG else TIMEOUT_S)
    failure, _ = check(config)
    assert words in str(failure) and "\n" not in str(failure) and fault_server.base_url in str(failure)
    # A wait may cure the errors of a server; the others are said at once.
    assert len(fault_server.checks) == (0 if reply in (HTML, Fault(503)) else 2)
    assert fault_server.requests == []


@pytest.mark.parametrize("reply", [Say("", "length"), Say(None), Say("", refusal="no"), Say("<think>OK"), "OK"])
def test_any_answer_shows_that_a_server_is_there(reply, fault_server):
    fault_server.checks.append(reply)

    async def main():
        async with Client(config_of(fault_server, retry_max_tokens=900)) as client:
            await client.check()

    asyncio.run(main())
    assert not fault_server.checks


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind, some in NO_REPLIES.items() for reply in some])
def test_what_a_server_did_not_say_is_no_reply(kind, reply, fault_server):
    fault_server.answer = lambda body: reply
    failure, attempts = chat(config_of(fault_server, max_retries=1), max_tokens=20)
    assert (type(failure), failure.kind) == (LLMError, kind)
    assert failure.completion_tokens == 5 * len(attempts)  # they are paid for
    assert len(attempts) == (2 if kind == "interrupted" else 1)

    # Once more with a larger limit, where the profile has one, whatever the number of retries.
    fault_server.answer = lambda body: "好的" if body["max_tokens"] > 20 else reply
    answer, attempts = chat(config_of(fault_server, max_retries=0, retry_max_tokens=900), max_tokens=20)
    if kind in ("cut_off", "empty"):
        assert (answer.text, answer.attempts, answer.completion_tokens) == ("好的", 2, 5)
        assert [each.request["max_tokens"] for each in attempts] == [20, 900]
    else:
        assert answer.kind == kind and len(attempts) == 1


def test_a_text_that_is_cut_off_is_asked_for_once_more_with_a_larger_limit(fault_server):
    fault_server.answer = lambda body: Say("抱歉给您", "length")
    answer, attempts = chat(config_of(fault_server), max_tokens=20)
    assert (answer.text, answer.cut_off, len(attempts)) == ("抱歉给您", True, 1)
    answer, attempts = chat(config_of(fault_server, retry_max_tokens=900), max_tokens=20)
    assert answer.cut_off and [each.request["max_tokens"] for each in attempts] == [20, 900]
    config = config_of(fault_server, extra_body={"max_tokens": None, "max_completion_tokens": 30}, retry_max_tokens=900)
    assert [each.request["max_completion_tokens"] for each in chat(config)[1]] == [30, 900]
    config = config_of(fault_server, max_tokens=900, retry_max_tokens=900)
    assert len(chat(config)[1]) == 1


def test_retry_after_in_each_of_its_forms():
    def seconds(**headers):
        return client_module._retry_after({name.replace("_", "-"): value for name, value in headers.items()})

    assert seconds(retry_after="2.5") == 2.5
    assert seconds(retry_after="9", retry_after_ms="250") == 0.25
    assert seconds(retry_after="Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert seconds(retry_after="Fri, 01 Jan 2100 00:00:00 GMT") > 1e9
    assert seconds(retry_after="soon") is seconds() is None


def test_a_rate_limit_is_waited_out_by_all_requests():
    """After a refusal nothing is sent before the time that the server named."""
    clock = []

    async def main():
        limits = RequestLimits(LLMConfig(base_url="http://localhost/v1", model="small", concurrency=4))
        loop = asyncio.get_running_loop()
        async with limits.slot(1) as sent_in:
            limits.on_rate_limit(sent_in, 0.05)
            refused = loop.time()

        async def send():
            async with limits.slot(1):
                clock.append(loop.time() - refused)

        await asyncio.gather(*(send() for _ in range(3)))

    asyncio.run(main())
    assert len(clock) == 3 and min(clock) >= 0.049


def test_concurrency_falls_on_a_rate_limit_and_recovers():
    """Halved once for all requests that were under way, and one more for each full round of answers."""

    async def main():
        limits = RequestLimits(LLMConfig(base_url="http://localhost/v1", model="small", concurrency=8))
        under_way, most = 0, 0
        refused = asyncio.Event()

        async def send(index):
            nonlocal under_way, most
            async with limits.slot(1) as sent_in:
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(0)
                if index < 5:  # five of the first eight are refused together
                    limits.on_rate_limit(sent_in, 0)
                elif index >= 8:
                    limits.on_success()
                under_way -= 1
            if index == 7:
                refused.set()

        await asyncio.gather(*(send(index) for index in range(8)))
        assert most == 8
        assert limits.concurrency == 4
        bounds = []
        for _ in range(8):
            most = 0
            await asyncio.gather(*(send(8) for _ in range(int(limits.concurrency))))
            bounds.append(limits.concurrency)
            assert most <= 8
        assert bounds == sorted(bounds) and bounds[0] < 5.1 and bounds[-1] == 8
        await asyncio.gather(*(send(8) for _ in range(20)))
        assert most == 8

        # However often it is refused, one request at a time continues.
        for _ in range(10):
            async with limits.slot(1) as sent_in:
                limits.on_rate_limit(sent_in, 0)
        assert limits.concurrency == 1
        most = 0
        limits.on_success = lambda *_: None
        await asyncio.gather(*(send(8) for _ in range(6)))
        assert most == 1

    asyncio.run(main())


def test_requests_are_sent_in_the_order_in_which_they_arrive():
    """Who has just been answered asks again behind those that wait; one that is cancelled holds up nobody."""
    sent = []

    async def main():
        limits = RequestLimits(LLMConfig(base_url="http://localhost/v1", model="small", concurrency=1))

        async def ask(name):
            for number in range(3):
                async with limits.slot(1):
                    sent.append(f"{name}{number}")
                    await asyncio.sleep(0)

        first, gone, *others = [asyncio.create_task(ask(name)) for name in "abcd"]
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(first, *others)

    asyncio.run(main())
    assert sent == [f"{name}{number}" for number in range(3) for name in "acd"]


def test_a_client_asks_no_more_at_a_time_than_it_may(fault_server):
    """By the server's own count, and fewer after it said that it is too many."""
    under_way, counts = [], []

    def answer(body):
        with lock:
            under_way.append(body)
            counts.append(len(under_way))
            arrived = len(counts)
        if arrived <= 4:
            all_there.wait(TIMEOUT_S)
        # The refusal is known long before the three others are answered.
        time.sleep(0.5 if arrived < 4 else 0 if arrived == 4 else 0.02)
        with lock:
            under_way.pop()
        return Fault(429, retry_after=SOON) if arrived == 4 else "好"

    lock, all_there = threading.Lock(), threading.Barrier(4)
    fault_server.answer = answer

    async def several(client, observe):
        return await asyncio.gather(*(client.chat(CHAT, observe=observe) for _ in range(12)))

    answers, attempts = run(config_of(fault_server, concurrency=4), several)
    assert [each.text for each in answers] == ["好"] * 12
    assert max(counts[:4]) == 4 and max(counts) == 4 and max(counts[4:7]) < 4
    assert [each.kind for each in attempts].count("rate_limit") == 1


def test_requests_and_tokens_a_minute():
    """Spread evenly, by what the server counted where that differs from the estimate."""

    async def waits(rate, amounts):
        slept = []

        async def sleep(seconds):
            slept.append(round(seconds, 2))

        for amount in amounts:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(asyncio, "sleep", sleep)
                await rate.acquire(amount)
        return slept

    assert asyncio.run(waits(RateLimiter(60), [1, 1, 1])) == [0, 1, 2]
    # A request that is larger than a minute's share goes; the next ones wait for it.
    assert asyncio.run(waits(RateLimiter(600), [1200, 1, 1])) == [0, 120, 120.1]
    corrected = RateLimiter(600)
    corrected.adjust(-100)
    assert asyncio.run(waits(corrected, [10, 10])) == [0, 1]

    async def used():
        rate = RateLimiter(600)
        first = await waits(rate, [100, 0])
        rate.adjust(-50)
        return first + await waits(rate, [0])

    assert asyncio.run(used()) == [0, 10, 5]


def test_ids_and_text_go_to_completions(fault_server):
    async def both(client, observe):
        return [await client.complete(prompt, seed=1, max_tokens=9, observe=observe) for prompt in ([5, 6], "问：")]

    answers, _ = run(config_of(fault_server), both)
    assert [each.text for each in answers] == ["您好", "您好"]
    assert [path for path, *_ in fault_server.requests] == ["/v1/completions"] * 2
    assert fault_server.bodies == [
        {"model": "small", "prompt": prompt, "seed": 1, "max_tokens": 9} for prompt in ([5, 6], "问：")
    ]
    fault_server.completions = "text"
    refused, _ = run(config_of(fault_server), both)
    assert (refused.kind, refused.attempts) == ("bad_request", 1)


def test_keywords_that_are_passed_through_are_those_of_the_function_that_takes_them():
    for options, function in ((Sampling, Client.body), (ReadOptions, iter_checked)):
        defaults = {name for name, each in inspect.signature(function).parameters.items() if each.default != each.empty}
        hints = typing.get_type_hints(function)
        assert typing.get_type_hints(options) == {name: hints[name] for name in defaults}


def test_what_the_configuration_says_comes_before_what_the_task_asks_for(fault_server):
    chat(config_of(fault_server, temperature=0.3, max_tokens=2000), temperature=0, max_tokens=256)
    assert (fault_server.bodies[0]["temperature"], fault_server.bodies[0]["max_tokens"]) == (0.3, 2000)


def test_thoughts_are_no_part_of_the_answer(fault_server):
    fault_server.script.append("<think>他很急。</think>\n\n[情感管理]抱歉")
    assert chat(config_of(fault_server))[0].text == "[情感管理]抱歉"


def test_null_leaves_out_what_a_model_does_not_take(fault_server, monkeypatch):
    config = config_of(fault_server, extra_body={"max_tokens": None, "temperature": None, "max_completion_tokens": 900})
    estimates, slot = [], RequestLimits.slot
    monkeypatch.setattr(RequestLimits, "slot", lambda limits, tokens: estimates.append(tokens) or slot(limits, tokens))
    answer, _ = chat(config, temperature=0, max_tokens=256, seed=3)
    assert answer.text == "您好"
    assert estimates == [sum(len(message["content"]) for message in CHAT) // 2 + 900]
    assert fault_server.bodies == [{"model": "small", "messages": CHAT, "seed": 3, "max_completion_tokens": 900}]


def test_a_server_that_asks_for_no_wait_is_given_time_all_the_same(fault_server, monkeypatch):
    monkeypatch.setattr(client_module, "INITIAL_BACKOFF_S", 0.2)
    fault_server.script += [Fault(429, retry_after=0)] * 2
    started = time.monotonic()
    assert chat(config_of(fault_server))[0].attempts == 3
    assert time.monotonic() - started >= 0.75 * (0.2 + 0.4)


def test_messages_that_no_file_could_hold(fault_server, monkeypatch):
    key = "sk-very-secret-key-" + "0123456789" * 3
    monkeypatch.setenv("SOME_KEY", key)
    fault_server.script += [Say("", refusal="half \ud83d"), Fault(400, message="x" * 240 + key)]
    failures = [chat(config_of(fault_server, api_key_env="SOME_KEY"))[0] for _ in range(2)]
    assert failures[0].message == "half ?"
    assert key[:8] not in failures[1].message and "***" in failures[1].message


@pytest.mark.parametrize("usage", [("three", 5), ([], {"a": 1}), (float("inf"), 1)])
def test_a_count_of_tokens_that_is_none(usage, fault_server):
    fault_server.script.append(Say("您好", usage=usage))
    _, attempts = chat(config_of(fault_server))
    assert [each.kind for each in attempts] == ["malformed", None]


def test_a_likelihood_that_is_no_finite_number(fault_server):
    fault_server.echoes = True
    fault_server.script.append(Say("", log_likelihoods=(None, -1.5, float("-inf"))))
    fault_server.script.append(Say("", log_likelihoods=(None, -1.5, -2.5)))
    answer, attempts = run(
        config_of(fault_server), lambda client, observe: client.log_likelihoods([1, 2, 3], observe=observe)
    )
    assert answer == (-1.5, -2.5)
    assert [each.kind for each in attempts] == ["malformed", None]


@pytest.mark.parametrize("reply", [HTML, TORN, Say("\ud83d"), Say(["您好"])])
def test_a_reply_that_is_none_of_this_api(reply, fault_server):
    fault_server.script.append(reply)
    _, attempts = chat(config_of(fault_server))
    assert [each.kind for each in attempts] == ["malformed", None]


def test_wrong_settings_are_refused():
    def refusal(**settings):
        with pytest.raises(InputError) as caught:
            LLMConfig(**{"base_url": "http://localhost/v1", "model": "small"} | settings)
        return str(caught.value)

    assert refusal(base_url="localhost:8000").startswith("llm.base_url=localhost:8000: give an address such as")
    assert "password" not in refusal(base_url="http://me:hush@localhost/v1").replace("user or password", "")
    assert "hush" not in refusal(base_url="http://me:hush@localhost/v1")
    assert refusal(json_mode="yaml").startswith("llm.json_mode=yaml: choose one of auto, json_schema")
    assert refusal(temperature=-1) == "llm.temperature=-1: must be at least 0"
    assert refusal(requests_per_minute=0) == "llm.requests_per_minute=0: must be at least 1"
    with pytest.raises(InputError, match=r"^llm\.backend=mock: not a server: choose one"):
        Client(LLMConfig(backend="mock"))


def test_cost():
    prices = {"price_per_million_input": 2.5, "price_per_million_output": 10}
    assert LLMConfig(base_url="http://localhost/v1", model="small", **prices).cost(1_000_000, 500_000) == 7.5
    assert LLMConfig(base_url="http://localhost/v1", model="small").cost(1, 1) is None


# Answers of a given form


class Mood(enum.Enum):
    CALM = "平静"
    ANGRY = "生气"


class Verdict(pydantic.BaseModel):
    keep: bool
    mood: Mood
    score: int
    link: str


GOOD = '{"keep": false, "mood": "生气", "score": 4, "link": "https://example.com//a?b=1"}'
READ = Verdict(keep=False, mood=Mood.ANGRY, score=4, link="https://example.com//a?b=1")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"判断如下 {{供参考}}：\n{GOOD}\n希望有帮助。// 完",
        GOOD.replace("false", '"false"'),
        GOOD.replace("4", '"4"'),
        f"先举例 {GOOD.replace('生气', '平静')}，答案是 {GOOD}",
        GOOD.replace("{", '{"why": "第一行\n第二行", '),
    ],
)
def test_what_can_be_read_for_sure_is_read(text):
    assert parse_answer(text, Verdict) == READ


def test_false_as_a_string_is_false():
    """A program that takes any non-empty text for true would keep what the model rejected."""
    assert parse_answer(GOOD.replace("false", '"false"'), Verdict).keep is False
    assert parse_answer(GOOD.replace("false", '"true"'), Verdict).keep is True
    assert bool("false")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("好的", "There is no complete JSON object in it."),
        (GOOD[:-5], "There is no complete JSON object in it."),
        (GOOD.replace("false", '"maybe"'), "keep: Input should be a valid boolean, unable to interpret input"),
        (GOOD.replace("生气", "愤怒"), "mood: Input should be '平静' or '生气'"),
        ('{"keep": true}', "mood: Field required; score: Field required; link: Field required"),
        (GOOD.replace("https", "\\ud83d"), "It contains a lone surrogate."),
        ('{"keep":' * 1500, "There is no complete JSON object in it."),
    ],
)
def test_anything_else_is_reported_as_wrong(text, problem):
    with pytest.raises(ValueError) as caught:
        parse_answer(text, Verdict)
    assert str(caught.value) == problem


def verdict(config, **settings):
    return run(config, lambda client, observe: ask_structured(client, CHAT, Verdict, observe=observe, **settings))


def formats(server):
    return [body.get("response_format", {}).get("type") for body in server.bodies]


def test_a_server_that_takes_a_schema_is_given_one(fault_server):
    fault_server.answer = lambda body: GOOD
    answer, _ = verdict(config_of(fault_server), seed=7, temperature=0.8)
    assert (answer.value, answer.attempts) == (READ, 1)
    (body,) = fault_server.bodies
    assert body["messages"] == CHAT and (body["seed"], body["temperature"]) == (7, 0.8)
    described = body["response_format"]["json_schema"]
    assert (described["name"], described["strict"]) == ("Verdict", True)
    assert described["schema"]["required"] == ["keep", "mood", "score", "link"]
    assert described["schema"]["additionalProperties"] is False
    assert described["schema"]["$defs"]["Mood"]["enum"] == ["平静", "生气"]


@pytest.mark.parametrize(("known", "rungs"), [("json_object", JSON_MODES[:2]), ("text", JSON_MODES)])
def test_json_modes_fall_back_to_the_one_that_the_server_supports(known, rungs, fault_server):
    def answer(body):
        kind = body.get("response_format", {}).get("type", "text")
        return (
            GOOD if JSON_MODES.index(kind) >= JSON_MODES.index(known) else Fault(400, message="response_format unknown")
        )

    fault_server.answer = answer

    async def twice(client, observe):
        return [await ask_structured(client, CHAT, Verdict, observe=observe) for _ in range(2)]

    answers, attempts = run(config_of(fault_server), twice)
    assert [each.value for each in answers] == [READ, READ]
    assert [each.attempts for each in answers] == [len(rungs), 1]
    asked = [None if rung == "text" else rung for rung in (*rungs, known)]
    assert formats(fault_server) == asked
    for body in fault_server.bodies[1:]:
        assert body["messages"][0] == CHAT[0]
        said = body["messages"][1]["content"]
        assert said.startswith(CHAT[1]["content"]) and "JSON" in said and '"平静"' in said
    assert [each.kind for each in attempts].count("bad_request") == len(rungs) - 1


def test_a_server_that_looks_at_no_format_is_asked_in_words(fault_server):
    fault_server.script += ["我觉得可以。", GOOD, GOOD]

    async def twice(client, observe):
        return [await ask_structured(client, CHAT, Verdict) for _ in range(2)]

    answers, _ = run(config_of(fault_server), twice)
    assert [each.attempts for each in answers] == [2, 1]
    assert formats(fault_server) == ["json_schema", None, None]


def test_a_bad_request_is_not_blamed_on_the_format_that_worked(fault_server):
    fault_server.script += [GOOD, Fault(400, message="prompt too long")]

    async def twice(client, observe):
        return [await ask_structured(client, CHAT, Verdict) for _ in range(2)]

    failure, _ = run(config_of(fault_server), twice)
    assert (failure.kind, failure.attempts, len(fault_server.requests)) == ("bad_request", 1, 2)


def test_the_configured_way_is_the_only_one(fault_server):
    fault_server.script += [Fault(400)]
    failure, _ = verdict(config_of(fault_server, json_mode="json_schema"))
    assert (failure.kind, len(fault_server.requests)) == ("bad_request", 1)
    fault_server.script += [GOOD]
    verdict(config_of(fault_server, json_mode="text"))
    assert formats(fault_server) == ["json_schema", None]


def test_two_repairs_that_say_what_is_wrong(fault_server):
    wrong = GOOD.replace("false", '"maybe"')
    fault_server.script += [wrong, Say(GOOD[:-5], finish_reason="length"), GOOD]
    answer, attempts = verdict(config_of(fault_server), seed=7)
    assert (answer.value, answer.attempts) == (READ, 3)
    assert (answer.prompt_tokens, answer.completion_tokens) == (30, 15)
    assert len(attempts) == 3
    first, second, third = (body["messages"] for body in fault_server.bodies)
    assert first == CHAT
    assert second[:2] == CHAT and second[2] == {"role": "assistant", "content": wrong}
    assert "keep: Input should be a valid boolean" in second[3]["content"] and '"平静"' in second[3]["content"]
    assert third[4] == {"role": "assistant", "content": GOOD[:-5]}
    assert "cut off" in third[5]["content"]
    assert [body["seed"] for body in fault_server.bodies] == [7, 7, 7]


def test_then_one_fresh_sample_then_failure(fault_server):
    fault_server.script += ["不", "行", "啊", GOOD]
    answer, _ = verdict(config_of(fault_server, json_mode="json_object"), seed=7)
    assert (answer.value, answer.attempts) == (READ, 4)
    assert [body["seed"] for body in fault_server.bodies] == [7, 7, 7, 8]
    assert len(fault_server.bodies[3]["messages"]) == 2

    fault_server.answer = lambda body: Say("不", usage=(100, 20))
    failure, attempts = verdict(config_of(fault_server), seed=7)
    assert (type(failure), failure.kind) == (LLMError, "malformed")
    assert failure.message == "no answer matches the schema Verdict: There is no complete JSON object in it."
    assert (failure.attempts, failure.prompt_tokens, failure.completion_tokens) == (4, 400, 80)
    assert [each.text for each in attempts] == ["不"] * 4


def test_a_failure_counts_the_answers_before_it(fault_server):
    fault_server.script += ["不", Fault(401)]
    failure, _ = verdict(config_of(fault_server, json_mode="text"))
    assert type(failure) is UnusableServerError
    assert (failure.attempts, failure.prompt_tokens, failure.completion_tokens) == (2, 10, 5)
