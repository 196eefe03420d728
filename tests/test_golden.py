"""Golden losses: the demo's first 40 steps train as they did, and benchmarks/compare_losses.py finds what differs.

tests/golden/demo_losses.json says which commit, torch version and CPU its losses are from.
"""

import hashlib
import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from csc_train.config.compose import compose
from csc_train.files import read_json
from csc_train.jsonl import write_jsonl
from csc_train.training.callbacks import StopOnSignal

GOLDEN = ROOT / "tests" / "golden" / "demo_losses.json"
COMPARE = str(ROOT / "benchmarks" / "compare_losses.py")


def cpu_kind() -> dict[str, str]:
    """The CPU's model name, and a digest of its instruction sets."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = " ".join(sorted(facts.get("flags", "").split()))
    return {"model": facts.get("model name", ""), "flags": hashlib.sha256(flags.encode()).hexdigest()[:16]}


@pytest.fixture
def one_thread():
    """One thread, since the order of sums depends on their number; signal handlers are restored."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def train_demo(steps: int) -> list[float]:
    """Train the demo in the current directory, stop it after `steps` of its steps, and return their losses."""

    def stop(self, args, state, control, **_):
        self.interrupted = control.should_training_stop = state.global_step == steps

    config = compose("sft", ["experiment=demo", "trainer.logging_steps=1", "tracking=off", "run.directory=demo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stop)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "recipes" / "sft.py"))["main"](config)
    rows = [json.loads(line) for line in Path("demo/history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_the_demo_trains_as_it_did(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    golden = read_json(GOLDEN)
    losses = train_demo(len(golden["losses"]))
    if (golden["torch"], golden["cpu"]) == (torch.__version__, cpu_kind()):
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=0, abs=1e-5)


def compare(monkeypatch, *arguments: object) -> int:
    """The exit status of benchmarks/compare_losses.py."""
    monkeypatch.setattr(sys, "argv", [COMPARE, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(COMPARE, run_name="__main__")
    return caught.value.code


def test_two_runs_are_compared_step_by_step(tmp_path, monkeypatch, capsys):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 21)]
    write_jsonl(tmp_path / "a" / "history.jsonl", [*rows, {"step": 20, "eval_loss": 3.0}])
    write_jsonl(tmp_path / "b.jsonl", [row | {"loss": row["loss"] + 1e-3 * (row["step"] == 15)} for row in rows])
    (tmp_path / "golden.json").write_text(json.dumps({"losses": [row["loss"] for row in rows[:5]]}))

    assert compare(monkeypatch, tmp_path / "a", tmp_path / "a" / "history.jsonl") == 0
    assert capsys.readouterr().out.endswith("20 steps: 0 differ by more than 0, in no step; max 0\n")
    assert compare(monkeypatch, tmp_path / "a", tmp_path / "golden.json") == 0
    assert "\n5 steps: " in capsys.readouterr().out

    assert compare(monkeypatch, tmp_path / "a", tmp_path / "b.jsonl") == 1
    out = capsys.readouterr().out
    assert out.endswith("20 steps: 1 differ by more than 0, first in step 15; max 0.001\n")
    assert f"| 15 | {1 / 15!r} | {1 / 15 + 1e-3!r} | -0.001 |" in out
    assert compare(monkeypatch, tmp_path / "a", tmp_path / "b.jsonl", "--tolerance", "0.01") == 0


def test_runs_that_cannot_be_compared_are_named(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}])
    write_jsonl(tmp_path / "b.jsonl", [{"step": 3, "loss": 1.0}])
    assert compare(monkeypatch, tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 2
    assert "no logged step in common" in capsys.readouterr().err
    assert compare(monkeypatch, tmp_path / "a.jsonl", tmp_path / "none") == 2
    assert "no losses" in capsys.readouterr().err
    assert compare(monkeypatch, tmp_path / "a.jsonl", tmp_path / "a.jsonl") == 1
    assert "first in step 2; max nan" in capsys.readouterr().out
