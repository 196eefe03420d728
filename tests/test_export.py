"""An export writes over nothing but an earlier export; the lines of its model card stay whole."""

import contextlib
import copy
import fcntl
import importlib
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from conftest import manifest_of, small_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csc_train.checkpoints import export as exports
from csc_train.checkpoints import manifest as manifests
from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.content import hash_files
from csc_train.checkpoints.export import TOLERANCE, _logits, claim_output, export, with_weights
from csc_train.checkpoints.locate import ModelSource, open_source
from csc_train.checkpoints.manifest import save_final_model, write_manifest
from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.inference.config import InferenceConfig
from csc_train.inference.hf import load_final_model
from csc_train.models.experts import replayed_decisions
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply


@pytest.fixture
def source(tmp_path):
    """The final model of a run `run`, as far as `claim_output` looks at it."""
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    write_manifest(model, manifest_of(template))
    return ModelSource(model, manifest_of(template), finished=True)


@pytest.mark.parametrize("if_exists", ["error", "replace"])
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (".", "in the same place"), ("run", "in the same place"), ("run/model", "in the same place"),
        ("run/model/inside", "in the same place"), ("linked", "in the same place"), ("files", "is no export"),
        ("trained", "is no export"),
    ],
)  # fmt: skip
def test_an_export_never_writes_over_what_is_no_export(source, tmp_path, output, reason, if_exists):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.safetensors").write_text("precious")
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.json").write_text("{}")
    write_manifest(tmp_path / "trained", source.manifest)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=rf"^output=.*: .*{reason}.*: choose another output$"):
        claim_output(source, ExportConfig(output=str(tmp_path / output), if_exists=if_exists))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_export_is_replaced_only_on_request_and_by_one_process(source, tmp_path):
    output = tmp_path / "out"
    settings = {name: ExportConfig(output=str(output), if_exists=name) for name in ("error", "replace")}
    claim_output(source, settings["error"]).release()
    output.mkdir()
    (output / "config.json").write_text("{}")
    write_manifest(output, replace(source.manifest, exported_from="run/model"))
    with pytest.raises(InputError, match=r"holds an export: choose another output, or add if_exists=replace$"):
        claim_output(source, settings["error"])
    with claim_output(source, settings["replace"]):
        (lock,) = tmp_path.glob(".*")
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: in use by another process: wait for its end"):
            claim_output(source, settings["replace"])


@pytest.fixture
def compressed_tensors():
    """compressed-tensors, which CI has."""
    return (
        importlib.import_module("compressed_tensors")
        if os.environ.get("CI")
        else pytest.importorskip("compressed_tensors")
    )


def save_trained(directory, architecture, change=lambda model: None):
    """Write a final model in fp32."""
    tokenizer = small_tokenizer("qwen2_5")
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, 0.1))
    change(model)
    manifest = manifest_of(template, config={"adapter": {"kind": "full"}, "trainer": {"precision": "fp32"}})
    save_final_model(directory, model, tokenizer, template.chat_template, manifest)
    return directory


@pytest.fixture
def trained(tmp_path):
    return save_trained(tmp_path / "model", "qwen2")


@pytest.mark.slow
def test_an_export_in_float8_rounds_the_linear_layers_and_is_read_by_transformers(
    compressed_tensors, trained, tmp_path
):
    output = tmp_path / "fp8"
    difference = export(open_source(str(trained)), ExportConfig(output=str(output), format="fp8"))
    assert 1e-3 < difference < 0.2 and f"{difference:.1e}" in (output / "README.md").read_text("utf-8")
    before, after = load_file(trained / "model.safetensors"), load_file(output / "model.safetensors")
    linear = {name for name, value in before.items() if "_proj.weight" in name}
    assert {name for name, value in after.items() if value.dtype == torch.float8_e4m3fn} == linear
    assert after.keys() == before.keys() | {f"{name}_scale" for name in linear}
    for name in linear:
        weight, scale = before[name], after[f"{name}_scale"]
        assert scale.shape == (len(weight), 1)
        # Of three bits behind the point half of the last one, or of the smallest number.
        allowed = torch.maximum(weight.abs() / 2**4, scale / 2**10) * 1.0001
        assert ((after[name].float() * scale - weight).abs() <= allowed).all()
        assert (after[name].float().abs().amax(1) == 448).all()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name not in linear)
    settings = json.loads((output / "config.json").read_text("utf-8"))["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "float-quantized")
    assert not open_source(str(output)).unverified()
    turns = (Turn(Speaker.SUPPORTER, "您好", STRATEGIES[0]), Turn(Speaker.CUSTOMER, "你好"))
    settings = InferenceConfig(max_new_tokens=4)
    assert isinstance(load_final_model(str(output), settings).reply(turns), Reply)


def test_an_export_in_float8_is_refused_if_a_scale_is_wrong_or_the_library_is_missing(
    compressed_tensors, trained, tmp_path, monkeypatch
):
    def spoil(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight_scale"][3] *= 1.1
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return hash_files(directory)

    settings = ExportConfig(output=str(tmp_path / "fp8"), format="fp8")
    monkeypatch.setattr(manifests, "hash_files", spoil)
    with pytest.raises(InputError, match="the logits of the exported model differ by"):
        export(open_source(str(trained)), settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^format=fp8: compressed-tensors is not installed: run `pip install .\[comp"):
        export(open_source(str(trained)), settings)
    assert not (tmp_path / "fp8").exists()


EXPERT = "model.layers.1.mlp.experts.0.{}_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_5_moe_text"])
def test_an_export_forgives_only_decisions_of_routers_between_experts_that_tie(
    architecture, tmp_path, monkeypatch, said
):
    @torch.no_grad()
    def tie(model):  # experts 0 and 1 of very different outputs, apart by less than bf16 can tell
        rows = model.model.layers[1].mlp.gate.weight
        rows[1] = rows[0] + 1e-4 * torch.randn(32)
        model.model.layers[1].mlp.experts.down_proj.mul_(3)

    trained = save_trained(tmp_path / "model", architecture, tie)
    before = load_file(trained / "model.safetensors")
    assert EXPERT.format("gate") in before and before[EXPERT.format("down")].shape == (32, 16)
    settings = {name: ExportConfig(output=str(tmp_path / name), dtype="bf16") for name in ("bf16", "spoilt", "blind")}
    # The gated delta nets make more of a rounding than is usual, and of a random error of that size as well.
    usual = export(open_source(str(trained)), settings["bf16"]) < TOLERANCE[torch.bfloat16]
    assert usual == (architecture == "qwen3_moe")
    (note,) = [line for line in said if "routers" in line]
    assert re.search(r"^note: routers decide differently where scores tie within \d.\de-0[345] of the largest$", note)
    written = load_file(tmp_path / "bf16" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], before[name].bfloat16()) for name in before)
    said, now = (json.loads((each / "config.json").read_text()) for each in (trained, tmp_path / "bf16"))
    assert {key for key in now if now[key] != said.get(key)} == {"dtype"}

    def spoil(patch, name, change):
        def hash_spoilt(directory):
            tensors = load_file(directory / "model.safetensors")
            change(tensors[name])
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
            return hash_files(directory)

        patch.setattr(manifests, "hash_files", hash_spoilt)

    gate = "model.layers.1.mlp.gate.weight"
    for name, change, what in (
        (gate, lambda rows: rows[3].mul_(2), "a router's decisions"),
        (gate, lambda rows: rows.mul_(3), "the logits"),  # the same decisions with other weights
        (EXPERT.format("down"), lambda weight: weight.mul_(3), "the logits"),
    ):
        with monkeypatch.context() as patch:
            spoil(patch, name, change)
            with pytest.raises(InputError, match=f"{what} of the exported model differ by"):
                export(open_source(str(trained)), settings["spoilt"])
    replays = iter([lambda *_: contextlib.nullcontext([])])  # of the written model; not of the random errors
    monkeypatch.setattr(exports, "replayed_decisions", lambda *facts: next(replays, replayed_decisions)(*facts))
    with pytest.raises(InputError, match="the logits of the exported model differ by"):
        export(open_source(str(trained)), settings["blind"])
    assert not (tmp_path / "spoilt").exists() and not (tmp_path / "blind").exists()


def test_experts_are_not_exported_in_float8(compressed_tensors, tmp_path):
    trained = save_trained(tmp_path / "model", "qwen3_moe")
    with pytest.raises(InputError, match=r"^format=fp8: .*model has experts, which are not rounded: choose format=mer"):
        export(open_source(str(trained)), ExportConfig(output=str(tmp_path / "fp8"), format="fp8"))


def test_logits_are_those_of_fp32_weights_though_only_one_layer_has_them_at_a_time():
    config = tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.1, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: seen.append([each.dtype for each in model.model.layers.parameters()]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(_logits(model, {}), _logits(wide, {}))
    shares = [dtypes.count(torch.float32) / len(dtypes) for dtypes in seen]
    assert shares == [1 / len(shares)] * len(shares) and len(shares) > 1
    trained = {"model.layers.1.mlp.up_proj.weight": torch.randn(wide.model.layers[1].mlp.up_proj.weight.shape)}
    changed = with_weights(wide, trained, None)
    assert torch.equal(_logits(model, trained), _logits(changed, {}))
    assert not torch.equal(_logits(model, trained), _logits(model, {}))
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and after[name].dtype == value.dtype for name, value in before.items())
