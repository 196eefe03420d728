"""Training metrics and their tracking: history, curves and W&B offline, over resumes, failures and kills."""

import contextlib
import csv
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy
import psutil
import pytest
import torch
import wandb
from conftest import ROOT, random_dialogue, sampled, small_tokenizer, tiny_config
from processes import TIMEOUT_S, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, TrainerState
from wandb_file import offline_runs
from workers import loss_curve
from workers.loss_curve import (
    EPOCHS,
    LOCAL_MLFLOW,
    MANIFEST,
    PACKS_PER_STEP,
    STEPS_PER_EPOCH,
    curve,
    first_packs,
    train,
)

from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.jsonl import JsonlLog
from csc_train.models.config import AdapterConfig
from csc_train.models.families import count_adapter_parameters, forward_flops, model_dims, training_flops
from csc_train.models.loading import lora_config
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.token_groups import GROUP_SHAPE, NUM_GROUPS, TURN_BUCKETS, token_group_ids
from csc_train.packing.truncation import drop_leading_turns
from csc_train.runs.comparison import HISTORY_FILE
from csc_train.runs.directory import EXIT_STOPPED, Run
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue, TokenType
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.history import write_csv
from csc_train.tracking.reporters import MLFLOW_DEFAULTS, REPORTERS, Reporter
from csc_train.tracking.tracker import Tracker, check_trackers
from csc_train.tracking.wandb import attach_evaluation, exit_code, open_run, resolve_mode, result_rows
from csc_train.training.callbacks import ProgressReporter
from csc_train.training.train_metrics import TrainMetrics, peak_flops, token_metrics

STEPS = list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
RUNTIME = {"time", "trained_tokens_per_second", "tokens_per_second", "step_seconds", "data_wait_seconds", "rank_skew"}
"""Figures that no two trainings share."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and packs for two steps and one pack, of dialogues with strategies in their replies."""
    folder = tmp_path_factory.mktemp("tracking")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    rng = random.Random(10)
    # Most of the long system prompt left out, for speed.
    examples = [without_prompt(template.encode(random_dialogue(rng)), 8) for _ in range(60)]
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=700))
    packs = first_packs(packs)
    members = [member for pack in packs.pack_items for member in pack]
    assert len(members) > 2 * len(packs) and not any(each.first_turn for each in members)
    (folder / "shared").write_bytes(pickle.dumps(packs))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.1, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


def without_prompt(example: TokenizedDialogue, kept: int) -> TokenizedDialogue:
    """The example with only the last tokens of its prefix."""
    cut = int(example.turn_offsets[0]) - kept
    return TokenizedDialogue(
        example.input_ids[cut:], example.token_types[cut:], example.turn_offsets - cut, example.strategies
    )


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / HISTORY_FILE).read_text(encoding="utf-8").splitlines()]


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in history(run)]


def trained(folder: Path, name: str, **options):
    """A tracked training; states of it are saved after every other step."""
    return train(
        folder,
        packs="shared",
        tracked=name,
        checkpoints=f"{name}/checkpoints",
        save_steps=2,
        save_total_limit=9,
        **options,
    )


@pytest.fixture
def signals():
    """Puts back what a training does with signals."""
    handled = (signal.SIGTERM, signal.SIGUSR1)
    before = {signum: signal.getsignal(signum) for signum in handled}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def whole(folder):
    """A tracked training that nothing befell, and its run directory."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    done = curve(trained(folder, "whole"))
    for signum, handler in before.items():
        signal.signal(signum, handler)
    return done, folder / "whole"


# What is measured


@pytest.mark.slow
def test_losses_are_bitwise_those_of_a_training_that_is_neither_measured_nor_tracked(folder, whole, monkeypatch):
    monkeypatch.setattr(TrainMetrics, "update", lambda *_: None)
    monkeypatch.setattr(TrainMetrics, "compute", lambda *_: {})
    assert curve(train(folder, packs="shared")) == whole[0]


def by_hand(folder: Path) -> dict[str, tuple[float, int, int]]:
    """Summed negative log-likelihood, tokens, and tokens that are the first choice, by name; dialogue by dialogue.

    Under "entropy", the summed entropy of all.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    packs, sums = pickle.loads((folder / "shared").read_bytes()), {}
    for example in (packs.dialogues[member.dialogue] for pack in packs.pack_items for member in pack):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        scores = log_softmax(model(ids[None], use_cache=False).logits[0, :-1], dim=-1)
        for turn, (start, end) in enumerate(zip(example.turn_offsets[:-1], example.turn_offsets[1:], strict=True)):
            for place in range(start, end):
                if example.token_types[place] == TokenType.CONTEXT:
                    continue
                first = scores[place - 1].argmax() == ids[place]
                loss = -scores[place - 1, ids[place]].item()
                stretch = next(name for last, name in zip((4, 8, 16, 32), TURN_BUCKETS, strict=False) if turn < last)
                strategy = STRATEGIES[example.strategies[turn] - 1].en
                part = TokenType(example.token_types[place]).name.lower()
                for name in (f"{part}_tokens", f"by_strategy/{strategy}", f"by_turn/{stretch}"):
                    total, count, right = sums.get(name, (0.0, 0, 0))
                    sums[name] = (total + loss, count + 1, right + int(first))
                total, count, right = sums.get("entropy", (0.0, 0, 0))
                entropy = -(scores[place - 1].exp() * scores[place - 1]).sum().item()
                sums["entropy"] = (total + entropy, count + 1, right + int(first))
    return sums


@pytest.mark.slow
def test_losses_by_strategy_turn_and_part_are_those_computed_by_hand(folder, tmp_path):
    # A step takes all the packs, so that their order does not matter.
    packs = pickle.loads((folder / "shared").read_bytes())
    packs = first_packs(packs, PACKS_PER_STEP)
    (tmp_path / "shared").write_bytes(pickle.dumps(packs))
    (tmp_path / "model").symlink_to(folder / "model")
    (line,) = [entry for entry in train(tmp_path, packs="shared", max_steps=1).state.log_history if "loss" in entry]
    sums = by_hand(tmp_path)
    entropy, tokens, hits = sums.pop("entropy")
    assert line["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
    assert line["mean_token_accuracy"] == pytest.approx(hits / tokens)
    assert len(sums) > 14 and {"by_turn/1-4", "by_turn/9-16"} <= set(sums)
    assert {name for name in line if name.startswith("loss_")} == {f"loss_{name}" for name in sums}
    for name, (total, count, _) in sums.items():
        assert line[f"loss_{name}"] == pytest.approx(total / count, rel=1e-5), name
    for part in ("strategy_tokens", "reply_tokens"):
        assert line[f"accuracy_{part}"] == pytest.approx(sums[part][2] / sums[part][1])
    assert sums["strategy_tokens"][2] + sums["reply_tokens"][2] > 0
    counted = sum(sums[f"{part}_tokens"][1] for part in ("strategy", "reply"))
    assert line["trained_share"] == pytest.approx(counted / sum(map(sum, packs.document_lengths)))
    assert line["rank_skew"] == 1
    assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(sum(map(sum, packs.document_lengths)))
    assert 0 < line["data_wait_seconds"] < line["step_seconds"]
    assert not {"mfu", "memory_allocated_gib"} & set(line)  # a CPU has none


@pytest.mark.slow
def test_step_metrics_exclude_the_evaluation(folder):
    trainer = train(folder, packs="shared", max_steps=1)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.packs[0]]))
    for mode, counted in ((trainer.model.eval, False), (trainer.model.train, True)):
        mode()
        with torch.no_grad():
            trainer.compute_loss(trainer.model, dict(batch))
        assert bool(trainer.metrics._sums.any()) == (trainer.metrics._forward > 0) == counted


def an_example(strategies: list[int]) -> TokenizedDialogue:
    """A prefix of two tokens, then turns of a header, a strategy, a reply and a footer, the latter three trained."""
    turn = [TokenType.CONTEXT, TokenType.STRATEGY, TokenType.REPLY, TokenType.REPLY]
    token_types = [0, 0] + [kind if strategy else 0 for strategy in strategies for kind in turn]
    turn_offsets = 2 + 4 * numpy.arange(len(strategies) + 1)
    ids = numpy.arange(len(token_types), dtype=numpy.int32)
    return TokenizedDialogue(
        ids, numpy.array(token_types, numpy.uint8), turn_offsets, numpy.array(strategies, numpy.uint8)
    )


def test_a_token_counts_for_its_part_its_strategy_and_its_turn():
    example = an_example([1, 0, 12, 0, 5])
    cells = token_group_ids(example)
    assert cells.dtype == numpy.int16 and cells.max() < NUM_GROUPS

    def cell(part: int, strategy: int, stretch: int) -> list[int]:
        reply = 1 + numpy.ravel_multi_index((1, strategy, stretch), GROUP_SHAPE)
        return [0, 1 + numpy.ravel_multi_index((part, strategy, stretch), GROUP_SHAPE), reply, reply]

    context = [0] * 4
    assert cells.tolist() == [0, 0, *cell(0, 1, 0), *context, *cell(0, 12, 0), *context, *cell(0, 5, 1)]
    # A trimmed dialogue's turns keep their place.
    assert token_group_ids(drop_leading_turns(example, 3), 3).tolist() == [0, 0, *context, *cell(0, 5, 1)]
    long = token_group_ids(an_example([0] * 39 + [12]))
    assert long[-1] == NUM_GROUPS - 1 == numpy.prod(GROUP_SHAPE)
    # A chat's turns have no strategy; each source of a mix has groups of its own.
    chat = replace(example, strategies=numpy.zeros(5, numpy.uint8))
    assert token_group_ids(chat).tolist()[2:6] == cell(0, 0, 0)
    last = replace(example, strategies=numpy.full(5, 12, numpy.uint8))
    assert token_group_ids(last, 200, 199).max() == 200 * NUM_GROUPS - 1 < 2**15


def test_what_has_no_weight_counts_nowhere():
    examples = [an_example([1, 0, 12])] * 2
    packs, _ = pack_dialogues(examples, PackingConfig("best_fit", max_length=100), LossConfig(strategy_weight=0.0))
    (row,) = list(packs)
    assert ((row["token_groups"] > 0) == (row["loss_weights"] > 0)).all()
    assert (row["token_groups"] > 0).sum() == 8


def test_metrics_of_groups_that_did_not_occur_are_left_out():
    sums = torch.zeros(3, *GROUP_SHAPE)
    sums[:, 1, 5, 2] = torch.tensor([4.0, 6.0, 1.0])
    strategy = STRATEGIES[4].en
    expected = {"loss_reply_tokens": 1.5, "accuracy_reply_tokens": 0.25}
    assert token_metrics(sums) == expected | {f"loss_by_strategy/{strategy}": 1.5, "loss_by_turn/9-16": 1.5}


def linear_flops(model):
    return sum(
        2 * each.in_features * each.out_features for each in model.modules() if isinstance(each, torch.nn.Linear)
    )


def test_flops_follow_the_convention(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    linear, attention = forward_flops(model)
    assert linear == linear_flops(model)
    head, dims = 2 * 32 * model.config.vocab_size, model_dims(model.config)
    assert training_flops(dims) == (3 * (linear - head), 3 * head, 3 * attention)
    # Frozen weights need no gradient of their own.
    import peft

    adapted = peft.get_peft_model(model, lora_config(AdapterConfig("lora", rank=4), model))
    more = forward_flops(adapted)[0] - linear
    assert forward_flops(adapted) == (linear_flops(adapted), attention)
    assert training_flops(dims, count_adapter_parameters(adapted)) == (
        2 * (linear - head) + 3 * more,
        2 * head,
        3 * attention,
    )


@pytest.mark.parametrize(
    ("device", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_a_devices_peak_is_known_by_its_name(device, tflops):
    assert peak_flops(device) == tflops * 1e12
    assert peak_flops("Quadro") is None


# Where the figures go


@pytest.mark.slow
def test_the_history_holds_every_step_and_so_do_its_table_and_curves(whole):
    done, run = whole
    lines = history(run)
    assert [line["step"] for line in lines] == STEPS
    assert [line["loss"] for line in lines] == done["losses"]
    rows = list(csv.DictReader((run / "history.csv").open(encoding="utf-8")))
    assert [float(row["loss"]) for row in rows] == done["losses"]
    assert '"Gradient norm"' in (run / "curves.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_wandb_gets_the_same_metrics_settings_and_provenance(whole):
    done, run = whole
    (kept,) = offline_runs(run)
    place = {"id": kept.id, "mode": "offline", "url": None}
    assert json.loads((run / "tracking.json").read_text()) == {"wandb": place}
    assert sorted(kept.rows) == STEPS
    for line in history(run):
        row = kept.rows[line.pop("step")]
        line.pop("time")
        assert {name: row[f"train/{name}"] for name in line} == line
    assert kept.summary["train_loss"] == pytest.approx(sum(done["losses"]) / len(STEPS))
    assert kept.config["tracking"] == {"mode": "offline"}
    assert kept.config["manifest"]["data_hash"] == MANIFEST.data_hash
    assert kept.config["packing_report"]["token_ratio"] == 0.9
    assert kept.config["cluster"]["world_size"] == 1
    assert kept.config["learning_rate"] == 3e-3  # by the Trainer's own integration
    assert kept.exit_code == 0
    assert kept.artifacts[f"model-{kept.id}"] == "model"
    assert kept.rows[2]["samples.nrows"] == 1
    assert (run / "samples.jsonl").read_text() == '{"step": 2, "prompt": "a", "reply": "b"}\n'


def same_but_for_time(run: Path, other: Path) -> None:
    lines, others = ([{n: v for n, v in line.items() if n not in RUNTIME} for line in history(r)] for r in (run, other))
    assert lines == others


@pytest.mark.slow
def test_a_training_that_fails_closes_its_run_and_resumes_it(folder, whole, signals):
    run = folder / "failed"
    with pytest.raises(RuntimeError, match="as planned"):
        trained(folder, "failed", ends=("error", 5))
    assert steps_of(run) == [1, 2, 3, 4, 5]
    again = trained(folder, "failed", resume="failed/checkpoints/checkpoint-4")
    first, second = offline_runs(run)
    assert first.exit_code == 1 and second.exit_code == 0
    assert first.id == second.id
    # Step 5 was done twice, and is there once in our history; W&B takes no step twice.
    assert (sorted(first.rows), sorted(second.rows)) == ([1, 2, 3, 4, 5], [5, 6])
    assert first.rows[5]["train/loss"] == second.rows[5]["train/loss"]
    same_but_for_time(run, whole[1])
    assert curve(again)["losses"] == whole[0]["losses"]


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_closes_its_run_with_its_status(folder, signals):
    run = folder / "stopped"
    with pytest.raises(SystemExit) as caught:
        trained(folder, "stopped", ends=("stop", 3))
    assert caught.value.code == EXIT_STOPPED
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    (kept,) = offline_runs(run)
    assert (kept.exit_code, sorted(kept.rows), steps_of(run)) == (EXIT_STOPPED, [1, 2, 3], [1, 2, 3])
    record = json.loads((run / "checkpoints/checkpoint-3/csc_checkpoint.json").read_text())
    assert record["run_ids"] == {"wandb": kept.id}


@pytest.mark.slow
def test_a_training_that_is_killed_loses_no_step_in_any_tracker_and_is_recorded_as_crashed(
    folder, whole, signals, said, empty_store, monkeypatch
):
    run = folder / "killed"
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    store = shutil.copy(empty_store, folder / "store.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    case = {
        "packs": "shared",
        "tracked": "killed",
        "to": TRACKERS,
        "checkpoints": "killed/checkpoints",
        "save_steps": 2,
        "ends": ["kill", 5],
    }
    done = run_script(loss_curve.__file__, folder, json.dumps({"killed": case}), folder / "none")
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    before = json.loads((run / "tracking.json").read_text())
    assert [each["step"] for each in mlflow_values(before["mlflow"], "train/loss")] == [1, 2, 3, 4, 5]
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    with (run / HISTORY_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # torn
    trained(folder, "killed", to=TRACKERS, resume="killed/checkpoints/checkpoint-4")
    assert any("killed crashed: the process was killed before it recorded its end" in line for line in said)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished" and len(record["crashed"]) == 1
    first, second = offline_runs(run)
    assert first.exit_code is None and second.exit_code == 0
    assert first.id == second.id
    assert (sorted(first.rows), sorted(second.rows)) == ([1, 2, 3, 4], [5, 6])  # the open row of step 5 was lost
    same_but_for_time(run, whole[1])
    check_all_trackers_agree(run, before)


def check_all_trackers_agree(run: Path, before: dict[str, dict[str, str]]) -> None:
    """Each tracker holds one run, that of `before`, and the last value of each step is that of the history."""
    record = json.loads((run / "tracking.json").read_text())
    assert record == before and set(record) == set(TRACKERS)
    checkpoint = json.loads((run / "checkpoints/checkpoint-6/csc_checkpoint.json").read_text())
    assert checkpoint["run_ids"] == {name: kept["id"] for name, kept in record.items()}
    expected = {line["step"]: line for line in history(run)}
    assert list(expected) == STEPS
    names = [name for name in expected[1] if name not in ("step", "time")]
    assert {"loss", "learning_rate", "trained_share"} < set(names) and len(names) > 20

    board = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    board.Reload()
    assert set(board.Tags()["scalars"]) == {f"train/{name}" for line in expected.values() for name in line} - {
        "train/step", "train/time"
    }  # fmt: skip
    server = {name: mlflow_values(record["mlflow"], f"train/{name}") for name in names}
    uploaded = inspected(run)
    for name in names:
        values = {step: line[name] for step, line in expected.items() if name in line}
        events = board.Scalars(f"train/{name}")
        assert [each.step for each in events] == list(values)  # step 5 was logged twice, and the first is purged
        assert {each.step: each.value for each in events} == pytest.approx(values, rel=1e-6)  # of single precision
        in_order = sorted(server[name], key=lambda each: each["timestamp"])
        assert [each["step"] for each in in_order] == [1, 2, 3, 4, 5, 5, 6] or len(values) < len(STEPS)
        assert {each["step"]: each["value"] for each in in_order} == values
        assert {step: row[f"train/{name}"] for step, row in uploaded.items() if f"train/{name}" in row} == values
    assert board.Tensors("settings/text_summary")
    state = mlflow_run(record["mlflow"])
    assert (state.info.status, state.info.run_name) == ("FINISHED", "killed")
    assert state.data.params["manifest.data_hash"] == MANIFEST.data_hash
    assert state.data.params["learning_rate"] == "0.003"
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


TRACKERS = ["wandb", "tensorboard", "mlflow"]
SECRET = "5ec2e7" + "0" * 34
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture
def local_mlflow(monkeypatch):
    """MLflow, which is not in the environment, and none of its variables afterwards."""
    monkeypatch.syspath_prepend(LOCAL_MLFLOW)
    for name in ("MLFLOW_TRACKING_URI", *MLFLOW_DEFAULTS):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    if not os.environ.get("CI"):
        pytest.importorskip("mlflow", reason="make test installs it")


@pytest.fixture(scope="module")
def made_store(tmp_path_factory) -> Path:
    """An empty store of MLflow; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    make = f"import mlflow; mlflow.MlflowClient('sqlite:///{path}').search_experiments()"
    subprocess.run([sys.executable, "-c", make], env=os.environ | {"PYTHONPATH": str(LOCAL_MLFLOW)}, check=True)
    return path


@pytest.fixture
def empty_store(local_mlflow, made_store) -> Path:
    return made_store


def mlflow_run(kept: dict[str, str]):
    """The run that a `tracking.json` names, as MLflow's own client reads it; it is the only one there."""
    import mlflow

    client = mlflow.MlflowClient(kept["url"])
    (experiment,) = client.search_experiments(filter_string="name = 'csc-train'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == kept["id"]
    return run


def mlflow_values(kept: dict[str, str], name: str) -> list[dict]:
    """Every value of a metric, with its step and time."""
    import mlflow

    mlflow_run(kept)
    return [dict(each) for each in mlflow.MlflowClient(kept["url"]).get_metric_history(kept["id"], name)]


def inspected(run: Path) -> dict[int, dict]:
    """What W&B's own command reads of the offline files of a run directory: the last row of each step."""
    rows = {}
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        rows |= {each["history"]["step"]["num"]: each["history"]["item"] for each in records if "history" in each}
    return rows


@pytest.mark.slow
def test_an_evaluation_is_attached_to_the_run_that_trained(folder, whole, tmp_path):
    scores = {"value": 50.0, "low": 40.0, "high": 60.0, "unit": "percent", "direction": "higher", "signature": "x"}
    write_json(
        tmp_path / "results.json", {"results": {"ours": {"reference": {"profiles": {"paper": {"ACC": scores}}}}}}
    )
    (tmp_path / "table.md").write_text("| ours |")
    training = {"id": offline_runs(whole[1])[0].id, "mode": "offline", "step": STEPS[-1]}
    before = {path.name: path.is_file() and path.read_bytes() for path in whole[1].iterdir()}
    for number in (1, 2):
        attach_evaluation(training, {"mode": "offline"}, tmp_path)
        time.sleep(1)  # W&B names its folders by the second
        kept = offline_runs(tmp_path)[number - 1]
        assert kept.id == training["id"]
        assert kept.artifacts[f"evaluation-{kept.id}"] == "evaluation"
        assert list(kept.rows) == [STEPS[-1] + number]
        assert kept.rows[STEPS[-1] + number]["evaluation/results.nrows"] == 1
    assert {path.name: path.is_file() and path.read_bytes() for path in whole[1].iterdir()} == before


def test_an_evaluation_of_an_untracked_training_is_not_attached_and_a_failure_is_said(tmp_path, said):
    attach_evaluation({}, {"mode": "offline"}, tmp_path)
    assert not list(tmp_path.iterdir()) and not said
    attach_evaluation({"id": "0123abcd", "mode": "offline"}, {"mode": "offline"}, tmp_path)  # it has no results.json
    assert [line for line in said if "not attached to the training's W&B run 0123abcd" in line]


def test_rows_of_scores():
    score = {"value": 1, "low": None, "high": 2, "unit": "words", "direction": "none", "signature": "s"}
    results = {"a": {"reference": {"profiles": {"zh": {"B-2": score}}}}}
    assert result_rows(results) == [["a", "reference", "zh", "B-2", 1, None, 2, "words", "none"]]


# The tracker


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """Neither a key nor a login, no variable of W&B, and no state of another test."""
    real = os.environ
    monkeypatch.setattr(os, "environ", os.environ.copy())  # W&B sets some
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb, "run", None)
    wandb.teardown()
    real.pop("WANDB_SERVICE", None)  # the address of a service that has ended: a later test would call it
    yield
    kill_service()  # one that is asked to end may not
    forget_service()


@pytest.mark.parametrize("asked", ["auto", "wandb", "offline", "off"])
def test_without_a_key_no_prompt_asks_for_one(no_login, asked):
    if asked == "wandb":
        with pytest.raises(InputError, match="tracking=wandb: no key; run `wandb login`"):
            resolve_mode(TrackingConfig(asked))
    else:
        assert resolve_mode(TrackingConfig(asked)) == {"auto": "offline"}.get(asked, asked)


@pytest.mark.parametrize(
    ("variables", "mode"),
    sampled(
        [
            ({"WANDB_MODE": "offline"}, "offline"),
            ({"WANDB_MODE": "dryrun"}, "offline"),
            ({"WANDB_MODE": "disabled"}, "off"),
            ({"WANDB_MODE": "online"}, "wandb"),
            ({"WANDB_DISABLED": "True"}, "off"),
            ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "off"),
            ({"WANDB_DISABLED": "false"}, "wandb"),
            ({"WANDB_MODE": "sometimes"}, "offline"),  # W&B refuses it
        ],
        4,
    ),
)
def test_auto_follows_the_trackers_own_variables(no_login, monkeypatch, variables, mode):
    for name, value in (variables | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(TrackingConfig()) == mode
    # Our setting comes first.
    assert [resolve_mode(TrackingConfig(ours)) for ours in ("offline", "off")] == ["offline", "off"]
    if variables == {"WANDB_MODE": "disabled"}:
        assert resolve_mode(TrackingConfig("wandb")) == "wandb"


OURS = {
    "project": "csc-train", "entity": "", "display_name": "run", "notes": "", "tags": [], "run_group": "",
    "job_type": "", "resume": "allow", "init_timeout": 30, "finish_timeout": 300, "console": "off", "silent": True,
}  # fmt: skip
"""What a W&B run in the directory `run` is without settings and variables."""
THEIRS = {
    "project": ("WANDB_PROJECT", "p"), "entity": ("WANDB_ENTITY", "e"), "display_name": ("WANDB_NAME", "n"),
    "notes": ("WANDB_NOTES", "some notes"), "tags": ("WANDB_TAGS", "a,b"), "run_group": ("WANDB_RUN_GROUP", "g"),
    "job_type": ("WANDB_JOB_TYPE", "j"), "id": ("WANDB_RUN_ID", "mine"), "resume": ("WANDB_RESUME", "never"),
    "init_timeout": ("WANDB_INIT_TIMEOUT", "7"), "finish_timeout": ("WANDB_FINISH_TIMEOUT", "8"),
    "console": ("WANDB_CONSOLE", "redirect"), "silent": ("WANDB_SILENT", "false"),
}  # fmt: skip
"""What W&B's variables say instead."""
READ = {"tags": ["a", "b"], "init_timeout": 7, "finish_timeout": 8, "silent": False}
BY_VARIABLE = {name: READ.get(name, value) for name, (_, value) in THEIRS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "config", "recorded", "expected"),
    [
        ({}, {}, None, OURS),
        (dict.fromkeys(("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME"), ""), {}, None, OURS),
        (dict(THEIRS.values()), {}, None, BY_VARIABLE),
        (
            dict(THEIRS.values()) | {"WANDB_DIR": "elsewhere"},
            {"project": "q", "entity": "f", "init_timeout": 3, "finish_timeout": 4},
            None,
            BY_VARIABLE | {"project": "q", "entity": "f", "init_timeout": 3, "finish_timeout": 4},
        ),
        # The run that a training continues is known already.
        (dict(THEIRS.values()), {}, "theirs", BY_VARIABLE | {"id": "theirs", "resume": "allow"}),
    ],
    ids=["nothing", "empty", "variables", "settings first", "continued"],
)
def test_settings_come_before_wandbs_variables_and_those_before_defaults(
    no_login, monkeypatch, tmp_path, variables, config, recorded, expected
):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if recorded:
        write_json(tmp_path / "run" / "tracking.json", {"id": recorded})
    with Tracker(TrackingConfig("offline", **config), tmp_path / "run") as tracker:
        tracker.open({})
        settings = tracker._wandb.settings
    (kept,) = offline_runs(tmp_path / variables.get("WANDB_DIR", "run"))
    got = {name: getattr(kept.run, name, None) for name in expected} | {"id": kept.id, "tags": list(kept.run.tags)}
    for name in ("resume", "init_timeout", "finish_timeout", "console", "silent"):
        got[name] = getattr(settings, name)
    assert got == {"id": tracker.run_ids["wandb"]} | expected
    assert not [path for path in tmp_path.iterdir() if path.name not in ("run", "elsewhere")]  # nor in the home


@pytest.mark.slow
def test_the_files_of_wandbs_own_commands_are_read(no_login, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = filed\nmode = offline\n")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with Tracker(TrackingConfig(), tmp_path / "run") as tracker:
        tracker.open({})
    (kept,) = offline_runs(tmp_path / "run")
    assert kept.run.project == "filed"


# What fails in W&B


def kill_service(*_) -> None:
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("wandb"):
            process.kill()
            process.wait()


def forget_service() -> None:
    """Let later tests start a service of their own."""
    with contextlib.suppress(Exception):  # of a service that is dead
        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


def raising(tracker: Tracker, _) -> None:
    def log(*_, **__):
        raise TypeError("not a number")

    tracker._wandb.log = log


FAULTS = {
    # name: (before the start, at the second step, what is said)
    "a home that is no folder": (
        lambda folder: (os.environ.update(HOME=str(folder / "file" / "home")), (folder / "file").touch()), None, None
    ),
    "a folder that cannot be made": (lambda folder: (folder / "run" / "wandb").touch(), None, "Not a directory"),
    "a variable that is refused": (lambda _: os.environ.update(WANDB_RESUME="sometimes"), None, "sometimes"),
    "a service that dies": (None, kill_service, "Connection"),
    "a call that raises": (None, raising, "not a number"),
    "files that cannot be written": (
        None,
        lambda _, folder: resource.prlimit(
            next(each for each in psutil.Process().children() if each.name() == "wandb-core").pid,
            resource.RLIMIT_FSIZE,
            (50_000, 50_000),
        ),
        "cannot write all; see ",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_wandb_is_said_once_and_the_history_is_whole(no_login, tmp_path, said, fault, request):
    before, during, reason = FAULTS[fault]
    run = tmp_path / "run"
    run.mkdir()
    (run / "code.diff").write_text("diff")
    if before:
        before(tmp_path)
    request.addfinalizer(forget_service)
    with Tracker(TrackingConfig(), run) as tracker:
        tracker.open({"a": 1})
        for step in range(1, 5):
            if step == 2 and during:
                during(tracker, tmp_path)
            tracker.log(step, {"loss": 1 / step})
            tracker.commit(step)
            tracker.log_table("samples", [{"prompt": "a"}], step)
        tracker.alert("loss spike", "step 3: far above")
        tracker.log_summary({"train_loss": 0.5, "long": "x" * 100_000})
        tracker.log_model(run, {"data_hash": "0" * 64}, {"train": {"path": __file__}})
    assert steps_of(run) == [1, 2, 3, 4]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 4
    assert (run / "curves.html").exists()
    failures = [line for line in said if "W&B failed" in line]
    assert len(failures) == (reason is not None), said
    if reason:
        assert reason in failures[0] and said[-1].endswith("curves.html; W&B: incomplete")
    else:
        (kept,) = offline_runs(run)
        assert kept.artifacts[f"model-{kept.id}"] == "model"
        assert kept.alerts == [("loss spike", "step 3: far above", "WARN")]


@pytest.mark.slow
def test_a_training_whose_tracker_cannot_work_ends_with_its_model(tmp_path):
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": f"{tmp_path}/file/home", "WANDB_RESUME": "sometimes"}
    done = run_script(
        ROOT / "recipes" / "sft.py", "debug=cpu_tiny", "tracking=auto", "tracking.to=[wandb,tensorboard]",
        "trainer.max_steps=1", "run.directory=run", cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("W&B failed, training goes on without it") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [each.step for each in board.Scalars("train/loss")] == [1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"to": ["wandb", "tensorbord"]}, "tracking.to=tensorbord: choose one of .* Did you mean 'tensorboard'"),
        ({"fork_from": "0123abcd"}, r"tracking.fork_from=0123abcd: write RUN\?_step=N"),
        ({"fork_from": "0123abcd?_step=last"}, r"tracking.fork_from=0123abcd\?_step=last: write RUN\?_step=N"),
        ({"fork_from": "0123abcd?_step=1", "to": ["mlflow"]}, "tracking.fork_from: only W&B can fork a run: add wandb"),
    ],
)
def test_a_tracker_or_fork_that_does_not_exist_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrackingConfig(**values)


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_starts_nothing(tmp_path):
    done = run_script(
        ROOT / "recipes" / "sft.py", "debug=cpu_tiny", "tracking=mlflow", "run.directory=run", cwd=tmp_path
    )
    said = "error: tracking.to=mlflow: MLflow is not installed: pip install 'csc-train[mlflow]', or leave it out\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_refused_without_its_password(local_mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:5ec2e7@127.0.0.1:9")
    with pytest.raises(InputError, match=r"tracking.to=mlflow: http://127\.0\.0\.1:9: ") as caught:
        check_trackers(TrackingConfig("off", ["mlflow"]))
    assert "5ec2e7" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+none://127.0.0.1/runs?password=5ec2e7")
    with pytest.raises(InputError, match=r"tracking.to=mlflow: mysql\+none://127\.0\.0\.1/runs: ") as asked:
        check_trackers(TrackingConfig("off", ["mlflow"]))
    assert "5ec2e7" not in str(asked.value)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == MLFLOW_DEFAULTS["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]


@pytest.mark.slow
def test_a_tracker_that_dies_is_said_once_and_the_history_is_whole(empty_store, tmp_path, said):
    run = tmp_path / "run"
    run.mkdir()
    store = shutil.copy(empty_store, run / "mlflow.db")
    (run / "tensorboard").touch()  # in the place of its folder
    config = TrackingConfig("off", ["wandb", "tensorboard", "mlflow"])
    with pytest.raises(RuntimeError, match="as planned"), Tracker(config, run) as tracker:
        tracker.open({"a+b": {"c": 1}})
        tracker.log(1, {"loss": 1.0, "turn 33+": None})
        raise RuntimeError("as planned")
    record = json.loads((run / "tracking.json").read_text())
    assert record == {"mlflow": {"id": tracker.run_ids["mlflow"], "url": f"sqlite:///{store}"}}
    kept = mlflow_run(record["mlflow"])
    assert (kept.info.status, kept.data.params, kept.data.metrics) == ("FAILED", {"a_b.c": "1"}, {"train/loss": 1.0})
    with Tracker(config, run) as tracker:
        tracker.open({"a+b": {"c": 2}}, {"mlflow": kept.info.run_id}, 2)
        with contextlib.closing(sqlite3.connect(store)) as database:
            database.execute("DROP TABLE metrics")
        for step in (2, 3, 4):
            tracker.log(step, {"loss": 1 / step})
    assert steps_of(run) == [1, 2, 3, 4] and tracker.run_ids["mlflow"] == kept.info.run_id
    failures = [line for line in said if "failed, training goes on without it" in line]
    assert [line.split()[0] for line in failures] == ["TensorBoard", "TensorBoard", "MLflow"], said
    assert "no such table: metrics" in failures[-1] and len(failures[-1]) < 400
    assert said[-1].endswith("TensorBoard: incomplete; MLflow: incomplete")


@pytest.mark.slow
@pytest.mark.parametrize("password", ["5ec2e7", "5e@c2e7"])
def test_a_server_that_is_lost_is_named_without_its_password(local_mlflow, monkeypatch, tmp_path, said, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{password}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Reporter("mlflow", TrackingConfig("off", ["mlflow"]), tmp_path, None, 0, {})
    (failure,) = (line for line in said if line.startswith("MLflow failed"))
    assert "127.0.0.1:9" in failure and "c2e7" not in failure


def test_what_a_slow_server_has_not_got_in_time_is_dropped_at_the_end(monkeypatch, tmp_path):
    answers, sent = threading.Event(), []

    class SlowTracker:
        def log(self, row, step):
            sent.append(step)
            assert answers.wait(TIMEOUT_S)

    kind = replace(REPORTERS["tensorboard"], start=lambda *_: (SlowTracker(), {"id": "slow"}))
    monkeypatch.setitem(REPORTERS, "tensorboard", kind)
    reporter = Reporter("tensorboard", TrackingConfig("off"), tmp_path, None, 0, {})
    for step in (1, 2, 3):
        reporter.log({"loss": 1.0}, step)
    assert reporter.close(None, timeout=0.1) == "TensorBoard: incomplete"
    answers.set()
    reporter._thread.shutdown()
    assert sent == [1]


@pytest.mark.slow
def test_a_run_begins_with_the_steps_of_another_and_a_resume_continues_it(no_login, tmp_path):
    first, run = tmp_path / "first", tmp_path / "run"
    write_json(first / "tracking.json", {"id": "0123abcd", "mode": "offline"})  # of an earlier version
    (first / HISTORY_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n')
    config = TrackingConfig("offline", fork_from=f"{first}?_step=3")
    check_trackers(config)
    for step in (1, 2):
        with Tracker(config, run) as tracker:
            tracker.open({})
            tracker.log(step, {"loss": 1.0 / step})
            tracker.log_table("samples", [{"prompt": "a"}], step)
        time.sleep(1)  # W&B names its folders by the second
    one, two = offline_runs(run)
    assert one.id == two.id != "0123abcd"
    assert (one.run.branch_point.run, one.run.branch_point.value) == ("0123abcd", 3)
    assert not two.run.HasField("branch_point")
    assert [list(each.rows) for each in (one, two)] == [[4], [5]]
    assert [one.rows[4]["train/global_step"], two.rows[5]["train/global_step"]] == [4, 5]
    assert two.rows[5]["samples.nrows"] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("first?_step=9", "has 4 steps"), ("?_step=1", "has no W&B run"), ("frist?_step=1", "frist: no such directory")],
)
def test_a_run_that_cannot_be_forked_is_refused(tmp_path, wrong, message):
    write_json(tmp_path / "first" / "tracking.json", {"wandb": {"id": "0123abcd"}})
    (tmp_path / "first" / HISTORY_FILE).write_text('{"step": 4, "loss": 1.0}\n')
    with pytest.raises(InputError, match=message):
        check_trackers(TrackingConfig("offline", fork_from=f"{tmp_path}/{wrong}"))


@pytest.mark.slow
def test_a_dead_network_leaves_the_run_offline_and_says_so(no_login, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    config = TrackingConfig(init_timeout=2)
    assert resolve_mode(config) == "wandb"
    run = open_run(config, tmp_path, "wandb", "0123abcd", {"a": 1})
    assert run.offline and run.id == "0123abcd"
    run.finish()
    wandb.teardown()  # until then the file may not be written out
    assert "W&B does not answer" in capfd.readouterr().out
    (kept,) = offline_runs(tmp_path)
    assert kept.config["a"] == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (SystemExit(75), 75),
        (SystemExit(), 0),
        (KeyboardInterrupt(), 130),
        (InputError("x"), 2),
        (OSError(), 1),
    ],
)
def test_a_run_is_closed_with_the_status_of_its_process(error, status):
    assert exit_code(error) == status


# Files


def test_rows_are_kept_up_to_a_step_and_a_torn_one_is_not(tmp_path):
    lines = JsonlLog(tmp_path / "lines.jsonl")
    lines.truncate_after(3)
    assert lines.read() == []
    for step in (1, 2, 2, 3):
        lines.append({"step": step, "名": step / 2})
    lines.close()
    with lines.path.open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in lines.read()] == [1, 2, 2, 3]
    lines.append({"step": 4})
    assert [line["step"] for line in lines.read()] == [1, 2, 2, 3, 4]
    lines.truncate_after(2)
    assert lines.path.read_text() == '{"step": 1, "名": 0.5}\n{"step": 2, "名": 1.0}\n{"step": 2, "名": 1.0}\n'
    lines.append({"step": 3})
    assert [line["step"] for line in lines.read()] == [1, 2, 2, 3]


def test_a_history_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(InputError, match=rf"{HISTORY_FILE}: cannot write: Is a directory"):
        JsonlLog(tmp_path / HISTORY_FILE).append({"step": 1})


def test_metrics_of_a_step_become_one_row_of_the_table(tmp_path):
    write_csv(tmp_path / "h.csv", [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 1.0}])
    assert (tmp_path / "h.csv").read_text().splitlines() == ["step,loss,eval_loss", "1,2.0,3.0", "2,1.0,"]


# The run's own record


def begun(directory: Path, if_exists: str = "reuse", **values) -> tuple[Run, str]:
    run = Run("sft", {"trainer": values, "run": {"directory": str(directory), "if_exists": if_exists}})
    return run, run.start({"train": "0"})


def test_resuming_with_other_settings_is_refused_with_the_differences(tmp_path):
    begun(tmp_path, learning_rate=1e-5, epochs=3)
    with pytest.raises(InputError) as caught:
        begun(tmp_path, "resume", learning_rate=2e-5, epochs=3)
    assert str(caught.value) == (
        f"{tmp_path}: the run started with other settings: trainer.learning_rate=1e-05, not 2e-05; "
        "resume it as it was by "
        f"run={tmp_path} resume=true, or start a new run by from={tmp_path}"
    )
    assert begun(tmp_path, "resume", learning_rate=1e-5, epochs=3)[1] == "unfinished"


def test_a_run_that_recorded_its_end_did_not_crash(tmp_path, said):
    run, _ = begun(tmp_path / "stopped")
    with pytest.raises(SystemExit):
        run.stop()
    begun(tmp_path / "stopped")
    assert not any("crashed" in line for line in said)
    begun(tmp_path / "stopped")
    assert "crashed" in said[-1]


# Progress


def progress(state: TrainerState, logs: list[tuple[int, dict]]) -> None:
    shown = ProgressReporter()
    shown.on_train_begin(None, state, None)
    for step, values in logs:
        state.global_step = step
        shown.on_step_end(None, state, None)
        shown.on_log(None, state, None, values)
    shown.on_train_end(None, state, None)


LOGS = [
    (step, {"loss": 1 / step, "trained_tokens_per_second": 1234.4, "memory_allocated_gib": 3.21}) for step in (1, 2, 3)
]


def test_without_a_terminal_the_first_and_the_last_step_are_said_and_no_more_than_one_each_half_minute(capsys):
    progress(TrainerState(max_steps=3), [*LOGS, (3, {"eval_loss": 2.0, "epoch": 1.0}), (3, {"train_runtime": 3.0})])
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "step 1/3: loss 1.0000, 1,234 trained tokens/s, 3.2 GiB, 00:00 left",
        "step 3/3: loss 0.3333, 1,234 trained tokens/s, 3.2 GiB, 00:00 left",
        "step 3: eval_loss 2",
        "trained 3 steps in 00:00",
    ]


def test_on_a_terminal_one_line_lives(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress(TrainerState(max_steps=3), LOGS)
    shown = capsys.readouterr()
    assert shown.out == "trained 3 steps in 00:00\n"
    assert "3/3" in shown.err and "loss 0.3333, 1,234 trained tokens/s, 3.2 GiB" in shown.err


def test_other_processes_say_nothing(capsys):
    progress(TrainerState(max_steps=3, is_world_process_zero=False), LOGS)
    assert capsys.readouterr().out == ""
