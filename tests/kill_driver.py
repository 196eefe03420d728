"""Kill each recipe at random file events, start it again, and compare all that it leaves with an uninterrupted run.

python -m pytest tests/kill_driver.py                      # every recipe; about 20 minutes on two cores
python -m pytest tests/kill_driver.py -k sft --kills 40 --seed 1

Not collected by default. A run is compared byte for byte, except for the times in `TIMES`; a file that only one of the
two has is a failure, so that nothing a killed process left stays. `workers/kill_at.py` says what a file event is.
"""

import contextlib
import csv
import functools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, manifest_of, small_tokenizer, tiny_config
from processes import TIMEOUT_S, run_script
from servers.faults import FaultServer
from test_human_judges import rating_file
from test_llm_judge import DIALOGUES, planted, system
from transformers import Qwen2ForCausalLM

from csc_train.checkpoints.manifest import save_final_model
from csc_train.data.dialogue import data_digest
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.evaluation.judges.annotation_form import read_key
from csc_train.files import write_json
from csc_train.inference.predictions import write_predictions
from csc_train.runs.claim import is_claimed
from csc_train.runs.config import RESOLVED_FILE
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

pytestmark = pytest.mark.slow
KILL_AT = Path(__file__).parent / "workers" / "kill_at.py"
SFT = [
    "debug=cpu_tiny", "run.directory=run", "trainer.packs_per_step=2", "trainer.micro_batch_size=1",
    "trainer.save_steps=2", "packing.max_length=512", "validation.eval_steps=3", "validation.num_turns=8",
]  # fmt: skip
"""Six steps inside an epoch, with three training checkpoints; the last is of the last step."""


@dataclass(frozen=True)
class Case:
    """A recipe to kill.

    Attributes:
        command: its script and arguments.
        kills: how often it is killed.
        again: the arguments that go on, where the directory `run` holds a configuration; else, and without them, the
            same command.
        after: a regular expression; only events after the last one that matches it count.
    """

    command: list[str]
    kills: int = 3
    again: tuple[str, ...] = ("run=run", "resume=true")
    after: str = ""


REUSE = "run.if_exists=reuse"
CASES = {
    "sft": Case(["recipes/sft.py", *SFT, REUSE], 12),
    "sft_end": Case(["recipes/sft.py", *SFT, REUSE], 6, after=r"^os\.rename run/checkpoints/"),
    "evaluate": Case([
        "recipes/evaluate.py", "checkpoint=model", "data=files", "data.train.path=train.jsonl",
        "data.evaluation.path=evaluation.jsonl", "evaluation.base=false", "evaluation.batch_size=4",
        "evaluation.max_new_tokens=16", "metrics.bootstrap_resamples=100", "run.directory=run", REUSE,
    ], 12),
    "synthesize_rolecs": Case(["recipes/synthesize_rolecs.py", "target=6", "run.directory=run"], 12),
    "build_csconv": Case(["recipes/build_csconv.py", "run.directory=run", REUSE], 12),
    "judge": Case([
        "recipes/judge.py", "one", "other", "llm=openai", "llm.model=judge", "llm.base_url=SERVER",
        "llm.api_key_env=null", "judge.num_turns=10", "run.directory=run", REUSE,
    ]),
    "compare": Case(["recipes/compare.py", "one", "other", "run.directory=run", REUSE]),
    "compare_runs": Case(["recipes/compare_runs.py", "trained", "run.directory=run", REUSE]),
    "inspect_data": Case(["recipes/inspect_data.py", "path=train.jsonl", "run.directory=run", REUSE]),
    "human_eval_export": Case(["recipes/human_eval.py", "export", "one", "other", "run.directory=run", REUSE]),
    "human_eval_import": Case(
        ["recipes/human_eval.py", "import", "anna.json", "key=form/key.json", "run.directory=run", REUSE]
    ),
    "export": Case(["recipes/export.py", "source=trained/run", "output=exported", "if_exists=replace"], again=()),
    "prepare": Case(["recipes/prepare.py", *SFT], again=()),
    "clean": Case(["recipes/clean.py", "directory=trained", "older_than_days=0", "delete=true"], again=()),
    "write_sample": Case(["recipes/write_sample.py", "data.sample_dialogues=20"], again=()),
    "launch": Case(["launch/launch.py", "recipe=sft", *SFT, "cluster=cpu1", "trainer.max_steps=2"]),
    "sweep": Case([
        "launch/sweep.py", *SFT[:1], *SFT[2:], "trainer.max_steps=2", "sweep=lr", "sweep.trials=2", "sweep.poll=0.2",
        "cluster=cpu1",
    ], again=()),
}  # fmt: skip
"""Every recipe that writes a directory."""


def start(case: Case, place: Path, server: FaultServer, number: int = 0, again: bool = False):
    """Run a case in a directory, up to an event if `number` is one."""
    script, *arguments = case.command
    if again and case.again and (place / "run" / RESOLVED_FILE).exists():
        arguments = case.again
    words = [ROOT / script, *(word.replace("SERVER", server.base_url) for word in arguments)]
    killed = [] if again else [KILL_AT, str(number), place / "events.json"]
    return run_script(*killed, *words, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)})


_SPEED = {
    "data_wait_seconds", "step_seconds", "tokens_per_second", "trained_tokens_per_second", "time", "eval_runtime",
    "eval_samples_per_second", "eval_steps_per_second", "train_runtime", "train_samples_per_second",
    "train_steps_per_second", "eval_generation_seconds",
}  # fmt: skip
TIMES: dict[str, set[str]] = {
    "summary.json": {"seconds", "hours"},
    "run.json": {"started", "finished", "seconds", "commands", "crashed"},
    "history.jsonl": _SPEED,
    "history.csv": _SPEED,
    "metrics.json": _SPEED,
    "trainer_state.json": _SPEED,
    # Hashes of trainer_state.json; all other files are compared themselves.
    "csc_checkpoint.json": {"seconds", "trainer_state.json", "xxh3_128"},
}
"""The fields that tell when, how often and how fast a run worked, by file name."""
SHOWN = {"curves.html", "study.log", "summary.md", "summary.html", "output.log"}
"""Files that show such a field in another form; what else they show is in other files."""
UNORDERED = {"answers.jsonl", "judgements.jsonl"}
"""Logs of answers to questions that are asked at the same time, in the order in which they come."""


def content(place: Path) -> dict[str, object]:
    """What each file below a directory holds, without times."""
    return {str(path.relative_to(place)): without_times(path, place) for path in place.rglob("*") if path.is_file()}


def without_times(path: Path, place: Path) -> object:
    if path.name in SHOWN:
        return None
    if path.suffix == ".db":  # its pages lie in the order in which they were freed
        with contextlib.closing(sqlite3.connect(path)) as database:
            return list(database.iterdump())
    if path.name not in TIMES and path.name not in UNORDERED:
        content = re.sub(rb"\bif_exists: \w+", b"if_exists: HOW", path.read_bytes())  # as a resume writes it
        return re.sub(rb"\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d{4}", b"TIME", content).replace(bytes(place), b".")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _drop(json.loads(text), TIMES[path.name])
    rows = csv.DictReader(text.splitlines()) if path.suffix == ".csv" else map(json.loads, text.splitlines())
    rows = [_drop(row, TIMES.get(path.name, set())) for row in rows]
    return sorted(rows, key=json.dumps) if path.name in UNORDERED else rows


def _drop(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {key: _drop(each, names) for key, each in value.items() if key not in names}
    return [_drop(each, names) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def server():
    """A judge that knows the better reply."""
    with FaultServer() as server:
        server.answer = planted
        yield server


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """What the recipes read: a model, dialogues, two evaluations, a rated form and a training."""
    place = tmp_path_factory.mktemp("inputs")
    tokenizer = small_tokenizer("qwen2_5")
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    torch.manual_seed(1)
    dialogues = generate_sample(12, seed=3)
    write_dialogues(place / "train.jsonl", dialogues[:6])
    write_dialogues(place / "evaluation.jsonl", dialogues[6:])
    facts = manifest_of(template, data_hash=data_digest(dialogues[:6]), config={})
    model = Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5))
    save_final_model(place / "model", model, tokenizer, template.chat_template, facts)
    for name, value in (("one", 3), ("other", 2)):
        replies = system(lambda n, value=value: f"品质{value}，第{n}句")
        write_predictions(place / name / "predictions" / "trained-reference.jsonl", replies)
        write_dialogues(place / name / "dialogues.jsonl", DIALOGUES.values())
    form = ["recipes/human_eval.py", "export", "one", "other", "run.directory=form"]
    (place / "trained").mkdir()
    for where, words in ((place, form), (place / "trained", CASES["sft"].command)):
        done = run_script(ROOT / words[0], *words[1:], cwd=where)
        assert done.returncode == 0, done.stderr
    key = read_key(place / "form" / "key.json")
    write_json(place / "anna.json", rating_file(key, "Anna", "AB=" * (len(key.items) // 3)))
    return place


@pytest.fixture(scope="session")
def whole(inputs, server, tmp_path_factory):
    """case name -> the files and the events of a run that nothing interrupted."""

    @functools.cache
    def run(name: str):
        place = new_place(inputs, tmp_path_factory, name)
        done = start(CASES[name], place, server)
        assert done.returncode == 0, done.stdout + done.stderr
        events = json.loads((place / "events.json").read_text())
        (place / "events.json").unlink()
        return content(place), events

    return run


def new_place(inputs: Path, tmp_path_factory, name: str) -> Path:
    place = tmp_path_factory.mktemp(name).resolve()
    shutil.copytree(inputs, place, dirs_exist_ok=True)
    (place / "recipes").symlink_to(ROOT / "recipes")  # as in a checkout
    return place


def pytest_generate_tests(metafunc):
    kills = metafunc.config.getoption("kills")
    counts = {name: case.kills if kills is None else kills for name, case in CASES.items()}
    metafunc.parametrize(("name", "kill"), [(name, kill) for name in CASES for kill in range(counts[name])])


def test_killed_and_started_again_it_leaves_the_same(name, kill, inputs, whole, server, tmp_path_factory, request):
    case, (expected, events) = CASES[name], whole(name)
    first = max((n for n, event in enumerate(events, 1) if case.after and re.search(case.after, event)), default=0)
    rng = random.Random(f"{request.config.getoption('seed')} {name}")
    numbers = [rng.randint(first + 1, len(events)) for _ in range(kill + 1)]
    place = new_place(inputs, tmp_path_factory, f"{name}-{kill}")
    killed = start(case, place, server, numbers[-1])
    where = f"event {numbers[-1]} of {len(events)}, {events[numbers[-1] - 1]}"
    assert killed.returncode == -signal.SIGKILL, f"{where}: not killed\n{killed.stdout}{killed.stderr}"
    end = time.monotonic() + TIMEOUT_S
    while any(map(is_claimed, [place / "run", *place.glob("runs/**/")])) and time.monotonic() < end:
        time.sleep(0.1)  # what it started ends, too
    done = start(case, place, server, again=True)
    assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
    found = content(place)
    differing = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
    assert differing == [], f"{where}: the only or other {', '.join(differing)}"
