"""Launchers: one from outside the package starts a job and a sweep, and a faulty one is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import TIMEOUT_S

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError
from csc_train.launching.job import launch
from csc_train.launching.launchers.base import LAUNCHERS, JobSpec, Launcher, register_launcher
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.sweep import sweep

FOLDER_QUEUE = '''
"""A launcher that queues jobs as files of a folder, and finishes a job when it is polled."""

import json
import sys
from pathlib import Path

from csc_train.launching.launchers.base import Launcher, register_launcher


@register_launcher("folder_queue")
class FolderQueueLauncher(Launcher):
    def check(self):
        if "queue" not in self.job.cluster.launcher_options:
            raise ValueError("no queue")

    def describe(self):
        return f"queue in {self.queue}: {self.job.script} {' '.join(self.job.arguments)}"

    @property
    def queue(self):
        return Path(self.job.cluster.launcher_options["queue"])

    def start(self):
        self.queue.mkdir(exist_ok=True)
        self.job_id = str(len(list(self.queue.iterdir())))
        (self.queue / self.job_id).write_text(self.describe())

    def poll(self):
        loss = {"log": [{"eval_loss": 1 + int(self.job_id)}]}
        (self.job.directory / "metrics.json").write_text(json.dumps(loss))
        (self.job.directory / "run.json").write_text(json.dumps({"recipe": "sft", "finished": "now"}))
        return 0

    def stop(self, signum=0):
        (self.queue / self.job_id).unlink()
'''
QUEUE = ["cluster=cpu1", "cluster.scheduler=folder_queue", "plugins=[folder_queue]",
         "+cluster.launcher_options.queue=queue"]  # fmt: skip


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory with a launcher module beside it, as a user writes one."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "folder_queue.py").write_text(FOLDER_QUEUE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "folder_queue", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path
    LAUNCHERS.pop("folder_queue", None)


@pytest.mark.slow
def test_a_launcher_from_outside_starts_a_job(outside, capsys):
    asked = ["experiment=demo", *QUEUE, "run.directory=runs/x"]
    assert launch([*asked, "dry_run=true"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("queue in queue: ") and command.endswith("recipes/sft.py run=runs/x resume=true")
    assert list(Path().iterdir()) == []
    assert launch(asked) == 0
    assert capsys.readouterr().out == "run directory: runs/x\nSubmitted batch job 0\n"
    assert Path("queue/0").read_text() == command
    recorded = yaml.safe_load(Path("runs/x/launch.yaml").read_text())["cluster"]
    assert recorded["scheduler"] == "folder_queue" and recorded["launcher_options"] == {"queue": "queue"}


@pytest.mark.slow
def test_a_launcher_from_outside_runs_a_sweep(outside, capsys):
    asked = ["debug=cpu_tiny", "sweep.poll=0.1", *QUEUE, "sweep=lr", "sweep.trials=2", "sweep.parallel=2"]
    assert sweep(asked) == 0, capsys.readouterr().err
    facts = json.loads(Path("runs/sweeps/lr/summary.json").read_text())
    assert [(trial["state"], trial["value"]) for trial in facts["trials"]] == [("complete", 1), ("complete", 2)]


@pytest.mark.slow
def test_unknown_launchers_are_refused_with_the_nearest_name(outside, capsys):
    assert launch(["experiment=demo", *QUEUE, "cluster.scheduler=folder_que"]) == 2
    assert capsys.readouterr().err == (
        "error: cluster.scheduler=folder_que: choose one of kubernetes, local, skypilot, slurm, folder_queue. "
        "Did you mean 'folder_queue'?\n"
    )
    with pytest.raises(InputError, match=r"^cluster.scheduler=slrum: choose one of .* Did you mean 'slurm'\?$"):
        launcher_class(ClusterConfig(scheduler="slrum"))
    assert launch(["experiment=demo", "plugins=[nowhere]"]) == 2
    expected = "error: plugins=nowhere: cannot be imported: ModuleNotFoundError: No module named 'nowhere'\n"
    assert capsys.readouterr().err == expected


def test_faulty_launchers_are_refused():
    class Misspelt(Launcher):
        def check(self): ...
        def describe(self): ...
        def start(self): ...
        def pol(self): ...
        def stop(self, signum=0): ...

    with pytest.raises(InputError, match=r"Misspelt\): method 'poll' is missing: define it. Did you mean 'pol'\?$"):
        register_launcher("mine")(Misspelt)
    with pytest.raises(
        InputError, match=r"not a launcher: derive it from csc_train.launching.launchers.base.Launcher$"
    ):
        register_launcher("mine")(int)
    with pytest.raises(InputError, match=r"the name is taken by SlurmLauncher: choose another$"):
        register_launcher("slurm")(Misspelt)
    assert "mine" not in LAUNCHERS


@pytest.mark.parametrize(
    ("scheduler", "command"),
    [
        ("local", f"{sys.executable} recipes/evaluate.py run=runs/x resume=true"),
        (
            "slurm",
            "-m csc_train.launching.supervise runs/x \\\n    python recipes/evaluate.py run=runs/x resume=true' &",
        ),
    ],
)
def test_one_process_sees_all_gpus_of_its_node(scheduler, command):
    cluster = ClusterConfig(gpus_per_node=8, device="cuda", process_launcher="none", scheduler=scheduler)
    assert (cluster.world_size, cluster.gpus) == (1, 8)
    job = JobSpec(cluster, Path("runs/x"), "recipes/evaluate.py", ("run=runs/x", "resume=true"))
    shown = launcher_class(cluster)(job).describe()
    assert command in shown and "distributed" not in shown
    assert scheduler == "local" or "#SBATCH --gpus-per-node=8\n" in shown
    with pytest.raises(
        InputError, match=r"^cluster.process_launcher=none: one process has one node: set cluster.nodes"
    ):
        ClusterConfig(nodes=2, process_launcher="none")


SAVES = """
import signal, subprocess, sys
child = subprocess.Popen(["sleep", "3600"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
print("waits", flush=True)
child.wait()
"""


@pytest.mark.slow
def test_a_signal_reaches_the_one_process_and_not_its_helpers(tmp_path):
    command = [sys.executable, "-m", "csc_train.launching.supervise", str(tmp_path), sys.executable, "-c", SAVES]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    assert process.communicate(timeout=TIMEOUT_S)[0] == "saved\n"
    assert process.returncode == 128 + signal.SIGTERM
