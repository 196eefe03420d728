"""Every shipped configuration composes, means what its file says, and wrong ones are refused with a remedy."""

import functools
import itertools
import re
import sys
import typing
from collections import defaultdict

import pytest
import torch
from conftest import ROOT, sampled
from omegaconf import OmegaConf
from processes import run_script
from transformers import AutoModelForCausalLM

from csc_train.config.cli import run_recipe
from csc_train.config.compose import compose, to_container
from csc_train.config.explain import groups_of
from csc_train.config.paths import CONF
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.models.families import build_model_config, model_dims

FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_file())
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen3.5-0.8B": 752_393_024,
    "Qwen/Qwen3.5-2B": 1_881_825_088,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "Qwen/Qwen3.5-27B": 26_895_998_464,
    "Qwen/Qwen3.6-27B": 26_895_998_464,
    "Qwen/Qwen3.8-27B": 26_895_998_464,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen/Qwen3.6-35B-A3B": 34_660_610_688,
}
"""As published, each matrix counted once: some pages count a tied output matrix twice (Qwen3-0.6B and 1.7B).

Of Qwen3.5, 3.6 and 3.8 the text part, which with that of vision gives the published total."""
REQUIRED = {
    "sft": [],
    "prepare": [],
    "inspect_data": [],
    "preflight": [],
    "export": ["source=runs/x", "output=y"],
    "evaluate": ["checkpoint=runs/x/model"],
    "compare": ["a=runs/x", "b=runs/y"],
    "judge": ["a=runs/x", "b=runs/y"],
    "human_eval": ["export", "runs/x", "runs/y"],
    "chat": ["checkpoint=runs/x/model"],
    "write_sample": [],
    "convert": ["from=csv", "input=x", "output=y.jsonl"],
    "build_csconv": [],
    "synthesize_rolecs": [],
    "launch": [],
    "sweep": [],
    "reproduce": ["suite=cpu_tiny"],
    "compare_runs": [],
    "clean": [],
}
"""What each recipe cannot do without."""
INSTEAD = {
    ("evaluate", "template"): ["llm=gpt_4o", "data=rolecs"],
    ("convert", "llm"): ["from=csv", "input=x", "output=y.jsonl", "label=llm"],
}
"""The same, where a group goes with something else."""
CHOOSERS = ("experiment", "debug", "suite")
"""Groups whose files choose files of other groups."""
WITH_DATA = [recipe for recipe in SCHEMAS if "data" in schema_of(recipe).__dataclass_fields__]
"""The recipes that read dialogues."""


def recipes_of(file):
    """The recipes that a file of conf/ belongs to."""
    group, _, name = file.rpartition("/")
    if not group:
        return [recipe for recipe in SCHEMAS if name == f"{recipe}.yaml"]
    return [recipe for recipe in SCHEMAS if group in groups_of(recipe)]


def cases():
    """(recipe, files of conf/ that it takes at once): every file is among those of one recipe.

    Of recipes whose section is of one type, each takes a share of the group's files: they share all that reads it.
    """
    shares = defaultdict(dict)
    for group in sorted({file.rpartition("/")[0] for file in FILES} - {""}):
        files, alike = [file for file in FILES if file.startswith(f"{group}/")], defaultdict(list)
        for recipe in recipes_of(files[0]):
            alike[str(typing.get_type_hints(schema_of(recipe)).get(group))].append(recipe)
        for recipes in alike.values():
            for index, recipe in enumerate(recipes):
                shares[recipe][group] = files[index :: len(recipes)]
    for recipe in SCHEMAS:
        yield recipe, (f"{recipe}.yaml",)
        alone = [group for group in shares[recipe] if group in CHOOSERS or (recipe, group) in INSTEAD]
        yield from ((recipe, (file,)) for group in alone for file in shares[recipe][group])
        columns = [files for group, files in shares[recipe].items() if group not in alone]
        yield from ((recipe, tuple(filter(None, row))) for row in itertools.zip_longest(*columns))


CASES = list(cases())
FILLER = "a/b"
"""In place of every value that a file leaves to the user."""


@functools.cache
def composed(recipe, *files):
    """A recipe's configuration with files of conf/, one of a group, the values that they leave to the user filled."""
    overrides = REQUIRED[recipe]
    for group, _, name in (file.rpartition("/") for file in files):
        overrides = INSTEAD.get((recipe, group), overrides)
        if not group:
            continue
        overrides = [*overrides, f"{group}={name.removesuffix('.yaml')}"]
        if group not in ("experiment", "debug"):
            marked = [key for key, value in leaves(load(f"{group}/{name}")).items() if value == "???"]
            fillers = {key: f"[{{path: '{FILLER}'}}]" if key == "mix" else FILLER for key in marked}
            overrides += [f"{group}.{key}={value}" for key, value in fillers.items()]
    return compose(recipe, overrides)


def model_of(file):
    """The section that a file of conf/model brings about."""
    return next(composed(recipe, *files).model for recipe, files in CASES if file in files)


def load(file):
    return OmegaConf.to_container(OmegaConf.load(CONF / file)) or {}


def leaves(node, prefix=""):
    """{dotted key: value} of nested mappings; the defaults list is not among the values."""
    flat = {}
    for key, value in node.items():
        if key == "defaults":
            continue
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def stated(file):
    """{dotted key of the recipe's configuration: value} that a file must bring about, by its overrides and itself."""
    group = file.rpartition("/")[0]
    content = load(file)
    values = {}
    for entry in content.get("defaults", []):
        if entry == "_self_":
            continue
        if isinstance(entry, str):  # another file of the group
            values |= stated(f"{group}/{entry}.yaml") if group else {}
            continue
        for choice, option in entry.items():
            if choice.startswith("override /"):
                values |= stated(f"{choice.removeprefix('override /')}/{option}.yaml")
    return values | leaves(content, "" if group in ("experiment", "debug", "suite") else f"{group}.")


def test_conf_holds_yaml_only_and_a_root_for_each_recipe():
    assert len(FILES) > 30
    assert [file for file in FILES if not file.endswith(".yaml")] == []
    assert {file.removesuffix(".yaml") for file in FILES if "/" not in file} == set(SCHEMAS)
    entries = [path for folder in ("recipes", "launch") for path in (ROOT / folder).glob("*.py")]
    assert {path.stem for path in entries} == set(SCHEMAS)


@pytest.mark.slow
def test_every_file_belongs_to_a_recipe():
    assert [file for file in FILES if not recipes_of(file)] == []


def test_every_file_is_composed():
    assert {file for _, files in CASES for file in files} == set(FILES)


@pytest.mark.parametrize(
    ("recipe", "files"), sampled(CASES, 16), ids=["-".join((recipe, *files)) for recipe, files in CASES]
)
def test_every_file_composes_and_its_values_arrive(recipe, files):
    got = leaves(to_container(composed(recipe, *files)))
    for file in files:
        for key, value in stated(file).items() if "/" in file else ():
            if value == "???":
                assert got[key] == FILLER or got[key][0]["path"] == FILLER, (file, key)
            elif "${" not in str(value):
                assert got[key] == value, (file, key)


@pytest.mark.slow
def test_debug_presets_shrink_every_experiment():
    experiments = [file.split("/")[1].removesuffix(".yaml") for file in FILES if file.startswith("experiment/")]
    presets = [file for file in FILES if file.startswith("debug/")]
    assert presets
    for preset in presets:
        expected = {key: value for key, value in stated(preset).items() if "${" not in str(value)}
        for experiment in experiments:
            overrides = [f"experiment={experiment}", f"debug={preset.split('/')[1].removesuffix('.yaml')}"]
            got = leaves(to_container(compose("sft", overrides)))
            assert {key: got[key] for key in expected} == expected, overrides


@pytest.mark.slow
def test_prepare_takes_what_sft_takes_and_makes_the_same_of_it():
    for files in ([], *([file] for file in FILES if file.startswith("experiment/"))):
        assert to_container(composed("prepare", *files)) == to_container(composed("sft", *files)), files


@pytest.mark.slow
def test_experiments_keep_what_makes_them_differ():
    """A row and its ablation or adapter version differ in what their names say, and in nothing else."""
    row, reply_only, given, lora = (
        to_container(composed("sft", f"experiment/qwen2_5_7b_{name}.yaml"))
        for name in ("rolecs", "reply_only", "given", "lora")
    )
    for name, ablation in (("reply_only", reply_only), ("given", given)):
        assert [part for part in row if row[part] != ablation[part]] == ["template"]
        assert ablation["template"]["mode"] == name
    assert [part for part in row if row[part] != lora[part]] == ["adapter", "trainer"]
    assert (row["adapter"]["kind"], lora["adapter"]["kind"]) == ("full", "lora")


@pytest.mark.slow
def test_a_published_model_is_loaded_not_made_up():
    for file in FILES:
        if file.startswith("model/") and "path" in load(file):
            model = model_of(file)
            assert (model.init, model.tokenizer) == ("pretrained", None), file


@pytest.mark.parametrize("file", sampled([file for file in FILES if file.startswith("model/")], 12))
def test_model_has_the_published_number_of_parameters(file):
    model = model_of(file)
    comment = re.match(r"# ([\d,]+) parameters", (CONF / file).read_text())
    if "architecture" not in load(file) or model.init == "random":
        assert comment is None
        return
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(build_model_config(model.architecture, None))
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[model.path]
    assert int(comment.group(1).replace(",", "")) == PARAMETERS[model.path]
    active = re.search(r"a token uses ([\d,]+\d)", (CONF / file).read_text())
    assert (active is None) == ("A3B" not in model.path)
    if active:
        assert int(active.group(1).replace(",", "")) == model_dims(model.architecture).active_parameters


def refusal(recipe, *overrides):
    """The message with which a recipe's configuration is refused."""
    with pytest.raises(InputError) as caught:
        compose(recipe, [*REQUIRED[recipe], *overrides])
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    sampled([
        (
            "sft",
            "trainer.lerning_rate=1",
            "unknown key 'trainer.lerning_rate' for recipe sft. Did you mean 'trainer.learning_rate'?",
        ),
        (
            "sft",
            "+trainer.lerning_rate=1",
            "unknown key 'trainer.lerning_rate' for recipe sft. Did you mean 'trainer.learning_rate'?",
        ),
        (
            "sft",
            "++trainer.lerning_rate=1",
            "unknown key 'trainer.lerning_rate' for recipe sft. Did you mean 'trainer.learning_rate'?",
        ),
        (
            "sft",
            "model.architecture.hiden_size=8",
            "unknown key 'model.architecture.hiden_size' for recipe sft. Did you mean "
            "'model.architecture.hidden_size'?",
        ),
        ("sft", "trianer=full", "unknown key 'trianer' for recipe sft. Did you mean 'trainer'?"),
        ("sft", "+datta=rolecs", "unknown key 'datta' for recipe sft. Did you mean 'data'?"),
        ("sft", "+qqq=1", "unknown key 'qqq' for recipe sft."),
        (
            "sft",
            "trainer=ful",
            "trainer=ful: not in conf/trainer. Did you mean 'full'? Known: from_scratch, full, lora",
        ),
        ("sft", "trainer=null", "trainer=null: choose one of from_scratch, full, lora, or leave it out"),
        ("sft", "trainer.epochs=many", "trainer.epochs: Value 'many' of type 'str' could not be converted to Float"),
        ("sft", "trainer.warmup_ratio=2", "trainer.warmup_ratio=2.0: must be between 0 and 0.99"),
        ("sft", "trainer.epochs=nan", "trainer.epochs=nan: must be between 0.001 and 1000000"),
        ("sft", "template.mode=joiint", "template.mode=joiint: choose one of joint, given, reply_only. Did you mean "
         "'joint'?"),
        ("sft", "data=files", "data.train.path is required: give data.train.path=..."),
        ("sft", "model.path=null", "model.path is not set: give a local directory or a hub id, or model.init=random"),
        ("preflight", "zero=zero4", "zero=zero4: not in conf/zero. Did you mean 'zero3'? Known: from_launcher, off, "
         "zero0, zero1, zero2, zero3, zero3_offload"),
        ("preflight", "zero.stage=4", "zero.stage=4: choose one of auto, off, 0, 1, 2, 3, from_launcher."),
        (
            "evaluate",
            "evaluation.batchsize=3",
            "unknown key 'evaluation.batchsize' for recipe evaluate. Did you mean 'evaluation.batch_size'?",
        ),
        (
            "evaluate",
            "evaluation.contexts=[referense]",
            "evaluation.contexts=referense: choose one of reference, generated. Did you mean 'reference'?",
        ),
        ("evaluate", "evaluation.contexts=[]", "evaluation.contexts=[]: give one or more of reference, generated"),
        ("evaluate", "metrics=model_based", "metrics.bertscore_model is required: give metrics.bertscore_model=..."),
        (
            "sft",
            "model.architecture.rope_parameters={factor: 2}",
            "model.architecture.rope_parameters: entries are added one by one: "
            "+model.architecture.rope_parameters.name=value",
        ),
        ("evaluate", "checkpoint=???", "checkpoint is required: give checkpoint=..."),
        (
            "write_sample",
            "data.sample_dialogs=3",
            "unknown key 'data.sample_dialogs' for recipe write_sample. Did you mean 'data.sample_dialogues'?",
        ),
    ], 4),
)  # fmt: skip
def test_message(recipe, override, message):
    assert refusal(recipe, override) == message


def nested_key(recipe):
    """A key two levels down that `recipe` has."""
    return {
        "sft": "packing.max_length",
        "prepare": "tokenization.num_workers",
        "inspect_data": "packing.max_length",
        "preflight": "cluster.nodes",
        "evaluate": "evaluation.batch_size",
        "compare": "metrics.batch_size",
        "write_sample": "data.seed",
        "launch": "cluster.nodes",
    }[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WITH_DATA)
def test_every_recipe_refuses_what_is_wrong(recipe):
    key = nested_key(recipe)
    group, leaf = key.split(".")
    assert compose(recipe, [*REQUIRED[recipe], f"{key}=7"])
    for prefix in ("", "+", "++"):
        message = refusal(recipe, f"{prefix}{group}.{leaf}x=1")
        assert f"unknown key '{group}.{leaf}x'" in message and f"Did you mean '{key}'?" in message
        assert "unknown key 'nonsense'" in refusal(recipe, f"{prefix}nonsense=1")
    assert f"Did you mean '{group}'?" in refusal(recipe, f"+{group}x=1")
    group, option = next((group, option) for group, option in groups_of(recipe).items() if option)
    assert f"Did you mean '{option}'?" in refusal(recipe, f"{group}={option}x")
    assert refusal(recipe, f"{key}=word").startswith(f"{key}: ")
    assert refusal(recipe, f"{key}=1.5").startswith(f"{key}: ")
    assert refusal(recipe, f"{key}=[1]").startswith(f"{key}: ")
    assert refusal(recipe, f"{key}=-1").startswith(f"{key}=-1")
    assert refusal(recipe, f"{key}=1=2").startswith(f"{key}: ")
    assert refusal(recipe, f"{key}={{").startswith(f"{key}={{: broken list")
    for broken in (key, "--multirun"):
        assert refusal(recipe, broken).startswith(f"{broken}: not of the form key=value")


def test_an_unknown_key_of_export_is_refused():
    assert "Did you mean 'output'?" in refusal("export", "outputt=x")
    assert refusal("export", "merge_into=x").startswith("merge_into=x: choose one of base, dequantized")


@pytest.mark.slow
def test_required_values_are_named_for_every_recipe():
    with pytest.raises(InputError, match=r"^checkpoint is required: give checkpoint=\.\.\.$"):
        compose("evaluate", [])
    with pytest.raises(InputError, match=r"^output is required: give output=\.\.\.$"):
        compose("export", ["source=runs/x"])
    for recipe in WITH_DATA:
        assert refusal(recipe, "data=files") == "data.train.path is required: give data.train.path=..."
    assert compose("sft", ["data=files", "data.train.path=mine.jsonl"]).data.train.path == "mine.jsonl"


def test_compare_takes_its_two_runs_as_bare_words():
    config = compose("compare", ["runs/x", "runs/y", "permutations=2000"])
    assert (config.a, config.b, config.permutations) == ("runs/x", "runs/y", 2000)
    assert compose("compare", ["runs/x", "b=runs/y"]).b == "runs/y"
    with pytest.raises(InputError, match=r"^b is required"):
        compose("compare", ["runs/x"])
    assert refusal("compare", "runs/z").startswith("runs/z: not of the form key=value")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predictions=x.jsonl", "checkpoint=y"], "predictions=x.jsonl: give it or checkpoint=..., not both"),
        (["predictions=x.jsonl"], "predictions=x.jsonl: say what they answer, such as data=rolecs"),
        (["predictions=x.jsonl", "data=sample"], "predictions=x.jsonl: say in which context they were made"),
        (["score_only=true"], "score_only=true: name the run whose predictions to score, by run=DIR"),
        (["score_only=True"], "score_only=true: name the run whose predictions to score, by run=DIR"),
    ],
)
def test_an_evaluation_without_a_model_says_what_it_needs(overrides, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        compose("evaluate", overrides)


def test_a_mapping_takes_whole_numbers():
    config = compose(
        "sft", ["model.architecture.rope_parameters.rope_theta=5000", "+model.architecture.rope_parameters.factor=2.5"]
    )
    assert config.model.architecture.rope_parameters["rope_theta"] == 5000
    assert config.model.architecture.rope_parameters["factor"] == 2.5
    assert refusal("sft", "+model.architecture.rope_parameters.factor=[1]").startswith(
        "model.architecture.rope_parameters.factor: "
    )


def recipe_process(cwd, *arguments):
    return run_script(ROOT / "recipes" / "sft.py", *arguments, cwd=cwd)


@pytest.mark.slow
def test_misspelt_override_on_the_command_line(tmp_path):
    done = recipe_process(tmp_path, "trainer.lerning_rate=1")
    assert done.returncode == 2
    assert done.stdout == ""
    expected = "error: unknown key 'trainer.lerning_rate' for recipe sft. Did you mean 'trainer.learning_rate'?\n"
    assert done.stderr == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_on_one_rank_of_a_job_is_printed(rank, tmp_path, monkeypatch, capsys):
    """By the first process itself, by the others in the report that torchrun makes of the process that failed."""

    def refuse(config):
        raise InputError("the disk of this machine is full")

    report = tmp_path / "error.json"
    monkeypatch.setattr(sys, "argv", ["write_sample.py"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(SystemExit) as stop:
        run_recipe("write_sample", refuse)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (said, report.exists()) == (
        ("error: the disk of this machine is full\n", False) if rank == "0" else ("", True)
    )
    assert rank == "0" or "the disk of this machine is full" in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_help_and_cfg_show_and_write_nothing(tmp_path):
    shown = recipe_process(tmp_path, "--cfg", "job", "experiment=qwen2_5_7b_lora", "trainer.epochs=5")
    assert shown.returncode == 0, shown.stderr
    config = OmegaConf.create(shown.stdout)
    assert (config.adapter.kind, config.trainer.epochs, config.model.name) == ("lora", 5, "qwen2_5_7b")
    helped = recipe_process(tmp_path, "--help")
    assert helped.returncode == 0, helped.stderr
    options = ", ".join(sorted(file.split("/")[1].removesuffix(".yaml") for file in FILES if file.startswith("model/")))
    assert f"model: {options}" in " ".join(helped.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_weights_is_given_by_strategy():
    loss = compose(
        "sft", ["experiment=demo", "loss=by_strategy", "loss.strategy_factors.EM=2", "loss.strategy_factors.OT=0"]
    ).loss
    assert loss.weighting == "by_strategy"
    assert loss.strategy_factors == {
        strategy.code: {"EM": 2.0, "OT": 0.0}.get(strategy.code, 1.0) for strategy in STRATEGIES
    }
    with pytest.raises(
        InputError, match=r"loss\.strategy_factors\.EN' for recipe sft\. Did you mean 'loss\.strategy_factors"
    ):
        compose("sft", ["experiment=demo", "loss=by_strategy", "loss.strategy_factors.EN=2"])
