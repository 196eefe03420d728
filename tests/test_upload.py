"""Uploading to the hub: a private repository, one commit of what is missing, and what a user is told when it fails."""

import logging
import time
from dataclasses import replace

import pytest
from conftest import manifest_of, small_tokenizer
from huggingface_hub import constants
from servers.hub import DROP, LATE, HubServer

from csc_train.checkpoints import upload
from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.content import hash_files
from csc_train.checkpoints.manifest import write_manifest
from csc_train.checkpoints.upload import check_push, push
from csc_train.errors import InputError
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

NAME = "owner/trained"
WEIGHTS = {"model-00001-of-00002.safetensors": bytes(range(256)) * 40, "model-00002-of-00002.safetensors": b"w" * 999}
FILES = {"config.json": b"{}", "model.safetensors.index.json": b'{"a": 1}', **WEIGHTS}


@pytest.fixture(scope="module")
def manifest():
    """That of an export."""
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    facts = {"exported_from": "/runs/demo/checkpoints/checkpoint-30", "export": {"format": "merged", "step": "30"}}
    return replace(manifest_of(template), **facts)


@pytest.fixture
def exported(tmp_path, manifest):
    """An export, as far as an upload looks at it, and a file beside that is none of it."""
    directory = tmp_path / "exported"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    write_manifest(directory, replace(manifest, files=hash_files(directory)))
    (directory / "README.md").write_text("---\ntags:\n- csc-train\n---\n# Demo\n")
    (directory / "notes.txt").write_text("private")
    return directory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, for a token that may write; nobody waits for it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with HubServer() as server, server.client(monkeypatch, tmp_path, "hf_writes"):
        yield server


def upload_to(name, directory, **settings):
    config = ExportConfig(source=str(directory), push_to=name, **settings)
    push(check_push(config), directory, config)


def refusal(directory, name=NAME, **settings):
    with pytest.raises(InputError) as caught:
        upload_to(name, directory, **settings)
    text = str(caught.value)
    assert "\n" not in text and "hf_" not in text, text
    return text


def files_of(hub, name=NAME):
    return {path: content for path, content in hub.head(name).files.items() if path != ".gitattributes"}


def whole(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "notes.txt"}


def sent(hub, what):
    return [request.split("?")[0] for request in hub.requests if request.startswith(what)]


def test_an_export_is_uploaded_in_one_commit_into_a_private_repository(hub, exported, caplog):
    caplog.set_level(logging.INFO, logger="csc_train")
    upload_to(NAME, exported)
    assert files_of(hub) == whole(exported)
    repository = hub.repositories["models", NAME]
    assert repository.private and len(repository.commits) == 2 and repository.large == set(WEIGHTS)
    assert hub.head(NAME).message == "demo: step 30, merged"
    assert (
        "upload: 6 of 6 files, " in caplog.text
        and f"{exported} is {NAME} at commit {hub.head(NAME).oid}" in caplog.text
    )
    hub.requests.clear()
    upload_to(NAME, exported)
    assert (
        len(repository.commits) == 2 and not sent(hub, "PUT") and not any("/commit/" in each for each in hub.requests)
    )
    assert f"{NAME}: commit {hub.head(NAME).oid[:12]} holds all 6 files of {exported}" in caplog.text
    caplog.clear()
    (exported / "README.md").write_text("# Better\n")
    upload_to(NAME, exported)
    assert "upload: 1 of 6 files, 0.0 MB; owner/trained has the other 5" in caplog.text
    assert files_of(hub) == whole(exported) and not sent(hub, "PUT")


def test_a_public_repository_is_made_and_taken_on_request_only(hub, exported):
    upload_to("group/open", exported, push_private=False)
    assert not hub.repositories["models", "group/open"].private
    commits = len(hub.repositories["models", "group/open"].commits)
    assert refusal(exported, "group/open") == (
        "push_to=group/open: the repository is public: add push_private=false, or choose another"
    )
    assert len(hub.repositories["models", "group/open"].commits) == commits


def test_files_of_others_stay_and_weights_of_another_layout_go(hub, exported, caplog):
    caplog.set_level(logging.INFO, logger="csc_train")
    hub.add("models", NAME, {"model.safetensors": b"old", "notes.md": b"mine", "config.json": b"other"})
    upload_to(NAME, exported)
    assert files_of(hub) == whole(exported) | {"notes.md": b"mine"}
    assert f"{NAME} holds other files, which stay: notes.md" in caplog.text
    assert "would mix them with the new ones: model.safetensors" in caplog.text
    assert hub.repositories["models", NAME].commits[0].files["model.safetensors"] == b"old"


@pytest.mark.parametrize("fault", [DROP, LATE, 503], ids=["lost", "arrived", "503"])
@pytest.mark.parametrize(
    "step", ["POST /api/repos/create", "POST .*/preupload/", "POST .*/batch", "PUT ", "POST .*/commit/"]
)
def test_a_broken_connection_at_any_step_leaves_one_whole_commit(hub, exported, step, fault, caplog):
    caplog.set_level(logging.INFO, logger="csc_train")
    hub.faults = [(step, fault)]
    upload_to(NAME, exported)
    assert not hub.faults
    assert files_of(hub) == whole(exported) and len(hub.repositories["models", NAME].commits) == 2
    landed = step.endswith("commit/") and fault == LATE
    assert sum("/commit/main" in each for each in hub.requests) == (2 if step.endswith("commit/") and not landed else 1)
    assert len(sent(hub, "PUT")) == len(WEIGHTS) + step.startswith("PUT"), "what arrived is not sent again"
    assert landed == ("holds all 6 files" in caplog.text)
    assert "hf_" not in caplog.text and "X-Signature" not in caplog.text


def test_a_commit_of_somebody_else_in_between_is_not_lost(hub, exported, monkeypatch):
    """The parent is named: the hub refuses, and the next look sees both."""
    real = upload._message

    def slow(*arguments):
        if len(hub.repositories["models", NAME].commits) == 1:
            hub.add("models", NAME, {"theirs.txt": b"theirs"})
        return real(*arguments)

    monkeypatch.setattr(upload, "_message", slow)
    upload_to(NAME, exported)
    assert files_of(hub) == whole(exported) | {"theirs.txt": b"theirs"}
    assert len(hub.repositories["models", NAME].commits) == 3
    assert sum("/commit/main" in each for each in hub.requests) == 2, "the first is refused"


def test_an_upload_that_ends_in_between_is_resumed_without_an_export(hub, exported):
    before = whole(exported)
    hub.faults = [("POST .*/commit/", DROP)] * 4
    text = refusal(exported)
    assert text.endswith(
        f"the model in {exported} is whole; to upload it: python recipes/export.py source={exported} push_to={NAME}"
    )
    assert whole(exported) == before and files_of(hub) == {}
    hub.requests.clear()
    upload_to(NAME, exported)
    assert files_of(hub) == before and not sent(hub, "PUT"), "the weights are there"


def test_an_interrupted_upload_says_how_to_resume(hub, exported, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="csc_train")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(upload, "_message", interrupt)
    with pytest.raises(SystemExit) as caught:
        upload_to(NAME, exported, push_private=False)
    assert caught.value.code == 130 and files_of(hub) == {}
    assert f"interrupted: the model in {exported} is whole; to upload it: " in caplog.text
    assert caplog.text.rstrip().endswith(f"push_to={NAME} push_private=false")


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "HF_TOKEN is not set: "), ("hf_wrong", "the hub does not accept the token in HF_TOKEN: "),
        ("hf_writes\x07", "HF_TOKEN holds characters that no token has: "), ("hf_reads", "has no right to that: "),
    ],
)  # fmt: skip
def test_a_token_that_is_wrong_is_refused_before_anything_is_written(hub, exported, monkeypatch, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    text = refusal(exported)
    assert text.startswith(f"push_to={NAME}: ") and reason in text.replace("\x07", "")
    assert not hub.repositories and not [each for each in hub.requests if not each.startswith("GET")]


def test_what_the_hub_refuses_is_said_in_one_line_without_secrets(hub, exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_narrow")  # whose right only a refusal tells
    assert "has no right to that: give it the permission to write there" in refusal(exported)
    monkeypatch.setenv("HF_TOKEN", "hf_writes\n")  # as from a file
    assert "the owner must be owner or group" in refusal(exported, "stranger/trained")
    hub.faults = [("PUT ", 403)] * 2
    assert "has no right to that" in refusal(exported)
    hub.faults = [("POST .*/batch", 413)]
    assert "HTTP 413: planned; the model in " in refusal(exported)
    assert upload._bare("no hf_writes\n at https://a/b?X-Sig=c&d=e ok?") == "no HF_TOKEN at https://a/b ok?"
    hub.faults = [("POST .*/commit/", 500)] * 4
    assert "HTTP 500: planned; " in refusal(exported)


def test_a_directory_that_changed_since_it_was_written_is_not_uploaded(hub, exported):
    (exported / "config.json").write_bytes(b"{ }")
    text = refusal(exported)
    assert text == f"{exported}: not as it was written (config.json has 3 bytes, not 2): export the model again"
    assert not hub.repositories


def test_without_the_hub_nothing_is_begun(hub, exported, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: upload from a machine that reaches the hub" in refusal(exported)
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["trained", "a/b/c", "owner/", "/name", "owner/na me", "owner/x.git", "-a/b", "o/a--b", "https://hf/o/n"]
)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(InputError, match=r"no name of a hub repository: write OWNER/NAME$"):
        ExportConfig(source="x", output="y", push_to=name)


def test_settings_of_an_export_need_an_output():
    with pytest.raises(InputError, match=r"^format=adapter: changes an export: add output=DIR"):
        ExportConfig(source="x", push_to=NAME, format="adapter")
    assert ExportConfig(source="x", push_to="Owner_1/my.model-2").output is None
