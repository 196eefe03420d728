"""The profiler of a training: its trace, and the shares of time by kernel family."""

import gzip
import json
import logging
import logging.handlers
import random

import pytest
import torch
from conftest import random_dialogue, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.training.config import TrainerConfig
from csc_train.training.profiling import IDLE, OTHER, TRACE, ProfilerCallback, time_shares
from csc_train.training.trainer import build_trainer, training_arguments

STEPS = 4


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The trace of a training of `STEPS` steps, and the line that it printed."""
    folder = tmp_path_factory.mktemp("profiled")
    tokenizer, rng = small_tokenizer("qwen2_5"), random.Random(3)
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig(mode="reply_only"))
    examples = [template.encode(random_dialogue(rng)) for _ in range(12)]
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", max_length=1000))
    model = AutoModelForCausalLM.from_config(
        tiny_config("qwen2", tokenizer, 0.1), dtype=torch.float32, attn_implementation=VARLEN_ATTENTION
    )
    settings = TrainerConfig(packs_per_step=1, max_steps=STEPS, precision="fp32", save_steps=1000)
    arguments = training_arguments(settings, folder / "checkpoints", processes=1)
    trainer = build_trainer(model, tokenizer, packs, arguments, "shared_prefix", AdapterConfig())
    trainer.add_callback(ProfilerCallback(folder / "profile"))
    lines = logging.handlers.BufferingHandler(1000)
    logger = logging.getLogger("csc_train.training.profiling")
    logger.addHandler(lines)
    trainer.train()
    logger.removeHandler(lines)
    with gzip.open(folder / "profile" / TRACE, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"], [record.getMessage() for record in lines.buffer]


@pytest.mark.slow
def test_a_trace_holds_the_steps_and_the_shares_are_printed(trace):
    events, lines = trace
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert len(steps) == STEPS - 1  # one to warm up
    [line] = lines
    assert f"profile up to step {STEPS}" in line
    assert "attention " in line


@pytest.mark.slow
def test_shares_add_up_and_name_what_a_step_does(trace):
    shares = time_shares(trace[0])
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    for family in ("attention", "matrix products", "normalisation", "head", "optimizer", OTHER, IDLE):
        assert shares[family] > 0, family
    assert "communication" not in shares


def event(category, name, start, duration, number=0, thread=1):
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread,
        "args": {"External id": number},
    }  # fmt: skip


def test_on_a_gpu_kernels_count_by_the_range_that_launched_them_or_by_name_and_gaps_are_idle():
    events = [
        event("user_annotation", "ProfilerStep#4", 0, 1000, 1),
        event("cpu_op", "_LinearCrossEntropy", 10, 10, 2),
        event("cpu_op", "aten::mm", 11, 5, 3),
        event("cpu_op", "csc_train::varlen_attention", 30, 10, 4),
        event("cpu_op", "aten::index_select", 31, 2, 5),
        event("cpu_op", "aten::mm", 41, 2, 6),
        event("kernel", "nvjet_tst_128x256", 100, 20, 3, thread=7),
        event("kernel", "indexSelectLargeIndex", 120, 5, 5, thread=7),
        event("kernel", "flash_fwd_kernel", 125, 25, 4, thread=7),
        event("kernel", "nvjet_tst_64x64", 160, 30, 6, thread=7),
        event("kernel", "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", 190, 5, 999, thread=7),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 195, 5, thread=7),
    ]
    shares = time_shares(events)
    assert shares == pytest.approx(
        {"head": 0.2, "attention": 0.3, "matrix products": 0.3, "normalisation": 0.05, "copies": 0.05, IDLE: 0.1}
    )


def test_kernels_of_two_streams_share_the_time_in_which_they_overlap():
    events = [
        event("user_annotation", "ProfilerStep#4", 0, 1000),
        event("kernel", "nvjet_tst", 0, 10, thread=7),
        event("kernel", "ncclDevKernel_AllReduce", 5, 10, thread=8),
    ]
    assert time_shares(events) == pytest.approx({"matrix products": 0.5, "communication": 0.5, IDLE: 0})


def test_an_operator_has_no_time_of_those_below_it():
    events = [
        event("user_annotation", "ProfilerStep#0", 0, 100),
        event("cpu_op", "aten::linear", 0, 60, 2),
        event("cpu_op", "aten::copy_", 5, 20, 3),
        event("cpu_op", "aten::t", 30, 10, 4),
        event("cpu_op", "aten::mul", 70, 10, 5),
    ]
    assert time_shares(events) == pytest.approx({"matrix products": 0.4, "copies": 0.2, OTHER: 0.1, IDLE: 0.3})
