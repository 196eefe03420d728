"""Reading from the hub: what a user is told when it refuses, and how soon."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_TOKENIZERS, small_tokenizer, tiny_config
from processes import TIMEOUT_S, free_port
from safetensors.torch import load_file, save_file
from servers.hub import HubServer
from transformers import Qwen2ForCausalLM

from csc_train.errors import InputError
from csc_train.models.hub import hub_errors, is_local_path, load_causal_lm
from csc_train.models.tokenizer import load_tokenizer

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
REFUSALS = {
    MODEL: (401, "GatedRepo"),
    "owner/not-granted": (403, "GatedRepo"),
    "owner/absent": (401, "RepoNotFound"),
    "owner/revised": (404, "RevisionNotFound"),
}
PROGRAM = """
import sys, time
waits = []
time.sleep = waits.append
from csc_train.errors import InputError
from csc_train.models.tokenizer import load_tokenizer
for model in sys.argv[1:]:
    waits.clear()
    try:
        load_tokenizer(model)
    except InputError as error:
        print(f"{sum(waits)}|{error}")
"""
"""Loads tokenizers in a separate process: the hub's address and the offline switch are read on import."""


FETCH = """
import sys
from csc_train.errors import InputError
from csc_train.models.hub import snapshot
for model in sys.argv[1:]:
    try:
        print(snapshot(model, "metric model"))
    except InputError as error:
        print(error)
"""


def run_elsewhere(program, arguments, hub, home, **environment):
    """Run a program that knows no hub but `hub`, without a token."""
    foreign = ("hf_", "hugging", "transformers_", "http_proxy", "https_proxy", "all_proxy")
    own = {name: value for name, value in os.environ.items() if not name.lower().startswith(foreign)}
    own |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=home,
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done


def load_elsewhere(models, hub, home, offline):
    """Load each tokenizer: ({model: (seconds waited between attempts, message)}, stderr)."""
    done = run_elsewhere(PROGRAM, models, hub, home, HF_HUB_OFFLINE=offline)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(models), done.stdout
    return {model: (float(time), text) for model, (time, text) in zip(models, lines, strict=True)}, done.stderr


@pytest.mark.slow
def test_a_refusal_of_the_hub_comes_at_once_with_what_to_do(tmp_path):
    with HubServer() as hub:
        hub.refusals = REFUSALS
        answers, stderr = load_elsewhere(REFUSALS, hub, tmp_path, offline="0")
    assert "Retrying" not in stderr
    gated = "accept its licence on its hub page, and set HF_TOKEN or run `hf auth login`, or give a local directory"
    messages = {
        MODEL: f": the model is gated: {gated}",
        "owner/not-granted": f": the model is gated: {gated}",
        "owner/absent": ": no such model on the hub: check the name; a private model needs HF_TOKEN",
        "owner/revised": ": the hub repository has no such branch, tag or commit: check the revision",
    }
    for model, (seconds, message) in answers.items():
        assert f"HEAD /{model}/resolve/main/config.json" in hub.requests
        assert message == model + messages[model]
        assert seconds == 0


@pytest.mark.slow
def test_a_model_of_the_hub_is_downloaded_once_in_one_form_of_its_weights(tmp_path):
    weights = {"model.safetensors": b"s" * 9, "pytorch_model.bin": b"b" * 9, "tf_model.h5": b"h" * 9}
    facts = {"config.json": b"{}", "vocab.txt": b"v", "README.md": b"---\nlicense: mit\n---\n"}
    with HubServer() as hub:
        hub.refusals = REFUSALS
        hub.add("models", "owner/both", facts | weights, private=False)
        hub.add("models", "owner/old", facts | {"pytorch_model.bin": b"b" * 9}, private=False)
        models = {"owner/both": "model.safetensors", "owner/old": "pytorch_model.bin"}
        printed = run_elsewhere(FETCH, [*models], hub, tmp_path).stdout.splitlines()
        for found, expected in zip(printed, models.values(), strict=True):
            files = {file.name: file.read_bytes() for file in Path(found).iterdir()}
            assert files == facts | {expected: weights[expected]}
        hub.requests.clear()
        *again, refused = run_elsewhere(FETCH, [*models, "owner/absent"], hub, tmp_path).stdout.splitlines(True)
        offline = run_elsewhere(FETCH, [*models], hub, tmp_path, HF_HUB_OFFLINE="1").stdout.splitlines()
        assert [path.strip() for path in again] == offline == printed
        assert not [each for each in hub.requests if each.startswith("GET") and "resolve" in each]
    assert refused == "owner/absent: no such model on the hub: check the name; a private model needs HF_TOKEN\n"


@pytest.mark.slow
def test_offline_with_an_empty_cache_sends_no_request(tmp_path):
    with HubServer() as hub:
        answers, _ = load_elsewhere([MODEL], hub, tmp_path, offline="1")
    seconds, message = answers[MODEL]
    assert hub.requests == []
    assert message == (
        f"{MODEL}: cannot load the tokenizer: HF_HUB_OFFLINE is set and the cache has no copy: "
        "check the name, give a local directory, or download it"
    )
    assert seconds == 0


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://no-such-name.invalid"])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(address, tmp_path):
    endpoint = address.format(free_port())
    with HubServer() as hub:
        hub.add("models", "owner/cached", {"config.json": b"{}", "model.safetensors": b"s"}, private=False)
        (cached,) = run_elsewhere(FETCH, ["owner/cached"], hub, tmp_path).stdout.splitlines()
    done = run_elsewhere(PROGRAM, ["owner/mistyped"], hub, tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout == (
        f"0|owner/mistyped: cannot load the tokenizer: {endpoint} cannot be reached and the cache has no copy: "
        "check the name, give a local directory, or download it\n"
    )
    done = run_elsewhere(FETCH, ["owner/cached"], hub, tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout.splitlines() == [cached] and "Retrying" not in done.stderr


def test_a_directory_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", None)  # no attempt is repeated
    for path in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere", "a/b/c", "nowhere"):
        with pytest.raises(InputError) as caught:
            load_tokenizer(path)
        assert str(caught.value) == f"{path}: no such model directory"


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


def test_a_directory_is_known_from_a_hub_id(tmp_path, monkeypatch):
    assert not is_local_path(MODEL)
    assert all(is_local_path(path) for path in ("./a", "/a/b", "~/a", "../a", "a", "a/b/c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert is_local_path("owner/model")
    assert load_tokenizer(str(SMALL_TOKENIZERS / "qwen2")).is_fast


def test_a_model_that_lacks_weights_is_refused_not_made_up(tmp_path):
    model = Qwen2ForCausalLM(tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.5))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    whole = load_causal_lm(str(tmp_path)).state_dict()
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], value) for name, value in model.state_dict().items())
    lost = [name for name in weights if "layers.1.mlp" in name]
    save_file({name: value for name, value in weights.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{len(lost)} tensors of the model are missing, the first .*layers\.1\.mlp"):
        load_causal_lm(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="has no readable model"):
        load_causal_lm(str(tmp_path))


def test_only_failures_to_read_are_explained():
    """A bug in what runs inside must not be reported as a missing model."""
    with pytest.raises(ZeroDivisionError), hub_errors(str(SMALL_TOKENIZERS), "model"):
        raise ZeroDivisionError
    reason = r"has no readable model \(OSError\)"
    with pytest.raises(InputError, match=reason), hub_errors(str(SMALL_TOKENIZERS), "model"):
        raise OSError
