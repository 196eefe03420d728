"""The model card: read as a card by the hub's own package, with figures of this very model or none."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import manifest_of, small_tokenizer, tiny_config
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import export
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import save_final_model, write_manifest
from csc_train.checkpoints.model_card import write_model_card, write_own_card
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES
from csc_train.data.training_record import write_training_record
from csc_train.inference.config import InferenceConfig
from csc_train.inference.hf import load_final_model
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

CONFIG = {
    "adapter": {"kind": "lora", "rank": 8}, "trainer": {"precision": "fp32", "learning_rate": 1e-4},
    "data": {"train": {"path": "/secret/place/rolecs.jsonl", "source": "RoleCS"}, "evaluation": {"path": None}},
}  # fmt: skip
SENTENCE = "says anything about real support"


def save(directory, mode="joint", seed=0, **facts):
    """A final model of a run, as a training saves it."""
    tokenizer = small_tokenizer("qwen2_5")
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig(mode=mode, language="en"))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2", tokenizer, 0.3))
    manifest = manifest_of(template, **{"base_model": "Qwen/Qwen2.5-7B", "config": CONFIG} | facts)
    save_final_model(directory, model, tokenizer, template.chat_template, manifest)
    return directory


def result(value, low=None, high=None, direction="higher", unit="turns"):
    return {"unit": unit, "value": value, "low": low, "high": high, "direction": direction, "reason": None}


def evaluation(directory, content_hash, incomplete=False, **data):
    """What an evaluation leaves that a card is made of."""
    directory.mkdir(parents=True)
    counts = {"turns": 7, "dialogues": 2, "failed": 0, "incomplete": incomplete}
    scores = {
        "strategy": {"macro-F1": result(0.5)},
        "likelihood": {"NLL": result(2.0, direction="lower", unit="nats per token")},
    }
    scores |= {
        "counts": counts,
        "profiles": {"zh": {"ACC": result(61.5, 60.25, 62.75), "BS": result(None), "B-2": result(1.0)}},
    }
    results = {"untrained base": {"reference": scores}, "trained": {"reference": scores}}
    (directory / "results.json").write_text(json.dumps({"results": results}))
    (directory / "evaluated_model.json").write_text(json.dumps({"content_hash": content_hash}))
    (directory / "resolved.yaml").write_text(json.dumps({"data": data or None}))
    return directory


def card_of(model):
    return ModelCard.load(model / "README.md")


@pytest.mark.parametrize(("revision", "on_hub"), [("abc", True), (None, True), (None, False)])
def test_a_card_without_figures_shows_none(tmp_path, revision, on_hub):
    config = CONFIG if on_hub else CONFIG | {"model": {"init": "random"}}
    base = {"base_model": "Qwen/Qwen2.5-7B" if on_hub else "../base", "base_revision": revision}
    model = save(tmp_path / "first" / "model", config=config, **base)
    turns = (Turn(Speaker.CUSTOMER, "a"), Turn(Speaker.SUPPORTER, "b", STRATEGIES[0]))
    write_training_record(model, [Dialogue("1", turns), Dialogue("2", turns)])
    write_model_card(model)
    card = card_of(model)
    assert card.data.to_dict() == {
        "language": "en", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["customer-support", "csc-train"],
    } | ({"base_model": "Qwen/Qwen2.5-7B"} if on_hub else {})  # fmt: skip
    origin = ("Qwen/Qwen2.5-7B" if on_hub else "random weights") + (f" at {revision}" if revision else "")
    for line in ("# first", f"- Base: {origin}", "- Trained: lora", "| `trainer.learning_rate` | 0.0001 |"):
        assert line in card.content.splitlines(), line
    assert "- Training dialogues: 2, from `rolecs.jsonl`, rows of the source RoleCS\n" in card.content
    assert "None: no complete evaluation" in card.content and "/secret" not in card.content
    assert SENTENCE not in card.content and "\n\n\n" not in card.content and "| `adapter.rank` | 8 |" in card.content


@pytest.mark.slow
def test_figures_are_of_this_very_model_complete_and_with_intervals(tmp_path):
    model = save(tmp_path / "run" / "model")
    before, known = open_source(str(model)), open_source(str(model)).content_hash()
    own = evaluation(tmp_path / "run" / "evaluation", known)
    for wrong in (evaluation(tmp_path / "other", "0" * 64), evaluation(tmp_path / "cut", known, incomplete=True)):
        write_model_card(model, wrong)
        assert card_of(model).data.eval_results is None
    for elsewhere in (tmp_path / "other", own):  # `run` is no run of a training yet: no model's directory is touched
        write_own_card(elsewhere)
        assert card_of(model).data.eval_results is None
    write_manifest(tmp_path / "run", before.manifest)
    write_own_card(own)
    card = card_of(model)
    found, few = card.data.eval_results
    assert (few.metric_type, few.metric_args) == ("bleu", None)  # of too few dialogues for an interval
    assert (found.metric_type, found.metric_value) == ("accuracy", 61.5)
    assert found.metric_args == {"interval_95": [60.25, 62.75]}
    assert (found.dataset_name, found.dataset_config, card.data.model_name) == ("RoleCS", "reference context", "run")
    assert "| reference | zh | ACC | turns | 61.50 [60.25, 62.75] | 61.50 [60.25, 62.75] |" in card.content.splitlines()
    assert "| reference | likelihood | NLL ↓ | nats per token | 2.00 | 2.00 |" in card.content.splitlines()
    assert "BS" not in card.content and "not on this one" not in card.content
    # The card is no part of the model.
    again = open_source(str(model))
    assert not again.unverified() and again.content_hash() == known and again == before
    # A model of an evaluation's run that changed since has no figures of it.
    save(tmp_path / "run" / "model", seed=1)
    assert not (model / "README.md").exists() and not list((tmp_path / "run").glob("model.replaced*"))
    write_own_card(own)
    assert not (model / "README.md").exists()


def test_sample_data_are_said_to_be_synthetic(tmp_path):
    config = CONFIG | {"data": {"train": {"path": "runs/sample/d.jsonl"}, "sample_dialogues": 700}}
    model = save(tmp_path / "demo" / "model", config=config)
    write_model_card(model, evaluation(tmp_path / "e", open_source(str(model)).content_hash(), sample_dialogues=9))
    card = card_of(model)
    assert "synthetic-data" in card.data.tags and card.content.count(SENTENCE) == 2


def test_the_licence_is_that_of_the_card_of_the_base(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.org/l\n---\n")
    model = save(tmp_path / "run" / "model", base_model=str(base))
    write_model_card(model)
    card = card_of(model)
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "qwen", None)
    assert (
        "names the licence qwen (https://x.org/l)" in card.content and "- Base: the local model base\n" in card.content
    )
    (base / "README.md").write_text("---\nlicense: [\n---\n")  # no card: then none is known
    write_model_card(model)
    assert card_of(model).data.license is None and "Not known here" in card_of(model).content


def test_the_licence_of_a_base_of_the_hub_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = save(tmp_path / "run" / "model", base_revision="a" * 40)
    write_model_card(model)
    assert card_of(model).data.license is None
    kept = tmp_path / "cache" / "models--Qwen--Qwen2.5-7B" / "snapshots" / ("a" * 40)
    kept.mkdir(parents=True)
    (kept / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_model_card(model)
    card = card_of(model)
    assert card.data.license == "apache-2.0" and "names the licence apache-2.0" in card.content


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["joint", "given", "reply_only"])
def test_the_code_of_a_card_replies_as_the_model_does(tmp_path, mode, capsys, monkeypatch):
    model = save(tmp_path / "run" / "model", mode)
    write_model_card(model)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(model).content, re.DOTALL)
    monkeypatch.chdir(model)  # the directory that the code means
    exec(code.replace("=256", "=12"), {})
    generator = load_final_model(str(model), InferenceConfig(max_new_tokens=12))
    history = [Turn(Speaker.CUSTOMER, get_language("en").opening)]
    cache = generator.new_cache()
    given = STRATEGIES[0] if mode == "given" else None
    (row,) = cache.add(["d"], [generator.template.prompt_ids(history, given)])
    with torch.inference_mode():
        said = generator.template.tokenizer.decode(cache.step()[row], skip_special_tokens=True)
    assert capsys.readouterr().out.strip("\n") == said.strip("\n") and len(said) > 3


@pytest.mark.slow
def test_an_export_takes_the_figures_of_what_it_was_made_of(tmp_path):
    full = CONFIG | {"adapter": {"kind": "full"}}
    model = save(tmp_path / "run" / "model", config=full)
    export(open_source(str(model)), ExportConfig(output=str(tmp_path / "plain")))
    assert card_of(tmp_path / "plain").data.eval_results is None
    evaluation(tmp_path / "run" / "evaluation", open_source(str(model)).content_hash())
    export(open_source(str(model)), ExportConfig(output=str(tmp_path / "mine"), dtype="bf16"))
    card = card_of(tmp_path / "mine")
    # Of other weights than those that were evaluated, the hub's index holds no figures.
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    assert "Measured on the model that this one was exported from, not on this one." in card.content
    assert "| reference | zh | ACC | turns | 61.50 [60.25, 62.75] | 61.50 [60.25, 62.75] |" in card.content
    difference = open_source(str(tmp_path / "mine")).manifest.export["difference"]
    assert difference > 0 and f"over the largest logit: {difference:.1e}\n" in card.content
    # An adapter says so.
    source = open_source(str(tmp_path / "mine"))
    write_manifest(
        tmp_path / "mine", replace(source.manifest, config=CONFIG, export={"format": "adapter", "step": "4"})
    )
    write_model_card(tmp_path / "mine")
    card = card_of(tmp_path / "mine")
    assert card.data.library_name == "peft" and "- Form: a LoRA adapter of rank 8 " in card.content
    assert "- Step: 4\n" in card.content and "needs the package peft" in card.content
