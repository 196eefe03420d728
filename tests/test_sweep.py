"""Sweeps: refused settings, placement, results and failures of trials, and the summary."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
import wandb.wandb_agent
import yaml
from conftest import ROOT
from matplotlib.figure import Figure
from optuna.trial import TrialState
from test_launch import Forked, Started, left_in, record

from csc_train.checkpoints.locate import locate_checkpoint
from csc_train.config.cluster import ClusterConfig, ParameterConfig, PrunerConfig, SweepConfig
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.launching.journal import open_journal
from csc_train.launching.launchers.base import LAUNCHERS
from csc_train.launching.launchers.local import LocalLauncher
from csc_train.launching.search_space import distributions, extreme_points
from csc_train.launching.sweep import PRUNERS, plan_sweep, sweep
from csc_train.launching.sweep_runner import NoSuchMetricError, SweepRunner, keep_best, metric_values, trial_result
from csc_train.launching.sweep_summary import report_sweep
from csc_train.launching.trial_runner import FailedTrialError, RunningTrial
from csc_train.launching.warm_start import EARLIER, add_earlier, own_trials, read_earlier
from csc_train.runs.claim import claim
from csc_train.runs.comparison import find_runs, save_svg, sort_runs

SWEEP = [sys.executable, str(ROOT / "launch" / "sweep.py")]
SMALL = ["debug=cpu_tiny", "sweep.poll=0.2", "cluster=cpu1"]
FOUR = [
    *SMALL, "sweep=lr", "sweep.trials=4", "trainer.max_steps=12", "trainer.save_steps=0",
    "data.sample_dialogues=20", "packing.max_length=512", "validation.eval_steps=1",
    "validation.num_turns=0", "validation.num_samples=0",
]  # fmt: skip


def steps(run: Path) -> list[int]:
    """The optimizer steps in a run's history."""
    lines = (run / "history.jsonl").read_text().splitlines() if (run / "history.jsonl").exists() else []
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory to work in, with the recipes in it as in a checkout."""
    directory = tmp_path_factory.mktemp("place").resolve()
    (directory / "recipes").symlink_to(ROOT / "recipes")
    return directory


@pytest.fixture(scope="module")
def interrupted(place):
    """A sweep of four trials, one of which cannot but fail, until Ctrl-C after a step of its first."""
    started = Started([*SWEEP, *FOUR], place)
    while not steps(place / "runs/sweeps/lr/trial-0"):
        assert started.process.poll() is None, started.end() or started.output
        time.sleep(0.05)
    assert any("csc_train.launching.supervise" in process.cmdline() for process in left_in(place))
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 130, started.output
    left = left_in(place)
    (place / "runs/sweeps/lr/trial-2/model").mkdir(parents=True)  # what no run left: the recipe will not touch it
    return started.output, left, record(place / "runs/sweeps/lr/trial-0")


@pytest.fixture(scope="module")
def summary(place, interrupted):
    """What the same command came to when it was given again, with two trials at a time."""
    started = Forked([*SWEEP, *FOUR, "sweep.parallel=2"], place)
    assert started.end() == 0, started.output
    assert left_in(place) == []
    return json.loads((place / "runs/sweeps/lr/summary.json").read_text()), started.output


@pytest.mark.slow
def test_ctrl_c_lets_trials_save_and_leaves_nothing_running(interrupted):
    output, left, first = interrupted
    assert left == []
    assert "interrupted after 0 of 4 trials; the same command resumes\n" in output
    assert first["stopped"] and not first["finished"]


@pytest.mark.slow
def test_an_interrupted_sweep_ends_with_as_many_trials_as_were_asked_for(place, summary):
    facts, _ = summary
    runs = place / "runs/sweeps/lr"
    assert [(trial["number"], trial["state"]) for trial in facts["trials"]] == [
        (0, "complete"), (1, "complete"), (2, "fail"), (3, "complete"),
    ]  # fmt: skip
    assert facts["trials"][2]["reason"].endswith(
        "runs/sweeps/lr/trial-2 holds model but no run.json: choose another directory, or an empty one"
    )
    # Each was trained with the values that the study holds, and judged by its own last held-out loss.
    values = set()
    for trial in (trial for trial in facts["trials"] if trial["state"] == "complete"):
        config = yaml.safe_load((runs / f"trial-{trial['number']}/resolved.yaml").read_text())
        given = trial["parameters"]
        assert list(given) == ["trainer.learning_rate", "trainer.warmup_ratio"]
        assert config["trainer"]["learning_rate"] == given["trainer.learning_rate"]
        assert config["trainer"]["warmup_ratio"] == given["trainer.warmup_ratio"]
        log = json.loads((runs / f"trial-{trial['number']}/metrics.json").read_text())["log"]
        assert trial["value"] == [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
        assert sorted(set(steps(runs / f"trial-{trial['number']}"))) == list(range(1, 13))
        values.add(given["trainer.learning_rate"])
    assert len(values) == 3  # the restarted sampler does not repeat its values
    best = min((trial for trial in facts["trials"] if trial["value"]), key=lambda trial: trial["value"])
    assert facts["best"] == best["number"]
    assert facts["importances"].keys() == best["parameters"].keys()


@pytest.mark.slow
def test_the_interrupted_trial_resumed_from_its_checkpoint(place, interrupted, summary):
    first = record(place / "runs/sweeps/lr/trial-0")
    assert interrupted[2]["stopped"] and first["finished"] and "stopped" not in first


@pytest.mark.slow
def test_a_summary_is_printed_and_kept_with_a_page(place, summary):
    facts, output = summary
    runs = place / "runs/sweeps/lr"
    text = (runs / "summary.md").read_text()
    assert f"4 of 4 trials: 3 complete, 1 fail; best: trial {facts['best']}, eval_loss " in text
    assert f"| {facts['best']}* |" in text and "holds model but no run.json" in text
    assert "Sweep lr (* best)" in output
    page = (runs / "summary.html").read_text(encoding="utf-8")
    assert f'href="trial-{facts["best"]}/curves' in page and 'http-equiv="refresh' not in page
    assert sum(trial["seconds"] for trial in facts["trials"] if trial["seconds"]) / 3600 == facts["hours"] > 0


@pytest.mark.slow
def test_a_sweep_is_not_mixed_with_another(place, summary, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert sweep([*FOUR, "sweep.space.learning_rate.high=1", "trainer.max_steps=9"]) == 2
    assert capsys.readouterr().err == (
        "error: runs/sweeps/lr holds a sweep with sweep.space.learning_rate.high=0.001, not 1.0; "
        "training.trainer.max_steps=12, not 9: choose another sweep.directory\n"
    )


@pytest.mark.slow
def test_runs_are_compared_by_what_they_differ_in(place, summary):
    facts, _ = summary
    broken = place / "runs/sweeps/lr/broken"
    broken.mkdir()
    (broken / "resolved.yaml").write_text("a: 1\n")
    (broken / "run.json").write_text("{")
    started = Forked([sys.executable, "recipes/compare_runs.py", "runs", "run.directory=runs/compared"], place)
    assert started.end() == 0, started.output
    compared = json.loads((place / "runs/compared/runs.json").read_text())
    assert compared["differing"] == ["trainer.learning_rate", "trainer.warmup_ratio"]
    done = sorted((trial for trial in facts["trials"] if trial["value"]), key=lambda trial: trial["value"])
    rows = compared["runs"]
    expected = [*(trial["directory"] for trial in done), "runs/sweeps/lr/trial-2"]
    assert [row["directory"] for row in rows] == expected
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["not started"]
    assert [row["metrics"]["eval_loss"] for row in rows[:3]] == [trial["value"] for trial in done]
    assert all(row["speed"] > 0 for row in rows[:3]) and rows[3]["speed"] is None
    assert compared["broken"] == [
        "runs/sweeps/lr/broken: runs/sweeps/lr/broken/run.json: broken JSON at line 1, column 2: Expecting property "
        "name enclosed in double quotes"
    ]
    assert f"not read: {compared['broken'][0]}" in started.output
    text = (place / "runs/compared/runs.md").read_text()
    assert text.index(expected[0]) < text.index(expected[1]) < text.index(expected[3])
    assert "<svg" in (place / "runs/compared/runs.svg").read_text()


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no training run"):
        find_runs([tmp_path])


@pytest.mark.slow
def test_a_bad_trial_of_a_grid_is_pruned(tmp_path, monkeypatch, capsys):
    """The second point learns nothing; its process is told to stop, and does."""
    monkeypatch.chdir(tmp_path)
    worker = str(ROOT / "tests" / "workers" / "short_trial.py")
    monkeypatch.setattr(LocalLauncher, "command", lambda self: [sys.executable, worker, str(self.job.directory)])
    asked = [
        *SMALL, "sweep=loss_grid", "sweep.space.learning_rate.choices=[1e-2,1e-12]",
        "sweep.space.loss.choices=[tokens]",
        "sweep.pruner.kind=median", "sweep.pruner.startup_trials=1", "sweep.pruner.first_step=5",
    ]  # fmt: skip
    assert sweep(asked) == 0, capsys.readouterr().err
    runs = tmp_path / "runs/sweeps/loss_grid"
    facts = json.loads((runs / "summary.json").read_text())
    assert [(trial["state"], trial["parameters"]) for trial in facts["trials"]] == [
        ("complete", {"trainer.learning_rate": 0.01, "loss": "tokens"}),
        ("pruned", {"trainer.learning_rate": 1e-12, "loss": "tokens"}),
    ]
    assert facts["trials"][0]["value"] == 7.0 - 0.01 * 40
    assert steps(runs / "trial-0") == list(range(1, 41))
    assert 5 <= len(steps(runs / "trial-1")) < 2000
    assert record(runs / "trial-1")["status"] == "stopped"
    assert left_in(tmp_path.resolve()) == [psutil.Process()]
    # Asked for again, it has nothing left to do.
    before = capsys.readouterr().out
    assert sweep(asked) == 0
    assert before.count("started") == 2 and "started" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_misspelt_metric_ends_a_sweep_with_its_first_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    worker = str(ROOT / "tests" / "workers" / "short_trial.py")
    monkeypatch.setattr(LocalLauncher, "command", lambda self: [sys.executable, worker, str(self.job.directory)])
    assert sweep([*SMALL, "sweep=lr", "sweep.metric=evl_loss"]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "error: sweep.metric=evl_loss: runs/sweeps/lr/trial-0 logged no such metric. Did you mean 'eval_loss'? See "
        "its metrics.json\n"
    )
    assert shown.out.count("started") == 1
    assert "still running" not in Path("runs/sweeps/lr/summary.html").read_text()


SBATCH = """#!{python}
import json, pathlib, re, sys
script = pathlib.Path(sys.argv[1]).read_text()
run = pathlib.Path(re.search("run=([^ ]+) ", script).group(1))
number = len(list(pathlib.Path("queue").iterdir())) + 7
pathlib.Path("queue", str(number)).write_text(str(run))
print("Submitted batch job", number)
"""
SQUEUE = """#!{python}
# The second query of a job finds it gone; the middle job did not finish.
import json, pathlib, sys
(number,) = [text.split("=")[1] for text in sys.argv if text.startswith("--jobs=")]
job = pathlib.Path("queue", number)
run = pathlib.Path(job.read_text())
if not (run / "asked").exists():
    (run / "asked").touch()
    print("RUNNING")
elif number == "8":
    (run / "slurm-8.out").write_text("starting\\ntorch.OutOfMemoryError: CUDA out of memory. Tried\\n  more\\n")
    print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
    sys.exit(1)
else:
    (run / "metrics.json").write_text(json.dumps({{"log": [{{"eval_loss": 1.0 / int(number)}}]}}))
    (run / "run.json").write_text(json.dumps({{"recipe": "sft", "finished": "now"}}))
"""


@pytest.mark.slow
def test_a_list_is_submitted_to_slurm(tmp_path, monkeypatch, capsys):
    """By a queue that answers as SLURM does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    asked = [
        *SMALL[:-1], "sweep=adapters_list", "cluster=slurm_4x8", "cluster.nodes=1", "cluster.gpus_per_node=2",
        "sweep.parallel=2", "preflight.force=true",
    ]  # fmt: skip
    assert sweep(asked) == 0, capsys.readouterr().err
    facts = json.loads(Path("runs/sweeps/adapters_list/summary.json").read_text())
    keys = ("adapter", "adapter.rank", "trainer.learning_rate")
    points = [tuple(trial["parameters"].get(key) for key in keys) for trial in facts["trials"]]
    assert points == [("full", None, 1e-5), ("lora", 16, 1e-4), ("lora", 64, 1e-4)]
    assert [(trial["state"], trial["value"], trial["reason"]) for trial in facts["trials"]] == [
        ("complete", 1 / 7, None),
        ("fail", None, "out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried"),
        ("complete", 1 / 9, None),
    ]
    script = Path("runs/sweeps/adapters_list/trial-1/job.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=2\n" in script
    assert yaml.safe_load(Path("runs/sweeps/adapters_list/trial-1/resolved.yaml").read_text())["adapter"]["rank"] == 16
    assert facts["best"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep.space.learning_rate.key=trainer.lerning_rate"], "sweep.space: unknown key 'trainer.lerning_rate' for "
         "recipe sft. Did you mean 'trainer.learning_rate'?"),
        (["sweep.space.warmup_ratio.high=2"], "sweep.space: trainer.warmup_ratio=2.0: must be between 0 and 0.99"),
        (["sweep=adapters_list", "sweep.points=[{adapter:lora},{adaptor:full}]"], "sweep.points: unknown key "
         "'adaptor' for recipe sft. Did you mean 'adapter'?"),
        (["sweep=loss_grid", "sweep.space.loss.choices=[tokens,turn]"], "sweep.space: loss=turn: not in conf/loss. Did "
         "you mean 'turns'? Known: by_strategy, inverse_frequency, tokens, turns"),
        (["sweep=loss_grid", "sweep.trials=10"], "sweep.trials=10: the grid has 9 points: lower it"),
        (["sweep.space.learning_rate.low=1"], "sweep.space.learning_rate: type=float needs low below high, "
         "and no choices"),
        (["sweep.trails=3"], "unknown key 'sweep.trails' for recipe sweep. Did you mean 'sweep.trials'?"),
        (["sweep=lrr"], "sweep=lrr: not in conf/sweep. Did you mean 'lr'? Known: adapters_list, full, lora, loss_grid, "
         "lr"),
        (["swep=lr"], "unknown key 'swep'. Did you mean 'sweep'?"),
        (["trainer.lerning_rate=1"], "sweep.space: unknown key 'trainer.lerning_rate' for recipe sft. Did you mean "
         "'trainer.learning_rate'?"),
        (["run.directory=x"], "run.directory=x: a sweep names its runs itself: use sweep.directory"),
        (["sweep.pruner.kind=hyperbad"], "sweep.pruner.kind=hyperbad: choose one of none, median, asha, hyperband. "
         "Did you mean 'hyperband'?"),
        (["sweep.pruner.reduction_factor=2"], "sweep.pruner.reduction_factor=2: only asha and hyperband have one"),
        (["sweep.budget_gpu_hours=0"], "sweep.budget_gpu_hours=0.0: must be at least 0.0001"),
        (["sweep.budget_gpu_hours=-1"], "sweep.budget_gpu_hours=-1.0: must be at least 0.0001"),
        (["sweep.keep=bset"], "sweep.keep=bset: choose one of all, best. Did you mean 'best'?"),
        (["sweep.warm_start=nowhere"], "sweep.warm_start=nowhere: holds no summary.json: give the directory of a sweep "
         "that has ended a trial"),
        (["sweep=loss_grid", "sweep.warm_start=nowhere"], "sweep.warm_start=nowhere: a grid samples nothing: leave it "
         "out"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused_before_the_first_trial(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sweep(["debug=cpu_tiny", "cluster=cpu1", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_preflight_ends_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep([*SMALL, "data.evaluation.path=nowhere.jsonl", "data.train.path=nowhere.jsonl",
                  "data.sample_dialogues=null"]) == 2  # fmt: skip
    assert "error: preflight: data" in capsys.readouterr().err
    assert not Path("runs/sweeps/lr").exists()  # nothing that would stand in the way


@pytest.mark.slow
def test_every_extreme_of_every_parameter_is_checked():
    config = plan_sweep(["debug=cpu_tiny", "cluster=cpu1", "sweep=full"]).config
    points = extreme_points(config)
    for name, parameter in config.space.items():
        ends = parameter.choices or [parameter.low, parameter.high]
        assert {point[name] for point in points} == set(ends)
    assert len(points) == 1 + 1 + 2 + 1 + 1


def driver(folder: Path, monkeypatch, *used: int) -> None:
    """Put an nvidia-smi on the path that knows GPUs of which so many MiB are in use."""
    rows = "\n".join(f"NVIDIA H100, 81559, {mib}, 580.1" for mib in used)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def slots(cluster: ClusterConfig, parallel: int | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each trial that may run at the same time."""
    return [variables["CUDA_VISIBLE_DEVICES"] for variables in LocalLauncher.slots(cluster, parallel)]


def test_trials_are_placed_on_the_free_gpus(tmp_path, monkeypatch):
    two = ClusterConfig("two", gpus_per_node=2, device="cuda")
    driver(tmp_path, monkeypatch, 4, 50_000, 4, 4, 4, 4)
    assert slots(two, None) == ["0,2", "3,4"]
    assert slots(two, 1) == ["0,2"]
    with pytest.raises(InputError, match=r"^3 jobs of cluster.gpus_per_node=2 need 6 GPUs; 5 are free"):
        slots(two, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5")
    assert slots(two, None) == ["3,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,1,3,5")  # an absent one moves no other
    assert slots(two, None) == ["3,5"]


@pytest.mark.slow
def test_trials_default_to_one_gpu_or_one_cpu_process(tmp_path, monkeypatch):
    assert plan_sweep(["debug=cpu_tiny", "sweep=lr"]).launch.cluster.name == "cpu1"
    driver(tmp_path, monkeypatch, 4)
    assert plan_sweep(["debug=cpu_tiny", "sweep=lr"]).launch.cluster.name == "gpu1"
    assert plan_sweep(["debug=cpu_tiny", "sweep=lr", "cluster=cpu2"]).launch.cluster.name == "cpu2"


def test_a_trial_holds_the_lock_of_its_sweep(tmp_path):
    """As long as it runs: also where the sweep itself was killed."""
    start = (
        "import pathlib, subprocess\n"
        "from csc_train.runs.claim import claim\n"
        "lock = claim(pathlib.Path('lr'), 'sweep lr')\n"
        "print(subprocess.Popen(['sleep', '600'], pass_fds=(lock.descriptor,), stdout=-3).pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    with pytest.raises(InputError, match=r"lr: in use by sweep lr on .*: wait for its end"):
        claim(tmp_path / "lr", "sweep lr")
    trial = psutil.Process(int(done.stdout))
    trial.kill()
    while trial.is_running() and trial.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    claim(tmp_path / "lr", "sweep lr").release()


def test_metric_values_come_as_they_are_written_and_follow_a_truncated_history(tmp_path):
    assert metric_values(tmp_path, "loss") == []
    history = tmp_path / "history.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2, 3)]
    history.write_text(lines[0] + lines[1] + lines[2][:7])
    assert metric_values(tmp_path, "loss") == [(1, 1.0), (2, 0.5)]
    history.write_text("".join(lines) + '{"step": 3, "eval_loss": 2}\n')
    assert metric_values(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    history.write_text(lines[0])
    assert metric_values(tmp_path, "loss") == [(1, 1.0)]


def test_the_result_or_failure_of_a_trial(tmp_path):
    def write(name: str, facts: dict) -> None:
        (tmp_path / name).write_text(json.dumps(facts))

    with pytest.raises(FailedTrialError, match=r"^ended without output: it may have been killed$"):
        trial_result(tmp_path, "loss")
    report = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n====\n  error_file: <N/A>\n"
    for printed, reason in (
        ("step 1\nerror: no room\n", "no room"),
        ("[rank0]: ValueError: bad\n  at x\n", "ValueError: bad"),
        ("step 1\n  traceback : Signal 9 (SIGKILL) received by PID 7\n", "Signal 9 (SIGKILL) received by PID 7"),
        ("DefaultCPUAllocator: can't allocate memory\nRuntimeError: can't allocate memory: 9 bytes\n",
         "out of memory: RuntimeError: can't allocate memory: 9 bytes"),
    ):  # fmt: skip
        (tmp_path / "output.log").write_text(printed + report)
        with pytest.raises(FailedTrialError, match=f"^{re.escape(reason)}$"):
            trial_result(tmp_path, "loss")
    write("run.json", {"finished": None, "status": "failed", "error": "OutOfMemoryError: 20 GiB"})
    with pytest.raises(FailedTrialError, match=r"^out of memory: OutOfMemoryError: 20 GiB$"):
        trial_result(tmp_path, "loss")
    write("run.json", {"finished": None, "status": "stopped"})
    with pytest.raises(FailedTrialError, match=r"^stopped from outside$"):
        trial_result(tmp_path, "loss")
    write("run.json", {"finished": "now"})
    log = [{"loss": 3, "eval_loss": 2.0}, {"loss": 1.5, "eval_loss": 4.0}, {"train_runtime": 1}]
    write("metrics.json", {"log": log})
    assert (trial_result(tmp_path, "loss"), trial_result(tmp_path, "eval_loss")) == (1.5, 4.0)
    write("metrics.json", {"log": log, "validation": {"loss": 2.0, "step": 1}})  # of the checkpoint
    assert trial_result(tmp_path, "eval_loss") == 2.0
    with pytest.raises(NoSuchMetricError, match=r"^sweep.metric=evl_loss: .* Did you mean 'eval_loss'\? See"):
        trial_result(tmp_path, "evl_loss")
    write("metrics.json", {"log": [{"loss": float("nan")}]})
    with pytest.raises(FailedTrialError, match=r"^loss is nan$"):
        trial_result(tmp_path, "loss")


def test_finished_runs_come_first_by_their_metric(tmp_path):
    for name, status, loss in (("a", "failed", 0.1), ("b", "finished", 3.0), ("c", "finished", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").write_text(f"trainer: {{seed: {loss}}}\n")
        (tmp_path / name / "run.json").write_text(json.dumps({"recipe": "sft", "status": status, "error": None}))
        (tmp_path / name / "metrics.json").write_text(json.dumps({"log": [{"loss": loss}]}))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "resolved.yaml").write_text(f"checkpoint: {tmp_path}/b/checkpoint\n")
    (tmp_path / "evaluation" / "run.json").write_text('{"recipe": "evaluate"}')
    score = {"ACC": {"value": 50.0}, "BS": {"value": None}}
    results = {system: {"reference": {"profiles": {"paper": score}}} for system in ("base", "trained")}
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps({"results": results}))
    runs, broken = find_runs([tmp_path])
    assert broken == []
    names = lambda direction: [Path(run.directory).name for run in sort_runs(runs, "loss", direction)]  # noqa: E731
    assert (names("minimize"), names("maximize")) == (["c", "b", "a"], ["b", "c", "a"])
    assert [run.scores for run in runs] == [{}, {"reference paper ACC": 50.0}, {}]


@pytest.mark.slow
def test_the_command_of_a_wandb_agent_is_a_launch(tmp_path, capfd, monkeypatch):
    """By the agent's own code, without its service; on a cluster that is at hand, and dry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them for good
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    described = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    agent = wandb.wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = [*described["command"], "dry_run=true", "cluster=cpu2"]
    chosen = {"trainer.learning_rate": {"value": 0.00025}, "adapter.rank": {"value": 64}}
    assert chosen.keys() == described["parameters"].keys()
    agent._command_run({"run_id": "r", "program": described["program"], "args": chosen})
    assert agent._run_processes["r"].wait() == 0
    printed = capfd.readouterr().out
    assert "  learning_rate: 0.00025\n" in printed and "  rank: 64\n" in printed
    assert "--nproc_per_node=2" in printed.splitlines()[-1]


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in ("one.svg", "other.svg"):
        figure = Figure()
        figure.subplots().plot([1, 2], label="loss")
        save_svg(figure, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_the_lock_file_of_a_killed_sweep_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.log.lock").symlink_to(tmp_path)
    study = optuna.create_study(study_name="s", storage=open_journal(Path("study.log")))
    study.tell(study.ask(), 1.0)
    assert sorted(os.listdir()) == ["study.log", "study.log.lock"]


WORKERS = ROOT / "tests" / "workers"
CHEAP = [
    "debug=cpu_tiny", "cluster=cpu1", "cluster.scheduler=cheap_trials", "plugins=[cheap_trials]", "sweep=lr",
    "sweep.poll=0.1",
]  # fmt: skip
"""A sweep whose trials write what a training writes (see `workers/cheap_trials.py`)."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A sweep of twelve trials that is killed twice; its directory, and the history of each trial that died."""
    place = tmp_path_factory.mktemp("killed").resolve()
    runs, died = place / "runs/sweeps/lr", {}
    asked = [*SWEEP, *CHEAP, "sweep.trials=12", "sweep.pruner.kind=asha", "sweep.pruner.first_step=4",
             "sweep.budget_gpu_hours=5", "sweep.keep=best"]  # fmt: skip
    for until in (2, 5, None):
        started = Forked(asked, place, PYTHONPATH=f"{ROOT}{os.pathsep}{WORKERS}")
        if until is None:
            assert started.end() == 0, started.output
            return runs, died, started.output
        while not (found := [n for n in range(until, 12) if len(steps(runs / f"trial-{n}")) > 1]):
            assert started.process.poll() is None, started.output
            time.sleep(0.01)
        started.process.send_signal(signal.SIGKILL)
        assert started.end() == -signal.SIGKILL
        while left_in(place):
            time.sleep(0.01)
        rows = (runs / f"trial-{found[-1]}/history.jsonl").read_text().splitlines()
        died[found[-1]] = [json.loads(row) for row in rows]
    raise AssertionError("not ended")


@pytest.mark.slow
def test_a_sweep_of_twelve_trials_that_was_killed_twice_ends_with_its_page(killed):
    runs, died, output = killed
    facts = json.loads((runs / "summary.json").read_text())
    assert [trial["number"] for trial in facts["trials"]] == list(range(12))
    states = [trial["state"] for trial in facts["trials"]]
    assert set(states) == {"complete", "pruned"}, states
    assert "12 of 12 trials: " in (runs / "summary.html").read_text(encoding="utf-8")
    assert " of 5 process hours used\n" in output
    assert len(died) == 2
    for number, before in died.items():
        trial, rows = facts["trials"][number], steps(runs / f"trial-{number}")
        assert rows[: len(before)] == [row["step"] for row in before]  # it went on where it was
        after = [json.loads(row) for row in (runs / f"trial-{number}/history.jsonl").read_text().splitlines()]
        parts = (before, after[len(before) :])
        worked = sum(part[-1]["time"] - part[0]["time"] for part in parts if part)
        assert trial["seconds"] >= round(worked, 1) > 0  # what it worked before it was killed counts too
    assert facts["hours"] * 3600 == pytest.approx(sum(trial["seconds"] for trial in facts["trials"]))


@pytest.mark.slow
def test_only_the_best_trial_keeps_its_weights(killed):
    runs, *_ = killed
    facts = json.loads((runs / "summary.json").read_text())
    for trial in facts["trials"]:
        run, best = runs / f"trial-{trial['number']}", trial["number"] == facts["best"]
        assert [(run / name).exists() for name in ("model", "checkpoints")] == [best, best]
        assert record(run).get("removed") == (None if best else "sweep.keep=best")
        if not best:
            with pytest.raises(InputError, match=r"were removed by sweep.keep=best: train it again$"):
                locate_checkpoint(str(run))
        assert (run / "resolved.yaml").exists() and steps(run)
        if trial["state"] == "complete":
            assert trial_result(run, "eval_loss") == trial["value"]


def test_only_ended_and_free_trials_lose_their_weights(tmp_path, capsys):
    study, config = filled_study(tmp_path, "minimize")
    config = replace(config, keep="best", keep_number=2)
    for number in range(16):
        (tmp_path / f"trial-{number}/model").mkdir()
        write_json(tmp_path / f"trial-{number}/run.json", {"recipe": "sft"})
    (tmp_path / "trial-9/run.json").unlink()  # what no run wrote
    with claim(tmp_path / "trial-8", "export"):
        study_of = lambda: {n for n in range(16) if (tmp_path / f"trial-{n}/model").exists()}  # noqa: E731
        assert study_of() == set(range(16))
        descriptor = os.open(tmp_path / "trial-7/.lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process
        keep_best(tmp_path, study, config)
        os.close(descriptor)
        assert study_of() == {0, 1, 7, 9, 15}
    assert "note: its model and checkpoints are kept: " in capsys.readouterr().out
    keep_best(tmp_path, study, config)
    assert study_of() == {0, 1, 9, 15}
    keep_best(tmp_path, study, replace(config, keep="all"))
    assert study_of() == {0, 1, 9, 15}


@pytest.fixture
def cheap(tmp_path, monkeypatch):
    """An empty directory to sweep in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(WORKERS)
    yield tmp_path / "runs/sweeps/lr"
    LAUNCHERS.pop("cheap_trials", None)
    sys.modules.pop("cheap_trials", None)


@pytest.mark.slow
def test_a_used_up_budget_stops_a_sweep_and_a_greater_one_resumes_it(cheap, capsys):
    Path("wait").touch()
    asked = [*CHEAP, "sweep.trials=2", "sweep.space.learning_rate.low=5e-5"]
    assert sweep([*asked, "sweep.budget_gpu_hours=0.0001"]) == 1
    printed = capsys.readouterr().out
    assert "of 0.0001 process hours used: 1 stopped, 1 not started; the same command with a greater" in printed
    assert record(cheap / "trial-0")["status"] == "stopped" and not (cheap / "trial-1").exists()
    facts = json.loads((cheap / "summary.json").read_text())
    assert [trial["state"] for trial in facts["trials"]] == ["stopped"]
    assert facts["trials"][0]["seconds"] >= 0.4 and len(steps(cheap / "trial-0")) == 5
    assert sweep([*asked, "sweep.budget_gpu_hours=0.0001"]) == 1  # as often as it is asked
    assert len(steps(cheap / "trial-0")) == 5
    Path("wait").unlink()
    assert sweep([*asked, "sweep.budget_gpu_hours=9"]) == 0
    facts = json.loads((cheap / "summary.json").read_text())
    assert [trial["state"] for trial in facts["trials"]] == ["complete"] * 2
    assert steps(cheap / "trial-0") == list(range(1, 17))
    assert facts["trials"][0]["seconds"] > 0.4 and facts["budget"] == 9


def test_a_job_in_a_queue_takes_no_time(tmp_path):
    study = optuna.create_study()
    trial, now = study.ask(), time.time()
    launcher = SimpleNamespace(attached=False, job=SimpleNamespace(directory=tmp_path))
    write_json(tmp_path / "run.json", {})
    os.utime(tmp_path / "run.json", (now - 100,) * 2)  # of an earlier start
    running = RunningTrial(trial, launcher, [], {}, submitted=now)
    running.start_clock()
    assert running.seconds == 0 and "begun" not in trial.user_attrs
    os.utime(tmp_path / "run.json", (now + 1,) * 2)
    running.start_clock()
    assert running.started is not None and trial.user_attrs["begun"]["directory"] == str(tmp_path)
    watched = RunningTrial(trial, launcher, [], {})  # by another runner
    watched.start_clock()
    assert watched.started is not None


def test_the_time_of_a_start_that_was_killed_counts_up_to_its_last_write(tmp_path):
    config = SweepConfig(trials=1, space={"rate": ParameterConfig("trainer.learning_rate", low=1e-6, high=1e-3)})
    study, now = optuna.create_study(), time.time()
    trial = study.ask(distributions(config))
    trial.set_user_attr("begun", {"seconds": 5, "time": now - 100, "directory": str(tmp_path)})
    seconds = []
    for written in (None, 40, 40):  # a second start adds nothing
        if written:
            (tmp_path / "history.jsonl").touch()
            os.utime(tmp_path / "history.jsonl", (now - written,) * 2)
        SweepRunner(config, study, plan_sweep, [{}], -1)
        seconds.append(study.trials[0].user_attrs["seconds"])
    assert seconds == [0, 65, 65]


def budgeted(hours: float | None, devices: int, *ended: float, running: float | None = None):
    """What a sweep starts next whose trials took so many hours, of which one was interrupted."""
    space = {"rate": ParameterConfig("trainer.learning_rate", low=1e-6, high=1e-3, log=True)}
    config, study = SweepConfig(trials=9, space=space, budget_gpu_hours=hours), optuna.create_study()
    for state, spent in [(TrialState.COMPLETE, each) for each in ended] + [(None, running)] * (running is not None):
        trial = study.ask(distributions(config))
        trial.set_user_attr("seconds", 3600 * spent)
        if state:
            study.tell(trial, 1.0)
    found = SweepRunner(config, study, plan_sweep, [{}], -1, devices).next_trial()
    return found and found[0].number


def test_a_trial_starts_if_the_budget_has_room_for_the_median_of_the_others():
    assert budgeted(None, 8, 1000) == 1
    assert budgeted(0.5, 1) == 0  # nothing is known yet
    assert budgeted(2.5, 1, 1) == 1
    assert budgeted(2.5, 1, 1, 1) is None
    assert budgeted(2.5, 2, 1) is None  # GPUs of a trial
    assert budgeted(8, 1, 0.5, 1, 4) == 3  # 5.5 used, 1 expected
    assert budgeted(6, 1, 0.5, 1, 4) is None
    # An interrupted trial resumes as long as there is any.
    assert budgeted(2, 1, 1, running=0.9) == 1
    assert budgeted(2, 1, 1, running=1.1) is None


def earlier_sweep(directory: Path, **changed) -> Path:
    """The summary of a sweep of four complete trials and a pruned one; one lies outside of 1e-5 to 1e-3."""
    rates = [1e-5, 1e-4, 1e-3, 0.1, 1e-4]
    trials = [
        {"number": number, "state": "complete" if number < 4 else "pruned", "value": 2.0 + number,
         "parameters": {"trainer.learning_rate": rate, "trainer.warmup_ratio": 0.03},
         "directory": str(directory / f"trial-{number}")}
        for number, rate in enumerate(rates)
    ]  # fmt: skip
    facts = {"metric": "eval_loss", "direction": "minimize", "trials": trials} | changed
    directory.mkdir(exist_ok=True)
    write_json(directory / "summary.json", facts)
    return directory


@pytest.mark.slow
def test_an_earlier_sweep_teaches_the_sampler_and_counts_for_nothing(cheap, tmp_path, capsys):
    earlier = earlier_sweep(tmp_path / "earlier")
    asked = [*CHEAP, "sweep.trials=2", f"sweep.warm_start={earlier}", "sweep.budget_gpu_hours=9", "sweep.keep=best"]
    assert sweep(asked) == 0
    printed = capsys.readouterr().out
    assert f"warm start: 3 trials of {earlier} teach the sampler\n" in printed
    assert f"note: outside sweep.space, so left out: {earlier}/trial-3 (trainer.learning_rate=0.1, " in printed
    facts = json.loads((cheap / "summary.json").read_text())
    assert [trial["number"] for trial in facts["trials"]] == [0, 1]
    assert sorted(path.name for path in cheap.glob("trial-*")) == ["trial-0", "trial-1"]
    assert [trial["value"] for trial in facts["earlier"]] == [2.0, 3.0, 4.0]
    assert facts["best"] in (0, 1)
    # Given again, it takes no trial twice, and needs the earlier sweep no more.
    shutil.rmtree(earlier)
    assert sweep([*asked, "sweep.trials=3"]) == 0
    facts = json.loads((cheap / "summary.json").read_text())
    assert (len(facts["trials"]), len(facts["earlier"])) == (3, 3)
    assert sweep(asked[:-3]) == 2
    assert f"holds a sweep with sweep.warm_start={earlier}, not None" in capsys.readouterr().err


@pytest.mark.slow
def test_earlier_trials_are_taken_once_and_prune_none_of_the_new_ones(tmp_path):
    config = plan_sweep(["debug=cpu_tiny", "cluster=cpu1", "sweep=lr", "sweep.trials=9",
                         f"sweep.warm_start={earlier_sweep(tmp_path / 'earlier')}"]).config  # fmt: skip
    study = optuna.create_study(pruner=PRUNERS["asha"](PrunerConfig("asha")))
    trials, _ = read_earlier(config)
    study.add_trials(trials[:2])  # killed in the middle
    add_earlier(study, config)
    add_earlier(study, config)
    assert [trial.value for trial in study.trials] == [2.0, 3.0, 4.0]
    assert own_trials(study) == []
    runner = SweepRunner(config, study, plan_sweep, [{}], -1)
    trial, _ = runner.next_trial()
    assert (trial.number, runner.describe(trial)[:8]) == (3, "trial 0 ")
    fresh, _ = SweepRunner(config, optuna.create_study(), plan_sweep, [{}], -1).next_trial()
    assert fresh.params != trial.params  # it does not draw what the earlier sweep drew
    trial.report(99.0, 4)
    assert not trial.should_prune()  # of its own sweep it is the best so far


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric": "loss"}, "sweep.warm_start=e: that sweep has sweep.metric=loss, not eval_loss: take another"),
        ({"direction": "maximize"}, "sweep.warm_start=e: that sweep has sweep.direction=maximize, not minimize: "
         "take another"),
        ({"trials": 3}, "e/summary.json: trials: not as a sweep writes it: run that sweep's command again"),
        ({"trials": []}, "sweep.warm_start=e: none of its 0 complete trials lies in sweep.space"),
    ],
)  # fmt: skip
def test_an_earlier_sweep_of_another_kind_is_refused(cheap, capsys, changed, message):
    earlier_sweep(Path("e"), **changed)
    assert sweep([*CHEAP, "sweep.warm_start=e"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert os.listdir() == ["e"]


def test_each_pruner_has_its_settings():
    for kind in ("none", "median", "asha", "hyperband"):
        assert PRUNERS[kind](PrunerConfig(kind))
    assert set(PRUNERS) == {"none", "median", "asha", "hyperband"}
    # ASHA with two trials at step 3: of 2 the better goes on, at step 3 * 2 again.
    study = optuna.create_study(pruner=PRUNERS["asha"](PrunerConfig("asha", first_step=3, reduction_factor=2)))
    good, bad = study.ask(), study.ask()
    pruned = []
    for trial, value in ((good, 1.0), (bad, 2.0)):
        for step in range(1, 7):
            trial.report(value, step)
            pruned += [(trial.number, step)] * trial.should_prune()
    assert pruned[0] == (1, 3) and 0 not in {number for number, _ in pruned}


def filled_study(directory: Path, direction: str) -> tuple[optuna.Study, SweepConfig]:
    """A sweep with trials in every state, two of them of an earlier sweep, and the histories of its runs."""
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=1))
    space = {
        "rate": ParameterConfig("trainer.learning_rate", low=1e-6, high=1e-2, log=True),
        "rank": ParameterConfig("adapter.rank", type="categorical", choices=[8, 16, 64]),
        "mark": ParameterConfig("tracking.name", type="categorical", choices=[MARKUP, "b"]),
    }
    config = SweepConfig(space=space, trials=20, metric="score", direction=direction, budget_gpu_hours=1.0)
    for number in range(18):
        trial = study.ask(distributions(config))
        for step in range(1, 5):
            trial.report(2 + number / 18 + 1 / step, step)
        state = {6: TrialState.PRUNED, 7: TrialState.FAIL, 17: None}.get(number, TrialState.COMPLETE)
        trial.set_user_attr("seconds", 90.0)
        if number < 2:
            trial.set_user_attr(EARLIER, f"earlier/trial-{number}")
        if state:
            study.tell(trial, 2 + number / 18 if state == TrialState.COMPLETE else None, state=state)
        if number >= 2:
            (run := directory / f"trial-{number - 2}").mkdir(parents=True)
            rows = [{"step": step, "loss": 3 / step, "score": 2 + number / 18 + 1 / step} for step in range(1, 5)]
            (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run / "output.log").touch()
    study.set_user_attr(EARLIER, 2)
    return study, config


MARKUP = "<b>a</b>"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_page_of_a_sweep_shows_each_trial_and_the_best_runs(tmp_path, browser, direction):
    report_sweep(tmp_path, *filled_study(tmp_path, direction), ClusterConfig(gpus_per_node=4))
    best = 0 if direction == "minimize" else 14
    page, said, asked = browser.new_page(viewport={"width": 400, "height": 800}), [], []
    for event in ("console", "pageerror"):
        page.on(event, lambda message: said.append(str(message)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "summary.html").as_uri())
    lines = page.locator("#parallel path")
    states = [text.split()[0] for text in lines.evaluate_all("all => all.map(each => each.getAttribute('class'))")]
    assert {state: states.count(state) for state in set(states)} == {
        "best": 1, "complete": 12, "pruned": 1, "fail": 1, "stopped": 1, "earlier": 2,
    }  # fmt: skip
    assert states[-1] == "best"  # on top
    assert page.locator("#states .entry").all_inner_texts()[:3] == ["complete", "best", "pruned"]
    axes = page.locator("#parallel text.name").evaluate_all("all => all.map(each => each.textContent)")
    assert axes == ["learning_rate", "rank", "name", "score"]
    assert MARKUP in page.locator("#parallel text").evaluate_all("all => all.map(each => each.textContent)")
    # A line ends at the height of its result, the largest on top.
    end = "each => [Number(each.dataset.number), each.getPointAtLength(each.getTotalLength()).y]"
    ends = page.locator("#parallel path[data-number]").evaluate_all(f"all => all.map({end})")
    results = {number: y for number, y in ends if number not in (4, 5, 15)}
    assert sorted(results, key=results.get) == sorted(results, reverse=True)
    assert page.locator("tr.best th").inner_text() == f"{best}*"
    assert page.locator("tbody tr").count() == 16
    page.hover(f"tr[data-number='{best}'] th")
    assert "lit" in page.locator(f"path[data-number='{best}']").get_attribute("class")
    assert page.locator("#curves svg").count() == 2
    order = (0, 1, 2, 3, 6) if direction == "minimize" else (14, 13, 12, 11, 10)
    names = page.locator("#curves figure").first.locator(".entry").all_inner_texts()
    assert names == [f"trial {number}" for number in order]
    assert page.locator("#importance .name").count() == 3
    text = page.locator("header").inner_text()
    assert f"best: trial {best}, score" in text
    assert "1.6 of 1 process hours used: 1 stopped, 4 not started" in text
    hrefs = page.locator("#table a").evaluate_all("all => all.map(each => each.getAttribute('href'))")
    assert len(hrefs) == 16 and all((tmp_path / href).exists() for href in hrefs)
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(wide), "wider than a telephone"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.close()
    assert said == [] and asked == [(tmp_path / "summary.html").as_uri()]


def test_a_restarted_sweep_draws_the_values_of_an_uninterrupted_one():
    config = SweepConfig(
        trials=4, space={"rate": ParameterConfig("trainer.learning_rate", low=1e-6, high=1e-3, log=True)}
    )

    def values(restarted: bool) -> list[float]:
        study, runner = optuna.create_study(), None
        for number in range(4):
            if restarted or runner is None:
                runner = SweepRunner(config, study, plan_sweep, [{}], -1)
            trial, _ = runner.next_trial()
            assert trial.number == number
            study.tell(trial, number)
        return [trial.params["rate"] for trial in study.trials]

    assert values(restarted=True) == values(restarted=False)
    assert len(set(values(restarted=True))) == 4
