"""Every ZeRO stage trains the same model as one process, really shards it, and resumes what any other saved."""

import json
import pickle
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import psutil
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from conftest import ROOT, manifest_of, random_dialogue, sampled, small_tokenizer, tiny_config
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from faults import FAULTS
from processes import TIMEOUT_S, Script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from workers.loss_curve import EPOCHS, STEPS_PER_EPOCH, curve, first_packs, train, train_all

from csc_train.checkpoints import export as exporting
from csc_train.checkpoints import manifest as manifests
from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.content import hash_files
from csc_train.checkpoints.export import export
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import MANIFEST_FILE, write_manifest
from csc_train.checkpoints.reshard import MOMENTS, WEIGHT, open_training_checkpoint
from csc_train.checkpoints.training_checkpoint import (
    CHECKPOINT_FILE,
    PARTIAL_FOLDER,
    CheckpointRecord,
    check_resumable,
    check_whole,
    newest_whole,
)
from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.launching.preflight.size import memory_scenario
from csc_train.models.config import AdapterConfig
from csc_train.models.hub import load_causal_lm
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.compatibility import LAUNCHED, REFUSED, check_supported
from csc_train.training.config import ZeroConfig
from csc_train.training.deepspeed import check_engine, deepspeed_config, launcher_stage

TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-3
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STAGES = ("off", "0", "1", "2", "3")
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "learning_rate": 2e-2}
QLORA = {**LORA, "adapter": {**LORA["adapter"], "kind": "qlora"}}
DORA = {**LORA, "adapter": {**LORA["adapter"], "use_dora": True, "use_rslora": True}}
EIGHT_BITS = {"optimizer": "adamw_8bit"}
SELECTIVE, FULL = ({"gradient_checkpointing": mode} for mode in ("selective", "full"))
OFFLOAD = {"2": {"offload_optimizer": True}, "3": {"offload_optimizer": True, "offload_parameters": True}}


def case(
    stage: str, *, resume: str | None = None, checkpoints: str | None = None, offload: bool = False, **options
) -> dict:
    """What `loss_curve.train` gets; half of a step's packs in one pass, so that its steps accumulate gradients."""
    made = {"micro_batch_size": 1, "zero": {"stage": stage, **(OFFLOAD[stage] if offload else {})}, **options}
    if stage == "3":
        made["zero"]["persistence_threshold"] = 0  # the whole model is below the usual one
    if checkpoints:
        made |= {"checkpoints": f"{checkpoints}/checkpoints", "save_steps": 2, "save_total_limit": 9, "held": True}
    return made | ({"resume": f"{resume[:-1]}/checkpoints/checkpoint-{resume[-1]}"} if resume else {})


# Steps 2 and 4 of two epochs of three steps: in the middle of either.
TWO_PROCESSES = {
    **{f"full {stage}": case(stage, checkpoints=f"full-{stage}", **SELECTIVE) for stage in STAGES},
    **{
        f"lora {stage}": case(stage, checkpoints=f"lora-{stage}", **LORA, **SELECTIVE)
        for stage in STAGES
        if stage != "0"
    },
    **{f"qlora {stage}": case(stage, **QLORA) for stage in ("1", "2", "3")},
    **{f"bf16 {stage}": case(stage, precision="bf16", checkpoints=f"bf16-{stage}") for stage in ("off", "1")},
    **{f"bf16 {stage}": case(stage, precision="bf16") for stage in ("2", "3")},
    **{f"offload {stage}": case(stage, offload=True) for stage in OFFLOAD},
    **{
        f"again {stage} {step}": case(stage, resume=f"full-{stage}{step}", **FULL)
        for stage in STAGES
        for step in (2, 4)
    },
    **{
        f"moved {one} {other}": case(other, resume=f"full-{one}4")
        for one, other in (("off", "2"), ("1", "3"), ("2", "off"), ("3", "1"), ("0", "3"), ("3", "0"))
    },
    **{f"again lora {stage} 4": case(stage, resume=f"lora-{stage}4", **LORA, **FULL) for stage in ("1", "2", "3")},
    "bf16 again 1": case("1", precision="bf16", resume="bf16-14"),
    **{
        f"bf16 moved {one} {other}": case(other, precision="bf16", resume=f"bf16-{one}4")
        for one, other in (("off", "1"), ("1", "off"))
    },
    "moved lora 3 1": case("1", resume="lora-34", **LORA),
    "moved lora off 3": case("3", resume="lora-off4", **LORA),
    "dora 3": case("3", checkpoints="dora-3", **DORA),
    "8bit 2": case("2", checkpoints="8bit-2", **EIGHT_BITS),
    "8bit again 2": case("2", resume="8bit-24", **EIGHT_BITS),
    "8bit moved 2 off": case("off", resume="8bit-24", **EIGHT_BITS),
    "8bit left 2": case("2", resume="8bit-24"),
    "tied 1": case("1", checkpoints="tied-1", save_in_background="false") | {"held": False},
    "without room 1": case("1", checkpoints="without-room-1", save_in_background="false") | {"held": False, "full": 1},
}
ONE_PROCESS = {
    **{f"alone {stage} {step}": case(stage, resume=f"full-{stage}{step}") for stage in STAGES for step in (2, 4)},
    **{f"alone {stage} 2": case(stage, resume=f"full-{stage}2", checkpoints=f"alone-{stage}") for stage in ("2", "3")},
    **{f"alone lora {stage}": case(stage, resume=f"lora-{stage}4", **LORA) for stage in ("1", "2", "3")},
    "alone moved 2 off": case("off", resume="full-24"),
    "alone bf16 1": case("1", precision="bf16", resume="bf16-14"),
}
BACK_ON_TWO = {f"back {stage}": case(stage, resume=f"alone-{stage}4") for stage in ("2", "3")}
"""From step 4 of one process, which had resumed what two had saved after step 2."""


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory) -> Path:
    """A tiny model, and packs for two steps and one pack, so that the last step of an epoch has fewer passes."""
    folder = tmp_path_factory.mktemp("zero")
    rng = random.Random(11)
    examples = [template.encode(random_dialogue(rng)) for _ in range(40)]
    packs, _ = pack_dialogues(examples, PackingConfig("best_fit", max_length=1000))
    packs = first_packs(packs)
    assert min(map(len, packs.document_lengths)) > 1
    (folder / "packs").write_bytes(pickle.dumps(packs))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.1, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    template.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    return train_all(folder, TWO_PROCESSES, 2)


@pytest.fixture(scope="module")
def on_one(folder, on_two):
    """On one process, from what two have saved."""
    return train_all(folder, ONE_PROCESS, 1)


@pytest.fixture(scope="module")
def references(folder) -> dict[str, dict]:
    """One process, all packs of a step in one pass; the states of the adapters are kept."""
    kept = {"save_steps": 4, "save_total_limit": 1}
    trained = {"full": train(folder, micro_batch_size=4)}
    for kind, options in (("lora", LORA), ("qlora", QLORA), ("dora", DORA)):
        changed = {**options, "adapter": AdapterConfig(**options["adapter"])}
        trained[kind] = train(folder, micro_batch_size=4, checkpoints=f"{kind}-one/checkpoints", **kept, **changed)
    return {kind: curve(trainer) for kind, trainer in trained.items()}


def agree(run: dict, reference: dict, tolerance: float = TOLERANCE) -> None:
    """Losses, gradient norms, learning rates and final weights. A checkpoint holds the log entries before it."""
    first = run["first_step"]
    assert len(reference["losses"]) in (STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH)
    assert run["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert run["learning_rates"] == pytest.approx(reference["learning_rates"], rel=1e-9)
    if run["stage"] == 0:
        assert set(run["grad_norms"][first:]) == {None}  # DeepSpeed computes none there
    elif reference["stage"] != 0:
        assert run["grad_norms"][first:] == pytest.approx(reference["grad_norms"][first:], rel=tolerance)
    assert run["documents"] == reference["documents"][first:]  # none again, none left out
    assert run["weights"].keys() == reference["weights"].keys()
    for name, values in run["weights"].items():
        difference = (torch.tensor(values) - torch.tensor(reference["weights"][name])).abs().max()
        assert difference < tolerance, name


def really(run: dict, stage: str, processes: int) -> None:
    """The requested engine ran: several set-ups fall back to another silently."""
    engines = {1: "Qwen2ForCausalLM", 2: "DistributedDataParallel"}
    assert run["processes"] == processes
    if stage == "off":
        assert run["engine"] == engines[processes] and run["stage"] is None
    else:
        assert (run["engine"], run["distributed_type"], run["stage"]) == ("DeepSpeedEngine", "DEEPSPEED", int(stage))
    assert run["empty"] == (1 if stage == "3" else 0)


@pytest.mark.distributed
@pytest.mark.parametrize("run", [name for name in TWO_PROCESSES if name.startswith(("full", "lora"))])
def test_every_stage_trains_as_one_process_does(on_two, references, run):
    adapter, stage = run.split()
    run = on_two[run]
    assert run["accumulation"] == 2
    really(run, stage, 2)
    agree(run, references[adapter])
    assert run["losses"][-1] < 0.95 * run["losses"][0]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_qlora_trains_as_one_process_does(on_two, references, stage):
    really(on_two[f"qlora {stage}"], stage, 2)
    # Quantized weights enter the gradient's rounding; adapters agree all the same.
    run, reference = on_two[f"qlora {stage}"], references["qlora"]
    assert run["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert reference["losses"] != pytest.approx(references["lora"]["losses"], rel=1e-4)


@pytest.mark.distributed
def test_dora_under_stage_3_trains_and_exports_as_on_one_process(on_two, references, runs, tmp_path):
    really(on_two["dora 3"], "3", 2)
    agree(on_two["dora 3"], references["dora"])
    assert references["dora"]["losses"] != pytest.approx(references["lora"]["losses"], rel=1e-3)
    difference, weights = exported(runs, "dora-3", tmp_path / "model")
    assert difference < TOLERANCE
    magnitudes = {
        name.removeprefix("base_model.model.").replace("lora_magnitude_vector.default.", ""): torch.tensor(values)
        for name, values in references["dora"]["weights"].items()
        if "magnitude" in name
    }
    assert len(magnitudes) == 2 * 7
    for name, values in magnitudes.items():  # the length of each row of the merged weights
        assert weights[name].norm(dim=1) == pytest.approx(values, rel=1e-4)


@pytest.mark.distributed
def test_moments_in_8_bits_train_sharded_and_resume_as_they_were_saved_or_not_at_all(on_two, references):
    run = on_two["8bit 2"]
    really(run, "2", 2)
    assert run["losses"] == pytest.approx(references["full"]["losses"], rel=1e-2)
    assert run["losses"][1:] != pytest.approx(references["full"]["losses"][1:], rel=TOLERANCE)
    assert on_two["8bit again 2"]["first_step"] == 4
    assert on_two["8bit again 2"]["digest"] == run["digest"]
    moved, left = on_two["8bit moved 2 off"]["error"], on_two["8bit left 2"]["error"]
    assert "has moments in 8 bits of 2 processes under ZeRO stage 2, which are not resharded: resume with" in moved
    assert "was saved with trainer.optimizer=adamw_8bit, this run has adamw: resume with adamw_8bit, or" in left


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_bf16_trains_as_without_deepspeed(on_two, references, stage):
    run, plain = on_two[f"bf16 {stage}"], on_two["bf16 off"]
    really(run, stage, 2)
    assert run["losses"] == pytest.approx(plain["losses"], rel=BF16_TOLERANCE)
    assert run["losses"] != pytest.approx(references["full"]["losses"], rel=TOLERANCE)  # it did compute in bf16
    assert run["weights_dtype"] == "torch.float32"  # DeepSpeed would round them as it does the activations


@pytest.mark.distributed
def test_stage_1_in_bf16_sums_gradients_in_fp32_and_holds_no_others(on_two):
    run = on_two["bf16 1"]
    parameters = sum(map(len, run["weights"].values()))
    held = run["gradient_bytes"]
    assert held["bf16"] == 0
    assert 4 * parameters <= held["fp32"] <= 4 * parameters + 1024  # padding
    assert held["sent"] == "torch.float32"


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["bf16 again 1", "bf16 moved off 1", "bf16 moved 1 off", "alone bf16 1"])
def test_a_run_in_bf16_resumes_with_its_fp32_weights(on_two, on_one, run):
    again = on_two.get(run) or on_one[run]
    really(again, run.split()[-1], 1 if "alone" in run else 2)
    assert again["first_step"] == 4
    assert again["losses"] == pytest.approx(on_two["bf16 1"]["losses"], rel=BF16_TOLERANCE)
    if run == "bf16 again 1":
        assert again["digest"] == on_two["bf16 1"]["digest"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", OFFLOAD)
def test_offloading_changes_nothing(on_two, references, stage):
    agree(on_two[f"offload {stage}"], references["full"])


@pytest.mark.distributed
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(on_two, on_one, references, stage, step):
    again, alone = on_two[f"again {stage} {step}"], on_one[f"alone {stage} {step}"]
    really(again, stage, 2)
    really(alone, stage, 1)
    assert again["first_step"] == alone["first_step"] == step
    agree(again, on_two[f"full {stage}"], 1e-6)
    agree(alone, references["full"])


@pytest.mark.distributed
def test_two_processes_then_one_then_two_train_as_if_nothing_was_lost(folder, on_two, on_one, references):
    """The same packs in each step, by another accumulation."""
    for name, run in train_all(folder, BACK_ON_TWO, 2).items():
        stage = name.split()[1]
        really(run, stage, 2)
        assert run["first_step"] == 4
        assert [run["accumulation"], on_one[f"alone {stage} 2"]["accumulation"]] == [2, 4]
        agree(run, on_two[f"full {stage}"])
        agree(run, references["full"])


@pytest.mark.distributed
@pytest.mark.parametrize("run", [name for name in TWO_PROCESSES if name.startswith("moved")])
def test_a_run_resumes_under_another_stage(on_two, references, run):
    really(on_two[run], run.split()[-1], 2)
    assert on_two[run]["first_step"] == 4
    agree(on_two[run], references["lora" if "lora" in run else "full"])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_resumed_adapter_equals_an_uninterrupted_one(on_two, on_one, references, stage):
    again, alone = on_two[f"again lora {stage} 4"], on_one[f"alone lora {stage}"]
    really(again, stage, 2)
    really(alone, stage, 1)
    assert again["first_step"] == alone["first_step"] == 4
    agree(again, on_two[f"lora {stage}"], 1e-6)
    agree(alone, references["lora"])


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "kind"), [("alone moved 2 off", "full")])
def test_a_run_resumes_under_another_stage_or_adapter_on_one_process(on_one, references, run, kind):
    agree(on_one[run], references[kind])


@pytest.mark.distributed
def test_other_packs_per_step_are_refused_with_both_numbers(folder, on_two, tmp_path):
    state = folder / "full-3/checkpoints/checkpoint-4"
    recorded = json.loads((state / CHECKPOINT_FILE).read_text())
    expected = {"packs_per_step": 4, "processes": 2, "stage": 3, "run_ids": {}}
    assert {name: recorded[name] for name in expected} == expected
    with pytest.raises(InputError, match=r"saved with trainer.packs_per_step=4, this run has 8: resume with 4"):
        check_resumable(state, CheckpointRecord(8, 2, 3))


# What a state holds


@pytest.mark.distributed
@pytest.mark.parametrize("run", [name for name in TWO_PROCESSES if TWO_PROCESSES[name].get("held")])
def test_the_memory_plan_counts_the_copies_that_are_written_in_the_background(on_two, run):
    copied, planned = on_two[run]["copied"], on_two[run]["copy_planned"]
    assert planned <= copied <= 1.02 * planned + 20_000  # random states, counts of steps, padding


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["full 0", "full 1", "full 2", "lora 1", "bf16 1", "8bit 2"])
def test_the_memory_plan_counts_the_states_of_the_optimizer_and_a_tied_head_once(on_two, run):
    held, planned = on_two[run]["optimizer_bytes"], on_two[run]["optimizer_planned"]
    assert planned <= held <= 1.02 * planned + 20_000  # counts of steps, padding


@pytest.mark.distributed
def test_a_tied_head_is_in_a_file_once_whether_training_waits_or_not(folder, on_two):
    assert on_two["tied 1"]["losses"] == on_two["full 1"]["losses"]
    sizes = [
        (folder / f"{name}-1/checkpoints/checkpoint-4/global_step4/mp_rank_00_model_states.pt").stat().st_size
        for name in ("full", "tied")
    ]
    # The foreground writes views of one memory; copies have a header each. The head has 76 kB.
    assert sizes[1] <= sizes[0] <= sizes[1] + 10_000


@pytest.mark.distributed
def test_a_rank_without_room_ends_all_at_once_also_where_training_waits(folder, on_two):
    assert on_two["without room 1"]["error"].endswith("checkpoints: cannot write: No space left on device")
    assert on_two["full 1"]["losses"]  # and the processes went on to train together
    assert not any((folder / "without-room-1/checkpoints").iterdir())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_sharded_checkpoint_is_consolidated(folder, on_two, stage):
    state = folder / f"full-{stage}/checkpoints/checkpoint-4"
    whole = open_training_checkpoint(state)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(state))
    gathered = load_file(state / "model.safetensors")
    assert whole.step == 4
    assert gathered.keys() - {"lm_head.weight"} == set(whole.names)  # which is the embeddings
    for name in whole.names:
        assert torch.equal(whole.read(name, WEIGHT), theirs[name])
        assert torch.equal(whole.read(name, WEIGHT), gathered[name])
    reference = open_training_checkpoint(folder / "full-off/checkpoints/checkpoint-4", _order(whole.names))
    for name in whole.names:
        for key in MOMENTS:
            difference = (whole.read(name, key) - reference.read(name, key)).abs().max()
            assert difference <= 1e-4 * reference.read(name, key).abs().max() + 1e-12, (name, key)


def _order(names: list[str]) -> list[str]:
    """Decaying parameters first, as `optimizer_order` says of a trainer."""
    return sorted(names, key=lambda name: "norm" in name or name.endswith("bias"))


@pytest.mark.distributed
def test_a_checkpoint_with_a_shard_missing_is_refused(folder, on_two, tmp_path):
    state = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "full-3/checkpoints/checkpoint-4", state)
    next(state.glob("global_step*/*pp_rank_1*optim_states.pt")).unlink()
    with pytest.raises(
        InputError, match=r"checkpoint-4: cannot read the training checkpoint: no shard of process 1 among 2"
    ):
        open_training_checkpoint(state)


@pytest.mark.distributed
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["full-2", "full-3", "lora-3"])
def test_damage_to_any_file_of_any_process_is_found(folder, on_two, kind, fault, tmp_path):
    original = folder / kind / "checkpoints"
    newest = original / "checkpoint-6"
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    ranks = [name for name in names if re.search(r"pp_rank_\d_.*optim_states|rng_state_\d", name)]
    assert len(ranks) == 4 and {"latest", "scheduler.pt", CHECKPOINT_FILE} < set(names)
    for number, name in enumerate(names):
        if not (newest / name).stat().st_size:
            continue
        states = tmp_path / str(number)
        for checkpoint in ("checkpoint-4", "checkpoint-6"):
            shutil.copytree(original / checkpoint, states / checkpoint)
        FAULTS[fault](states / newest.name / name)
        assert newest_whole(states, resume=True) == states / "checkpoint-4", name
        with pytest.raises(InputError, match=rf"checkpoint-6/{re.escape(name)}: "):
            check_whole(states / newest.name)
        shutil.rmtree(states)


@pytest.mark.distributed
def test_save_total_limit_prunes_checkpoints_and_nothing_incomplete_is_left(folder, on_two):
    states = folder / "full-1/checkpoints"
    assert {path.name for path in states.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert not (states / "writing").exists()


# Configuration


@pytest.mark.parametrize("name", sampled(["off", "zero0", "zero1", "zero2", "zero3", "zero3_offload"], 3))
def test_deepspeeds_configuration_leaves_the_trainers_values_to_it(name):
    made = deepspeed_config(compose("sft", [f"zero={name}"]).zero)
    if name == "off":
        assert made is None
        return
    owned = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {made[key] for key in owned} == {"auto"} == {made["bf16"]["enabled"]}
    assert made["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_param" in made["zero_optimization"]) == name.endswith("offload")
    assert "optimizer" not in made and "scheduler" not in made


@pytest.mark.parametrize(
    ("adapter", "precision", "stage"), [("full", "bf16", "1"), ("full", "fp32", "off"), ("lora", "bf16", "off")]
)
def test_auto_is_stage_1_for_full_fine_tuning_in_bf16(adapter, precision, stage, monkeypatch):
    assert ZeroConfig().resolved(adapter, precision) == ZeroConfig(stage)
    for given in ("off", "2"):
        assert ZeroConfig(given).resolved(adapter, precision) == ZeroConfig(given)
    planned = compose("preflight", [f"adapter={adapter}", f"trainer.precision={precision}", "cluster=gpu1"])
    assert memory_scenario(planned).stage == stage
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert ZeroConfig().resolved(adapter, precision) == ZeroConfig()


def test_a_stage_that_disagrees_with_the_launcher_is_refused(monkeypatch):
    with pytest.raises(InputError, match="zero=from_launcher: not started by"):
        deepspeed_config(ZeroConfig("from_launcher"))
    with pytest.raises(InputError, match="zero=from_launcher: not started by"):  # before a run directory is written
        ZeroConfig("from_launcher").resolved("full", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    for stage in ("auto", "from_launcher", "3"):
        assert deepspeed_config(ZeroConfig(stage)) is None
    for stage in ("off", "2"):
        with pytest.raises(InputError, match=f"zero.stage={stage}, but accelerate launched DeepSpeed stage 3"):
            deepspeed_config(ZeroConfig(stage))


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.why[:20])
def test_what_does_not_go_together_is_refused_with_the_reason(row):
    zero = ZeroConfig((row.stage or ["3"])[0], offload_optimizer=bool(row.offload))
    adapter = AdapterConfig((row.adapter or ["lora" if row.dora else "full"])[0], use_dora=bool(row.dora))
    for precision in row.precision or ["fp32"]:
        with pytest.raises(InputError) as caught:
            check_supported(zero, adapter, (row.optimizer or ["adamw"])[0], precision)
        assert row.why in str(caught.value)
    check_supported(ZeroConfig("3"), AdapterConfig(), "adamw", "bf16")
    check_supported(ZeroConfig("3"), AdapterConfig("lora", use_dora=True), "adamw_8bit", "fp32")


@pytest.mark.parametrize(
    ("launched", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has an optimizer beside trainer.optimizer=adamw_8bit: remove it there"),
        ({"offload_optimizer": {"device": "cpu"}}, "DeepSpeed's optimizer on the CPU has moments in fp32 only"),
        ({}, "DeepSpeed computes with DoRA's magnitudes in bf16"),
    ],
)
def test_what_does_not_go_with_the_launchers_configuration_is_refused(launched, said, tmp_path, monkeypatch):
    optimizer = {name: value for name, value in launched.items() if name == "optimizer"}
    sharding = {"stage": 2} | {name: value for name, value in launched.items() if name not in optimizer}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": sharding, **optimizer}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    for stage in ("auto", "from_launcher", "2"):
        with pytest.raises(InputError) as caught:
            check_supported(
                ZeroConfig(stage),
                AdapterConfig("lora", use_dora=True),
                "adamw_8bit",
                "bf16" if not launched else "fp32",
            )
        assert said in str(caught.value) and "\n" not in str(caught.value)
    if not launched:
        check_supported(ZeroConfig(), AdapterConfig("lora", use_dora=True), "adamw_8bit", "fp32")


def test_a_launchers_configuration_without_zero_is_refused_in_one_line(tmp_path, monkeypatch):
    (file := tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for call in (lambda: check_supported(ZeroConfig(), AdapterConfig(), "adamw", "fp32"), launcher_stage):
        with pytest.raises(InputError, match=r"^the launcher's DeepSpeed configuration: Please specify the ZeRO .*$"):
            call()
    file.write_text(json.dumps({"zero_optimization": {}}))
    assert launcher_stage() == "0"


@pytest.mark.parametrize("variable", LAUNCHED)
def test_what_the_launcher_cannot_ask_for_is_refused_with_the_reason(variable, monkeypatch):
    monkeypatch.setenv(variable, "true" if "USE" in variable else "2")
    with pytest.raises(InputError) as caught:
        check_supported(ZeroConfig(), AdapterConfig(), "adamw", "fp32")
    assert LAUNCHED[variable] in str(caught.value)
    monkeypatch.setenv(variable, "false" if "USE" in variable else "1")
    check_supported(ZeroConfig(), AdapterConfig(), "adamw", "fp32")


@pytest.mark.parametrize("wrong", [{"offload_optimizer": True}, {"stage": "2", "offload_parameters": True}])
def test_offloading_what_is_not_sharded_is_refused(wrong):
    with pytest.raises(InputError, match=r"choose stage 2 or 3|choose stage 3, which shards"):
        ZeroConfig(**wrong)


@pytest.mark.slow
def test_a_fallback_is_refused(folder, monkeypatch):
    trainer = train(folder, max_steps=1)
    check_engine(trainer)
    monkeypatch.setattr(trainer.args, "deepspeed_plugin", DeepSpeedPlugin(zero_stage=3))
    with pytest.raises(InputError, match="zero asks for ZeRO stage 3, but DDP or one process runs"):
        check_engine(trainer)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started, but the trainer sees 1"):
        check_engine(trainer)


# Export


@pytest.fixture(scope="module")
def runs(folder, template, on_two, references) -> Path:
    """The folder with a manifest in each of its run directories."""
    for run in folder.glob("*/checkpoints"):
        kind = run.parent.name.split("-")[0]
        adapter = {**LORA["adapter"], "kind": kind} if kind != "full" else {"kind": kind}
        adapter = DORA["adapter"] if kind == "dora" else adapter
        config = {"adapter": adapter, "trainer": {"precision": "fp32"}}
        manifest = manifest_of(template, base_model=str(folder / "model"), config=config)
        write_manifest(run.parent, manifest)
    return folder


def exported(runs: Path, run: str, output: Path, **options) -> tuple[float, dict[str, torch.Tensor]]:
    """The difference that `export` reports, and the weights it wrote."""
    difference = export(open_source(str(runs / run)), ExportConfig(output=str(output), **options))
    return difference, AutoModelForCausalLM.from_pretrained(output).state_dict()


@pytest.mark.distributed
@pytest.mark.parametrize("run", [f"{kind}-{stage}" for kind in ("full", "lora") for stage in ("off", "1", "2", "3")])
def test_any_checkpoint_exports_to_the_same_plain_directory(runs, references, run, tmp_path):
    difference, weights = exported(runs, run, tmp_path / "model")
    assert difference < TOLERANCE
    reference = references[run.split("-")[0]]["weights"]
    if run.startswith("full"):
        for name, values in reference.items():
            assert (weights[name].flatten() - torch.tensor(values)).abs().max() < TOLERANCE, name
    else:
        layer = "model.layers.1.mlp.up_proj"
        a, b = (
            torch.tensor(reference[f"base_model.model.{layer}.lora_{part}.default.weight"]).view(shape)
            for part, shape in (("A", (4, 32)), ("B", (64, 4)))
        )
        base = load_file(runs / "model" / "model.safetensors")[f"{layer}.weight"]
        assert (weights[f"{layer}.weight"] - base - 2 * b @ a).abs().max() < TOLERANCE
    assert not list((tmp_path / "model").glob("adapter*"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"- Trained: {run.split('-')[0]}" in card and "- Step: 6" in card
    assert (tmp_path / "model" / "csc_manifest.json").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["full-3", "lora-2"])
def test_what_was_exported_is_exported_again_in_another_form(runs, run, tmp_path):
    _, first = exported(runs, run, tmp_path / "model")
    difference, again = exported(tmp_path, "model", tmp_path / "again", shard_size="20KB")
    assert difference == 0
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"- Trained: {run.split('-')[0]}" in card and "- Step" not in card
    _, rounded = exported(tmp_path, "model", tmp_path / "rounded", dtype="bf16")
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}


@pytest.mark.distributed
def test_qlora_exports_on_either_base_and_says_how_far_that_is(runs, tmp_path):
    exact, _ = exported(runs, "qlora-one", tmp_path / "dequantized", merge_into="dequantized")
    original, _ = exported(runs, "qlora-one", tmp_path / "original")
    assert exact < TOLERANCE
    assert original > 1e-3
    card = (tmp_path / "original" / "README.md").read_text()
    assert f"{original:.1e}" in card and "- Trained: qlora, merged into the base weights" in card

    record = runs / "qlora-one" / MANIFEST_FILE  # a training that asked for it
    manifest = json.loads(record.read_text(encoding="utf-8"))
    manifest["config"]["adapter"]["merge_into"] = "dequantized"
    record.write_text(json.dumps(manifest), encoding="utf-8")
    assert exported(runs, "qlora-one", tmp_path / "asked")[0] == exact
    assert "merged into the dequantized weights" in (tmp_path / "asked" / "README.md").read_text()
    assert exported(runs, "qlora-one", tmp_path / "again", merge_into="base")[0] == original


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["lora-off", "lora-3", "qlora-one"])
def test_an_adapter_alone_is_loaded_by_peft_and_is_the_merged_model(runs, run, tmp_path):
    source, output = open_source(str(runs / run)), tmp_path / "adapter"
    assert export(source, ExportConfig(output=str(output), format="adapter")) < TOLERANCE
    settings = json.loads((output / "adapter_config.json").read_text("utf-8"))
    base = str(runs / "model")
    assert (settings["base_model_name_or_path"], settings["r"], settings["inference_mode"]) == (base, 4, True)
    weights = load_file(output / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\..*\.lora_[AB]\.weight", name) for name in weights)
    assert (output / "chat_template.jinja").is_file() and (output / "tokenizer.json").is_file()
    assert json.loads((output / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert "- Form: a LoRA adapter of rank 4" in (output / "README.md").read_text("utf-8")
    again = open_source(str(output))
    assert again.finished and not again.unverified() and again.manifest.weights_hash

    ids = torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(0))
    _, merged = exported(runs, run, tmp_path / "merged", merge_into="base")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        model = AutoModelForCausalLM.from_pretrained(base)
        plain = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, output)(ids).logits
    assert (adapted - whole).abs().max() < TOLERANCE < 0.01 < (adapted - plain).abs().max()
    loaded = load_causal_lm(str(output)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in merged.items())
    rounded = ExportConfig(output=str(output), format="adapter", dtype="bf16")
    assert TOLERANCE < export(source, rounded) < exporting.TOLERANCE[torch.bfloat16]
    assert {value.dtype for value in load_file(output / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "why"), [("full-off", "was trained without an adapter"), ("model", "holds no adapter")]
)
def test_what_has_no_adapter_is_not_exported_as_one(runs, run, why, tmp_path):
    if run == "model":
        exported(runs, "lora-off", tmp_path / "model")
        runs = tmp_path
    with pytest.raises(InputError, match=rf"^format=adapter: .* {why}.*: choose a training checkpoint of adapter=lora"):
        export(open_source(str(runs / run)), ExportConfig(output=str(tmp_path / "out"), format="adapter"))
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_an_export_in_bf16_is_sharded_as_asked_or_refused(runs, tmp_path, monkeypatch):
    difference, weights = exported(runs, "full-3", tmp_path / "model", dtype="bf16", shard_size="20KB")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert 0 < difference < exporting.TOLERANCE[torch.bfloat16]
    monkeypatch.setitem(exporting.TOLERANCE, torch.bfloat16, difference / 2)
    monkeypatch.setattr(exporting, "NOISE_FACTOR", 0)
    with pytest.raises(InputError, match="the logits of the exported model differ by"):
        exported(runs, "full-3", tmp_path / "other", dtype="bf16")
    assert not (tmp_path / "other").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "form"), [("full-1", "merged"), ("lora-off", "merged"), ("lora-off", "adapter")])
def test_an_export_is_refused_if_one_written_tensor_is_wrong(runs, run, form, tmp_path, monkeypatch):
    def spoil(directory: Path) -> dict:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        name = "model.layers.1.input_layernorm.weight" if form == "merged" else min(tensors)
        tensors[name][3] *= 1.01
        save_file(tensors, file, {"format": "pt"})
        return hash_files(directory)

    monkeypatch.setattr(manifests, "hash_files", spoil)
    with pytest.raises(InputError, match="the logits of the exported model differ by"):
        exported(runs, run, tmp_path / "model", format=form)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such directory"),
        ("model", "no csc_manifest.json: copy that file as well; or, to evaluate or chat with a model that another"),
    ],
)
def test_what_cannot_be_exported_is_refused(folder, path, message):
    with pytest.raises(InputError, match=message):
        open_source(str(folder / path))


# The recipe


SIGNAL_IN_SAVE = Path(__file__).parent / "workers" / "signal_in_save.py"
TINY = ["debug=cpu_tiny", "zero.persistence_threshold=0", "trainer.save_steps=2", "run.if_exists=reuse"]


def begin(directory: Path, module: list[str], *overrides: str, before: Sequence[str | Path] = ()) -> Script:
    """Start recipes/sft.py by a launcher, or by python itself.

    Args:
        before: a script that runs it, and its arguments.
    """
    launcher = ["-m", *module] if module else []
    return Script(*launcher, *before, ROOT / "recipes" / "sft.py", *TINY, *overrides, cwd=directory, forks=True)


def finish(script: Script) -> str:
    done = script.wait()
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(run: Path) -> list[float]:
    log = json.loads((run / "metrics.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory with a run on one process."""
    directory = tmp_path_factory.mktemp("recipe")
    finish(begin(directory, [], "run.directory=one"))
    return directory


def wait_until(script: Script, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened() and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.distributed
def test_a_sharded_run_that_loses_a_rank_and_gets_it_back_resumes_where_it_was(workplace, monkeypatch):
    """2 ranks until one is stopped while it writes a checkpoint, 1 until it is killed there, 2 again."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")  # a stopped process needs no time to save
    run, lost = workplace / "lost", ["zero=zero3", "run.directory=lost"]
    supervised = ["csc_train.launching.supervise", "lost", sys.executable, "-m", *TORCHRUN]
    script = begin(workplace, supervised, *lost, "run.timeout_s=10", before=[SIGNAL_IN_SAVE, "SIGSTOP", "4", "1"])
    wait_until(script, (run / "checkpoints" / "checkpoint-2").exists)
    ((first, second),) = (
        sorted(agent.children(), key=lambda each: each.pid) for agent in psutil.Process(script.pid).children()
    )
    done = script.wait()
    assert done.returncode == 1
    # On a CPU DeepSpeed counts gradients by programs that it starts, here by `_fork_child`.
    place = r"(csc_train/|tests/processes\.py:\d+ _fork_child)"
    said = rf"error: rank 1 \(process {second.pid} on \S+\): does not answer for 10 s, last in {place}.*step \d\)"
    advice = "look at its machine, or raise run.timeout_s; to go on: run=lost resume=true"
    assert re.search(f"^{said}: {advice}$", done.stderr, re.MULTILINE), done.stderr
    assert not first.is_running() and not second.is_running()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not (run / "model").exists()
    assert newest_whole(run / "checkpoints", resume=True) == run / "checkpoints" / "checkpoint-2"
    assert list((run / "checkpoints" / PARTIAL_FOLDER / "checkpoint-4").rglob("zero_pp_rank_1*optim_states.pt"))

    script = begin(workplace, [], *lost, before=[SIGNAL_IN_SAVE, "SIGKILL", "4", "0"])
    assert script.wait().returncode == -signal.SIGKILL
    assert newest_whole(run / "checkpoints", resume=True) == run / "checkpoints" / "checkpoint-2"
    assert (run / "checkpoints" / PARTIAL_FOLDER / "checkpoint-4").exists()

    text = finish(begin(workplace, TORCHRUN, *lost))
    (steps,) = re.findall(r"trained (\d+) steps in ", text)
    assert int(steps) == 4  # steps 1 and 2 are not done again
    assert not (run / "checkpoints" / PARTIAL_FOLDER).exists()
    assert losses(run) == pytest.approx(losses(workplace / "one"), rel=TOLERANCE)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, workplace / "one"))
    assert all((ours[name] - theirs[name]).abs().max() < TOLERANCE for name in theirs)
    record = json.loads((run / "checkpoints" / "checkpoint-6" / CHECKPOINT_FILE).read_text())
    assert (record["processes"], record["stage"]) == (2, 3)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerates_own_configuration_is_followed(workplace, stage):
    config = ROOT / "launch" / "accelerate" / f"zero{stage}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    finish(begin(workplace, [*launcher, "--main_process_port", "0"], f"run.directory=launched-{stage}"))
    assert losses(workplace / f"launched-{stage}") == pytest.approx(losses(workplace / "one"), rel=TOLERANCE)
    record = json.loads(
        (workplace / f"launched-{stage}" / "checkpoints" / "checkpoint-6" / CHECKPOINT_FILE).read_text()
    )
    assert (record["processes"], record["stage"]) == (2, stage)
