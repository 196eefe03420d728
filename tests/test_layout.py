"""A vision-language model of the hub is trained as a text model, resumed, and written in its own layout or as text."""

import json
import pickle
import random
import re
import time
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, manifest_of, random_dialogue, save_vision_language, small_tokenizer
from processes import TIMEOUT_S, run_script, start_ranks
from safetensors.torch import load_file, save_file
from test_deepspeed import LORA as LINEAR_LORA
from test_deepspeed import QLORA, agree, case
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from workers.loss_curve import train_all

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import TOLERANCE, export
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import save_final_model, write_manifest
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import load_generator, read_template
from csc_train.models.config import ModelConfig
from csc_train.models.families import get_family
from csc_train.models.hub import load_causal_lm
from csc_train.models.inspection import inspect_model
from csc_train.models.layout import stored_weights
from csc_train.models.loading import load_model
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

LORA = LINEAR_LORA | {"adapter": LINEAR_LORA["adapter"] | {"target_parameters": ["all-experts"]}}
UP = "model.language_model.layers.0.mlp.shared_expert.up_proj.weight"
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen3_5"), "qwen3_5", TemplateConfig(mode="reply_only"))


EXPERTS = {"tied": False, "architecture": "qwen3_5_moe_text"}
BASES = {"tied": {}, "untied": {"tied": False}, "experts": EXPERTS, "split experts": EXPERTS | {"split_experts": True}}


@pytest.fixture(scope="module", params=BASES)
def base(request, template, tmp_path_factory) -> Path:
    """A vision-language model, with the files of its processors."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    save_vision_language(directory, template.tokenizer, **BASES[request.param])
    (directory / "preprocessor_config.json").write_text('{"patch_size": 16}')
    (directory / "video_preprocessor_config.json").write_text('{"fps": 2}')
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


def text_type(directory: Path) -> str:
    return json.loads((directory / "config.json").read_text())["text_config"]["model_type"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def change(name: str, **values):
    """Change a file of settings; `text_config` of it, where a value is a dictionary."""

    def make(directory: Path) -> None:
        known = json.loads((directory / name).read_text())
        for key, value in values.items():
            known[key] = known[key] | value if isinstance(value, dict) else value
        (directory / name).write_text(json.dumps(known))

    return make


# Reading


def test_the_text_part_is_inspected_and_loaded(base):
    found = inspect_model(ModelConfig(path=str(base))).require()
    expected = text_type(base)
    assert found.dims.model_type == found.model.config.model_type == expected
    (note,) = found.repairs
    assert note == (
        f"{base}: its text model is used; 22 other tensors (mtp, visual) are not loaded, and a model "
        "that is trained from it gets them unchanged"
    )
    model, whole = load_causal_lm(str(base)), AutoModelForMultimodalLM.from_pretrained(base)
    assert type(model).__name__ == get_family(expected).causal_lm_class and model.dtype == torch.float32
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True)])
def test_tied_embeddings_are_one_matrix_whichever_part_of_the_settings_says_so(template, tmp_path, outer, inner):
    """transformers reads only the text part's word, and draws the output layer at random where that is silent."""
    save_vision_language(tmp_path / "model", template.tokenizer, tied=True)
    expected = logits(load_causal_lm(str(tmp_path / "model")))
    change("config.json", tie_word_embeddings=outer, text_config={"tie_word_embeddings": inner})(tmp_path / "model")
    model = load_causal_lm(str(tmp_path / "model"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(logits(model), expected)
    if (outer, inner) == (True, False):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert not torch.equal(logits(plain), expected)


def test_an_output_layer_of_its_own_is_kept(template, tmp_path):
    save_vision_language(tmp_path / "model", template.tokenizer, tied=False)
    expected = logits(load_causal_lm(str(tmp_path / "model")))
    change("config.json", tie_word_embeddings=True, text_config={"tie_word_embeddings": True})(tmp_path / "model")
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "model"))), expected)
    found = inspect_model(ModelConfig(path=str(tmp_path / "model"))).require()
    assert "tie_word_embeddings=true, but lm_head.weight differs" in found.repairs[0]


def _without(name: str):
    def make(directory: Path) -> None:
        file = directory / "model.safetensors"
        save_file({key: each for key, each in load_file(file).items() if key != name}, file, {"format": "pt"})

    return make


def _llava(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llava", "text_config": {"model_type": "llama"}}')


def _pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change("config.json", architectures=["Qwen3_5ForSequenceClassification"]),
            "names Qwen3_5ForSequenceClassification; choose a model of class Qwen3_5ForConditionalGeneration",
        ),
        (
            _without("model.language_model.layers.0.linear_attn.A_log"),
            r"model.layers.0.linear_attn.A_log is missing from the files \(tensors like it: 1\)",
        ),
        (_llava, "of model_type llava, of which no part is trained alone; choose a model of class LlamaForCausalLM"),
        (_pickled, r"pytorch_model.bin: no safetensors, as a vision-language model needs: convert it"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(template, tmp_path, spoil, message):
    save_vision_language(tmp_path / "model", template.tokenizer)
    spoil(tmp_path / "model")
    with pytest.raises(InputError, match=message) as error:
        inspect_model(ModelConfig(path=str(tmp_path / "model"))).require()
    assert "\n" not in str(error.value)


def test_what_no_gated_delta_net_of_ours_computes_is_refused_before_weights_are_read(template, tmp_path):
    save_vision_language(tmp_path / "model", template.tokenizer, linear_conv_kernel_dim=5)
    found = inspect_model(ModelConfig(path=str(tmp_path / "model")))
    assert re.search("linear_conv_kernel_dim=5: a gated delta net may convolve at most 4", *found.refusals)


# Writing


def _trained(base: Path):
    """The text model with other weights, and the names of all its tensors in the files of the base."""
    model = load_causal_lm(str(base))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["30KB", "50GB"])
def test_a_final_model_has_the_layout_of_its_base(base, template, tmp_path, shard_size):
    model = _trained(base)
    expected = logits(model)
    held = {each.untyped_storage().data_ptr() for each in model.parameters()}
    assert {each.untyped_storage().data_ptr() for each in stored_weights(model).values()} == held  # no copies
    config = {"adapter": {"kind": "full"}, "trainer": {"precision": "fp32"}}
    manifest = manifest_of(template, config=config, base_model=str(base))
    final = tmp_path / "final"
    save_final_model(
        final, model, template.tokenizer, template.chat_template, manifest, ModelConfig(path=str(base)), shard_size
    )
    before, after = tensors(base), tensors(final)
    assert (len(list(final.glob("*.safetensors"))) > 1) == (shard_size == "30KB")
    assert after.keys() == before.keys()
    own = {name for name in before if "language_model" in name or name == "lm_head.weight"}
    assert {name for name in before if torch.equal(before[name], after[name])} == before.keys() - own
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (final / name).read_bytes() == (base / name).read_bytes()
    said, now = (json.loads((each / "config.json").read_text()) for each in (base, final))
    family = get_family(text_type(base))
    assert now["architectures"] == [family.causal_lm_class.replace("ForCausalLM", "ForConditionalGeneration")]
    assert now["vision_config"] == said["vision_config"] and now.keys() == said.keys()
    assert {key for key in said["text_config"] if said["text_config"][key] != now["text_config"][key]} <= {"dtype"}
    whole, info = AutoModelForMultimodalLM.from_pretrained(final, output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(whole), expected)
    assert torch.equal(logits(load_causal_lm(str(final))), expected)
    assert not open_source(str(final)).unverified()
    # and can be exported again
    for layout in ("hub", "text"):
        export(open_source(str(final)), ExportConfig(output=str(tmp_path / layout), layout=layout))
        text = load_causal_lm(str(tmp_path / layout))
        assert torch.equal(logits(text), expected)
    assert tensors(tmp_path / "hub").keys() == before.keys()
    assert tensors(tmp_path / "text").keys() == {name.replace("model.language_model.", "model.") for name in own}
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (family.model_type, [family.causal_lm_class])
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(plain), expected)
    # A text model stays one.
    export(open_source(str(tmp_path / "text")), ExportConfig(output=str(tmp_path / "again")))
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "text").keys()
    why = "has experts, which are not rounded" if "moe" in family.model_type else "is a vision-language"
    with pytest.raises(InputError, match=rf"^format=fp8: .*final {why}"):
        export(open_source(str(final)), ExportConfig(output=str(tmp_path / "fp8"), format="fp8"))


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["full-3", "lora-2", "qlora-off"])
def test_a_checkpoint_is_exported_in_the_layout_of_its_base(folder, template, on_one, run, tmp_path):
    kind, base = run.split("-")[0], folder / "model"
    config = {
        "adapter": (QLORA if kind == "qlora" else LORA)["adapter"] | {"kind": kind},
        "trainer": {"precision": "fp32"},
    }
    write_manifest(folder / run, manifest_of(template, base_model=str(base), config=config))
    merge_into = "dequantized" if kind == "qlora" else None
    settings = ExportConfig(output=str(tmp_path / "model"), merge_into=merge_into)
    assert export(open_source(str(folder / run)), settings) < TOLERANCE[torch.float32]
    before, after = tensors(base), tensors(tmp_path / "model")
    assert before.keys() == after.keys()
    beside = {name for name in before if "visual" in name or "mtp" in name}
    assert all(torch.equal(before[name], after[name]) for name in beside)
    assert not torch.equal(before[UP], after[UP])
    experts = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(before[experts], after[experts]) == (kind == "qlora")
    whole, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    merged = load_causal_lm(str(tmp_path / "model"))
    assert not any(info.values()) and torch.equal(logits(whole), logits(merged))
    if kind == "lora":  # an adapter alone is that of the text model
        export(open_source(str(folder / run)), ExportConfig(output=str(tmp_path / "adapter"), format="adapter"))
        assert torch.allclose(logits(load_causal_lm(str(tmp_path / "adapter"))), logits(merged), atol=1e-4)


def test_the_gates_and_the_convolution_stay_out_of_4_bits(template, tmp_path):
    save_vision_language(tmp_path / "model", template.tokenizer, tied=False)
    source = ModelConfig(path=str(tmp_path / "model"))
    model = load_model(source, template.tokenizer, torch.float32, 0, load_in_4bit=True)
    quantized = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, Linear4bit)}
    assert quantized == {*get_family("qwen3_5_text").lora_targets} - {"in_proj_a", "in_proj_b"}
    assert {"in_proj_qkv", "out_proj"} <= quantized and not any("visual" in name for name, _ in model.named_modules())


# Training


PAIRS = {f"{kind} {stage}": {"full": {}, "lora": LORA}[kind] for kind in ("full", "lora") for stage in ("2", "3")}
"""Full fine-tuning and LoRA under ZeRO-2 and ZeRO-3."""
NEAR = {"full": 3e-5, "lora": 1e-4}
"""Allowed differences; the adapters' learning rate is high, and Adam's first steps are as long for any gradient."""
SETTINGS = {"packs": "single", "epochs": 1}


def _cases(runs: dict[str, dict], again: dict[str, dict]) -> dict[str, dict]:
    """Trainings that are saved after step 2, and resumes from there."""
    return {
        **{name: case(name.split()[1], checkpoints=name.replace(" ", "-"), **more) for name, more in runs.items()},
        **{
            f"again {name}": case(name.split()[1], resume=f"{name.replace(' ', '-')}2", **more)
            for name, more in again.items()
        },
    }


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory) -> Path:
    """A vision-language model, and 12 dialogues to train it on, one in a row."""
    folder = tmp_path_factory.mktemp("zero")
    save_vision_language(folder / "model", template.tokenizer, **EXPERTS)
    rng = random.Random(3)
    packs, _ = pack_dialogues([template.encode(random_dialogue(rng)) for _ in range(12)], PackingConfig("off"))
    (folder / "single").write_bytes(pickle.dumps(packs))
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    cases = _cases(PAIRS, PAIRS)
    return train_all(folder, {name: made | SETTINGS for name, made in cases.items()}, 2)


@pytest.fixture(scope="module")
def on_one(folder, on_two):
    """On one process, also from what two have saved."""
    moved = {name: case("off", resume=f"{name.replace(' ', '-')}2", **PAIRS[name]) for name in ("full 3", "lora 3")}
    runs = _cases({"full off": {}, "lora off": LORA, "qlora off": QLORA}, {"full off": {}, "qlora off": QLORA}) | moved
    return train_all(folder, {name: made | SETTINGS for name, made in runs.items()}, 1)


@pytest.mark.distributed
@pytest.mark.parametrize("pair", PAIRS)
def test_the_text_part_trains_and_resumes_under_every_stage(on_two, on_one, pair):
    run, again = on_two[pair], on_two[f"again {pair}"]
    kind, stage = pair.split()
    for each in (run, again):
        assert (each["engine"], each["stage"], each["processes"]) == ("DeepSpeedEngine", int(stage), 2)
    assert run["losses"][-1] < run["losses"][0] and len(run["losses"]) == 3
    agree(run, on_one[f"{kind} off"], NEAR[kind])
    assert again["first_step"] == 2
    agree(again, run, 1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_process_resumes_what_two_have_saved(on_one, kind):
    moved = on_one[f"{kind} 3"]
    assert (moved["processes"], moved["stage"], moved["first_step"]) == (1, None, 2)
    agree(moved, on_one[f"{kind} off"], NEAR[kind])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_one_process_resumes_what_it_has_saved(folder, on_one, kind):
    """The Trainer leaves out tensors whose names in the file are not those of parameters, and goes on."""
    assert on_one[f"again {kind} off"]["first_step"] == 2
    agree(on_one[f"again {kind} off"], on_one[f"{kind} off"], 1e-6)


# The recipes


BASE = [
    "debug=cpu_tiny",
    "data.sample_dialogues=30",
    "model.init=pretrained",
    "model.path=base",
    "model.tokenizer=null",
]
RUN = ["run.directory=run", "run.if_exists=reuse", "zero=zero3", "zero.persistence_threshold=0"]
CHEAP = ["data.sample_dialogues=16", "validation.num_samples=0", "validation.num_turns=8", "trainer.packs_per_step=2"]
BEST = [
    *CHEAP,
    "trainer.micro_batch_size=1",
    "trainer.max_steps=4",
    "trainer.save_steps=1",
    "trainer.learning_rate=3",
    "validation.save_best=true",
]


def recipe(name: str, *words: str, cwd: Path, ranks: int = 1) -> str:
    """Run a recipe to its end; what it printed."""
    done = run_script(ROOT / "recipes" / f"{name}.py", *words, cwd=cwd, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def killed(template, tmp_path_factory) -> Path:
    """A directory with a run under ZeRO-3 on two processes, which was killed after a checkpoint and resumed."""
    directory = tmp_path_factory.mktemp("recipes")
    save_vision_language(directory / "base", template.tokenizer, **EXPERTS)
    ranks = start_ranks(ROOT / "recipes/sft.py", *BASE, *RUN, *BEST, ranks=2, cwd=directory)
    deadline = time.monotonic() + TIMEOUT_S
    while not (directory / "run/checkpoints/checkpoint-2").exists() and time.monotonic() < deadline:
        assert {each.poll() for each in ranks} <= {None, 0}, ranks[0].stderr[-3000:]
        time.sleep(0.02)
    for each in ranks:
        each.kill()
        each.wait()
    assert not (directory / "run/model").exists()
    said = recipe("sft", *BASE, *RUN, *BEST, cwd=directory, ranks=2)
    assert re.search(r"trained [12] steps in ", said) and "visual) are not loaded" in said
    return directory


@pytest.mark.distributed
def test_a_killed_run_resumes_and_its_best_weights_become_a_model_like_its_base(killed):
    log = json.loads((killed / "run/metrics.json").read_text())["log"]
    measured = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(measured, key=measured.__getitem__)
    assert len(measured) == 4 and best < 4
    before, after = tensors(killed / "base"), tensors(killed / "run/model")
    saved = load_file(killed / f"run/checkpoints/checkpoint-{best}/model.safetensors")
    assert after.keys() == before.keys()
    for name, value in after.items():
        mine = saved.get(name.replace("model.language_model.", "model."))
        assert torch.equal(value, before[name] if "visual" in name or "mtp" in name else mine), name


@pytest.mark.distributed
def test_it_answers_the_same_in_either_layout_and_chats(killed):
    said = recipe("export", "source=run/model", "output=text", "layout=text", cwd=killed)
    assert "largest logit difference 0.0e+00" in said
    template, _ = read_template(open_source(str(killed / "text")))
    dialogues = generate_sample(2, seed=5)
    assert recipe("chat", "checkpoint=text", "dtype=fp32", cwd=killed)
    replies = {}
    for name in ("run/model", "text"):
        generator = load_generator(str(killed / name), template, InferenceConfig(max_new_tokens=6, dtype="fp32"))
        for context in ("reference", "generated"):
            predictions = generate_predictions(dialogues, generator, context)
            replies[name, context] = [(each.dialogue_id, each.turn, each.raw_text) for each in predictions]
    assert replies["run/model", "reference"] == replies["text", "reference"]
    assert replies["run/model", "generated"] == replies["text", "generated"]
    # as `transformers serve` loads it where torchvision is installed
    whole, limits = AutoModelForMultimodalLM.from_pretrained(killed / "run/model"), {"max_new_tokens": 6}
    for dialogue, turn, text in replies["text", "reference"][:3]:
        (history,) = (each.turns[:turn] for each in dialogues if each.id == dialogue)
        prompt = template.tokenizer.apply_chat_template(
            template.messages(history), add_generation_prompt=True, return_tensors="pt"
        )
        reply = whole.generate(**prompt, do_sample=False, **limits)[0, prompt["input_ids"].shape[1] :]
        assert template.tokenizer.decode(reply, skip_special_tokens=True) == text
