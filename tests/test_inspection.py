"""Base models with one thing wrong: preflight and training find the same, repair it or refuse it in one line."""

import json
import random
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from conftest import load_recipe, random_dialogue, sampled, small_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import export
from csc_train.checkpoints.locate import open_source
from csc_train.config.compose import compose
from csc_train.config.explain import all_settings
from csc_train.config.recipes import schema_of
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.launching.preflight.checks import run_preflight
from csc_train.models.hub import load_causal_lm
from csc_train.runs.claim import release_all

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A directory with a small tied model, its tokenizer, and dialogues."""
    folder = tmp_path_factory.mktemp("job")
    tokenizer = small_tokenizer("qwen2_5")
    torch.manual_seed(0)
    config = tiny_config("qwen2", tokenizer, 0.02, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    write_dialogues(folder / "dialogues.jsonl", [random_dialogue(rng) for _ in range(12)])
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    yield
    release_all()


def settings(name: str, **values) -> Callable[[Path], None]:
    """Change values of a JSON file, which need not exist."""

    def change(path: Path) -> None:
        known = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(known | values))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(content)


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    file = "model.safetensors"
    return lambda path: save_file(change(load_file(path / file)), path / file, metadata={"format": "pt"})


def cut(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def adapter_only(path: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (path / name).unlink()
    (path / "adapter_config.json").write_text("{}")


def lost_shard(path: Path) -> None:
    no_weights(path)
    AutoModelForCausalLM.from_config(tiny_config("qwen2", small_tokenizer("qwen2_5"), 0.02)).save_pretrained(
        path, max_shard_size="40KB"
    )
    sorted(path.glob("model-*.safetensors"))[0].unlink()


def rules(path: Path) -> None:
    found = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(found | {"normalizer": {"type": "NFKC"}}))


def untie(change: float) -> Callable[[dict], dict]:
    return lambda found: found | {HEAD: found[EMBEDDING] * change}


def layer(found: dict) -> dict:
    return found | {"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}


CONFIG, GENERATION = "config.json", "generation_config.json"
REFUSED = {
    "no config": (lambda path: (path / CONFIG).unlink(), f"{CONFIG}: cannot read: No such file"),
    "broken config": (text(CONFIG, "{"), f"{CONFIG}: broken JSON at line 1"),
    "empty config": (text(CONFIG, ""), f"{CONFIG}: broken JSON at line 1"),
    "list for a config": (text(CONFIG, "[]"), f"{CONFIG}: broken JSON: not an object"),
    "config of nothing": (text(CONFIG, "{}"), f"no readable {CONFIG} ("),
    "unknown family": (settings(CONFIG, model_type="gpt2"), "model.architecture.model_type=gpt2: choose one of qwen2"),
    "unknown model type": (settings(CONFIG, model_type="nope"), f"no readable {CONFIG} ("),
    "no language model": (
        settings(CONFIG, architectures=["Qwen2ForSequenceClassification"]),
        "choose a model of class",
    ),
    "text for a width": (settings(CONFIG, hidden_size="32"), f"no readable {CONFIG} ("),
    "negative layers": (settings(CONFIG, num_hidden_layers=-1), f"no readable {CONFIG} ("),
    "no heads": (settings(CONFIG, num_attention_heads=0), "job/model"),
    "another width": (settings(CONFIG, intermediate_size=48), "has another shape than config.json says"),
    "another kind of layer": (settings(CONFIG, layer_types=["chunked_attention"] * 2), "layer_types"),
    "dropout": (settings(CONFIG, attention_dropout=0.1), "the model has attention_dropout; use packing=off"),
    "few positions": (settings(CONFIG, max_position_embeddings=64), "the model has 64 positions, but the longest"),
    "untied, no head": (
        settings(CONFIG, tie_word_embeddings=False),
        f"{HEAD} is missing from the files (tensors like it: 1)",
    ),
    "4 bits": (
        settings(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        f"{CONFIG}: the weights are quantized (bitsandbytes)",
    ),
    "GPTQ": (settings(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), "are quantized (gptq)"),
    "AWQ": (settings(CONFIG, quantization_config={"quant_method": "awq", "bits": 4}), "are quantized (awq)"),
    "FP8": (settings(CONFIG, quantization_config={"quant_method": "fp8"}), "are quantized (fp8)"),
    "FP8 unsaid": (
        weights(lambda found: {name: value.to(torch.float8_e4m3fn) for name, value in found.items()}),
        "is stored as F8_E4M3",
    ),
    "broken generation config": (text(GENERATION, "{"), f"{GENERATION}: broken JSON"),
    "more replies than beams": (settings(GENERATION, num_return_sequences=3, num_beams=2), "num_return_sequences"),
    "list for a generation config": (text(GENERATION, "[]"), f"{GENERATION}: broken JSON: not an object"),
    "adapter beside": (
        settings("adapter_config.json", peft_type="LORA", r=4),
        "adapter_config.json: an adapter is no base",
    ),
    "adapter only": (adapter_only, "adapter_config.json: an adapter is no base"),
    "no weights": (no_weights, "neither model.safetensors nor an index of its shards"),
    "cut weights": (cut, "model.safetensors: not a whole weights file"),
    "lost shard": (lost_shard, "shards are missing, the first model-00001"),
    "broken index": (
        lambda path: (no_weights(path), text("model.safetensors.index.json", '{"weight_map": []}')(path)),
        "no readable model.safetensors.index.json",
    ),
    "lost tensor": (
        weights(lambda found: {name: value for name, value in found.items() if "layers.1.mlp" not in name}),
        "model.layers.1.mlp.down_proj.weight is missing from the files (tensors like it: 3)",
    ),
    "more layers": (weights(layer), "model.layers.2.mlp.up_proj.weight is none of this model"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
    "broken tokenizer": (text("tokenizer.json", "{"), "has no readable tokenizer"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "has no readable tokenizer"),
    "list for a tokenizer config": (text("tokenizer_config.json", "[]"), "has no readable tokenizer"),
    "few embeddings": (
        lambda path: (
            settings(CONFIG, vocab_size=590, pad_token_id=None)(path),
            weights(lambda found: found | {EMBEDDING: found[EMBEDDING][:590].clone()})(path),
        ),
        "the model embeds 590 tokens, the tokenizer has 597",
    ),
}
REPAIRED = {
    "temperature without sampling": (settings(GENERATION, temperature=0.6, top_p=0.9), "do_sample is taken as true"),
    "own head": (weights(untie(2)), "tie_word_embeddings=true, but lm_head.weight differs"),
    "own rules": (rules, "transformers' Qwen2Tokenizer has another normalizer: the file's are used"),
}
NOTHING_WRONG = {
    "copied head": weights(untie(1)),
    "fp16": weights(lambda found: {name: value.half() for name, value in found.items()}),
    "pickled": lambda path: (torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin"),
                             no_weights(path)),
    "no generation config": lambda path: (path / GENERATION).unlink(),
    "left padding": settings("tokenizer_config.json", padding_side="left", model_max_length=64, pad_token=None),
}  # fmt: skip


def overrides(job: Path, path: Path, *more: str) -> list[str]:
    return [
        "model=qwen2_5_7b", f"model.path={path}", "data=files", f"data.train.path={job / 'dialogues.jsonl'}",
        "data.evaluation_fraction=0.3", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.packs_per_step=1",
        "tracking=off", "validation.eval_steps=0", "run.directory=run", *more,
    ]  # fmt: skip


def preflight(job: Path, path: Path, *more: str) -> list:
    return run_preflight(compose("preflight", [*overrides(job, path, *more), "cluster.gpus_per_node=1"])).checks


def train(job: Path, path: Path, *more: str) -> None:
    load_recipe("sft").main(compose("sft", overrides(job, path, *more)))


def changed(job: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(job / "model", tmp_path / "model")
    change(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_alike(job, tmp_path, name):
    change, message = REFUSED[name]
    path = changed(job, tmp_path, change)
    failed = [check.message for check in preflight(job, path) if check.status == "failed"]
    with pytest.raises(InputError) as caught:
        train(job, path)
    assert str(caught.value) in failed, (failed, str(caught.value))
    assert message.replace("job/", f"{tmp_path}/") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or name in ("dropout", "few embeddings")  # these name the model
    assert not list(tmp_path.glob("run/checkpoints/*"))


def no_end_of_turn(path: Path) -> None:
    found = json.loads((path / "tokenizer.json").read_text())
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] != "<|im_end|>"]
    (path / "tokenizer.json").write_text(json.dumps(found))
    settings("tokenizer_config.json", eos_token="<|endoftext|>")(path)


def trl_template(name: str) -> Callable[[Path], None]:
    source = resources.files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return text("chat_template.jinja", source)


UNFIT = {
    "of another family": (lambda path: None, "llama3_1", "'<|eot_id|>', which is no control token of this tokenizer"),
    "no end of turn": (no_end_of_turn, "qwen2_5", "'<|im_end|>\\n', which is no control token of this tokenizer"),
    "not prefix-stable": (trl_template("qwen3"), "auto", "it is not prefix-stable"),
    "drops content": (
        trl_template("smolvlm"),
        "auto",
        "it changes, drops or repeats the content of assistant messages",
    ),
    "no template at all": (text("chat_template.jinja", "{% for %}"), "auto", "it cannot be rendered ("),
}
ADVICE = {
    "no end of turn": "none of the package's fits this tokenizer",
    "not prefix-stable": "choose qwen3, which fits",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFIT)
def test_a_chat_template_that_does_not_fit_is_refused_alike_and_one_that_fits_is_named(job, tmp_path, name):
    change, template, message = UNFIT[name]
    path = changed(job, tmp_path, change)
    chosen = f"model.chat_template={template}"
    (failed,) = (check.message for check in preflight(job, path, chosen) if check.status == "failed")
    with pytest.raises(InputError) as caught:
        train(job, path, chosen)
    assert str(caught.value) == failed
    assert failed.startswith(f"chat template {template}: it ") and message in failed and "\n" not in failed
    assert ADVICE.get(name, "choose qwen2_5, which fits this tokenizer") in failed
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.slow
def test_another_tokenizer_than_that_of_the_weights_is_refused_alike(job, tmp_path):
    with pytest.raises(
        InputError, match=r"^model.tokenizer=train with model.init=pretrained: the weights know other ids"
    ):
        preflight(job, job / "model", "model.tokenizer=train")

    def swap(path: Path) -> None:
        found = json.loads((path / "tokenizer.json").read_text())
        vocabulary = found["model"]["vocab"]
        first, second, *_ = vocabulary
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (path / "tokenizer.json").write_text(json.dumps(found))

    path = changed(job, tmp_path, swap)
    (failed,) = (
        check.message for check in preflight(job, job / "model", f"model.tokenizer={path}") if check.status == "failed"
    )
    assert failed.startswith(f"model.tokenizer={path}: 2 of 5"), failed
    with pytest.raises(InputError) as caught:
        train(job, job / "model", f"model.tokenizer={path}")
    assert str(caught.value) == failed
    shutil.copy(job / "model" / "tokenizer.json", path)  # a copy elsewhere is no other one
    shutil.rmtree("run")
    assert not [check for check in preflight(job, job / "model", f"model.tokenizer={path}") if check.status == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("name", [*REPAIRED, *NOTHING_WRONG])
def test_what_is_repaired_is_said_alike_and_trains(job, tmp_path, said, name, adapter):
    change, message = REPAIRED.get(name) or (NOTHING_WRONG[name], "")
    path = changed(job, tmp_path, change)
    checks = preflight(job, path, f"adapter={adapter}")
    assert not [check for check in checks if check.status == "failed"]
    notes = [line for line in said if line.startswith("note: ")]
    notes += [
        f"note: {repair}" for check in checks for repair in check.message.split("; ") if str(path) + "/" in repair
    ]
    said.clear()
    train(job, path, f"adapter={adapter}")
    repairs = [line for line in said if message and message in line]
    assert len(repairs) == bool(message) and all(line in notes for line in repairs), (said, notes)
    model = load_causal_lm("run/model")
    assert model.config.tie_word_embeddings == (name != "own head")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name != "own head")
    # A training checkpoint, merged into the base again, gives the same; its logits are compared.
    export(open_source("run"), ExportConfig(source="run", output="exported"))
    assert load_causal_lm("exported").config.tie_word_embeddings == (name != "own head")


NUMBERS = [
    setting.key
    for setting in all_settings(schema_of("preflight"))
    if re.match(r"(int|float)\b", setting.type) and not setting.key.startswith(("run.", "data.sample_seed"))
]


@pytest.mark.slow
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_none_is_refused_by_name(key):
    for value in ("nan", 10**13):
        overrides = [f"{key}={value}"]
        if key.startswith("data.mix."):
            overrides = ["data=mix", f"data.mix=[{{path: x, {key.rpartition('.')[2]}: {value}}}]"]
        with pytest.raises(InputError) as caught:
            compose("preflight", ["model=demo_qwen2", "cluster=cpu1", *overrides])
        assert key in str(caught.value).replace("[0]", "") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    sampled([
        "trainer.max_steps=-7", "trainer.max_steps=0", "trainer.max_steps=1000000001", "trainer.epochs=0",
        "trainer.epochs=10000000", "trainer.save_steps=-1", "trainer.packs_per_step=0", "trainer.packs_per_step=3",
        "cluster.gpu_memory_gib=0", "cluster.gpu_tflops=-1", "cluster.nodes=0", "packing.max_length=0",
        "packing.max_length=100000000", "adapter.rank=0", "model.architecture.num_attention_heads=0",
        "model.architecture.num_attention_heads=3", "model.architecture.num_key_value_heads=3",
        "model.architecture.head_dim=3", "model.architecture.hidden_size=-4", "model.architecture.model_type=gpt2",
        "model.architecture.rope_parameters.rope_type=no", "model.attn_implementation=nope",
    ], 6),
)  # fmt: skip
def test_what_a_training_would_refuse_fails_preflight(override):
    arguments = ["model=demo_qwen2", "cluster=cpu2", "data.train.path=absent.jsonl", override]
    with pytest.raises(InputError) as caught:
        report = run_preflight(compose("preflight", arguments), launching=False)
        raise InputError(*(check.message for check in report.failed))
    assert "\n" not in str(caught.value) and str(caught.value)
