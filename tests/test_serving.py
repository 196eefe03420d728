"""A checkpoint is served by others: `transformers serve` answers as our own generation does, and the directory holds
what vLLM reads."""

import copy
import json
import random

import peft
import pytest
import torch
from conftest import manifest_of, random_dialogue, sampled, small_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from servers.transformers_serve import ask, transformers_serve
from transformers import AutoModelForCausalLM

from csc_train.checkpoints.export import merged
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import save_final_model
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.evaluation.config import EvaluationConfig
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import load_generator, read_template
from csc_train.inference.openai import OpenAIGenerator
from csc_train.llm.config import LLMConfig
from csc_train.models.config import AdapterConfig
from csc_train.models.families import get_family
from csc_train.models.layout import stored_weights
from csc_train.models.loading import lora_config
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply, format_reply

FAMILIES = {"qwen2": "qwen2_5", "llama": "llama3_1", "qwen3_moe": "qwen3"}
"""Chat templates by architecture."""
SERVED = FAMILIES | {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5"}
"""Those that `transformers serve` is asked for."""
LIMIT = 40
"""Of new tokens, more than the taught replies have."""
TAUGHT = Dialogue(
    "taught",
    (
        Turn(Speaker.SUPPORTER, "您好，请讲。", STRATEGIES[0]),
        Turn(Speaker.CUSTOMER, "我的订单 20240817 还没到！"),
        Turn(Speaker.SUPPORTER, "抱歉，马上为您查。", STRATEGIES[3]),
    ),
)


def save(directory, model, template, **options):
    """Write a checkpoint of `model` whose manifest says of its origin what reading it asks for."""
    manifest = manifest_of(template)
    save_final_model(directory, model, template.tokenizer, template.chat_template, manifest, **options)


def tiny(architecture, **facts):
    """A tiny model with random weights, and its template."""
    template = DialogueTemplate(small_tokenizer(SERVED[architecture]), SERVED[architecture], TemplateConfig())
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(architecture, template.tokenizer, 0.1, **facts)), template


def teach(model, template, dialogue):
    """Train `model` until it says what the supporter of `dialogue` says, and ends its turns."""
    example = template.encode(dialogue)
    ids = torch.tensor(example.input_ids).long()[None]
    labels = ids.where(torch.tensor(example.trained), -100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        loss = model(ids, labels=labels).loss
        if loss.item() < 0.02:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"the dialogue is not learnt, loss {loss.item():.2f}")


# transformers serve


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A taught checkpoint of each architecture. One ships a strong repetition penalty, as Qwen2.5-Instruct ships a
    weak one."""
    folder = tmp_path_factory.mktemp("served")
    for architecture in SERVED:
        model, template = tiny(architecture)
        teach(model, template, TAUGHT)
        if architecture == "qwen2":
            model.generation_config.repetition_penalty = 5.0
        save(folder / architecture, model, template)
    return folder


@pytest.fixture(scope="module")
def server():
    """The address of `transformers serve`."""
    with transformers_serve() as address:
        yield address


@pytest.mark.slow
def test_transformers_serve_answers_as_our_own_generation_does(checkpoints, server):
    for architecture in SERVED:
        template, _ = read_template(open_source(str(checkpoints / architecture)))
        generator = load_generator(str(checkpoints / architecture), template, EvaluationConfig(max_new_tokens=LIMIT))
        # Temperature 0 leaves a repetition penalty of the checkpoint on; a frequency penalty of 0 takes it off.
        greedy = {"temperature": 0, "frequency_penalty": 0, "max_tokens": LIMIT}
        other = random_dialogue(random.Random(5))
        for own in generate_predictions([TAUGHT, other], generator, "reference"):
            dialogue, turn = TAUGHT if own.dialogue_id == TAUGHT.id else other, own.turn
            history = dialogue.turns[:turn]
            text, why, length = ask(server, checkpoints / architecture, template.messages(history), **greedy)
            assert text == own.raw_text
            assert length == len(template.prompt_ids(history))
            if dialogue is TAUGHT:
                gold = dialogue.turns[turn]
                assert (text, why) == (format_reply(Reply(gold.strategy, gold.text), "zh"), "stop")

        history, gold = TAUGHT.turns[:2], TAUGHT.turns[2]
        text, *_ = ask(server, checkpoints / architecture, template.messages(history), temperature=0, max_tokens=LIMIT)
        assert (text == format_reply(Reply(gold.strategy, gold.text), "zh")) == (architecture != "qwen2")
        # A strategy beside the content does not get through.
        chat = template.messages(history)
        chat[1] |= {"strategy": history[0].strategy.zh, "content": history[0].text}
        *_, shorter = ask(server, checkpoints / architecture, chat, **greedy)
        assert shorter < len(template.prompt_ids(history))


@pytest.mark.slow
def test_a_served_model_is_evaluated_as_a_local_one(checkpoints, server):
    """The server takes no token ids, so it is asked by messages; texts without control strings read the same."""
    dialogues = [TAUGHT, *(random_dialogue(random.Random(seed)) for seed in (5, 6))]
    for architecture in SERVED:
        path = str(checkpoints / architecture)
        template, _ = read_template(open_source(path))
        config = EvaluationConfig(max_new_tokens=LIMIT)
        llm = LLMConfig(base_url=f"{server}/v1", model=path, concurrency=2, extra_body={"frequency_penalty": 0})
        for context in ("reference", "generated"):
            served = generate_predictions(dialogues, OpenAIGenerator(llm, config, template), context)
            local = generate_predictions(dialogues, load_generator(path, template, config), context)
            assert [each.raw_text for each in served] == [each.raw_text for each in local]
            assert [each.strategy for each in served] == [each.strategy for each in local]
            assert {each.prompt_format for each in served} == {"messages"}


# vLLM


def tensor_names(config):
    """The names that vLLM's Qwen2, Llama and Qwen3-MoE know, given a config.json: those of published checkpoints."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        names.add("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        parts = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
        if config["model_type"] == "qwen2":
            parts += [f"self_attn.{part}_proj.bias" for part in "qkv"]
        blocks = ["mlp"]
        if config["model_type"] == "qwen3_moe":
            parts += ["mlp.gate.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"]
            blocks = [f"mlp.experts.{expert}" for expert in range(config["num_experts"])]
        parts += [f"{block}.{part}_proj.weight" for block in blocks for part in ("gate", "up", "down")]
        parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
        names |= {f"model.layers.{layer}.{part}" for part in parts}
    return names


def faults(directory, template):
    """What vLLM would miss or not understand in a checkpoint: (file, what) pairs."""

    def read(name):
        return json.loads((directory / name).read_text(encoding="utf-8"))

    config = read("config.json")
    expected = {
        "architectures": [get_family(config["model_type"]).causal_lm_class],
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    yield from (("config.json", key) for key, value in expected.items() if config.get(key) != value)
    yield from (("config.json", key) for key in ("auto_map", "quantization_config") if key in config)

    stops = read("generation_config.json").get("eos_token_id")
    if template.end_of_turn_id not in (stops if isinstance(stops, list) else [stops]):
        yield "generation_config.json", "eos_token_id"
    if (directory / "chat_template.jinja").read_text(encoding="utf-8") != template.chat_template:
        yield "chat_template.jinja", "text"
    vocabulary = {token["content"]: token["id"] for token in read("tokenizer.json")["added_tokens"]}
    if vocabulary.get(read("tokenizer_config.json")["eos_token"]) != template.end_of_turn_id:
        yield "tokenizer_config.json", "eos_token"

    shards = {file.name: load_file(file) for file in directory.glob("*.safetensors")}
    found = {name: (shard, tensor) for shard, tensors in shards.items() for name, tensor in tensors.items()}
    yield from (("weights", name) for name in tensor_names(config) ^ found.keys())
    yield from (("weights", name) for name, (_, tensor) in found.items() if tensor.dtype != torch.bfloat16)
    index = directory / "model.safetensors.index.json"
    if index.exists() != (len(shards) > 1):
        yield index.name, "whether it is there"
    elif index.exists() and read(index.name)["weight_map"] != {name: shard for name, (shard, _) in found.items()}:
        yield index.name, "weight_map"


@pytest.mark.parametrize("tied", sampled([True, False], 2), ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_final_model_holds_what_vllm_reads(architecture, kind, tied, tmp_path):
    model, template = tiny(
        architecture, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    model = model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in stored_weights(model).items()}
    if kind == "lora":
        experts = ["all-experts"] if architecture == "qwen3_moe" else []
        adapter = lora_config(AdapterConfig("lora", rank=2, alpha=4, target_parameters=experts), model)
        adapted = peft.get_peft_model(copy.deepcopy(model), adapter)
        pairs = {name: torch.rand_like(value) for name, value in adapted.named_parameters() if value.requires_grad}
        model = merged(model, pairs, adapter)
    for shard_size, several in (("50GB", False), ("20KB", True)):
        directory = tmp_path / shard_size
        save(directory, model, template, shard_size=shard_size)
        assert list(faults(directory, template)) == []
        weights = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
        assert (len(list(directory.glob("*.safetensors"))) > 1) == several
        changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
        assert changed == ({name for name in weights if "proj.weight" in name} if kind == "lora" else set())


def _without_a_shard(directory):
    next(directory.glob("model-00002-*.safetensors")).unlink()


def _with_a_renamed_tensor(directory):
    file = next(directory.glob("model-00001-*.safetensors"))
    tensors = load_file(file)
    save_file({f"base_model.{name}": tensor for name, tensor in tensors.items()}, file)


def _with(name, **values):
    def spoil(directory):
        facts = json.loads((directory / name).read_text(encoding="utf-8"))
        (directory / name).write_text(json.dumps(facts | values), encoding="utf-8")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "files"),
    [
        (_without_a_shard, {"weights", "model.safetensors.index.json"}),
        (_with_a_renamed_tensor, {"weights", "model.safetensors.index.json"}),
        (_with("config.json", tie_word_embeddings=True), {"weights"}),
        (_with("config.json", architectures=None), {"config.json"}),
        (_with("generation_config.json", eos_token_id=0), {"generation_config.json"}),
        (_with("tokenizer_config.json", eos_token="<|endoftext|>"), {"tokenizer_config.json"}),
    ],
)
def test_what_vllm_would_not_read_is_found(spoil, files, tmp_path):
    model, template = tiny(
        "qwen2", tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    save(tmp_path / "model", model.to(torch.bfloat16), template, shard_size="20KB")
    spoil(tmp_path / "model")
    assert {file for file, _ in faults(tmp_path / "model", template)} == files
