"""Launching: what is printed, saved and submitted, and the end of a job that is stopped, broken or killed."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, sampled
from processes import TIMEOUT_S, Script

from csc_train.config.compose import compose, to_container
from csc_train.errors import InputError
from csc_train.launching import job as launch_job
from csc_train.launching import supervise
from csc_train.launching.job import LAUNCH_FILE, launch, plan_job
from csc_train.launching.launchers.slurm import SlurmLauncher
from csc_train.launching.sweep import sweep
from csc_train.runs.directory import EXIT_STOPPED, Run

SLURM = ROOT / "tests" / "data" / "slurm"
LAUNCH = [sys.executable, str(ROOT / "launch" / "launch.py")]
PAGE = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def is_run_elsewhere(command: str) -> bool:
    """Whether test_docs.py composes it or runs it dry: what needs no run."""
    return command.startswith(("python", "torchrun", "accelerate")) and not re.search(" (run|from)=", command)


SMALL = ["recipe=sft", "debug=cpu_tiny", "trainer.max_steps=12", "trainer.save_steps=4"]
TWO_NODES = [
    *SMALL, "cluster=slurm_4x8", "cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.device=cpu",
    "cluster.slurm.cpus=1", "cluster.slurm.nodes_min=1", "run.directory=runs/two_nodes",
]  # fmt: skip
CLUSTER = [
    "recipe=sft", "experiment=qwen2_5_7b_lora", "trainer.packs_per_step=32", "cluster=slurm_4x8",
    "cluster.slurm.partition=gpu", "cluster.slurm.account=support", "cluster.slurm.options=['--qos=high']",
    "cluster.slurm.prologue=['module load cuda','export NCCL_SOCKET_IFNAME=ib0']",
    "cluster.slurm.srun_options=['--container-image=csc.sqsh']", "run.directory=runs/cluster",
]  # fmt: skip
GOLDEN = {"cluster.sbatch": CLUSTER, "two_nodes.sbatch": TWO_NODES,
          "accelerate.sbatch": [
              *CLUSTER, "cluster.process_launcher=accelerate", "cluster.slurm.requeue=false"
          ]}  # fmt: skip
STEP = ": loss "
"""In the line that the first step of a training prints, and few others."""


def trained(output: str) -> int:
    """How many steps a training says that it did."""
    (steps,) = re.findall(r"^(?:.*: ?)?trained (\d+) steps in ", output, re.MULTILINE)
    return int(steps)


class Started:
    """A separate process group in `directory`, whose output is read as it comes; killed after `limit` seconds."""

    def __init__(self, command: list[str], directory: Path, limit: float = TIMEOUT_S, **variables: str):
        path = os.pathsep.join([str(SLURM), str(Path(sys.executable).parent), os.environ["PATH"]])
        variables = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PATH": path, **variables}
        self.directory, self.output = directory, ""
        self.process = subprocess.Popen(
            command, cwd=directory, env=os.environ | variables, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.late = False
        self._limit = threading.Timer(limit, self._kill)
        self._limit.start()

    def until(self, text: str, times: int = 1) -> "Started":
        """Read on until a text has come `times` times."""
        while self.output.count(text) < times:
            line = self.process.stdout.readline()
            assert line, f"ended before {text!r}:\n{self.output}"
            self.output += line
        return self

    def end(self) -> int:
        """Read to the end; the exit status."""
        self.output += self.process.stdout.read()
        self._limit.cancel()
        assert not self.late, self.output
        return self.process.wait()

    def _kill(self):
        self.late = True
        for process in left_in(self.directory):
            process.kill()


class Forked(Started):
    """As `Started`; Python is forked there and below, with its libraries, which takes seconds less a process."""

    def __init__(self, command: list[str], directory: Path, **variables: str):
        self.directory = directory
        environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
        self.process = Script(*command[1:], cwd=directory, env=environment, forks=True, merge=True)

    @property
    def output(self) -> str:
        return self.process.stdout

    def until(self, text: str, times: int = 1) -> "Forked":
        while self.output.count(text) < times:
            ended = self.process.poll() is not None
            assert not ended or self.output.count(text) >= times, f"ended before {text!r}:\n{self.output}"
            time.sleep(0.02)
        return self

    def end(self) -> int:
        return self.process.wait().returncode


def left_in(directory: Path) -> list[psutil.Process]:
    """The processes that run in a directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def losses(run: Path) -> list[float]:
    log = json.loads((run / "metrics.json").read_text())["log"]
    return [entry["loss"] for entry in log if "grad_norm" in entry]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory to work in, with the recipes in it as in a checkout."""
    directory = tmp_path_factory.mktemp("place").resolve()
    (directory / "recipes").symlink_to(ROOT / "recipes")
    return directory


@pytest.fixture(scope="module")
def reference(place):
    """The losses of a launch on two ranks of one node that nothing befell."""
    started = Forked([*LAUNCH, *SMALL, "cluster=cpu2", "run.directory=runs/whole"], place)
    assert started.end() == 0, started.output
    assert started.output.startswith("run directory: runs/whole\n")
    assert left_in(place) == []
    assert len(losses(place / "runs/whole")) == 12
    return losses(place / "runs/whole")


# What is printed, saved and submitted


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A directory to work in where runs/first was launched, and lost before its ranks began."""
    directory = tmp_path_factory.mktemp("frozen")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        two_ranks = ["cluster=cpu2", "cluster.process_launcher=accelerate", "trainer.micro_batch_size=1"]
        plan_job(["experiment=demo", *two_ranks, "run.directory=runs/first"]).write()
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("written", [0, 1])
def test_a_launch_that_is_killed_while_it_writes_is_repeated_by_the_same_command(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=demo", "cluster=cpu1", "run.directory=run"]
    write, left = launch_job.write_text, written

    def killed(path, text):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(launch_job, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            plan_job(arguments).write()
    plan_job(arguments).write()
    assert plan_job(["run=run", "resume=true"]).launch.cluster.world_size == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_the_job_script_is_the_golden_one_and_shell(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert launch([*GOLDEN[name], "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "\nrun directory: runs/" in printed
    shown, _, script = printed.partition(", which is:\n\n")
    assert "max_length:" in shown and shown.endswith("job.sbatch")
    assert script.rstrip() == (SLURM / name).read_text().rstrip()
    assert subprocess.run(["bash", "-n", SLURM / name], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cluster", "launcher", "command"),
    sampled([
        ("cpu2", "torchrun", "CUDA_VISIBLE_DEVICES='' {} -m torch.distributed.run --nproc_per_node=2 --standalone "
         "--local_addr=localhost"),
        ("node8", "torchrun", "{} -m torch.distributed.run --nproc_per_node=8 --standalone --local_addr=localhost"),
        ("gpu1", "accelerate", "{} -m accelerate.commands.launch --mixed_precision=no --dynamo_backend=no "
         "--num_processes=1 --num_machines=1 --main_process_port=0"),
        ("cpu2", "accelerate", "CUDA_VISIBLE_DEVICES='' {} -m accelerate.commands.launch --multi_gpu "
         "--mixed_precision=no --dynamo_backend=no --num_processes=2 --num_machines=1 --main_process_port=0"),
    ], 4),
)  # fmt: skip
def test_a_dry_run_prints_all_and_writes_nothing(tmp_path, monkeypatch, capsys, cluster, launcher, command):
    monkeypatch.chdir(tmp_path)
    asked = [f"cluster={cluster}", f"cluster.process_launcher={launcher}", "run.directory=runs/x", "dry_run=true"]
    assert launch(["experiment=demo", "trainer.packs_per_step=8", "trainer.micro_batch_size=1", *asked]) == 0
    printed = capsys.readouterr().out
    expected = f"{command.format(sys.executable)} {ROOT}/recipes/sft.py run=runs/x resume=true"
    assert printed.splitlines()[-1] == expected
    assert "learning_rate: 0.003" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clustr=node8"], "unknown key 'clustr'. Did you mean 'cluster'?"),
        (["dry_rn=true"], "unknown key 'dry_rn'. Did you mean 'dry_run'?"),
        (["--multirun"], "--multirun: flags are not supported: use key=value (see docs/launching.md)"),
        (["cluster=nod8"], "cluster=nod8: not in conf/cluster. Did you mean 'node8'? Known: cpu1, cpu2, gpu1, "
         "kubernetes_2x8, node8, skypilot_2x8, slurm_4x8, slurm_apptainer, slurm_pyxis"),
        (["cluster.slurm.partion=x"], "unknown key 'cluster.slurm.partion' for recipe launch. Did you mean "
         "'cluster.slurm.partition'?"),
        (["trainer.lerning_rate=1"], "unknown key 'trainer.lerning_rate' for recipe sft. Did you mean "
         "'trainer.learning_rate'?"),
        (["recipe=sfft"], "recipe=sfft: choose one of sft, evaluate, compare. Did you mean 'sft'?"),
        (["recipe=compare", "a=runs/a", "b=runs/b", "cluster=node8"], "cluster: 8 processes for recipe=compare: give "
         "cluster=cpu1"),
        (["recipe=evaluate"], "checkpoint is required: give checkpoint=..."),
        (["cluster=node8", "trainer.packs_per_step=12"], "trainer.packs_per_step=12 is not a multiple of "
         "trainer.micro_batch_size=1 x 8 processes"),
        (["cluster=node8", "cluster.nodes=2", "trainer.packs_per_step=16"], "cluster.nodes=2: several nodes "
         "need cluster.scheduler=slurm|kubernetes|skypilot"),
        (["cluster=slurm_4x8", "cluster.nodes=3", "trainer.packs_per_step=32"], "cluster.nodes=3: "
         "trainer.packs_per_step=32 is not a multiple of trainer.micro_batch_size=1 x 24 processes: give "
         "cluster.nodes=2 or 4"),
        (["cluster=slurm_4x8", "cluster.slurm.nodes_min=3", "trainer.packs_per_step=32"], "cluster.slurm.nodes_min=3: "
         "trainer.packs_per_step=32 is not a multiple of trainer.micro_batch_size=1 x 24 processes: give "
         "cluster.slurm.nodes_min=2 or 4"),
        (["cluster=slurm_4x8", "cluster.slurm.nodes_min=5"], "cluster.slurm.nodes_min=5: must be between 1 and 4"),
        (["cluster=slurm_4x8", "cluster.slurm.nodes_min=2", "cluster.process_launcher=accelerate"],
         "cluster.process_launcher=accelerate: nodes_min needs torchrun"),
        (["cluster.slurm.time=soon"], "cluster.slurm.time=soon: write hours as 24:00:00, days as 2-00:00:00"),
        (["cluster.slurm.options=['qos=high']"], "cluster.slurm.options: qos=high is no option; options "
         "start with -"),
        (["run.if_exists=reuse"], "run.if_exists=reuse: a launch is a new run; resume one by run=DIR resume=true"),
        (["cluster=slurm_4x8", "trainer.packs_per_step=32", "run.directory='runs/my;run'"], "runs/my;run: a job "
         "script cannot hold ';': choose a path without it"),
        (["run=runs/first", "cluster=cpu1"], "run=runs/first: add resume=true to resume the run, or start a new run "
         "by from=DIR"),
        (["resume=true"], "resume=true: name the run to resume, by run=DIR"),
        (["run=runs/first", "resume=true", "trainer.epochs=2"], "trainer.epochs=2: a run resumes with its own "
         "values; start a new run with others by from=DIR"),
        (["run=runs/none", "resume=true"], "runs/none holds no launch.yaml: name the machines by cluster=..."),
        (["run=runs/none", "resume=true", "cluster=cpu1"], "runs/none holds no resolved.yaml: give the directory of a "
         "run"),
        (["from=runs/first", "model=qwen3_8b"], "model=qwen3_8b: runs/first has a complete configuration; change "
         "single values only"),
        (["from=runs/first", "trainer.epoch=2"], "unknown key 'trainer.epoch' for recipe sft. Did you mean "
         "'trainer.epochs'?"),
        (["run.directory=runs/first"], "runs/first holds a run (resolved.yaml): choose another run.directory, or "
         "resume by run=runs/first resume=true"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_written(frozen, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(frozen)
    before = sorted(frozen.rglob("*"))
    assert launch(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {message}\n"
    assert shown.out == ""
    assert sorted(frozen.rglob("*")) == before


@pytest.mark.slow
def test_the_ranks_read_the_saved_configuration(tmp_path, monkeypatch):
    """For every shipped experiment, and once more for a new run that is made from it."""
    monkeypatch.chdir(tmp_path)
    for file in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        job = plan_job([f"experiment={file.stem}", "cluster=cpu1", f"run.directory=runs/{file.stem}"])
        job.write()
        assert compose("sft", [f"run={job.directory}", "resume=true"]) == job.config
        assert (job.config.run.directory, job.config.run.if_exists) == (str(job.directory), "resume")
        again = compose("sft", [f"from={job.directory}", "trainer.epochs=7", "data.train.path=other.jsonl"])
        expected = to_container(job.config)
        expected["trainer"]["epochs"], expected["data"]["train"]["path"] = 7.0, "other.jsonl"
        expected["run"] = {"directory": None, "if_exists": "error", "timeout_s": 1800}
        assert to_container(again) == expected


@pytest.mark.slow
def test_a_run_resumes_as_it_was_launched_or_on_another_cluster(frozen, monkeypatch):
    monkeypatch.chdir(frozen)
    same = plan_job(["run=runs/first", "resume=true"])
    assert (same.launch.cluster.name, same.launch.cluster.process_launcher, same.new) == ("cpu2", "accelerate", False)
    torchrun = plan_job(["run=runs/first", "resume=true", "cluster.process_launcher=torchrun"])
    assert torchrun.launch.cluster.process_launcher == "torchrun"
    assert plan_job(["run=runs/first", "resume=true", "cluster=cpu1"]).launch.cluster.world_size == 1
    with pytest.raises(InputError, match="not a multiple"):
        plan_job(["run=runs/first", "resume=true", "cluster=node8"])
    changed = plan_job(["run=runs/first", "resume=true", "run.timeout_s=60", "trainer.on_nonfinite=skip"])
    assert (
        changed.launcher().describe().endswith(" run=runs/first resume=true run.timeout_s=60 trainer.on_nonfinite=skip")
    )
    new = plan_job(["from=runs/first"])
    assert (new.new, new.launch) == (True, same.launch)
    assert plan_job(["from=runs/first", "cluster=cpu1"]).launch.cluster.world_size == 1
    assert re.fullmatch(r"runs/sft-\d{8}-\d{6}", str(new.directory))


@pytest.mark.slow
def test_a_run_resumes_with_changed_code_but_not_with_changed_data(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    job = plan_job(["experiment=demo", "cluster=cpu1", "run.directory=runs/first"])
    job.write()
    run = Run("sft", to_container(job.config))
    assert run.start({"train": "a"}) == "new"
    assert run.start({"train": "a"}) == "unfinished"
    crashed = "note: runs/first crashed: the process was killed before it recorded its end"
    assert said == [crashed]
    (tmp_path / "runs/first/run.json").write_text(json.dumps(record(run.directory) | {"code": {"code": "other"}}))
    assert run.start({"train": "a"}) == "unfinished"
    changed = "note: code or package versions differ from those that the run started with: code; torch None, not "
    assert said[1].startswith(changed) and said[2:] == [crashed]
    with pytest.raises(InputError, match="the run started with other data"):
        run.start({"train": "b"})
    run.finish()
    assert run.start({"train": "a"}) == "finished"


@pytest.mark.slow
def test_sbatch_that_is_missing_or_refuses_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert launch(TWO_NODES) == 2
    missing = (
        "cluster.scheduler=slurm: there is no sbatch on this machine: launch where there is one; dry_run=true prints"
    )
    assert missing in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PATH", f"{SLURM}{os.pathsep}{os.defpath}")
    # Its model is not on this machine, which preflight would not let pass.
    assert launch(CLUSTER) == 2
    assert "error: preflight: model files" in capsys.readouterr().err
    assert not Path("runs/cluster").exists()
    assert launch([*CLUSTER, "preflight.force=true"]) == 2
    assert "sbatch runs/cluster/job.sbatch: sbatch: error: more nodes than there are" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # the same command may be given again
    assert launch(TWO_NODES) == 0
    files = {path: path.read_text() for path in Path("runs/two_nodes").iterdir()}
    assert launch(["run=runs/two_nodes", "resume=true", "cluster.nodes=1"]) == 2
    assert {path: path.read_text() for path in Path("runs/two_nodes").iterdir()} == files
    assert launch(["run=runs/two_nodes", "resume=true"]) == 0
    assert "Submitted batch job 7" in capsys.readouterr().out


@pytest.mark.parametrize("command", sampled([command for command in COMMANDS if not is_run_elsewhere(command)], 4))
def test_a_command_of_the_page_runs_dry(frozen, monkeypatch, capsys, command):
    monkeypatch.chdir(frozen)
    words = shlex.split(command)
    if words[0] == "python":
        start = {"launch/launch.py": launch, "launch/sweep.py": sweep}[words[1]]
        assert start([*words[2:], "dry_run=true"]) == 0, capsys.readouterr().err
    elif words[0] == "wandb":  # see test_sweep.py
        assert words[1] == "agent" or (ROOT / words[2]).is_file()
    elif words[0] not in ("pip", "transformers", "vllm"):  # serving: see test_serving.py
        assert words[0] in ("torchrun", "accelerate")
        compose("sft", words[words.index("recipes/sft.py") + 1 :])


def test_the_pages_name_every_cluster():
    pages = PAGE + (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    shipped = {path.stem for path in (ROOT / "conf" / "cluster").glob("*.yaml")}
    assert {name for name in shipped if f"`{name}`" not in pages} == set()


# The end of a job


def submit(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PATH", f"{SLURM}{os.pathsep}{os.environ['PATH']}")
        assert launch(TWO_NODES) == 0


def free_job_number() -> str:
    """The number of a job whose nodes meet at a free port."""
    for number in range(1, 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 29500 + number)):
                return str(number)
    raise AssertionError("no free port")


def run_script(place: Path, nodes: int = 2, **options) -> Started:
    """Run the submitted script on nodes that are all this machine."""
    variables = {"SLURM_JOB_ID": free_job_number(), "SLURM_JOB_NODELIST": "node[1-2]"}
    variables |= {"SLURM_JOB_NUM_NODES": str(nodes)}
    return Started(["bash", f"runs/two_nodes/{SlurmLauncher.file}"], place, **variables, **options)


@pytest.mark.distributed
def test_two_nodes_stopped_requeued_and_broken_have_the_same_result(place, reference):
    """As one node with two ranks, through a time limit and the death of a node, which is not replaced."""
    submit(place)
    run = place / "runs/two_nodes"
    assert (run / SlurmLauncher.file).read_text() == (SLURM / "two_nodes.sbatch").read_text()

    # Near the time limit
    warned = run_script(place).until(STEP)
    warned.process.send_signal(signal.SIGUSR1)
    assert warned.end() == EXIT_STOPPED, warned.output
    assert len((place / "requeued").read_text().split()) == 1
    (state,) = [path.name for path in (run / "checkpoints").glob("checkpoint-*")]
    done = int(state.split("-")[1])
    assert 1 <= done < 12
    assert record(run)["stopped"] and not record(run)["finished"]
    assert not (run / "model").exists()
    assert left_in(place) == []

    # A node dies
    broken = run_script(place).until(STEP)
    (node,) = [
        process for process in left_in(place)
        if "csc_train.launching.supervise" in process.cmdline() and process.environ()["SLURM_NODEID"] == "1"
    ]  # fmt: skip
    for process in [node, *node.children(recursive=True)]:
        process.kill()
    assert broken.end() not in (0, EXIT_STOPPED), broken.output
    assert "Connection" in broken.output.partition("Root Cause (first observed failure)")[2]  # lost by the other node
    assert len((place / "requeued").read_text().split()) == 1
    assert left_in(place) == []

    # Queued again, on the other node alone
    again = run_script(place, nodes=1)
    assert again.end() == 0, again.output
    assert again.output.startswith("working on 1 of 1 nodes\n")
    assert json.loads((run / "checkpoints/checkpoint-12/csc_checkpoint.json").read_text())["processes"] == 1
    assert trained(again.output) <= 12 - done
    assert record(run)["finished"]
    assert losses(run) == pytest.approx(reference, abs=1e-6)
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.distributed
def test_sigterm_saves_and_the_resumed_run_has_the_same_result(place, reference):
    """With accelerate as the launcher of the first part."""
    run = place / "runs/stopped"
    accelerate = ["cluster=cpu2", "cluster.process_launcher=accelerate", "run.directory=runs/stopped"]
    started = Forked([*LAUNCH, *SMALL, *accelerate], place).until(STEP)
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == EXIT_STOPPED, started.output
    assert started.output.endswith("stopped; to resume: run=runs/stopped resume=true\n")
    assert left_in(place) == []
    assert not record(run)["finished"] and not (run / "model").exists()
    assert yaml.safe_load((run / LAUNCH_FILE).read_text())["cluster"]["process_launcher"] == "accelerate"
    (state,) = [path.name for path in (run / "checkpoints").glob("checkpoint-*")]

    again = Forked([*LAUNCH, "run=runs/stopped", "resume=true", "cluster=cpu2"], place)
    assert again.end() == 0, again.output
    assert trained(again.output) == 12 - int(state.split("-")[1])
    assert losses(run) == pytest.approx(reference, abs=1e-6)
    assert record(run)["finished"]


@pytest.mark.distributed
def test_ctrl_c_leaves_nothing_running(place, reference):
    started = Started([*LAUNCH, *SMALL, "cluster=cpu2", "run.directory=runs/interrupted"], place).until(STEP)
    assert len(left_in(place)) >= 4  # launcher, torchrun, two ranks
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 128 + signal.SIGINT
    assert left_in(place) == []
    run = place / "runs/interrupted"
    assert not (run / "model").exists() and not record(run)["finished"]


def idle(directory: Path, *behaviour: str) -> Started:
    """Two ranks that do nothing, or only harm, under a launcher."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = str(ROOT / "tests" / "workers" / "idle_rank.py")
    return Started([sys.executable, "-m", supervise.__name__, ".", *torchrun, worker, *behaviour], directory.resolve())


@pytest.mark.distributed
def test_a_rank_that_fails_ends_the_job_with_its_traceback(tmp_path):
    started = idle(tmp_path, "fails")
    assert started.end() == 1
    traceback, _, summary = started.output.partition("Root Cause (first observed failure)")
    assert "ZeroDivisionError: planted in rank 1" in traceback
    assert re.search(r"rank +: 1 ", summary) and "ZeroDivisionError: planted in rank 1" in summary
    assert left_in(tmp_path.resolve()) == []


@pytest.mark.distributed
def test_ranks_that_ignore_ctrl_c_are_killed(tmp_path):
    started = idle(tmp_path, "stubborn").until(" waits\n", 2)
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert len(left_in(tmp_path.resolve())) == 4
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 128 + signal.SIGINT
    assert left_in(tmp_path.resolve()) == []


@pytest.mark.distributed
def test_a_killed_launcher_ends_its_ranks(tmp_path):
    started = idle(tmp_path).until(" waits\n", 2)
    ranks = left_in(tmp_path.resolve())
    started.process.kill()
    started.end()
    assert psutil.wait_procs(ranks, timeout=TIMEOUT_S)[1] == []
