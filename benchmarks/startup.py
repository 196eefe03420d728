"""Measure the time from torchrun to the first optimizer step of the demo's training, on two CPU processes.

python benchmarks/startup.py                   # five minutes on two idle cores
python benchmarks/startup.py --old CHECKOUT    # beside an older build, such as 5fab51a, which needs datasketch
python benchmarks/startup.py --quick           # one round; its results mean little

Prints each result and writes benchmarks/results/startup.json.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measure import ROOT, Report, ratios, spread

from csc_train.jsonl import iter_jsonl

COMMAND = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "recipes/sft.py",
)  # fmt: skip
LIMIT_S = 900
"""Seconds after which a job that trains no step is given up."""


def main() -> None:
    """Measure new and resumed jobs of both builds in turns, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="an older build")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    options = parser.parse_args()
    builds = {"new": ROOT} | ({"old": options.old.absolute()} if options.old else {})
    taken = {(name, kind): [] for name in builds for kind in ("new run", "resumed")}
    with tempfile.TemporaryDirectory() as folder:
        prepared = {name: Path(folder) / name for name in builds}
        for name, build in builds.items():  # writes the sample and the cache, not counted; leaves a checkpoint
            start(build, prepared[name], stop=signal.SIGTERM)
        for _ in range(1 if options.quick else options.rounds):
            for name, build in builds.items():
                directory = Path(folder) / "run"
                taken[name, "new run"].append(start(build, directory))
                shutil.rmtree(directory)
                shutil.copytree(prepared[name], directory)
                taken[name, "resumed"].append(start(build, directory, resume=True))
                shutil.rmtree(directory)
    report = Report({"quick": options.quick, "rounds": options.rounds}, {})
    for kind in ("new run", "resumed"):
        report.section(
            kind,
            "Seconds from the start of torchrun to the end of the first optimizer step of the demo's model on two CPU "
            "processes; sample and token ids are prepared. Builds take turns.",
            command=" ".join(COMMAND[1:])
            + (" run=DIR resume=true" if kind == "resumed" else " experiment=demo trainer.micro_batch_size=1"),
        )
        for name in builds:
            report.add(f"{name}: seconds", spread(taken[name, kind]))
        if options.old:
            report.add("new / old", ratios(taken["new", kind], taken["old", kind]), most=0.8)
    report.write(options.output)
    print(f"\n{options.output}")


def start(build: Path, directory: Path, resume: bool = False, stop: signal.Signals = signal.SIGKILL) -> float:
    """Train until the next optimizer step is logged, and end the job: the seconds from its start to that step."""
    history = directory / "history.jsonl"
    before = trained(history)
    new = ["experiment=demo", "trainer.micro_batch_size=1", f"run.directory={directory}"]
    own = [f"run={directory}", "resume=true"] if resume else new
    environment = os.environ | {"PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    begun = time.time()
    with open(directory.with_name("output"), "w") as output:
        job = subprocess.Popen([*COMMAND, *own], cwd=build, env=environment, stdout=output, stderr=output)
        ranks = []
        try:
            while (now := trained(history)) <= before:
                if job.poll() is not None or time.time() > begun + LIMIT_S:
                    raise SystemExit(f"{build}: no step was trained:\n{Path(output.name).read_text()[-3000:]}")
                time.sleep(0.05)
            ranks = psutil.Process(job.pid).children(recursive=True)
            if stop != signal.SIGKILL:
                for rank in psutil.Process(job.pid).children():
                    rank.send_signal(stop)
                job.wait(LIMIT_S)
        finally:
            job.kill()
            job.wait()
            for rank in ranks:
                if rank.is_running():
                    rank.kill()
    return now - begun


def trained(history: Path) -> float:
    """When the last optimizer step was logged, in seconds of the epoch; 0 for none."""
    rows = iter_jsonl(history, allow_torn=True) if history.exists() else ()
    return max((row["time"] for _, row in rows if "loss" in row), default=0.0)


if __name__ == "__main__":
    main()
