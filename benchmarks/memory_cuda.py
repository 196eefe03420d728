"""Measure the peak GPU memory of two trainings against its estimate, and their speed and MFU; needs a CUDA GPU.

python benchmarks/memory_cuda.py [results.json]

Trains a 1.5B-shaped model fully and a 7B-shaped one with LoRA, both from random weights, on packs of random tokens, by
the trainer of recipes/sft.py on one GPU. Each run is a separate process. `estimate_memory` is the planned peak,
`measured` the peak that torch allocated; `reserved` and `used` are the peaks of its allocator and of the process.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch
from transformers.trainer_utils import SaveStrategy

from csc_train.config.compose import compose
from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.models.attention.select import select_attention
from csc_train.models.config import AdapterConfig, ArchitectureConfig, ModelConfig
from csc_train.models.loading import load_model
from csc_train.models.precision import weight_dtype
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.runs.provenance import provenance
from csc_train.template.dialogue_template import TokenizedDialogue
from csc_train.template.tokenizer_training import train_tokenizer
from csc_train.training.config import TrainerConfig
from csc_train.training.memory import GIB, estimate_memory, scenario_flops, scenario_of
from csc_train.training.trainer import build_trainer, training_arguments

STEPS, WARM_UP = 8, 3
LENGTH = 8192
DOCUMENT = 1024
TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
"""Dense bf16, by the data sheets."""


@dataclass(frozen=True)
class Case:
    """One training."""

    architecture: ArchitectureConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    checkpointing: bool = True
    strategy: str = "best_fit"


def cases() -> dict[str, Case]:
    """The trainings by name."""
    seven = compose("sft", ["model=qwen2_5_7b"]).model.architecture
    # Qwen2.5-1.5B: 1,543,714,304 parameters.
    small = replace(
        seven, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    return {"1.5B full": Case(small), "7B LoRA": Case(seven, AdapterConfig(kind="lora"))}


def random_examples(count: int) -> list[TokenizedDialogue]:
    """Dialogues of random tokens, of which every second turn is trained."""
    rng = numpy.random.default_rng(0)
    turn_offsets = numpy.arange(DOCUMENT // 4, DOCUMENT + 1, DOCUMENT // 8, dtype=numpy.int32)
    token_types = numpy.zeros(DOCUMENT, numpy.uint8)
    for start in turn_offsets[:-1:2]:
        token_types[start + 4 : start + DOCUMENT // 8] = 2
    strategies = numpy.array([1, 0] * 3, numpy.uint8)
    return [
        TokenizedDialogue(rng.integers(0, 290, DOCUMENT, dtype=numpy.int32), token_types, turn_offsets, strategies)
        for _ in range(count)
    ]


def measure(case: Case) -> dict:
    """Train for `STEPS` steps of two forward passes each."""
    packs, report = pack_dialogues(
        random_examples(2 * STEPS * LENGTH // DOCUMENT), PackingConfig(case.strategy, LENGTH)
    )
    tokenizer = train_tokenizer(["text"], 300)
    attention = select_attention("auto", case.strategy, "bf16")
    config = ModelConfig(init="random", tokenizer="train", architecture=case.architecture)
    with tempfile.TemporaryDirectory() as states:
        settings = TrainerConfig(
            packs_per_step=2, max_steps=STEPS, precision="bf16", save_steps=10**6,
            gradient_checkpointing=case.checkpointing,
        )  # fmt: skip
        arguments = training_arguments(settings, Path(states), processes=1)
        arguments.save_strategy = SaveStrategy.NO  # by default the last state is saved
        with torch.device("cuda"):
            model = load_model(config, tokenizer, weight_dtype("bf16", case.adapter.kind), 0, attention)
        trainer = build_trainer(
            model,
            tokenizer,
            packs,
            packing=case.strategy,
            arguments=arguments,
            adapter=case.adapter,
        )
        scenario, ends, real = scenario_of(trainer, LENGTH), [], trainer.log

        def log(logs, start_time=None):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
            real(logs, start_time)

        trainer.log = log
        trainer.train()
    free, total = torch.cuda.mem_get_info()
    measured, planned = torch.cuda.max_memory_allocated(), estimate_memory(scenario)
    # The last line that is logged is the summary.
    seconds = (ends[STEPS - 1] - ends[WARM_UP - 1]) / (STEPS - WARM_UP)
    tokens = report.tokens / STEPS
    name = torch.cuda.get_device_name()
    peak = next((tflops for known, tflops in TFLOPS.items() if known in name), None)
    return {
        "gpu": name,
        "attention": attention,
        "tokens_a_forward_pass": LENGTH,
        "plan_gib": planned.allocated / GIB,
        "measured_gib": measured / GIB,
        "plan_over_measured": planned.allocated / measured,
        "plan_total_gib": planned.total / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "used_gib": (total - free) / GIB,
        "tokens_a_second": tokens / seconds,
        "trained_tokens_a_second": report.trained_tokens / STEPS / seconds,
        "mfu": None if peak is None else scenario_flops(scenario, tokens, DOCUMENT) / seconds / (peak * 1e12),
    }


def main() -> None:
    """Measure every case, or, named by `--case`, one of them."""
    if not torch.cuda.is_available():
        raise InputError("benchmarks/memory_cuda.py measures GPU memory, and torch finds no CUDA GPU")
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(cases()[sys.argv[2]])))
        return
    results = {}
    for name in cases():
        done = subprocess.run([sys.executable, __file__, "--case", name], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(results[name], indent=2), flush=True)
    if sys.argv[1:]:
        write_json(sys.argv[1], {"provenance": provenance(), "results": results})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
