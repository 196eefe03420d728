"""Suites: refused settings, what a step is known by, the order and the failures of steps, and a whole suite."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import ROOT, sampled
from test_launch import Forked, left_in, record
from test_sweep import driver

from csc_train.config.cluster import ClusterConfig
from csc_train.config.schedulers import SlurmConfig
from csc_train.config.suite import StepConfig
from csc_train.launching.job import Job
from csc_train.launching.journal import open_journal
from csc_train.launching.launchers.local import LocalLauncher
from csc_train.suites import reproduce as reproduction
from csc_train.suites.base import Cost
from csc_train.suites.plan import _cluster, plan_suite
from csc_train.suites.reproduce import LEDGER_FILE, STUDY, reproduce

MINE = """# @package _global_
suite:
  name: mine
  poll: 0.1
  overrides:
    sft: [debug=cpu_tiny]
  steps:
    first_training: {{recipe: sft}}
    first: {{overrides: ["checkpoint={{first_training}}/model"]}}
    other_training: {{recipe: sft, overrides: [trainer.max_steps=5]}}
    other: {{overrides: ["checkpoint={{other_training}}/model"]}}
    {more}
  rows:
    first: {{step: first}}
    other: {{step: other, against: first}}
"""


SMALL = """# @package _global_
suite:
  name: mine
  poll: 0.1
  overrides:
    sft: [debug=cpu_tiny]
  steps:
    first_training: {recipe: sft}
    first: {overrides: ["checkpoint={first_training}/model"]}
    served: {placement: local, overrides: [llm=gpt_4o, data=sample, template=joint]}
  rows:
    first: {step: first}
    served: {step: served}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory to work in, with a suite of the user's own: two trainings, their evaluations, a comparison."""
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / "conf" / "suite" / "mine.yaml"
    suite.parent.mkdir(parents=True)
    suite.write_text(MINE.format(more=""))
    return tmp_path


@pytest.fixture
def quick(here, monkeypatch):
    """Each step is a stand-in that ends at once."""
    worker = str(ROOT / "tests" / "workers" / "short_step.py")

    def command(launcher):
        job = launcher.job
        return [sys.executable, worker, str(job.directory), Path(job.script).stem, job.arguments[-1]]

    monkeypatch.setattr(LocalLauncher, "command", command)
    monkeypatch.setattr(Job, "preflight", lambda job: None)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    return here


@pytest.fixture
def small(quick):
    """A suite of one training, its evaluation, and a served model."""
    (quick / "conf/suite/mine.yaml").write_text(SMALL)
    return quick


OWN = ["--config-dir=conf", "suite=mine"]


def plan(*arguments):
    return plan_suite([*OWN, *arguments])


def ledger(here):
    """The study of the suite."""
    return optuna.load_study(study_name=STUDY, storage=open_journal(here / "runs/suites/mine" / LEDGER_FILE))


def order(here):
    """The steps in the order in which they started."""
    file = here / "order.txt"
    return file.read_text().split() if file.exists() else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    sampled([
        (["suite=cpu_tinny"],
         "suite=cpu_tinny: not in conf/suite. Did you mean 'cpu_tiny'? Known: ablations, cpu_tiny, paper"),
        ([], "suite is required: choose one by suite=ablations|cpu_tiny|paper"),
        (["suite=cpu_tiny", 'suite.steps.plain.overrides=["checkpoint={plain_trainin}/model"]'],
         "suite.steps.plain: {plain_trainin}: no such step. Did you mean 'plain_training'?"),
        (["suite=cpu_tiny", "suite.overrides.sft=[experiment=dem]"],
         "suite.steps.plain_training: experiment=dem: not in conf/experiment. Did you mean 'demo'?"),
        (["suite=cpu_tiny", "suite.rows.base.step=plan"],
         "suite.rows.base.step=plan: no such step. Did you mean 'plain'?"),
        (["suite=cpu_tiny", "suite.rows.base.against=bas"],
         "suite.rows.base.against=bas: no such against. Did you mean 'base'?"),
        (["suite=cpu_tiny", "+suite.steps={a-b:{recipe:sft}}"],
         "suite.steps.a-b: write a name of letters, digits and _"),
        (["suite=cpu_tiny", "suite.rows.base.step=plain_training"],
         "suite.rows.base.step=plain_training: is no evaluation: name one of evaluate"),
        (["suite=cpu_tiny", "suite.rows.base.published=Qwen2.5 7B"], "paper.csv: no row 'Qwen2.5 7B'. Did you mean "
         "'Qwen2.5-Instruct 7B'?"),
        (["suite=cpu_tiny", "suite.published=null"], "suite.rows.base.published=Qwen2.5-Instruct 7B: name the table by "
         "suite.published"),
        (["suite=cpu_tiny", "sft.trainer.lerning_rate=1"], "suite.steps.plain_training: unknown key "
         "'trainer.lerning_rate' for recipe sft. Did you mean 'trainer.learning_rate'?"),
        (["suite=cpu_tiny", "trainer.epochs=1"], "trainer.epochs=1: no key of a suite; write RECIPE.KEY=VALUE for its "
         "steps."),
        (["suite=cpu_tiny", "clster=cpu2"],
         "clster=cpu2: no key of a suite; write RECIPE.KEY=VALUE for its steps. Did you mean 'cluster'?"),
        (["suite=cpu_tiny", "suite.steps.plain.recipe=evalute"], "suite.steps.plain.recipe=evalute: choose one of sft, "
         "evaluate, compare. Did you mean 'evaluate'?"),
        (["suite=cpu_tiny", 'suite.steps.plain_training.overrides=["model.path={plain}/model"]'],
         "suite.steps: a circle of needs: plain_training -> plain -> plain_training"),
    ], 6),
)  # fmt: skip
def test_a_wrong_suite_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert reproduce(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_two_steps_of_one_name_are_refused_with_their_line(here, capsys):
    (here / "conf/suite/mine.yaml").write_text(MINE.format(more="first: {recipe: sft}"))
    assert reproduce(OWN) == 2
    assert capsys.readouterr().err == (
        f"error: {here}/conf/suite/mine.yaml, line 12: found duplicate key first: mend the YAML\n"
    )


@pytest.mark.slow
def test_a_step_is_known_by_what_decides_its_results(here):
    def contents(*arguments):
        return {name: step.directory.name for name, step in plan(*arguments).steps.items()}

    before = contents()
    assert set(before) == {"first_training", "first", "other_training", "other", "other.gain"}
    assert len({name.rpartition("-")[2] for name in before.values()}) == 5

    def changed(*arguments):
        return {name for name, content in contents(*arguments).items() if content != before[name]}

    everything = set(before)
    assert changed("sft.trainer.epochs=2") == everything
    assert changed("evaluate.evaluation.max_new_tokens=8") == {"first", "other", "other.gain"}
    assert changed("suite.steps.other_training.overrides=[trainer.max_steps=4]") == {
        "other_training", "other", "other.gain",
    }  # fmt: skip
    assert changed("evaluate.data=sample") == {"first", "other", "other.gain"}  # as the default, but chosen
    # What changes no result, the schema's own defaults, and the place of the suite.
    same = ["sft.tracking=off", "sft.zero=zero1", "cluster=cpu2", "suite.directory=elsewhere"]
    assert changed(*same, "sft.trainer.weight_decay=0.0") == set()
    Path("rows.jsonl").write_text("1\n")
    data = ["sft.data.train.path=rows.jsonl", "sft.data.sample_dialogues=null"]
    one = contents(*data)
    Path("rows.jsonl").write_text("2\n")
    assert contents(*data)["first_training"] != one["first_training"] != before["first_training"]
    # The files of a mix count, and what differs from its defaults.
    data = ["sft.data.train.path=null", "sft.data.sample_dialogues=null"]
    mix = contents(*data, "sft.data.mix=[{path: rows.jsonl}]")
    assert contents(*data, "sft.data.mix=[{path: rows.jsonl, fraction: 1, kind: csc}]") == mix
    Path("rows.jsonl").write_text("3\n")
    assert contents(*data, "sft.data.mix=[{path: rows.jsonl}]")["first_training"] != mix["first_training"]


@pytest.mark.slow
def test_steps_run_after_those_that_they_need_and_never_twice(quick, capsys):
    assert reproduce(OWN) == 0, capsys.readouterr().err
    ran = order(quick)
    assert sorted(ran) == ["first", "first_training", "other", "other.gain", "other_training"]
    for before, after in (("first_training", "first"), ("other_training", "other"), ("other", "other.gain"),
                          ("first", "other.gain")):  # fmt: skip
        assert ran.index(before) < ran.index(after)
    assert (quick / "runs/suites/mine/results.html").exists()
    assert reproduce(OWN) == 0
    assert order(quick) == ran
    # A change runs what it changes, and nothing else.
    assert reproduce([*OWN, "suite.steps.other_training.overrides=[trainer.max_steps=4]"]) == 0
    assert sorted(order(quick)[5:]) == ["other", "other.gain", "other_training"]


@pytest.mark.slow
def test_a_failed_step_fails_what_needs_it_and_is_tried_again(small, capsys):
    Path("fail-first_training").touch()
    assert reproduce(OWN) == 1
    assert sorted(order(small)) == ["first_training", "served"]
    shown = capsys.readouterr().out
    assert "step first_training: fail, no room\n" in shown
    assert "failed: step first: needs first_training, which failed; the same command tries it again\n" in shown
    rows = json.loads((small / "runs/suites/mine/results.json").read_text())["rows"]
    assert [(row["name"], row["state"]) for row in rows] == [("first", "failed"), ("served", "done")]
    assert rows[0]["reason"] == "step first_training: no room"
    Path("fail-first_training").unlink()
    assert reproduce(OWN) == 0
    assert order(small)[2:] == ["first_training", "first"]
    # The ledger keeps every attempt.
    study = ledger(small)
    attempts = [trial.state.name for trial in study.trials if trial.user_attrs["step"] == "first_training"]
    assert attempts == ["FAIL", "COMPLETE"] and len(study.trials) == 4
    assert all(trial.user_attrs["planned"].keys() == {"gpu_hours", "tokens", "money"} for trial in study.trials)
    assert all(trial.user_attrs["seconds"] > 0 for trial in study.trials)


@pytest.mark.slow
def test_a_served_model_without_a_key_is_named_first_and_the_rest_goes_on(small, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert reproduce(OWN) == 1
    shown = capsys.readouterr().out
    missing = "llm.api_key_env=OPENAI_API_KEY: this environment variable is not set"
    assert shown.index(f"step served: not started, {missing}") < shown.index("started\n")
    assert order(small) == ["first_training", "first"]


@pytest.mark.slow
def test_other_metrics_score_a_finished_evaluation_again(small):
    assert reproduce(OWN) == 0
    (first,) = small.glob("runs/suites/mine/first-*")
    assert json.loads((first / "results.json").read_text())["mode"] == "resume=true"
    for ran in (5, 5):  # the second time nothing is left to do
        assert reproduce([*OWN, "evaluate.metrics.bootstrap_resamples=300"]) == 0
        assert len(order(small)) == ran
    assert json.loads((first / "results.json").read_text())["mode"] == "score_only=true"


@pytest.mark.slow
def test_a_job_of_a_scheduler_is_not_started_again_elsewhere(small, capsys):
    """A step was left in a queue; then the same suite starts on this machine, with another step of old inputs."""
    runs = small / "runs/suites/mine"
    runs.mkdir(parents=True)
    study = optuna.create_study(study_name=STUDY, storage=open_journal(runs / LEDGER_FILE))
    step = plan().steps["first_training"]
    for directory, job in ((str(step.directory), "17"), ("runs/suites/mine/old", "18")):
        trial = study.ask()
        for key, value in {"step": "first_training", "directory": directory, "job": job}.items():
            trial.set_user_attr(key, value)
    assert reproduce(OWN) == 1
    shown = capsys.readouterr().out
    advice = "job 17 of a scheduler was started for it: cancel it, or name that cluster"
    assert f"step first_training: fail, {step.directory}: {advice}\n" in shown
    assert "its inputs have changed, and job 18 may go on in runs/suites/mine/old: cancel it" in shown
    assert order(small) == ["served"]


def test_a_step_on_fewer_nodes_asks_for_no_more_of_them():
    cluster = ClusterConfig(nodes=4, scheduler="slurm", slurm=SlurmConfig(nodes_min=2))
    steps = [StepConfig(), StepConfig(nodes=2), StepConfig(placement="node")]
    assert [_cluster(cluster, step).slurm.nodes_min for step in steps] == [2, None, None]


@pytest.mark.slow
def test_a_training_is_checked_on_the_gpus_of_its_slot(small, monkeypatch, capsys):
    """The first GPU is another user's."""
    driver(small, monkeypatch, 50_000, 4)
    seen = []
    monkeypatch.setattr(Job, "preflight", lambda job: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    assert reproduce([*OWN, "cluster=gpu1"]) == 0, capsys.readouterr()
    assert set(seen) == {"1", None}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    # Without a free GPU, what needs none still runs.
    driver(small, monkeypatch, 50_000, 50_000)
    assert reproduce([*OWN, "cluster=gpu1", "evaluate.evaluation.max_new_tokens=9"]) == 1
    assert order(small)[3:] == ["served"]
    reason = "1 jobs of cluster.gpus_per_node=1 need 1 GPUs; 0 are free on this machine"
    assert f"step first: not started, {reason}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_suite_leaves_the_step_to_the_next_one(small, monkeypatch, capsys):
    """Killed while an evaluation runs, which has finished when the next suite starts, as a job of a scheduler may: the
    card gets its figures."""
    Path("hold-first").touch()
    child = os.fork()
    if child == 0:
        reproduce(OWN)
        os._exit(0)
    while "first" not in order(small):
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while left_in(small.resolve()) not in ([], [psutil.Process()]):  # it ends with the suite
        time.sleep(0.02)
    (first,) = small.glob("runs/suites/mine/first-*")
    (first / "run.json").write_text(json.dumps({"recipe": "evaluate", "finished": "now"}))
    cards, read = [], []
    monkeypatch.setattr(reproduction, "add_figures", lambda *places: cards.append([path.name for path in places]))
    monkeypatch.setattr(reproduction, "measure_cost", lambda directory, *_: read.append(directory.name) or Cost())
    assert reproduce(OWN) == 0, capsys.readouterr().err
    assert [trial.state.name for trial in ledger(small).trials] == ["COMPLETE"] * 3
    assert cards == [["model", first.name]] and order(small).count("first") == 1
    assert read.count(first.name) == 1  # what a finished run has taken is counted once


@pytest.mark.slow
def test_the_papers_plan_has_eleven_rows_with_gpus_and_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce(["suite=paper", "dry_run=true"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "Suite paper: 11 rows, 19 steps, in runs/suites/paper" in shown
    planned = plan_suite(["suite=paper"])
    rows = planned.config.rows.values()
    assert len(rows) == 11 and all(f"\n{row.label} " in shown for row in rows)
    # Each training: GPUs, memory on each, whether it fits, hours, GPU hours, tokens, disk.
    figures = r"_training +sft +to run +(8|32) +\d+ of 80 +yes +[\d.]+ +[\d.]+ +[\d,]+ +[\d,.]+ *\n"
    assert re.findall(figures, shown) == ["8", "32", "8", "32"]
    assert "All steps: " in shown and "1,855 dialogues" in shown
    # A 7B has a copy on each GPU of one node, a 70B is spread over them; served models and comparisons run here.
    placed = {name: step.job.launch.cluster for name, step in planned.steps.items()}
    for name, expected in {
        "qwen2_5_7b": ("slurm_4x8", 1, "torchrun"), "qwen2_5_72b": ("slurm_4x8", 1, "none"),
        "qwen2_5_72b_training": ("slurm_4x8", 4, "torchrun"), "gpt_4o": ("local", 1, "none"),
        "qwen2_5_7b_rolecs.gain": ("local", 1, "none"),
    }.items():  # fmt: skip
        assert (placed[name].name, placed[name].nodes, placed[name].process_launcher) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_suite_killed_twice_ends_with_its_table_and_page(tmp_path):
    """The real recipes, on the tiny suite: Ctrl-C in the first training, SIGKILL in the first evaluation."""
    place = tmp_path.resolve()
    (place / "recipes").symlink_to(ROOT / "recipes")
    command = [
        sys.executable, str(ROOT / "launch" / "reproduce.py"), "suite=cpu_tiny", "sft.data.sample_dialogues=40",
        "sft.trainer.max_steps=4", "sft.trainer.save_steps=1", "sft.validation.eval_steps=4",
        "evaluate.evaluation.max_new_tokens=6", "evaluate.metrics.bootstrap_resamples=100",
    ]  # fmt: skip
    runs = place / "runs/suites/cpu_tiny"

    def stopped_at(pattern, signum):
        started = Forked(command, place)
        while not any(path.stat().st_size for path in runs.glob(pattern)):
            assert started.process.poll() is None, started.end() or started.output
            time.sleep(0.02)
        started.process.send_signal(signum)
        status = started.end()
        while left_in(place):  # what an interrupted step still does
            time.sleep(0.05)
        return status, started.output

    status, output = stopped_at("plain_training-*/history.jsonl", signal.SIGINT)
    assert status == 130 and "interrupted after 0 of 6 steps; the same command goes on" in output
    assert {row["state"] for row in json.loads((runs / "results.json").read_text())["rows"]} == {"waiting"}
    status, _ = stopped_at("plain-*/predictions/*", signal.SIGKILL)
    assert status == -signal.SIGKILL
    (training,) = runs.glob("plain_training-*")
    finished = record(training)["finished"]
    started = Forked(command, place)
    assert started.end() == 0, started.output
    assert record(training)["finished"] == finished  # not trained again
    rows = {row["name"]: row for row in json.loads((runs / "results.json").read_text())["rows"]}
    assert list(rows) == ["bigram", "base", "plain", "shared_prefix"]
    assert {row["state"] for row in rows.values()} == {"done"}
    page = (runs / "results.html").read_text()
    assert "plain packs" in page and f"{training.name}/" in page
    # The trained model carries its card with these figures.
    card = (training / "model" / "README.md").read_text()
    assert "ACC" in card
