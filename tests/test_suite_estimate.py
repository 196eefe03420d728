"""What steps of a suite take: estimates beside facts and sums by hand, and what a run recorded."""

import json
from dataclasses import replace

import pytest

from csc_train.config.cluster import ClusterConfig, PreflightConfig
from csc_train.config.compose import compose, to_container
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.inference.predictions import FailedTurn, build_prediction, write_predictions
from csc_train.llm.client import RequestAttempt
from csc_train.llm.usage import usage_observer
from csc_train.runs.directory import Run, as_yaml
from csc_train.suites.base import Cost
from csc_train.suites.estimate import (
    DialogueLengths,
    StepEstimate,
    estimate_step,
    find_dims,
    inference_memory,
    measure_cost,
)
from csc_train.template.reply import parse_reply
from csc_train.training.memory import GIB

H100 = {"device": "cuda", "gpu_memory_gib": 79.6, "gpu_tflops": 989, "gpu_bandwidth_gbs": 3350}
NODE = ClusterConfig(gpus_per_node=8, host_memory_gib=1024, **H100)
ONE_PROCESS = replace(NODE, process_launcher="none")
CPU = ClusterConfig(gpus_per_node=1)
PAPER = PreflightConfig(dialogues=11232, evaluation_dialogues=1855, tokens_per_dialogue=1320)
LLAMA_70B = ["checkpoint=meta-llama/Llama-3.1-70B-Instruct", "template=joint", "data=rolecs"]


def evaluation(*overrides):
    return compose("evaluate", overrides)


def test_prompts_and_prefills_are_those_that_were_measured():
    """1,855 dialogues of 13 supporter turns, a system prompt of 600 tokens, about 65 tokens a turn."""
    lengths = DialogueLengths([13] * 1855, 600, 64.8, "")
    assert lengths.requests == 24115
    assert lengths.prompts() == pytest.approx(33.3e6, rel=0.01)
    assert lengths.prefilled("generated") == pytest.approx(1.55e6, rel=0.01)
    # By hand: a dialogue of 2 supporter turns, a prefix of 10 tokens, 7 tokens a turn, 5 before each reply.
    two = DialogueLengths([2], 10, 7, "")
    assert two.prompts() == (10 + 5) + (10 + 7 + 7 + 5)
    assert two.prefilled("reference") == 10 + 7 + 7 + 5 and two.prefilled("generated") == 10 + 5 + 7 + 5
    assert two.scored() == 10 + 3 * 7 + 2 * 12 * 5
    assert (two.replies(256), two.replies(3)) == (14, 6)


def test_a_70b_is_spread_over_the_gpus_of_one_process():
    dims, config = find_dims("meta-llama/Llama-3.1-70B-Instruct"), evaluation(*LLAMA_70B)
    assert 2 * dims.parameters == pytest.approx(141e9, rel=0.001)
    lengths = DialogueLengths([13], 600, 64.8, "")
    without = inference_memory(replace(dims, intermediate=0), config, lengths, 8)
    # Keys and values of 8 heads of 128 in 80 layers, for 32 rows of 1.5 times the longest dialogue.
    cache = 32 * 2 * 2 * 8 * 128 * 80 * (1.5 * (600 + 26 * 64.8) + 64)
    assert without.parameters == pytest.approx((2 * dims.parameters + cache) / 8)

    whole = estimate_step("evaluate", config, NODE, PAPER)
    assert whole.memory_gib > 2 * dims.parameters / GIB and whole.fits is False and whole.gpus_from == 4
    assert "cluster.process_launcher=none" in whole.basis
    spread = estimate_step("evaluate", config, ONE_PROCESS, PAPER, price_per_gpu_hour=2.0)
    assert spread.fits and spread.memory_gib < 40 and (spread.gpus, spread.gpus_from) == (8, 4)
    # One GPU computes at a time.
    assert spread.hours == pytest.approx(8 * whole.hours)
    assert spread.cost.gpu_hours == pytest.approx(8 * spread.hours)
    assert spread.cost.money == pytest.approx(2 * spread.cost.gpu_hours)
    assert estimate_step("evaluate", config, replace(NODE, gpus_per_node=2), PAPER).gpus_from is None


@pytest.mark.slow
def test_a_local_evaluation_counts_its_systems_and_contexts():
    given = replace(PAPER, tokens_per_dialogue=3000)
    trained = compose("sft", ["experiment=qwen2_5_7b_lora"])

    def tokens(*overrides, **options):
        config = evaluation("checkpoint=runs/x/model", "data=rolecs", *overrides)
        return estimate_step("evaluate", config, NODE, given, trained=trained, **options)

    both, alone = tokens(), tokens("evaluation.base=false")
    assert both.cost.tokens == 2 * alone.cost.tokens and both.hours == pytest.approx(2 * alone.hours)
    short = tokens("evaluation.base=false", "evaluation.max_new_tokens=10", "evaluation.contexts=[generated]")
    assert short.cost.tokens == 24115 * 10
    assert tokens("evaluation.base=false", "evaluation.likelihoods=false").hours < alone.hours
    assert "rough" in alone.basis and estimate_step("compare", None, NODE, given).cost == Cost()


def test_a_training_has_preflights_figures():
    config = compose("sft", ["experiment=qwen2_5_7b_rolecs", "zero=zero3"])
    found = estimate_step("sft", config, NODE, PAPER, price_per_gpu_hour=3.0)
    dims, tokens = find_dims(config.model.path), 3 * 11232 * 1320
    flops = tokens * (6 * dims.linear + 6 * dims.embedding + 3 * 2 * dims.queries * dims.layers * 1320)
    assert found.cost.tokens == tokens
    assert found.hours == pytest.approx(flops / (0.4 * 989e12 * 8) / 3600)
    assert found.cost.money == pytest.approx(3 * 8 * found.hours)
    assert found.fits and found.memory_gib < found.gpu_memory_gib and found.gpus_from < 8
    kept = config.trainer.save_total_limit + 1
    assert found.disk_gib == pytest.approx((kept * 14 + 2) * dims.parameters / GIB)
    assert estimate_step("sft", config, replace(NODE, gpus_per_node=1), PAPER).fits is False


def test_a_served_model_costs_by_its_prices():
    asked = ["llm=gpt_4o", "template=joint", "data=rolecs", "evaluation.contexts=[reference]"]
    unpriced = estimate_step("evaluate", evaluation(*asked), CPU, PAPER)
    assert (
        unpriced.cost.money is None
        and "llm.price_per_million_input and _output in the step's overrides" in unpriced.basis
    )
    priced = evaluation(*asked, "llm.price_per_million_input=2", "llm.price_per_million_output=8")
    found = estimate_step("evaluate", priced, CPU, PAPER)
    prompts = int(found.basis.partition(" requests, ")[2].partition(" prompt")[0].replace(",", ""))
    assert found.basis.startswith("24,115 requests") and found.cost.tokens == unpriced.cost.tokens
    assert found.cost.money == pytest.approx((2 * prompts + 8 * (found.cost.tokens - prompts)) / 1e6)
    assert (found.gpus, found.memory_gib, found.hours) == (0, None, None)


@pytest.mark.slow
def test_what_is_not_here_is_said_and_what_is_here_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = evaluation("checkpoint=nobody/knows", "template=joint", "data=rolecs")
    found = estimate_step("evaluate", unknown, NODE, PAPER)
    assert (found.cost, found.hours) == (Cost(), None) and "nobody/knows is not here" in found.basis
    found = estimate_step("evaluate", evaluation(*LLAMA_70B), NODE, PreflightConfig())
    assert (
        found == StepEstimate(gpus=8, gpu_memory_gib=79.6, basis=found.basis) and "preflight.dialogues" in found.basis
    )
    files = ["data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl"]
    for name, count in (("train", 12), ("evaluation", 3)):
        write_dialogues(f"{name}.jsonl", generate_sample(count, seed=5))
    here = estimate_step("evaluate", evaluation(*LLAMA_70B[:2], *files), CPU, PreflightConfig())
    turns = sum(len(each.supporter_turns) for each in generate_sample(3, seed=5))
    assert here.basis == f"3 dialogues, {turns} replies; tokens estimated from characters"
    # Figures for data that cannot be read yet say nothing about these.
    assert estimate_step("evaluate", evaluation(*LLAMA_70B[:2], *files), CPU, PAPER) == here
    # The tokenizer is not here, nor the sample that the training writes.
    training = compose("sft", ["experiment=qwen2_5_7b_rolecs", *files])
    found = estimate_step("sft", training, NODE, PreflightConfig())
    assert found.basis.startswith("12 dialogues, ") and found.cost.tokens > 0
    tiny = estimate_step("sft", compose("sft", ["debug=cpu_tiny"]), CPU, PreflightConfig())
    assert tiny.cost.tokens > 0 and (tiny.gpus, tiny.memory_gib, tiny.hours) == (0, None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.jsonl", "train.jsonl"]


@pytest.mark.slow
def test_what_a_run_has_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slurm = replace(NODE, scheduler="slurm")
    rows = [
        {"step": step, "tokens_per_second": 100.0, "trained_tokens_per_second": 50.0, "step_seconds": 2.0}
        for step in (5, 10)
    ]
    rows.insert(1, {"step": 5, "eval_loss": 1.0})
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure_cost(tmp_path, "sft", NODE) == Cost(tokens=10 * 2 * 100)
    # Time in a queue is no computing: a detached job counts what its processes recorded.
    run = Run("sft", to_container(compose("sft", ["experiment=demo", "run.directory=run", "run.if_exists=resume"])))
    run.start({})
    with pytest.raises(SystemExit):
        run.fail("planted")
    first = json.loads((run.directory / "run.json").read_text())["seconds"]
    record = json.loads((run.directory / "run.json").read_text()) | {"seconds": 3600.0}
    (run.directory / "run.json").write_text(json.dumps(record))
    run.start({})
    run.finish()
    last = json.loads((run.directory / "run.json").read_text())["seconds"]
    assert first < 3600 <= last
    cost = measure_cost(run.directory, "sft", slurm, 7200, price_per_gpu_hour=2.0)
    assert (cost.gpu_hours, cost.money) == (pytest.approx(8 * last / 3600), pytest.approx(16 * last / 3600))
    assert measure_cost(run.directory, "sft", NODE, 7200).gpu_hours == 16
    assert measure_cost(run.directory, "sft", CPU, 7200).gpu_hours is None

    (dialogue,) = generate_sample(1, seed=1)
    turn = dialogue.supporter_turns[0]
    said = build_prediction(dialogue, turn, "reference", "好", parse_reply("好"), "", token_ids=(4, 5, 6))
    failed = FailedTurn(dialogue.id, turn, "reference", "timeout", "")
    write_predictions("local/predictions/trained-reference.jsonl", [said, failed])
    write_predictions("local/predictions/trained-generated.jsonl.part-00000", [said])
    # What a process that was killed while it wrote predictions left.
    (tmp_path / "local/predictions/.most frequent strategy-reference.jsonl.writing-abcd1234").mkdir()
    assert measure_cost(tmp_path / "local", "evaluate", CPU) == Cost(tokens=6)
    llm = ["llm=gpt_4o", "data=rolecs", "llm.price_per_million_input=1", "llm.price_per_million_output=10"]
    served = tmp_path / "served"
    served.mkdir()
    (served / "resolved.yaml").write_text(as_yaml(to_container(evaluation(*llm))))
    assert measure_cost(served, "evaluate", CPU) == Cost()
    usage_observer(served)(RequestAttempt({}, 1, None, "", "x", 1000, 200, 0.1))
    assert measure_cost(served, "evaluate", CPU) == Cost(tokens=1200, money=pytest.approx(0.003))
    later = evaluation(*llm[:2], "llm.price_per_million_input=2", "llm.price_per_million_output=20").llm
    assert measure_cost(served, "evaluate", CPU, llm=later).money == pytest.approx(0.006)
    assert measure_cost(tmp_path / "none", "compare", CPU) == Cost()
