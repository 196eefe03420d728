"""Generation by a served model: prompts, likelihoods, and turns that fail."""

import gc
import json
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import load_recipe, small_tokenizer, tiny_config
from servers.faults import DROP, HANG, HTML, TORN, Fault, Say
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.files import digest
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import HFGenerator
from csc_train.inference.openai import OpenAIGenerator, build_messages
from csc_train.inference.predictions import FailedTurn, Prediction, PredictionStore, read_outcomes
from csc_train.llm import client as client_module
from csc_train.llm.client import RequestAttempt
from csc_train.llm.config import LLMConfig
from csc_train.llm.usage import Usage, read_usage, usage_observer
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.likelihood import dialogue_log_likelihoods
from csc_train.template.system_prompt import system_prompt

DIALOGUES = generate_sample(4, seed=3)
DIALOGUES[3] = OPENED = Dialogue("opened by the customer", DIALOGUES[3].turns[1:])
TURNS = sum(len(dialogue.supporter_turns) for dialogue in DIALOGUES)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "INITIAL_BACKOFF_S", 0.01)


def template_of(mode="joint"):
    return DialogueTemplate(small_tokenizer("llama3_1"), "llama3_1", TemplateConfig(mode=mode))


def generator_of(server, template, **settings):
    llm = LLMConfig(base_url=server.base_url, model="served", **{"max_retries": 0, "concurrency": 3} | settings)
    return OpenAIGenerator(llm, EvaluationConfig(max_new_tokens=20, seed=7), template)


def echo(body):
    """An answer that depends on the whole prompt, as a greedy model's does."""
    prompt = body.get("prompt") or body["messages"]
    name = STRATEGIES[len(prompt) % 12].zh
    text = f"[{name}]回复{digest(prompt)[:6]}"
    return Say(text, usage=(len(prompt), 5))


def outcomes_of(server, generator, context, store=None, dialogues=DIALOGUES):
    """The outcomes, by dialogue and turn."""
    found = generate_predictions(dialogues, generator, context, store)
    assert len(found) == sum(len(each.supporter_turns) for each in dialogues)
    return {(each.dialogue_id, each.turn): each for each in found}


@pytest.mark.slow
def test_a_served_final_model_is_prompted_with_token_ids(fault_server):
    fault_server.answer = echo
    template = template_of()
    for context in ("reference", "generated"):
        fault_server.requests.clear()
        found = outcomes_of(fault_server, generator_of(fault_server, template), context)
        assert {path for path, *_ in fault_server.requests} == {"/v1/completions"}
        probe, other_probe, *asked = fault_server.bodies
        assert (probe["max_tokens"], other_probe["echo"], len(asked)) == (1, True, TURNS)
        sent = {digest(body["prompt"]): body for body in asked}
        for dialogue in DIALOGUES:
            history = []
            for index, turn in enumerate(dialogue.turns):
                if turn.speaker is Speaker.SUPPORTER:
                    prediction = found[dialogue.id, index]
                    prompt = template.prompt_ids(history)
                    body = sent[prediction.prompt_hash]
                    assert body["prompt"] == prompt and prompt.count(template.tokenizer.bos_token_id) == 1
                    assert (body["temperature"], body["max_tokens"]) == (0, 20)
                    assert prediction.raw_text == echo(body).text and prediction.prompt_format == "token_ids"
                    assert prediction.strategy == len(prompt) % 12 + 1
                    assert prediction.label_log_likelihoods is prediction.reference_nll is None
                own = turn.speaker is Speaker.SUPPORTER and context == "generated"
                history.append(template.literal_ids(found[dialogue.id, index].raw_text) if own else turn)
        assert len({body["seed"] for body in asked}) == TURNS


@pytest.mark.slow
def test_seeds_are_those_of_the_configuration_and_the_turn(fault_server):
    def seeds(seed):
        fault_server.requests.clear()
        llm = LLMConfig(base_url=fault_server.base_url, model="served")
        generate_predictions(
            DIALOGUES, OpenAIGenerator(llm, EvaluationConfig(seed=seed), TemplateConfig()), "reference"
        )
        # Requests come in any order, and several dialogues begin with the same messages.
        return {(digest(body["messages"]), body["seed"]) for body in fault_server.bodies}

    assert seeds(1) == seeds(1)
    assert not {seed for _, seed in seeds(1)} & {seed for _, seed in seeds(2)}


def test_the_ids_that_a_server_returns_are_the_history(fault_server):
    """Text may be split into other tokens than it was made of; what ended the turn is not part of it."""
    template = template_of()
    text = f"[{STRATEGIES[4].zh}]好"
    told = [*(token for character in text for token in template.literal_ids(character)), template.end_of_turn_id]
    assert told[:-1] != template.literal_ids(text)
    fault_server.answer = lambda body: Say(text, usage=(len(body["prompt"]), 3), token_ids=tuple(told))
    found = outcomes_of(fault_server, generator_of(fault_server, template), "generated")
    assert {each.token_ids for each in found.values()} == {tuple(told[:-1])}
    dialogue = DIALOGUES[0]
    second = template.prompt_ids([told[:-1], dialogue.turns[1]])
    assert found[dialogue.id, 2].prompt_hash == digest(second)


@pytest.fixture(scope="module")
def local():
    """A model, and what it finds of prompts as a server tells it."""
    torch.manual_seed(4)
    config = tiny_config("llama", small_tokenizer("llama3_1"), 0.5)
    model = AutoModelForCausalLM.from_config(config).eval()

    def answer(body):
        if "echo" not in body:
            return echo(body)
        ids = torch.tensor([body["prompt"]])
        with torch.inference_mode():
            found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        return Say("x", log_likelihoods=(None, *found, -0.5))

    return model, answer


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "context"), [("joint", "reference"), ("joint", "generated"), ("given", "reference")])
def test_likelihoods_from_a_server_equal_those_of_the_model(mode, context, local, fault_server):
    model, fault_server.answer = local
    fault_server.echoes = True
    template, settings = template_of(mode), EvaluationConfig(max_new_tokens=2)
    dialogues = DIALOGUES[:1]
    generator = generator_of(fault_server, template, max_tokens=500)
    found = outcomes_of(fault_server, generator, context, dialogues=dialogues)
    assert all(body["max_tokens"] == 1 and body["temperature"] == 0 for body in fault_server.bodies if "echo" in body)
    own = generate_predictions(dialogues, HFGenerator(model, template, settings), "reference")
    for expected in own if context == "reference" else ():
        told = found[expected.dialogue_id, expected.turn]
        assert told.reference_nll == pytest.approx(expected.reference_nll, abs=2e-3)
        assert told.reference_tokens == expected.reference_tokens > 2
        assert told.prompt_hash == expected.prompt_hash
        if mode == "joint":
            assert told.label_log_likelihoods == pytest.approx(expected.label_log_likelihoods, abs=2e-3)
    for dialogue in dialogues if context == "generated" else ():
        history = [found[dialogue.id, 0].token_ids, dialogue.turns[1]]
        with torch.inference_mode():
            prompt = template.prompt_ids(history)
            (expected,) = dialogue_log_likelihoods(model, template, prompt, [len(prompt)])[1].tolist()
        assert found[dialogue.id, 2].label_log_likelihoods == pytest.approx(expected, abs=2e-3)
    # The labels are not equally likely, and in mode given nobody chooses among them.
    labels = [each.label_log_likelihoods for each in found.values()]
    assert all(len(set(each)) == 12 for each in labels) if mode == "joint" else set(labels) == {None}
    assert {each.reference_nll is None for each in found.values()} == {context == "generated"}
    asked = sum("echo" in body for body in fault_server.bodies) - 1
    assert asked == len(found) * (12 * (mode == "joint") + (context == "reference"))


def tell(body):
    """An answer with likelihoods that depend on the whole prompt."""
    number = int(digest(body["prompt"])[:4], 16)
    return replace(
        echo(body), log_likelihoods=(None, *(-(number % each) / 8 for each in range(2, len(body["prompt"]) + 1)))
    )


@pytest.mark.slow
def test_likelihoods_that_are_not_wanted_are_not_asked_for(fault_server):
    fault_server.answer, fault_server.echoes = tell, True
    llm = LLMConfig(base_url=fault_server.base_url, model="served")
    generator = OpenAIGenerator(llm, EvaluationConfig(likelihoods=False), template_of())
    assert {each.label_log_likelihoods for each in generate_predictions(DIALOGUES, generator, "reference")} == {None}
    assert len(fault_server.requests) == 1 + TURNS


@pytest.mark.parametrize("told", [None, (-0.5,), (None, -0.5), "one more", "nothing"])
def test_a_server_that_returns_no_likelihoods_of_the_prompt(told, fault_server):
    """llama.cpp returns those of generated tokens only; another server adds a token before the prompt."""

    def answer(body):
        length = len(body["prompt"])
        lists = {"one more": [None] + [-0.5] * (length + 1), "nothing": [None] * (length + 1)}
        return Say("x", log_likelihoods=lists.get(told, told)) if "echo" in body else echo(body)

    fault_server.answer, fault_server.echoes = answer, True
    found = outcomes_of(fault_server, generator_of(fault_server, template_of()), "reference")
    assert {(each.label_log_likelihoods, each.reference_nll) for each in found.values()} == {(None, None)}
    assert len(fault_server.requests) == 2 + TURNS


@pytest.mark.slow
def test_a_turn_whose_likelihoods_fail_is_tried_again(fault_server, tmp_path):
    failing = []

    def now_and_then(body):
        failing.append("echo" in body)
        return Fault(500) if failing.count(True) in (5, 40) and failing[-1] else tell(body)

    fault_server.echoes = True
    generator = generator_of(fault_server, template_of(), concurrency=1)

    def run(name):
        with PredictionStore(tmp_path / name, generator.config_hash) as store:
            generate_predictions(DIALOGUES, generator, "reference", store)
        return store.merge(DIALOGUES)

    fault_server.answer = tell
    assert run("flawless.jsonl") == []
    fault_server.answer = now_and_then
    assert [each.kind for each in run("flawed.jsonl")] == ["server_error"] * 2
    fault_server.requests.clear()
    fault_server.answer = tell
    assert run("flawed.jsonl") == []
    assert len(fault_server.requests) == 1 + 2 * 14
    assert (tmp_path / "flawed.jsonl").read_bytes() == (tmp_path / "flawless.jsonl").read_bytes()


@pytest.mark.parametrize("refusal", ["no path", "text only", "other ids"])
def test_a_server_that_takes_no_ids_is_asked_by_messages(refusal, fault_server):
    fault_server.completions = {"no path": None, "text only": "text", "other ids": "ids"}[refusal]
    fault_server.answer = lambda body: Say("1 2 3", usage=(3, 1)) if "prompt" in body else echo(body)
    template = template_of()
    found = outcomes_of(fault_server, generator_of(fault_server, template), "generated")
    assert {(each.prompt_format, each.served_model) for each in found.values()} == {("messages", "served")}
    (probe, *asked) = fault_server.requests
    assert probe[0] == "/v1/completions" and {path for path, *_ in asked} == {"/v1/chat/completions"}
    dialogue = DIALOGUES[0]
    messages = [
        {"role": "system", "content": system_prompt("joint", "zh")},
        {"role": "assistant", "content": found[dialogue.id, 0].raw_text},
        {"role": "user", "content": dialogue.turns[1].text},
    ]
    assert found[dialogue.id, 2].prompt_hash == digest(messages)
    assert messages in [body["messages"] for *_, body in asked]


@pytest.mark.parametrize(("mode", "labelled"), [("joint", True), ("reply_only", False)])
def test_another_model_gets_chat_messages(mode, labelled, fault_server):
    fault_server.answer = lambda body: "[情感管理]非常抱歉"
    settings = TemplateConfig(mode=mode, language="en")
    generator = generator_of(fault_server, settings, temperature=0.5, max_tokens=900)
    found = outcomes_of(fault_server, generator, "reference")
    assert {path for path, *_ in fault_server.requests} == {"/v1/chat/completions"}
    assert {(body["temperature"], body["max_tokens"]) for body in fault_server.bodies} == {(0.5, 900)}
    expected = (5, "非常抱歉", True) if labelled else (None, "[情感管理]非常抱歉", False)
    assert {(each.strategy, each.response, each.predicts_strategy) for each in found.values()} == {expected}
    dialogue = DIALOGUES[0]
    opening = dialogue.turns[0]
    content = f"[{opening.strategy.en}]{opening.text}" if labelled else opening.text
    assert [
        {"role": "system", "content": system_prompt(mode, "en")},
        {"role": "assistant", "content": content},
        {"role": "user", "content": dialogue.turns[1].text},
    ] in [body["messages"] for body in fault_server.bodies]


@pytest.mark.slow
def test_a_given_strategy_needs_token_ids(fault_server):
    fault_server.answer = lambda body: Say("好的", usage=(len(body["prompt"]), 1))
    template = template_of("given")
    found = outcomes_of(fault_server, generator_of(fault_server, template), "generated")
    dialogue = DIALOGUES[0]
    label = template.label_ids[dialogue.turns[0].strategy.number]
    first = found[dialogue.id, 0]
    assert first.prompt_hash == digest([*template.prompt_ids([]), *label])
    assert first.token_ids == (*label, *template.literal_ids("好的")) and first.strategy is None
    fault_server.completions = None
    for asked in (template, TemplateConfig(mode="given")):
        with pytest.raises(InputError, match=r"^template\.mode=given: "):
            generate_predictions(DIALOGUES, generator_of(fault_server, asked), "reference")


FAULTS = {
    "rate_limit": Fault(429, retry_after=0.01),
    "server_error": Fault(500),
    "timeout": HANG,
    "connection": DROP,
    "malformed": TORN,
    "bad_request": Fault(400),
}


@pytest.mark.slow
@pytest.mark.parametrize("context", ["reference", "generated"])
def test_turns_that_failed_are_recorded_and_only_they_are_tried_again(context, fault_server, tmp_path):
    """After any failures, the second run writes the same file as a run without failures."""
    fault_server.answer = echo
    generator = generator_of(fault_server, TemplateConfig(), timeout_s=3)

    def run(name):
        fault_server.requests.clear()
        with PredictionStore(tmp_path / name, generator.config_hash) as store:
            outcomes = generate_predictions(DIALOGUES, generator, context, store)
        return outcomes, store.merge(DIALOGUES), len(fault_server.requests)

    run("flawless.jsonl")
    fault_server.script += FAULTS.values()
    outcomes, failures, asked = run("flawed.jsonl")
    kinds = Counter(each.kind for each in failures)
    later = kinds.pop("earlier_turn_failed", 0)
    assert kinds == dict.fromkeys(FAULTS, 1) if context == "reference" else sum(kinds.values()) == len(DIALOGUES)
    assert asked == TURNS - later and (later > 0) == (context == "generated")
    assert sum(isinstance(each, Prediction) for each in outcomes) + len(failures) == TURNS
    assert read_outcomes(tmp_path / "flawed.jsonl") == outcomes

    fault_server.script.clear()
    _, failures, asked = run("flawed.jsonl")
    assert failures == []
    assert asked == (len(FAULTS) if context == "reference" else TURNS)
    assert (tmp_path / "flawed.jsonl").read_bytes() == (tmp_path / "flawless.jsonl").read_bytes()


def test_within_the_budget_nothing_fails(fault_server):
    fault_server.answer = echo
    fault_server.script += [FAULTS[kind] for kind in ("rate_limit", "server_error", "connection", "malformed")]
    fault_server.script += [HTML]
    found = outcomes_of(fault_server, generator_of(fault_server, TemplateConfig(), max_retries=5), "reference")
    assert not any(isinstance(each, FailedTurn) for each in found.values())
    assert len(fault_server.requests) == TURNS + 5


def test_a_key_that_is_refused_ends_the_run_and_loses_nothing(fault_server, tmp_path):
    fault_server.answer = echo
    fault_server.script += [echo({"messages": [1]}), echo({"messages": [1]}), Fault(401)]
    generator = generator_of(fault_server, TemplateConfig(), concurrency=1)
    with (
        PredictionStore(tmp_path / "kept.jsonl", generator.config_hash) as store,
        pytest.raises(InputError, match=r"^llm\.api_key_env=None: .* rejects it: HTTP 401"),
    ):
        generate_predictions(DIALOGUES, generator, "reference", store)
    assert len(fault_server.requests) == 3
    assert len(PredictionStore(tmp_path / "kept.jsonl", generator.config_hash).earlier) == 2


@pytest.mark.slow
def test_a_key_that_is_refused_in_the_middle_loses_no_answer(fault_server, tmp_path, caplog):
    """Requests in flight are completed first."""
    told = []

    def until_then(body):
        told.append(len(fault_server.requests))
        if len(told) > 20:
            return Fault(401)
        time.sleep(0.05 * (len(told) % 3))
        return echo(body)

    fault_server.answer = until_then
    generator = generator_of(fault_server, TemplateConfig(), concurrency=8)
    with (
        PredictionStore(tmp_path / "kept.jsonl", generator.config_hash) as store,
        pytest.raises(InputError, match="rejects it"),
    ):
        generate_predictions(DIALOGUES, generator, "reference", store)
    assert len(PredictionStore(tmp_path / "kept.jsonl", generator.config_hash).earlier) == 20
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.slow
def test_a_server_that_goes_away_between_the_contexts_ends_the_run(fault_server):
    fault_server.answer = echo
    generator = generator_of(fault_server, template_of())
    found = outcomes_of(fault_server, generator, "reference")
    assert {type(each) for each in found.values()} == {Prediction}
    fault_server.__exit__()
    with pytest.raises(InputError, match=r": start the server, or correct the address$"):
        outcomes_of(fault_server, generator, "generated")


def test_a_server_that_fails_once_on_likelihoods_still_supports_them(fault_server):
    fault_server.echoes = True
    fault_server.answer = lambda body: Fault(500) if body.get("echo") else tell(body)
    with pytest.raises(InputError, match=r"\(server_error\); evaluation\.likelihoods=false skips"):
        generate_predictions(DIALOGUES, generator_of(fault_server, template_of()), "reference")


@pytest.mark.slow
def test_a_model_whose_chats_begin_with_the_user(fault_server):
    def strict(body):
        roles = [message["role"] for message in body["messages"]]
        proper = roles[:2] == ["system", "user"] and roles[-1] == "user" and roles[1::2] == ["user"] * len(roles[1::2])
        return echo(body) if proper else Fault(400, message="The first message must be a user message")

    fault_server.answer = strict

    def both(asked):
        """Without and with the user's message first; they are not the same system."""
        generators = [generator_of(fault_server, asked, user_first=user_first) for user_first in (False, True)]
        assert generators[0].config_hash != generators[1].config_hash
        return generators

    both(template_of())
    generators = both(TemplateConfig())
    for context in ("reference", "generated"):
        for generator, expected in zip(generators, (FailedTurn, Prediction), strict=True):
            found = outcomes_of(fault_server, generator, context)
            assert {type(each) for (name, _), each in found.items() if name != OPENED.id} == {expected}
            # The customer's own message comes first: no other is put before it.
            assert {type(each) for (name, _), each in found.items() if name == OPENED.id} == {Prediction}
            prompt = [*build_messages([], TemplateConfig()), {"role": "user", "content": OPENED.turns[0].text}]
            assert found[OPENED.id, 1].prompt_hash == digest(prompt)
    assert compose("evaluate", ["llm=deepseek_r1", "data=sample"]).llm.user_first


def test_an_unreachable_server_is_an_error_at_once(fault_server):
    fault_server.__exit__()
    with pytest.raises(InputError, match=rf"^llm\.base_url={fault_server.base_url}: .*: start the server, or "):
        generate_predictions(DIALOGUES, generator_of(fault_server, template_of()), "reference")


@pytest.mark.slow
def test_evaluate_with_a_server_that_fails_now_and_then(fault_server, tmp_path, monkeypatch, capsys):
    """Evaluation of another model: failures are counted, the run exits with 1 and resumes."""
    monkeypatch.chdir(tmp_path)
    evaluate = load_recipe("evaluate")
    write_dialogues("train.jsonl", generate_sample(20, seed=6))
    write_dialogues("evaluation.jsonl", DIALOGUES)
    fault_server.answer = echo
    fault_server.script += [TORN, Fault(500), TORN]
    with pytest.raises(SystemExit) as ended:
        evaluate.main(
            compose(
                "evaluate",
                [
                    "llm=openai", "llm.model=some/model", f"llm.base_url={fault_server.base_url}", "llm.max_retries=0",
                    "llm.api_key_env=null", "data=files", "data.train.path=train.jsonl",
                    "data.evaluation.path=evaluation.jsonl", "evaluation.contexts=[reference]", "run.directory=run",
                ],
            )
        )  # fmt: skip
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "3 turns failed (2 malformed, 1 server_error)" in shown and "run=run resume=true" in shown
    assert len(fault_server.requests) == TURNS
    assert re.search(
        rf"usage: {TURNS + 1} requests \(3 failed\), [\d,]+ prompt tokens, {5 * (TURNS - 2)} .*price unknown", shown
    )
    evaluate.main(compose("evaluate", ["run=run", "resume=true"]))
    assert len(fault_server.requests) == TURNS + 3
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == ["most frequent strategy", "strategy bigram", "some_model"]
    assert results["some_model"]["reference"]["counts"]["turns"] == TURNS
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["finished"]
    # The first three requests failed, and the server counted no tokens of them. Each start checked the server first.
    tokens = sum(len(body["messages"]) for body in fault_server.bodies[3:]) + 2 * 10, 5 * TURNS + 2 * 5
    used = read_usage("run")
    assert used == Usage(TURNS + 3 + 2, 3, *tokens)
    # Prices may be told later, and kept by a kill in the middle of a line.
    with open("run/usage.jsonl", "a") as log:
        log.write('{"requests": 1, "fail')
    assert read_usage("run") == used
    usage_observer("run")(RequestAttempt({}, 2, "timeout", "", "", 0, 0, 1.0))
    assert read_usage("run") == replace(used, requests=used.requests + 1, failed=4)
    prices = ["llm.price_per_million_input=2000", "llm.price_per_million_output=1e4"]
    evaluate.main(compose("evaluate", ["run=run", "score_only=true", *prices]))
    cost = tokens[0] * 2000 / 1e6 + tokens[1] * 1e4 / 1e6
    assert f"completion tokens, cost {cost:.2f}\n" in capsys.readouterr().out
    assert f"completion tokens, cost {cost:.2f}</td>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["llm=gpt_4o"], "llm: say on which dialogues to evaluate it, such as data=rolecs"),
        (
            ["llm=gpt_4o", "checkpoint=x", "template=joint"],
            "template: x knows its own; leave it out; or, if another program wrote it, say on which dialogues to "
            "evaluate it, such as data=rolecs",
        ),
        (
            ["llm=gpt_4o", "data=rolecs", "chat_template=qwen3"],
            "chat_template=qwen3: give checkpoint=... and template=... as well",
        ),
        (["llm=gpt_4o", "predictions=x", "data=rolecs"], "predictions=x: give them or llm=..., not both"),
        (["llm=vllm", "checkpoint=x"], "llm.model is required: give llm.model=..."),
    ],
)
def test_what_an_evaluation_over_a_server_needs(overrides, message):
    with pytest.raises(InputError) as caught:
        compose("evaluate", overrides)
    assert str(caught.value) == message
