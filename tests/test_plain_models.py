"""Models and adapters that another program wrote: evaluated, compared, judged and talked to as ours are, or refused."""

import io
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from conftest import load_recipe, manifest_of, random_dialogue, small_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from servers.faults import Say
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from csc_train.checkpoints.content import base_files, hash_files
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import plain_manifest, save_final_model, write_manifest
from csc_train.config.compose import compose
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.inference.hf import read_template
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

PLAIN = ["template=joint"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of another program, which knows no strategies."""
DATA = ["data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl"]
QUICK = [
    "evaluation.max_new_tokens=24", "evaluation.likelihoods=false", "metrics.profiles=[zh]",
    "metrics.bootstrap_resamples=100",
]  # fmt: skip
CONTEXTS = ("reference", "generated")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer("qwen2_5")


@pytest.fixture(scope="module")
def workplace(tokenizer, tmp_path_factory):
    """The model `plain` of another program, its adapter `adapter`, both merged as `merged`, and dialogues.

    `ours` holds the weights of `plain`, with a manifest; `ours_adapter` is `adapter` with one.
    """
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("workplace"))
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5))
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    stranger = small_tokenizer("qwen2_5")
    stranger.chat_template = CHATML
    for path in ("plain", "merged", "adapter"):
        stranger.save_pretrained(path)
    model.save_pretrained("plain")
    save_final_model("ours", model, tokenizer, template.chat_template, manifest_of(template, config={}))
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained("plain"),
        peft.LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(Path("plain").absolute())
    adapted.save_pretrained("adapter")
    adapted.merge_and_unload().save_pretrained("merged")
    shutil.copytree("adapter", "ours_adapter")
    base = {"base_model": str(Path("plain").absolute()), "base_files": base_files("plain", None)}
    write_manifest("ours_adapter", manifest_of(template, config={}, files=hash_files(Path("ours_adapter")), **base))
    rng = random.Random(5)
    dialogues = [replace(random_dialogue(rng), id=str(number)) for number in range(10)]
    write_dialogues("train.jsonl", dialogues[:4])
    write_dialogues("evaluation.jsonl", dialogues[4:])
    yield
    os.chdir(before)


def evaluate(path, *settings):
    """The tokens of a model's replies, by context, dialogue and turn."""
    run = f"runs/{path}"
    arguments = [f"checkpoint={path}", *DATA, *QUICK, f"run.directory={run}", *settings]
    load_recipe("evaluate").main(compose("evaluate", arguments))
    name = "trained" if path.startswith("ours") else "plain model"
    return {
        (context, row["dialogue_id"], row["turn"]): tuple(row["token_ids"])
        for context in CONTEXTS
        for row in map(json.loads, Path(f"{run}/predictions/{name}-{context}.jsonl").open(encoding="utf-8"))
    }


@pytest.fixture(scope="module")
def replies(workplace):
    settings = {
        "ours": ["evaluation.base=false"],
        "ours_adapter": [],
        "plain": PLAIN,
        "merged": PLAIN,
        "adapter": [*PLAIN, "chat_template=qwen2_5"],
    }
    return {path: evaluate(path, *each) for path, each in settings.items()}


@pytest.mark.slow
def test_a_plain_model_replies_as_the_same_weights_of_ours(replies):
    assert replies["plain"] == replies["ours"] != replies["merged"]
    assert len(set(replies["plain"].values())) > 3
    evaluated = json.loads(Path("runs/plain/evaluated_model.json").read_text("utf-8"))
    manifest = evaluated["manifest"]
    assert manifest["data_hash"] == "" and manifest["config"] == {} and evaluated["base"] is None
    assert len(manifest["template_hash"]) == len(manifest["tokenizer_hash"]) == 64
    (text,) = evaluated["unverified"]
    assert text == "plain: another program wrote this model: what it was trained from and on is unknown"
    page = Path("runs/plain/report.html").read_text("utf-8")
    assert (
        text in page and "trained on" not in page and "trained on" in Path("runs/ours/report.html").read_text("utf-8")
    )


@pytest.mark.slow
def test_an_adapter_replies_as_merged_and_its_base_is_part_of_what_it_is(replies, tmp_path):
    assert replies["adapter"] == replies["ours_adapter"] == replies["merged"]
    assert not json.loads(Path("runs/ours_adapter/evaluated_model.json").read_text("utf-8"))["unverified"]
    plain = plain_manifest(TemplateConfig(), "qwen2_5")
    before = open_source("adapter", plain=plain).content_hash()
    shutil.copytree("plain", tmp_path / "plain")
    other = json.loads(Path("adapter/adapter_config.json").read_text("utf-8"))
    shutil.copytree("adapter", tmp_path / "adapter")
    settings = json.dumps(other | {"base_model_name_or_path": str(tmp_path / "plain")})
    (tmp_path / "adapter/adapter_config.json").write_text(settings, "utf-8")
    unchanged = open_source(str(tmp_path / "adapter"), plain=plain).content_hash()
    torch.manual_seed(2)
    Qwen2ForCausalLM(AutoConfig.from_pretrained("plain")).save_pretrained(tmp_path / "plain")
    changed = open_source(str(tmp_path / "adapter"), plain=plain).content_hash()
    assert len({before, unchanged, changed}) == 3  # the second names another place


@pytest.mark.slow
def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(workplace, tmp_path):
    shutil.copytree("adapter", tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("*token*"):
        path.unlink()
    found = [
        read_template(open_source(str(path), plain=plain_manifest(TemplateConfig(), "qwen2_5")))[1].manifest
        for path in ("adapter", tmp_path / "adapter")
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_plain_model_is_compared_and_judged(replies, fault_server, capsys):
    pair = ["runs/ours", "runs/merged"]
    load_recipe("compare").main(
        compose("compare", [*pair, "metrics.profiles=[zh]", "permutations=1000", "run.directory=runs/compared"])
    )
    assert "plain model of runs/merged" in Path("runs/compared/comparison.md").read_text("utf-8")
    fault_server.answer = lambda body: '{"reason": "-", "better": "1"}'
    asked = [
        "llm=openai",
        f"llm.base_url={fault_server.base_url}",
        "llm.model=x",
        "llm.api_key_env=null",
        "judge.tasks=[pairwise]",
    ]
    few = ["judge.num_turns=3", "judge.bootstrap_resamples=100", "judge.permutations=1000"]
    load_recipe("judge").main(compose("judge", [*pair, *asked, *few, "run.directory=runs/judged"]))
    assert "plain model of runs/merged" in Path("runs/judged/judge.md").read_text("utf-8")


@pytest.mark.slow
def test_a_served_plain_model_is_asked_by_its_own_tokens(replies, fault_server):
    fault_server.answer = lambda body: Say("[礼貌问候]您好", usage=(len(body["prompt"]), 3))
    server = ["llm=vllm", f"llm.base_url={fault_server.base_url}", "llm.model=x", "run.directory=runs/served"]
    few = ["evaluation.contexts=[reference]", *QUICK]
    load_recipe("evaluate").main(compose("evaluate", ["checkpoint=plain", *PLAIN, *DATA, *server, *few]))
    rows = Path("runs/served/predictions/plain model-reference.jsonl").read_text("utf-8").splitlines()
    local = Path("runs/plain/predictions/plain model-reference.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["prompt_hash"] for row in rows] == [json.loads(row)["prompt_hash"] for row in local]
    assert {json.loads(row)["strategy"] for row in rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["plain", "adapter"])
def test_a_plain_model_is_talked_to(path, replies, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    settings = ["max_new_tokens=24"]
    load_recipe("chat").main(compose("chat", [f"checkpoint={path}", *PLAIN, *settings]))
    said = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    same = {"plain": "ours", "adapter": "merged"}[path]
    load_recipe("chat").main(compose("chat", [f"checkpoint={same}", *(PLAIN if same == "merged" else []), *settings]))
    assert capsys.readouterr().out == said and "你好" in said


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def take_a_token(path):
    """Leave the last row of the embedding out, as where a tokenizer was extended and the model was not."""
    tensors = load_file(path / "model.safetensors")
    rows = len(tensors["model.embed_tokens.weight"]) - 1
    cut = {name: tensor[:rows] if len(tensor) == rows + 1 else tensor for name, tensor in tensors.items()}
    save_file(cut, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", vocab_size=rows)


def take_a_factor(path):
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), path / "adapter_model.safetensors", {"format": "pt"})


REFUSED = {
    "a tokenizer that is larger than the model": ("plain", take_a_token, r"the model embeds \d+ tokens, the tokenizer"),
    "quantized weights": (
        "plain",
        lambda path: edit_json(path / "config.json", quantization_config={"quant_method": "awq"}),
        r"the weights are quantized \(awq\)",
    ),
    "a family without a row": (
        "plain",
        lambda path: edit_json(path / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "model_type=gpt2",
    ),
    "no weights": ("plain", lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a base that is gone": (
        "adapter",
        lambda path: edit_json(path / "adapter_config.json", base_model_name_or_path="/nowhere/base"),
        "/nowhere/base: no such model directory",
    ),
    "no base": (
        "adapter",
        lambda path: edit_json(path / "adapter_config.json", base_model_name_or_path=None),
        "base_model_name_or_path names no base model",
    ),
    "half an adapter": ("adapter", take_a_factor, "no readable adapter .*missing adapter keys"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_in_one_line(what, workplace, tmp_path):
    kind, spoil, message = REFUSED[what]
    path = shutil.copytree(kind, tmp_path / "model")
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe("chat").main(compose("chat", [f"checkpoint={path}", *PLAIN]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (
            "evaluate",
            ["checkpoint=plain", *DATA],
            "no csc_manifest.json: .* such as template=joint template.language=en",
        ),
        ("chat", ["checkpoint=adapter"], "no csc_manifest.json: .* such as template=joint template.language=en"),
        ("evaluate", ["checkpoint=plain", *PLAIN], "say on which dialogues to evaluate it, such as data=rolecs"),
        ("evaluate", ["checkpoint=ours", *PLAIN, *DATA], "template: ours knows its own; leave it out"),
        ("chat", ["checkpoint=ours", *PLAIN], "template: ours knows its own; leave it out"),
        ("chat", ["checkpoint=plain", "chat_template=qwen3"], "chat_template=qwen3: give template=... as well"),
        (
            "chat",
            ["checkpoint=an/owner", *PLAIN],
            "an/owner: cannot load the model: .*: check the name, give a local directory, or download it",
        ),
        ("export", ["source=plain", "output=exported"], "no csc_manifest.json: copy that file as well"),
    ],
)
def test_what_a_plain_model_needs_is_said(recipe, arguments, message, workplace):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(recipe).main(compose(recipe, arguments))
    assert "\n" not in str(caught.value)


def test_a_model_of_the_hub_is_found_by_its_id(workplace, tmp_path, monkeypatch):
    """From the hub's cache, with the content of the directory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--an--owner"
    shutil.copytree("plain", repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    plain = plain_manifest(TemplateConfig(), "qwen2_5")
    source = open_source("an/owner", plain=plain)
    assert source.path == repository / "snapshots" / ("c" * 40)
    assert source.content_hash() == open_source("plain", plain=plain).content_hash()
    with pytest.raises(InputError, match=r"^an/owner: no such directory$"):
        open_source("an/owner")  # without a template it can be none of the hub's


def test_a_checkpoint_of_another_trainer_is_a_plain_model(workplace, tmp_path):
    path = shutil.copytree("plain", tmp_path / "checkpoint-5")
    (path / "trainer_state.json").write_text("{}", "utf-8")
    assert open_source(str(path), plain=plain_manifest(TemplateConfig(), "qwen2_5")).path == path
    with pytest.raises(InputError, match="such as template=joint"):
        open_source(str(path))
