"""Preflight: each planted fault fails its own check, and missing files are an error only at the launch."""

import io
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, random_dialogue, small_tokenizer, tiny_config
from processes import run_script
from rich.console import Console
from transformers import AutoModelForCausalLM

from csc_train.config.cluster import ClusterConfig
from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn, data_digest
from csc_train.data.readers import write_dialogues
from csc_train.data.splits import read_and_check_splits
from csc_train.data.strategies import GREETING
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.launching.preflight.checks import check_world_size, run_preflight
from csc_train.launching.preflight.report import PreflightReport
from csc_train.launching.preflight.size import memory_scenario
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tokenized_cache import tokenize
from csc_train.training.memory import estimate_memory


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A directory with a small sharded model, its tokenizer, and dialogues."""
    folder = tmp_path_factory.mktemp("job")
    tokenizer = small_tokenizer("qwen2_5")
    config = tiny_config("qwen2", tokenizer, 0.02)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "model")
    assert (folder / "model" / "model.safetensors.index.json").is_file()
    rng = random.Random(4)
    write_dialogues(folder / "dialogues.jsonl", [random_dialogue(rng) for _ in range(12)])
    return folder


def composed(job: Path, *overrides: str):
    """A training of the job's model that every check passes; `overrides` come last."""
    return compose(
        "preflight",
        [
            "model=qwen2_5_0_5b", f"model.path={job / 'model'}", "data=files",
            f"data.train.path={job / 'dialogues.jsonl'}", "data.evaluation_fraction=0.3",
            f"run.directory={job / 'runs' / 'new'}",
            *overrides,
        ],
    )  # fmt: skip


def message(outcome: PreflightReport, name: str) -> str:
    return next(check.message for check in outcome.checks if check.name == name)


def statuses(outcome: PreflightReport) -> dict[str, str]:
    return {check.name: check.status for check in outcome.checks}


def failure(outcome: PreflightReport) -> tuple[str, str]:
    """Name and message of the one check that failed."""
    (check,) = outcome.failed
    return check.name, check.message


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_sound_job_passes_and_is_estimated(job):
    outcome = run_preflight(composed(job), launching=True)
    expected = dict.fromkeys(statuses(outcome), "ok") | {
        "memory": "not checked"
    }  # on a CPU there is nothing to plan for
    assert statuses(outcome) == expected, outcome.failed
    estimate = outcome.estimate
    assert (estimate.dialogues, estimate.steps) == (8, 3)  # one step an epoch
    assert estimate.hours is None and estimate.flops > 0
    given = composed(job, "cluster=node8", "preflight.dialogues=1000", "preflight.tokens_per_dialogue=1024",
                     "data.train.path=absent.jsonl", "preflight.probe=false", "trainer.epochs=2")  # fmt: skip
    estimate = run_preflight(given, launching=False).estimate
    # 1,024,000 tokens are 125 packs of 8192: 16 steps of 8, twice.
    assert (estimate.tokens, estimate.packs, estimate.steps) == (1_024_000, 125, 32)
    assert estimate.hours == pytest.approx(estimate.flops / (0.4 * 989e12 * 8 * 3600))
    given.data.train_fraction = 0.1
    assert run_preflight(given, launching=False).estimate.dialogues == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "few", "steps"),
    [
        (["trainer.epochs=49"], True, 49),
        (["trainer.epochs=50"], False, 50),
        (["trainer.max_steps=49"], True, 49),
        (["trainer.max_steps=50", "trainer.epochs=1"], False, 50),
    ],
)
def test_few_optimizer_steps_and_a_prompt_in_another_language_are_noted(job, overrides, few, steps):
    config = composed(job, *overrides)
    outcome = run_preflight(config, launching=True)
    assert outcome.estimate.steps == config.trainer.steps(outcome.estimate.packs) == steps
    assert (f"note: {steps} optimizer steps, fewer than 50" in str(outcome.estimate)) == few
    assert "note: " not in message(outcome, "data")
    english = [(Turn(Speaker.SUPPORTER, f"How may I help you on day {day}?", GREETING),) for day in range(8)]
    write_dialogues(job / "english.jsonl", [Dialogue(str(day), turns) for day, turns in enumerate(english)])
    config.data.train.path = str(job / "english.jsonl")
    assert "note: 100% of the dialogues are in the language en" in message(run_preflight(config), "data")


FAULTS = {
    "batch": (["trainer.packs_per_step=3"], "trainer.packs_per_step=3 is not a multiple of"),
    "ZeRO": (
        ["zero=zero0", "trainer.precision=bf16"],
        "zero.stage=0 with adapter.kind=full in bf16: DeepSpeed's stage 0",
    ),
    "parameters": (["trainer.router_aux_loss_coef=1"], "router_aux_loss_coef=1.0: qwen2 has no experts: leave it out"),
    "tokenizer and template": (["model.chat_template=llama3_1"], "chat template llama3_1: it ends a turn with"),
    "run": (["on_finish=evaluate", "on_finish.overrides=['evaluation.nope=1']"], "unknown key 'evaluation.nope'"),
    "attention": (["model.attn_implementation=varlen_fa3"], "No module named"),
    "final model": (
        ["adapter=lora", "adapter.target_modules=nope"],
        "adapter.target_modules=nope: matches no linear layer",
    ),
    "trackers": (["tracking=wandb"], "tracking=wandb: no key; run `wandb login`"),
    "data": (["data.train.source=nobody"], "no row has source 'nobody'"),
    "memory": (
        ["cluster.gpu_memory_gib=0.5"],
        "of 0.5 GiB per GPU, 0.0 GiB per node: does not fit; nothing tried fits: take shorter packs or an adapter",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_its_own_check_and_no_other(job, name):
    overrides, message = FAULTS[name]
    found, said = failure(run_preflight(composed(job, *overrides)))
    assert found == name
    assert message in said and "\n" not in said


@pytest.mark.slow
def test_a_missing_shard_is_named(job, tmp_path):
    shutil.copytree(job / "model", tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    shards[1].unlink()
    for launching in (True, False):
        outcome = run_preflight(composed(job, f"model.path={tmp_path / 'model'}"), launching=launching)
        expected = f"{tmp_path / 'model'}: 1 of {len(shards)} shards are missing, the first {shards[1].name}"
        assert failure(outcome) == ("model files", expected)


def test_a_broken_data_file_is_named_with_its_line(job, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    name, message = failure(run_preflight(composed(job, f"data.train.path={broken}")))
    assert name == "data" and str(broken) in message


@pytest.mark.slow
def test_missing_files_are_an_error_only_at_the_launch(job):
    absent = composed(job, "model.path=./nowhere", "data.train.path=./nowhere.jsonl")
    names = ("model files", "tokenizer and template", "data")
    assert [statuses(run_preflight(absent, launching=True))[name] for name in names] == ["failed"] * 3
    outcome = run_preflight(absent, launching=False)
    assert [statuses(outcome)[name] for name in names] == ["not checked"] * 3
    assert not outcome.failed


@pytest.mark.slow
def test_a_model_without_a_row_is_planned_by_its_own_files_or_not_at_all(job):
    own = run_preflight(composed(job, "model=own", f"model.path={job / 'model'}", "model.chat_template=qwen2_5"))
    row = run_preflight(composed(job))
    assert own.chosen == row.chosen
    with pytest.raises(InputError, match=r"^someone/model: cannot load .* or give its dimensions by a row of conf/"):
        run_preflight(composed(job, "model=own", "model.path=someone/model"))
    given = composed(job, "model=own", "model.path=someone/model", "model.architecture.hidden_size=128")
    assert run_preflight(given, launching=False).chosen.dims.hidden == 128


@pytest.mark.slow
def test_a_hybrid_is_planned_as_the_text_model_with_the_gpus_kernel(monkeypatch, tmp_path):
    """The dimensions of conf/model are enough; the kernel is looked for where preflight runs."""

    def outcome(*overrides: str, launching: bool = False):
        plan = ["model=qwen3_5_9b", "data.train.path=x", f"run.directory={tmp_path / 'run'}", "preflight.probe=false"]
        return run_preflight(compose("preflight", [*plan, *overrides]), launching=launching, free_disk=10**15)

    cluster = ["cluster=node8", "zero=zero3"]
    here, gpus = outcome(), outcome(*cluster)
    assert message(here, "delta nets") == "functions of torch, 24 of 32 layers"
    assert re.match("8,953,803,264 of the text model; its weights of vision", message(here, "parameters"))
    assert statuses(gpus)["delta nets"] == "not checked" and gpus.scenarios[0].dims.delta
    assert "not installed: run pip install -U flash-linear-attention, or set" in message(gpus, "delta nets")
    assert statuses(outcome(*cluster, launching=True))["delta nets"] == "failed"
    assert statuses(outcome(*cluster, "model.delta_kernel=torch", launching=True))["delta nets"] == "ok"
    # A package of that name, as pip would install it.
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").touch()
    (tmp_path / "flash_linear_attention-0.6.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: flash-linear-attention\nVersion: 0.6.0\n"
    (tmp_path / "flash_linear_attention-0.6.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    found = outcome(*cluster, launching=True)
    assert message(found, "delta nets") == "flash-linear-attention 0.6.0, 24 of 32 layers"
    # A vision-language directory is planned as itself whatever row is chosen, though its weights are not there yet.
    text = {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 248320}  # of the 9B, the rest by default
    write_json(tmp_path / "config.json", {"model_type": "qwen3_5", "vision_config": {}, "text_config": text})
    (tmp_path / "model.safetensors").touch()
    assert outcome("model=qwen2_5_7b", f"model.path={tmp_path}").chosen.dims == here.chosen.dims


@pytest.mark.slow
def test_experts_are_planned_whole_and_charged_by_those_of_a_token(tmp_path):
    def outcome(*overrides: str, launching: bool = False):
        plan = ["cluster=node8", "data.train.path=x", f"run.directory={tmp_path / 'run'}", "preflight.probe=false"]
        plan += ["preflight.dialogues=1000", "preflight.tokens_per_dialogue=1000"]
        plan += [*overrides, "trainer.epochs=1"]
        return run_preflight(compose("preflight", plan), launching=launching, free_disk=10**15)

    lora = outcome("experiment=qwen3_30b_a3b_lora")
    assert not lora.failed and statuses(lora)["memory"] == "ok" and lora.chosen.stage == "3"
    assert message(lora, "parameters") == "30,532,122,624, of which a token uses 3,353,032,704"
    dims = lora.chosen.dims
    flops = 4 * (dims.active_parameters - dims.embedding) * 1e6  # both embeddings count as used, one multiplies
    assert flops < lora.estimate.flops < 1.15 * flops  # with attention and adapters
    # Adapters of experts are charged by the experts of a token, too, and so are the gradients of these experts.
    more = outcome("experiment=qwen3_30b_a3b_lora", "adapter.target_parameters=all-experts")
    added = more.chosen.adapter_parameters - lora.chosen.adapter_parameters
    assert more.chosen.idle_adapters == added * 120 // 128
    behind = 2 * dims.layers * dims.experts.active * dims.expert
    assert more.estimate.flops - lora.estimate.flops == pytest.approx((6 * added / 16 + behind) * 1e6)
    assert len(more.chosen.changed_experts) == 2 and not lora.chosen.changed_experts
    assert estimate_memory(more.chosen).activations > estimate_memory(lora.chosen).activations + 2 * dims.block_experts
    unused = ["model=qwen2_5_7b", "adapter=full", "adapter.target_parameters=all-experts"]
    assert not memory_scenario(compose("preflight", unused)).adapted_experts
    # QLoRA quantizes linear layers only.
    qlora = outcome("model=qwen3_30b_a3b_instruct_2507", "adapter=qlora", "zero=off")
    assert message(qlora, "adapters").endswith("experts stay in bf16, 54.0 GiB: only linear layers are held in 4 bits")
    assert estimate_memory(qlora.chosen).parameters > 2 * 28_991_029_248
    # A directory is planned as itself, whatever row is chosen; one without experts in some layers is refused.
    config = {"model_type": "qwen3_moe", "vocab_size": 151936, "num_hidden_layers": 48, "num_key_value_heads": 4}
    write_json(tmp_path / "config.json", config | {"head_dim": 128})  # the rest by default
    (tmp_path / "model.safetensors").touch()
    directory = f"model.path={tmp_path}"
    assert outcome("model=qwen3_8b", "adapter=lora", "zero=zero3", directory).chosen.dims.parameters == dims.parameters
    write_json(tmp_path / "config.json", config | {"mlp_only_layers": [0]})
    refused = message(outcome("model=qwen3_30b_a3b_instruct_2507", directory, launching=True), "model files")
    assert re.search(r"; \S+ qwen3_moe: some layers have no experts \(mlp_.*: choose a model", refused), refused


@pytest.mark.slow
def test_a_disk_too_small_for_the_checkpoints_is_refused(job):
    outcome = run_preflight(composed(job), free_disk=1000)
    name, message = failure(outcome)
    assert name == "disk" and "0.0 GiB free" in message and "trainer.save_total_limit" in message
    # Checkpoints of 12 bytes per parameter, one more than are kept, and a final model of 4 bytes per parameter.
    parameters = outcome.scenarios[0].dims.parameters
    assert not run_preflight(composed(job), free_disk=(3 * 12 + 4) * parameters).failed
    assert run_preflight(composed(job), free_disk=(3 * 12 + 4) * parameters - 1).failed


@pytest.mark.slow
def test_another_world_size_than_the_clusters_is_refused(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    expected = "WORLD_SIZE=4, but cluster=cpu2 has 1 nodes x 2 processes = 2"
    assert failure(run_preflight(composed(job))) == ("world size", expected)


@pytest.mark.slow
def test_a_training_on_several_gpus_in_one_process_is_refused(job, monkeypatch):
    eight = ClusterConfig(device="cuda", gpus_per_node=8, process_launcher="none")
    with pytest.raises(InputError, match=r"^cluster.process_launcher=none: a training needs one process per GPU"):
        check_world_size(replace(composed(job), cluster=eight))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    one = ClusterConfig(device="cuda", gpus_per_node=1, process_launcher="none")
    assert check_world_size(replace(composed(job), cluster=one)) == "1 nodes x 1 processes = 1"


@pytest.mark.slow
def test_packages_outside_their_ranges_are_named(job, tmp_path, monkeypatch):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["torch<1", "no-such-package>=1", "rich>=1"]\n')
    monkeypatch.setattr("csc_train.launching.preflight.checks.PYPROJECT", project)
    name, message = failure(run_preflight(composed(job)))
    assert name == "packages"
    assert "torch<1 (" in message and "no-such-package>=1 (not installed)" in message and "rich" not in message


def driver(folder: Path, monkeypatch, *rows: str) -> None:
    """Put an nvidia-smi on the path that answers with `rows`."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.slow
def test_the_gpus_are_those_of_the_cluster(job, tmp_path, monkeypatch):
    row = "NVIDIA H100, 81559, {}, 580.1"

    def gpus(*used: int, **options) -> tuple[str, str]:
        driver(tmp_path, monkeypatch, *(row.format(mib) for mib in used))
        config = composed(job, "cluster=node8", *(f"{key}={value}" for key, value in options.items()))
        (check,) = (check for check in run_preflight(config, launching=False).checks if check.name == "GPUs")
        return check.status, check.message

    assert gpus(*[4] * 8) == ("ok", "8 x NVIDIA H100, 79.6 GiB")
    assert gpus(4) == ("failed", "cluster.gpus_per_node=8, but there are 1 GPUs")
    assert gpus(*[4] * 7, 50_000) == ("failed", "GPU 7 (NVIDIA H100): other processes use 48.8 GiB")
    assert gpus(*[4] * 8, **{"cluster.gpu_memory_gib": 140})[1].endswith(
        "has 79.6 GiB, but cluster.gpu_memory_gib=140.0"
    )
    assert gpus(4, **{"preflight.probe": "false"}) == ("not checked", "preflight.probe=false")
    assert gpus(4, **{"cluster.scheduler": "slurm"}) == ("not checked", "on another machine")


@pytest.mark.parametrize(("gib", "mode"), [(141, "off"), (79.6, "selective"), (60, "full")])
def test_the_memory_check_names_the_checkpointing_that_auto_takes(gib, mode):
    options = ["model=qwen2_5_7b", "cluster=node8", "zero=zero2", f"cluster.gpu_memory_gib={gib}"]
    checks = run_preflight(compose("preflight", [*options, "preflight.probe=false"]), launching=False).checks
    (message,) = (check.message for check in checks if check.name == "memory")
    assert f"of {gib:.1f} GiB per GPU, 113.5 of 1024 GiB per node, gradient checkpointing {mode}, saved in" in message


@pytest.mark.slow
def test_an_estimate_that_does_not_fit_names_what_fits(job):
    config = compose("preflight", ["model=qwen2_5_72b", "cluster=node8", "zero=zero3", "preflight.probe=false"])
    outcome = run_preflight(config, launching=False, free_disk=10**15)
    name, message = failure(outcome)
    assert name == "memory" and "of 79.6 GiB per GPU, " in message and " per node: does not fit; what fits: " in message
    assert message.endswith("GPUs")
    console = Console(width=180, record=True, file=io.StringIO())
    outcome.show(console)
    text = console.export_text()
    assert "Memory estimate: GiB on each of 8 GPUs of 79.6 GiB; 8,192 tokens per forward pass" in text
    rows = [line for line in text.splitlines() if "ZeRO-3" in line and ">" in line]
    assert len(rows) == 1 and "full" in rows[0]
    assert text.rstrip().endswith("1 failed: memory")


@pytest.mark.slow
def test_the_recipe_ends_with_status_1_and_writes_nothing(tmp_path):
    recipe = ROOT / "recipes" / "preflight.py"
    done = run_script(recipe, "experiment=demo", "cluster.gpus_per_node=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
    done = run_script(recipe, "experiment=demo", "trainer.packs_per_step=3", cwd=tmp_path)
    assert done.returncode == 1 and "1 failed: batch" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cached_tokenization_is_found(job, tmp_path):
    config = composed(job, f"tokenization.cache_dir={tmp_path}")
    assert message(run_preflight(config), "tokenized data").startswith("no hit: the run tokenizes first")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", config.template)
    train = read_and_check_splits(config.data).train
    tokenize(train, template, config.tokenization)
    (entry,) = tmp_path.glob("[0-9a-f]*")
    assert message(run_preflight(config), "tokenized data") == f"{entry}: hit"
    assert data_digest(train)[:12] in message(run_preflight(config), "data")
    assert "no hit" in message(
        run_preflight(composed(job, f"tokenization.cache_dir={tmp_path}", "data.seed=1")), "tokenized data"
    )
    dropping = composed(job, f"tokenization.cache_dir={tmp_path}", "data.on_overlap=drop")
    assert statuses(run_preflight(dropping))["tokenized data"] == "not checked"
