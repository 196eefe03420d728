"""A judge on a real server: planted preferences are found; what fails is counted, and asked again."""

import json
import math
import re

import numpy
import pytest
from conftest import load_recipe
from processes import TIMEOUT_S
from scipy.optimize import minimize
from servers.faults import Fault, Say

from csc_train.config.compose import compose
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.comparison import read_run_dialogues
from csc_train.evaluation.config import JudgeConfig, MetricsConfig
from csc_train.evaluation.judges.llm_judge import (
    ANSWER_SCHEMAS,
    CRITERIA,
    Preference,
    judge,
    judge_markdown,
    judge_questions,
    reference_table,
    sample_turns,
    summarize,
)
from csc_train.evaluation.metrics.strategy import accepted_accuracy
from csc_train.evaluation.table import PredictionTable
from csc_train.evaluation.win_rate import RIDGE, length_controlled, win_rate
from csc_train.inference.predictions import Prediction, expected_turns, read_run_predictions, write_predictions
from csc_train.llm import client as client_module
from csc_train.llm.config import LLMConfig
from csc_train.llm.structured import parse_answer
from csc_train.runs.claim import release_all

DIALOGUES = {dialogue.id: dialogue for dialogue in generate_sample(12, seed=3)}
PLACES = [(name, turn) for name in sorted(DIALOGUES) for turn in DIALOGUES[name].supporter_turns[:2]]
CONFIG = JudgeConfig(num_turns=None, bootstrap_resamples=200, permutations=1000)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "INITIAL_BACKOFF_S", 0.01)


def system(reply, strategy=5, predicts=True):
    """Predictions whose text at the n-th place is `reply(n)`."""
    return [
        Prediction(name, turn, "reference", "", "", strategy if predicts else None, reply(n), 5, "参考", predicts)
        for n, (name, turn) in enumerate(PLACES)
    ]


def quality(reply):
    """The number in a reply, its planted quality."""
    return int(re.search(r"品质(\d+)", reply).group(1))


def planted(body):
    """A judge that prefers what is planted to be better, and scores it so."""
    question = body["messages"][1]["content"]
    replies = re.findall(r"<回复[ \d]*>\n(.*?)\n</回复[ \d]*>", question, re.DOTALL)
    values = [quality(reply) for reply in replies]
    if len(values) == 1:
        return json.dumps({"reason": "-"} | {name: min(5, values[0] + (name == "wording")) for name in CRITERIA})
    better = "tie" if values[0] == values[1] else "1" if values[0] > values[1] else "2"
    return json.dumps({"reason": "-", "better": better})


def llm_of(server, **settings):
    return LLMConfig(base_url=server.base_url, **{"model": "judge", "max_retries": 0, "concurrency": 4} | settings)


def judged_by(server, a, b, cache, config=CONFIG, **settings):
    asked = judge_questions(a, b, DIALOGUES, config)
    judged = judge(asked, llm_of(server, **settings), config, cache)
    assert len(judged.answers) + len(judged.failures) == len(asked)
    return summarize(a, b, judged, config), judged


def test_planted_preferences_are_found(fault_server, tmp_path):
    """A is better at two of four places, worse at one, and as good at one."""
    fault_server.answer = planted
    a = system(lambda n: f"品质{(3, 3, 1, 2)[n % 4]}")
    b = system(lambda n: "品质2")
    result, judged = judged_by(fault_server, a, b, tmp_path / "cache.jsonl")
    count = len(PLACES)
    wins = sum(n % 4 in (0, 1) for n in range(count))
    losses = sum(n % 4 == 2 for n in range(count))
    rates = result.win_rate
    assert (rates.wins, rates.losses, rates.ties) == (wins, losses, count - wins - losses)
    assert rates.rate.value == pytest.approx(100 * (wins + rates.ties / 2) / count)
    assert rates.rate.low < rates.rate.value < rates.rate.high
    assert rates.length_controlled.value == pytest.approx(rates.rate.value, abs=0.1)  # all are equally long
    assert result.identical == rates.ties and result.disagreements == 0
    assert result.first == pytest.approx(50)
    points = result.scores["empathy"]
    assert points["B"].value == 2 and result.scores["wording"]["B"].value == 3
    assert points["A"].value == pytest.approx((3 * wins + losses + 2 * result.identical) / count)
    assert points["A - B"].value == pytest.approx(points["A"].value - 2)
    assert result.judged == {"pairwise": count, "rubric": count} and judged.failures == {}
    page = judge_markdown(result, judged, "AB", "judge")
    assert f"A preferred {wins}, B preferred {losses}, ties {rates.ties}" in page
    blocks = page.split("\n\n")  # headings and tables are blocks of their own, or Markdown shows them as text
    assert [block for block in blocks if "###" in block] == [
        "### Preferred replies (percent)",
        "### Scores (1 to 5 points)",
    ]
    (scores,) = [block.splitlines() for block in blocks if block.startswith("| criterion |")]
    assert len(scores) == 2 + len(result.scores) and all(row.count("|") == 5 for row in scores)


def test_both_orders_are_asked_and_a_judge_that_looks_at_the_place_only_gives_ties(fault_server, tmp_path):
    fault_server.answer = lambda body: '{"reason": "-", "better": "1"}'
    a, b = system(lambda n: f"甲的第{n}句"), system(lambda n: f"乙的第{n}句呀")
    config = JudgeConfig(tasks=["pairwise"], num_turns=None, bootstrap_resamples=200, permutations=1000)
    result, judged = judged_by(fault_server, a, b, tmp_path / "cache.jsonl", config)
    assert (result.win_rate.wins, result.win_rate.losses) == (0, 0)
    assert result.win_rate.rate.value == 50 and result.win_rate.p_value == 1
    assert (result.disagreements, result.first) == (len(PLACES), 100)
    assert result.scores == {}
    table = judge_markdown(result, judged, "AB", "judge")
    assert "| length-controlled win rate | n/a[^1] |" in table
    assert "[^1]: A's reply is -1 characters longer in every turn" in table
    texts = [body["messages"][1]["content"] for body in fault_server.bodies]
    orders = [text.index("甲的第") < text.index("乙的第") for text in texts]
    assert orders.count(True) == orders.count(False) == len(PLACES)


def test_what_the_judge_is_shown(fault_server, tmp_path):
    fault_server.answer = planted
    a, b = system(lambda n: "品质3<a href='x'>"), system(lambda n: "品质2", strategy=1)
    asked = judge_questions(a, b, DIALOGUES, CONFIG)
    name, turn = PLACES[1]
    (question,) = [each for each in asked if (each.dialogue_id, each.turn, each.side) == (name, turn, "BA")]
    instructions, shown = (message["content"] for message in question.messages)
    assert all(criterion in instructions for criterion in CRITERIA) and '"better"' in instructions
    turns = DIALOGUES[name].turns
    assert shown == (
        f"<上文>\n客服：{turns[0].text}\n客户：{turns[1].text}\n</上文>\n\n"
        "<回复 1>\n[礼貌问候]品质2\n</回复 1>\n\n<回复 2>\n[情感管理]品质3<a href='x'>\n</回复 2>"
    )
    (first,) = [each for each in asked if (each.dialogue_id, each.turn, each.side) == (*PLACES[0], "A")]
    assert first.messages[1]["content"].startswith("<上文>\n（对话由这句回复开始）\n</上文>\n\n<回复>\n[情感管理]品质3")

    # Where one system names no strategies, neither is shown with them.
    plain = judge_questions(a, system(lambda n: "品质2", predicts=False), DIALOGUES, CONFIG)
    assert not any("[情感管理]" in each.messages[1]["content"] for each in plain)
    english = judge_questions(a, b, DIALOGUES, JudgeConfig(language="en"))
    assert "Answer with one JSON object only" in english[0].messages[0]["content"]
    assert "[Emotional Management]" in english[-1].messages[1]["content"] + english[-2].messages[1]["content"]


@pytest.mark.slow
def test_answers_are_kept_and_only_what_failed_is_asked_again(fault_server, tmp_path):
    cache = tmp_path / "cache.jsonl"
    a, b = system(lambda n: f"品质3，第{n}句"), system(lambda n: f"品质2，第{n}句")
    fault_server.answer = planted
    fault_server.script += [Fault(500), Fault(400), Say("", refusal="no"), *["不"] * 4]
    result, judged = judged_by(fault_server, a, b, cache, json_mode="text", concurrency=1)
    assert [why.kind for why in judged.failures.values()] == ["server_error", "bad_request", "refused", "malformed"]
    spoilt = {(each.task, each.dialogue_id, each.turn) for each in judged.failures}
    assert result.judged == {
        task: len(PLACES) - sum(each[0] == task for each in spoilt) for task in ("pairwise", "rubric")
    }
    assert result.win_rate.wins == result.judged["pairwise"]
    kept = cache.read_text(encoding="utf-8")
    total = 4 * len(PLACES)
    assert len(kept.splitlines()) == total - 4
    assert judged.usage["attempts"] == len(fault_server.requests) == total + 3
    assert judged.usage["completion_tokens"] == 5 * (total + 3 - 2)  # the two HTTP errors took none

    # A line that was cut in the middle is asked again, and so is what failed; another seed asks all again.
    cache.write_text(kept[:-20], encoding="utf-8")
    fault_server.requests.clear()
    again, judged = judged_by(fault_server, a, b, cache, json_mode="text")
    assert len(fault_server.requests) == 5 and judged.failures == {}
    assert again.win_rate.wins == len(PLACES)
    judged_by(fault_server, a, b, cache, json_mode="text")
    assert len(fault_server.requests) == 5
    judged_by(
        fault_server,
        a,
        b,
        cache,
        JudgeConfig(num_turns=None, seed=1, bootstrap_resamples=200, permutations=1000),
        json_mode="text",
    )
    assert len(fault_server.requests) == 5 + total

    cache.write_text("{}\n" + kept, encoding="utf-8")
    with pytest.raises(InputError, match=r"cache\.jsonl, line 1: field key: Field required: delete the line"):
        judged_by(fault_server, a, b, cache)


@pytest.mark.slow
def test_an_answer_is_kept_for_all_that_decides_it_and_asked_for_without_chance(fault_server, tmp_path):
    fault_server.answer = planted
    a, b = system(lambda n: f"品质3，第{n}句"), system(lambda n: f"品质2，第{n}句")
    cache, rubric = (
        tmp_path / "cache.jsonl",
        JudgeConfig(tasks=["rubric"], num_turns=None, bootstrap_resamples=200, permutations=1000),
    )
    seeds = []
    for settings in (
        {}, {"model": "other"}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 99}, {"extra_body": {"think": 1}}
    ):  # fmt: skip
        fault_server.requests.clear()
        judged_by(fault_server, a, b, cache, rubric, **settings)
        bodies = fault_server.bodies
        assert len(bodies) == 2 * len(PLACES)
        assert {(body["model"], body["temperature"]) for body in bodies} == {
            (settings.get("model", "judge"), settings.get("temperature", 0))
        }
        seeds.append({body["seed"] for body in bodies})
        assert len(seeds[-1]) == len(bodies)  # one for each question
        judged_by(fault_server, a, b, cache, rubric, timeout_s=TIMEOUT_S, **settings)
        assert len(fault_server.requests) == 2 * len(PLACES)
    fault_server.requests.clear()
    judged_by(fault_server, a, b, tmp_path / "again.jsonl", rubric)
    assert {body["seed"] for body in fault_server.bodies} == seeds[0]


def test_a_key_that_is_refused_ends_it(fault_server, tmp_path):
    fault_server.script += [Fault(401)]
    with pytest.raises(InputError, match="rejects it: HTTP 401"):
        judged_by(fault_server, system(lambda n: "甲"), system(lambda n: "乙"), tmp_path / "cache.jsonl", concurrency=1)
    assert len(fault_server.requests) == 1


def test_the_turns_are_drawn_by_the_seed_and_not_by_which_others_there_are():
    turns = PredictionTable(system(lambda n: "甲"))
    few = JudgeConfig(num_turns=10)
    chosen = sample_turns(turns, few)
    assert len(chosen) == 10 and sorted(set(chosen)) == list(chosen)
    assert list(sample_turns(turns, JudgeConfig(num_turns=10, seed=1))) != list(chosen)
    assert list(sample_turns(turns, JudgeConfig(num_turns=None))) == list(range(len(turns)))
    keys = {turns.keys[index] for index in chosen}
    without = PredictionTable(
        [each for each in turns.predictions if (each.dialogue_id, each.turn) in keys or each.turn == 0]
    )
    assert {without.keys[index] for index in sample_turns(without, few)} == keys


def test_a_preference_may_be_written_as_a_number():
    answers = [f'{{"reason": "-", "better": {each}}}' for each in ("1", '"2"', '"tie"')]
    assert [parse_answer(answer, Preference).better for answer in answers] == ["1", "2", "tie"]
    for wrong in ("3", '"甲"', "null"):
        with pytest.raises(ValueError, match="better: "):
            parse_answer(f'{{"reason": "-", "better": {wrong}}}', Preference)


def admitting(body):
    """A judge that admits the strategies 12, 5 and 5 where the customer has spoken, else 1."""
    spoken = "客户：" in body["messages"][1]["content"]
    return json.dumps({"reason": "-", "strategies": ["其它", 5, "5"] if spoken else [1]})


ADMISSIBLE = JudgeConfig(tasks=["accepted"], num_turns=None, bootstrap_resamples=200)


def test_what_the_judge_is_shown_for_admissible_strategies():
    a = reference_table(DIALOGUES.values()).predictions
    assert [each.key for each in a] == sorted(expected_turns(DIALOGUES.values()))
    asked = judge_questions(a, a, DIALOGUES, ADMISSIBLE)
    assert [(each.task, each.dialogue_id, each.turn, each.side) for each in asked] == [
        ("accepted", *each.key, "R") for each in a
    ]
    instructions, shown = (message["content"] for message in asked[1].messages)
    assert all(f"{each.number} {each.zh}：{each.definition('zh')}\n" in instructions for each in STRATEGIES)
    turns = DIALOGUES[asked[1].dialogue_id].turns
    # The reference reply without its strategy, and no system's reply.
    assert shown == (
        f"<上文>\n客服：{turns[0].text}\n客户：{turns[1].text}\n</上文>\n\n<回复>\n{turns[2].text}\n</回复>"
    )
    english = judge_questions(a, a, DIALOGUES, JudgeConfig(tasks=["accepted"], language="en"))[0].messages[0]["content"]
    assert "5 Emotional Management: When the customer" in english and '"strategies": [numbers]' in english


def test_an_answer_of_admissible_strategies_is_checked():
    def parsed(strategies):
        return parse_answer(f'{{"reason": "-", "strategies": {strategies}}}', ANSWER_SCHEMAS["accepted"]).strategies

    assert parsed('[7, "5", "策略7 信息传达", "Greeting"]') == [1, 5, 7]
    for wrong in ("[]", "[0]", "[13]", '["情感"]', "5", "null", '["5+6"]'):
        with pytest.raises(ValueError, match="strategies"):
            parsed(wrong)


# Win rates


def logistic(x):
    return 1 / (1 + numpy.exp(-x))


def test_a_preference_for_length_only_is_no_preference_at_equal_length():
    """A's replies are longer, and the longer one is preferred: A wins, but not at equal length."""
    rng = numpy.random.default_rng(0)
    dialogues = numpy.repeat(numpy.arange(200), 10)
    longer = rng.normal(20, 20, 2000)
    preferences = (rng.random(2000) < logistic(0.05 * longer)).astype(float)
    rates = win_rate(preferences, longer, dialogues, 200, 1000)
    assert rates.rate.low > 60
    assert rates.length_controlled.low < 50 < rates.length_controlled.high
    better = (rng.random(2000) < logistic(0.05 * longer + math.log(3))).astype(float)
    rates = win_rate(better, longer, dialogues, 200, 1000)
    assert rates.length_controlled.low < 75 < rates.length_controlled.high
    assert rates.length_controlled.low > 50


def test_a_few_replies_that_run_on_do_not_decide_what_length_is_worth():
    """As above, but 2 % of A's replies ran to the limit of tokens, and almost all of those lose."""
    rng = numpy.random.default_rng(0)
    dialogues, longer = numpy.repeat(numpy.arange(200), 10), rng.normal(20, 20, 2000)
    likely, ran_on = logistic(0.05 * longer), rng.random(2000) < 0.02
    longer[ran_on], likely[ran_on] = rng.uniform(300, 600, ran_on.sum()), 0.02
    rates = win_rate((rng.random(2000) < likely).astype(float), longer, dialogues, 200, 1000)
    assert rates.rate.low > 60
    assert rates.length_controlled.low < 50 < rates.length_controlled.high
    assert rates.length_controlled.value == pytest.approx(50, abs=5)


def test_the_regression_is_the_maximum_of_its_likelihood():
    rng = numpy.random.default_rng(1)
    longer, preferences = rng.normal(5, 30, 60), rng.choice([0, 0.5, 1], 60)
    weights = rng.integers(0, 4, (3, 60)).astype(float)
    found = length_controlled(preferences, longer, weights)
    x = numpy.tanh(longer / numpy.median(numpy.abs(longer)) / 2)
    for row, rate in zip(weights, found, strict=True):

        def loss(ab, row=row):
            p = logistic(ab[0] + ab[1] * x)
            likelihood = row @ (preferences * numpy.log(p) + (1 - preferences) * numpy.log(1 - p))
            return RIDGE / 2 * (ab @ ab) - likelihood

        assert rate == pytest.approx(logistic(minimize(loss, [0, 0], tol=1e-10).x[0]), abs=1e-5)


def test_win_rates_at_the_edges():
    dialogues = numpy.arange(20)
    always = win_rate(numpy.ones(20), dialogues - 7, dialogues, 200, 1000)
    assert always.rate.value == 100 and 90 < always.length_controlled.value <= 100
    assert (always.wins, always.ties, always.losses) == (20, 0, 0)
    assert always.p_value == pytest.approx(1 / 1001)
    equal = win_rate(numpy.tile([1.0, 0.0], 10), numpy.zeros(20), dialogues, 200, 1000)
    assert equal.rate.value == 50 and equal.length_controlled.value == pytest.approx(50)
    mostly = win_rate(numpy.tile([1.0, 0.0], 10), numpy.repeat([0, 9], [15, 5]), dialogues, 200, 1000)
    assert 0 < mostly.length_controlled.low < 50 < mostly.length_controlled.high < 100  # the median difference is 0
    # Where length never varies, what it is worth cannot be told from what A is worth.
    same = win_rate(numpy.ones(20), numpy.full(20, -7), dialogues, 200, 1000)
    assert (same.rate.value, same.length_controlled.value, same.length_controlled.low) == (100, None, None)
    assert same.length_controlled.reason == "A's reply is -7 characters longer in every turn"
    few = win_rate(numpy.ones(5), numpy.zeros(5), numpy.arange(5), 200, 1000)
    assert few.rate.low is few.length_controlled.low is None
    none = win_rate(numpy.array([]), numpy.array([]), numpy.array([], int), 200, 1000)
    assert none.rate.value is none.length_controlled.value is none.p_value is None
    assert none.rate.reason == "no turns were judged"


# The recipe


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two evaluations in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 3), ("other", 2)):
        predictions = system(lambda n, value=value: f"品质{value}，第{n}句")
        write_predictions(tmp_path / name / "predictions" / "trained-reference.jsonl", predictions)
        write_dialogues(tmp_path / name / "dialogues.jsonl", DIALOGUES.values())
    return tmp_path


@pytest.mark.slow
def test_the_recipe_judges_resumes_and_reports(runs, fault_server, capsys):
    fault_server.answer = planted
    fault_server.script += [Fault(500)]
    command = [
        "one", "other", "llm=openai", "llm.model=judge", f"llm.base_url={fault_server.base_url}",
        "llm.api_key_env=null", "llm.max_retries=0", "judge.num_turns=20", "run.directory=judged",
    ]  # fmt: skip
    recipe = load_recipe("judge")
    with pytest.raises(SystemExit) as ended:
        recipe.main(compose("judge", command))
    assert ended.value.code == 1 and len(fault_server.requests) == 80
    reason = "incomplete: 1 of 80 questions failed (1 server_error); to retry the failed part: run=judged resume=true\n"
    assert capsys.readouterr().out.endswith(reason)
    assert json.loads((runs / "judged/run.json").read_text(encoding="utf-8"))["status"] == "incomplete"
    assert "(percent) †" in (runs / "judged/judge.md").read_text(encoding="utf-8")
    (failure,) = json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))["failures"]
    assert failure["kind"] == "server_error" and failure["dialogue_id"] in DIALOGUES

    recipe.main(compose("judge", ["run=judged", "resume=true"]))
    assert len(fault_server.requests) == 81
    written = json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))
    assert (written["win_rate"]["wins"], written["failures"]) == (20, [])
    assert (written["a"], written["judge"]) == ("trained of one", "judge")
    assert written["scores"]["strategy"]["A - B"]["value"] == 1
    table = (runs / "judged/judge.md").read_text(encoding="utf-8")
    assert "| win rate | 100.00" in table and "Turns judged: pairwise 20 of 20, rubric 20 of 20." in table
    assert "†" not in table
    assert table in capsys.readouterr().out
    recipe.main(compose("judge", ["run=judged", "resume=true"]))
    assert len(fault_server.requests) == 81 and table.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_a_judge_that_said_nothing_prefers_nobody(runs, fault_server, capsys):
    """Equal replies are ties, which are not asked about; alone they would show 50 %."""
    equal = system(lambda n: f"品质{2 if n % 2 else 3}，第{n}句")
    write_predictions(runs / "one/predictions/trained-reference.jsonl", equal)
    fault_server.answer = lambda body: Say(None)
    command = [
        "one", "other", "llm=openai", "llm.model=judge", f"llm.base_url={fault_server.base_url}",
        "llm.api_key_env=null", "judge.num_turns=20", "run.directory=judged",
    ]  # fmt: skip
    recipe = load_recipe("judge")
    with pytest.raises(SystemExit) as ended:
        recipe.main(compose("judge", command))
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "50.00" not in said
    assert "| win rate | n/a[^1] |" in said and "A preferred 0, B preferred 0, ties 0," in said
    assert re.search(r"incomplete: (\d+) of \1 questions failed \(\1 empty\); to retry the failed part: ", said)
    assert said.endswith("run=judged resume=true llm.retry_max_tokens=4096\n")
    written = json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))
    assert written["incomplete"] and written["by_turn"] == []

    fault_server.answer = lambda body: planted(body) if body.get("max_tokens") == 4096 else Say("", "length")
    recipe.main(compose("judge", ["run=judged", "resume=true", "llm.retry_max_tokens=4096"]))
    written = json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))
    rates = written["win_rate"]
    assert not written["incomplete"] and rates["losses"] == 0 < rates["wins"] < 20 == rates["wins"] + rates["ties"]


@pytest.mark.slow
def test_turns_that_failed_in_one_run_are_left_out_and_counted(runs, fault_server):
    fault_server.answer = planted
    write_predictions("one/predictions/trained-reference.jsonl", system(lambda n: f"品质3，第{n}句")[3:])
    command = ["one", "other", "llm=openai", "llm.model=judge", f"llm.base_url={fault_server.base_url}"]
    command += ["llm.api_key_env=null", "judge.num_turns=null", "judge.tasks=[rubric]", "run.directory=judged"]
    load_recipe("judge").main(compose("judge", command))
    assert len(fault_server.requests) == 2 * (len(PLACES) - 3)
    assert json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))["left_out"] == 3
    assert "Left out: 3 turns that only one of the two" in (runs / "judged/judge.md").read_text(encoding="utf-8")
    write_predictions("one/predictions/trained-reference.jsonl", [])
    with pytest.raises(InputError, match=r"^trained of one and trained of other have no turn in common: evaluate "):
        load_recipe("judge").main(compose("judge", [*command[:-1], "run.directory=none"]))


@pytest.mark.slow
def test_admissible_strategies_need_one_run_and_score_others(runs, fault_server, capsys):
    dialogues = list({each.turns[0].text: each for each in DIALOGUES.values()}.values())[:10]  # no question twice
    write_dialogues("one/dialogues.jsonl", dialogues)
    (runs / "one/predictions/trained-reference.jsonl").unlink()
    fault_server.answer = admitting
    fault_server.script += [Fault(500)]
    command = ["one", "llm=openai", "llm.model=judge", f"llm.base_url={fault_server.base_url}", "llm.max_retries=0"]
    command += ["llm.api_key_env=null", "judge.tasks=[accepted]", "judge.num_turns=null", "run.directory=judged"]
    recipe, table = load_recipe("judge"), reference_table(dialogues)
    count = len(table)
    with pytest.raises(SystemExit):
        recipe.main(compose("judge", command))
    assert f"incomplete: 1 of {count} questions failed (1 server_error); to retry" in capsys.readouterr().out
    assert "reference turns †" in (runs / "judged/judge.md").read_text(encoding="utf-8")
    file = runs / "judged/accepted.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == count - 1

    recipe.main(compose("judge", ["run=judged", "resume=true"]))
    assert len(fault_server.requests) == count + 1
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    opening = ["策略1 礼貌问候"]
    assert [(row["dialogue_id"], row["turn"]) for row in rows] == table.keys
    assert all(row["accepted"] == (["策略5 情感管理", "策略12 其它"] if row["turn"] else opening) for row in rows)
    written = json.loads((runs / "judged/judge.json").read_text(encoding="utf-8"))
    size, agreed = written["admissible"].values()
    assert size["value"] == pytest.approx(2 - 10 / count) and size["low"] < size["value"] < size["high"]
    hits = [row for row, own in zip(rows, table.reference, strict=True) if STRATEGIES[own - 1].label in row["accepted"]]
    assert agreed["value"] == pytest.approx(100 * len(hits) / count)
    assert (written["a"], written["judged"], written["win_rate"]) == ("one", {"accepted": count}, None)
    page = (runs / "judged/judge.md").read_text(encoding="utf-8")
    assert page.startswith("dialogues: one  \njudge: judge") and f"Turns judged: accepted {count} of {count}." in page
    assert "metrics.accepted=judged/accepted.jsonl" in capsys.readouterr().out

    # 12 counts wherever the customer has spoken before, and where it is the reference's own.
    write_predictions("other/predictions/trained-reference.jsonl", system(lambda n: "好", strategy=12))
    found = score_run_of("other", accepted=str(file))
    judged = [index for index, (name, _) in enumerate(PLACES) if name in {row["dialogue_id"] for row in rows}]
    expected = [index for index in judged if PLACES[index][1]]
    assert found.value == pytest.approx(100 * len(expected) / len(PLACES))
    assert "from accepted.jsonl, else from the data" in found.signature


def score_run_of(directory, **metrics):
    """ACC accepted of the predictions in a run directory."""
    config, run = MetricsConfig(**metrics), read_run_predictions(directory)
    table = PredictionTable(run.predictions["trained"]["reference"], read_run_dialogues(directory, config))
    return accepted_accuracy(table, config).compute(table.dialogue, 200)


@pytest.mark.slow
def test_a_judge_of_pairs_needs_two_runs_and_one_of_strategies_takes_one():
    for given, message in (
        (["one"], "b is required: give b=..."),
        (["one", "judge.tasks=[accepted,rubric]"], "b is required: give b=..."),
        (["one", "other", "judge.tasks=[accepted]"], "b: judge.tasks=[accepted] needs only the dialogues of a; leave"),
        (["one", "system_a=x", "judge.tasks=[accepted]"], "system_a: judge.tasks=[accepted] needs only the dialogues"),
        (["one", "judge.tasks=[acepted]"], "judge.tasks=acepted: choose one of pairwise, rubric, accepted. Did you"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            compose("judge", [*given, "llm=vllm", "llm.model=judge"])


def test_a_run_without_the_reference_context_is_refused(runs):
    (runs / "other/predictions/trained-reference.jsonl").rename(runs / "other/predictions/trained-generated.jsonl")
    config = compose("judge", ["one", "other", "llm=vllm", "llm.model=judge"])
    with pytest.raises(InputError, match=r"^other: trained was not evaluated in reference context: evaluate it there$"):
        load_recipe("judge").main(config)
    release_all()
    assert not (runs / "runs").exists()
