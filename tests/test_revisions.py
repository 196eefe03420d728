"""Models and data of the hub are taken at the commits that a run found when it started."""

import dataclasses
import json
import logging

import datasets
import pytest
import yaml
from conftest import load_recipe, small_tokenizer, tiny_config
from huggingface_hub import constants
from servers.hub import HubServer
from transformers import Qwen2ForCausalLM

from csc_train.checkpoints.revisions import pin_revisions
from csc_train.config.compose import compose, to_container
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.models.hub import snapshot
from csc_train.runs.comparison import RESULTS_FILE
from csc_train.runs.directory import Run
from csc_train.suites.plan import _other_metrics

MODEL, DATA, OTHER = "owner/model", "owner/dialogues", "owner/chats"
MIX = f"data.mix=[{{path: {DATA}}}, {{path: {OTHER}, also: [{DATA}]}}]"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with a model and two data sets, each of one commit `v1`."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server, server.client(monkeypatch, tmp_path):
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        for kind, name in (("models", MODEL), ("datasets", DATA), ("datasets", OTHER)):
            server.add(kind, name, {"config.json": b"{}"}, "v1", private=False)
        yield server


def composed(*arguments):
    return compose("sft", ["model=own", f"model.path={MODEL}", "data=mix", MIX, *arguments])


def found_in(config):
    first, second = config.data.mix
    return [config.model.revision, first.path, second.path, *second.also]


def expected(hub):
    model, data, other = (hub.head(name, kind).oid for kind, name in hub.repositories)
    return [model, f"{DATA}@{data}", f"{OTHER}@{other}", f"{DATA}@{data}"]


def move(hub):
    for kind, name in hub.repositories:
        hub.add(kind, name, {"config.json": b"{ }"}, "v2")


def record(config, directory):
    """What the run writes when it starts."""
    directory.mkdir()
    (directory / "resolved.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))


@pytest.mark.slow
def test_a_run_takes_and_keeps_the_commits_of_its_start(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="csc_train")
    config = pin_revisions(composed())
    first = expected(hub)
    assert found_in(config) == first
    assert [entry.label for entry in config.data.mix] == ["dialogues", "chats"]
    record(config, tmp_path / "run")
    hub.requests.clear()
    assert found_in(pin_revisions(compose("sft", ["run=run", "resume=true"]))) == first
    assert not hub.requests, "a recorded commit in the cache needs no request"
    move(hub)
    again = ["run.directory=run", "run.if_exists=resume"]
    assert found_in(pin_revisions(composed(*again))) == first
    assert f"{MODEL} has the commit {expected(hub)[0][:12]} by now; the run keeps {first[0][:12]}" in caplog.text
    assert f"{DATA} has the commit" in caplog.text
    assert found_in(pin_revisions(composed("run.directory=run", "run.if_exists=reuse"))) == first
    assert found_in(pin_revisions(composed("run.directory=run", "run.if_exists=replace"))) == expected(hub)
    assert found_in(pin_revisions(composed(*again, "model.revision=v2")))[0] == expected(hub)[0], "the run refuses it"


@pytest.mark.slow
def test_a_resume_with_another_commit_is_refused(hub, tmp_path):
    record(pin_revisions(composed()), tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"recipe": "sft", "status": "stopped", "inputs": {}}')
    before = hub.head(MODEL).oid
    move(hub)
    config = pin_revisions(composed("run.directory=run", "run.if_exists=resume", "model.revision=v2"))
    with pytest.raises(InputError, match=rf"other settings: model.revision={before}, not {hub.head(MODEL).oid};"):
        Run("sft", dataclasses.asdict(config)).start({})


@pytest.mark.slow
def test_a_given_revision_and_a_cache_without_the_hub(hub, monkeypatch):
    first = expected(hub)
    move(hub)
    asked = ["model.revision=v1", f"data.mix=[{{path: '{DATA}@v1'}}]"]
    config = pin_revisions(composed(*asked))
    assert (config.model.revision, config.data.mix[0].path) == (first[0], first[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = pin_revisions(composed("model.revision=v1"))
    assert found_in(config) == [first[0], DATA, OTHER, DATA], "the cache does not say which commit the data are"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model.path=owner/absent"], "owner/absent: no such model on the hub: check the name"),
        (["model.revision=v3"], f"{MODEL}: the hub repository has no such branch, tag or commit"),
        (["data.mix=[{path: owner/absent}]"], "owner/absent: no such data set on the hub: check the name; a private"),
        ([f"data.mix=[{{path: '{DATA}@v3'}}]"], f"{DATA}: the hub repository has no such branch, tag or commit"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(hub, arguments, reason, tmp_path):
    hub.refusals = {}
    with pytest.raises(InputError) as caught:
        pin_revisions(composed(*arguments))
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_data_are_read_at_their_commit(hub, tmp_path):
    dialogues = generate_sample(6, 0)
    for count in (4, 6):
        write_dialogues(tmp_path / "train.jsonl", dialogues[:count])
        hub.add(
            "datasets", DATA, {"train.jsonl": (tmp_path / "train.jsonl").read_bytes(), "config.json": None}, str(count)
        )
    first, second = (commit.oid for commit in hub.repositories["datasets", DATA].commits[1:])
    assert [each.id for each in read_dialogues(f"{DATA}@{first}")] == [each.id for each in dialogues[:4]]
    assert len(read_dialogues(f"{DATA}@{second}")) == len(read_dialogues(DATA)) == 6


def test_a_snapshot_is_of_the_given_revision(hub):
    move(hub)
    assert snapshot(f"{MODEL}@v1", "metric model").name == hub.repositories["models", MODEL].commits[0].oid
    assert (snapshot(f"{MODEL}@v1", "model") / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("asked", "scored", "other"),
    [
        ("owner/bert", f"owner/bert@{'a' * 40}", False), ("owner/bert@v1", f"owner/bert@{'a' * 40}", False),
        (f"owner/bert@{'b' * 40}", f"owner/bert@{'a' * 40}", True), ("owner/bert@v2", "owner/bert@v1", True),
        ("owner/bert", f"owner/other@{'a' * 40}", True), ("owner/bert", None, True),
    ],
)  # fmt: skip
def test_a_suite_does_not_score_again_with_the_commit_of_the_same_model(tmp_path, asked, scored, other):
    own = ["checkpoint=runs/first", "template=joint", "data=files", "data.train.path=d.jsonl"]
    config = compose("evaluate", [*own, f"metrics.bertscore_model={asked}"])
    metrics = to_container(config)["metrics"] | {"bertscore_model": scored}
    (tmp_path / RESULTS_FILE).write_text(json.dumps({"provenance": {"metrics": metrics}}))
    assert _other_metrics(tmp_path, config) == other


class Started(Exception):
    """A recipe got as far as its run directory."""


@pytest.mark.parametrize("recipe", ["sft", "evaluate"])
def test_recipes_start_their_runs_with_commits(hub, tmp_path, monkeypatch, recipe):
    tokenizer = small_tokenizer("qwen2_5")
    model = tmp_path / "saved"
    Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    commit = hub.add("models", MODEL, {file.name: file.read_bytes() for file in model.iterdir()})
    started = []

    def start(self, name, config, outputs=()):
        started.append(config)
        raise Started

    monkeypatch.setattr(Run, "__init__", start)
    data = ["data=files", f"data.train.path={DATA}", "run.directory=run"]
    own = {
        "sft": ["model=own", f"model.path={MODEL}"],
        "evaluate": [f"checkpoint={MODEL}", "template=joint", "evaluation.base=false"],
    }[recipe]
    with pytest.raises(Started):
        load_recipe(recipe).main(compose(recipe, [*own, *data]))
    (config,) = started
    assert config["data"]["train"]["path"] == expected(hub)[1]
    taken = config["model"]["revision"] if recipe == "sft" else config["checkpoint"]
    assert taken == (commit if recipe == "sft" else f"{MODEL}@{commit}")
