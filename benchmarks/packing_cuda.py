"""Compare packing with TRL's on a GPU: trained tokens per second, model FLOPs utilization and peak memory.

python benchmarks/packing_cuda.py       # one GPU of 80 GB, less than ten minutes

The models have Qwen2.5's dimensions and random weights in bf16: the 1.5B whole, the 7B with fewer layers. Writes
packing_cuda.json to the directory $OUT, or to benchmarks/results.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from measure import (
    PREFIX,
    SHAPES,
    Report,
    Steps,
    body_lengths,
    full_packs,
    pack_trainer,
    random_examples,
    random_model,
    seconds,
    spread,
    trl_trainer,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from csc_train.models.attention.select import select_attention
from csc_train.models.families import forward_flops
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.pack_cost import pack_cost
from csc_train.template.dialogue_template import TokenizedDialogue

DIALOGUES = 500


def main() -> None:
    """Measure every side on every shape, and write after each what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models to measure")
    parser.add_argument("--layers", type=int, default=12, help="layers of the 7B (all 28 take more than 80 GB)")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens in a pack")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a side")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before that, in which kernels are compiled")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--peak", type=float, default=989, help="the GPU's dense bf16 TFLOP/s (H100 SXM: 989)")
    parser.add_argument("--minutes", type=float, default=8, help="begin no further side after this")
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    parser.add_argument("--output", type=Path, default=folder / "packing_cuda.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("packing_cuda.py measures a CUDA GPU, and torch finds none here; packing.py measures a CPU")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    deadline = time.monotonic() + 60 * options.minutes
    report = Report({name: value for name, value in vars(options).items() if name != "output"}, {})
    for shape in options.shapes:
        measure_shape(report, shape, options, deadline)
        report.write(options.output)
    print(f"\n{options.output}")


def measure_shape(report: Report, shape: str, options: argparse.Namespace, deadline: float) -> None:
    """Measure all sides on one model, one after the other."""
    model = SHAPES[shape] | ({"num_hidden_layers": options.layers} if shape == "7b" else {})
    examples = random_examples(body_lengths(DIALOGUES).tolist(), PREFIX, model["vocab_size"])
    report.section(
        shape,
        "Trained tokens a second of whole optimizer steps of one pack (collation, forward, backward, clipping, AdamW). "
        "MFU: three times the forward FLOPs of the tokens in the pack over seconds x peak, that is 6 x parameters of "
        "linear layers x tokens, and attention counted for each document and its prefix, half of a square for causal "
        "ones; recomputed activations are not counted, nor is what a kernel masks. Peak memory is torch's, "
        "weights, gradients and AdamW's states in bf16 included.",
        model=model,
        prefix=PREFIX,
        max_length=options.max_length,
        dialogues=DIALOGUES,
        peak_tflops=options.peak,
        checkpointing=options.checkpointing,
    )
    rates = {}
    for name, prepare in sides(examples, model, options).items():
        if time.monotonic() > deadline:
            report.add(name, f"skipped: {options.minutes:g} minutes are over")
            continue
        with tempfile.TemporaryDirectory() as directory:
            try:
                rates[name] = measure_side(report, name, lambda prepare=prepare, at=directory: prepare(at), options)
            except (RuntimeError, ImportError, ValueError) as error:  # no memory, no kernel, not supported
                report.add(name, f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        gc.collect()
        torch.cuda.empty_cache()
        report.write(options.output)  # should the next side not come back
    best = max((name for name in rates if name.startswith("TRL")), key=lambda name: rates[name], default=None)
    if best and "shared prefix" in rates:
        report.add(f"shared prefix / {best}, TRL's fastest", rates["shared prefix"] / rates[best])


def sides(
    examples: list[TokenizedDialogue], model: dict, options: argparse.Namespace
) -> dict[str, Callable[[str], Steps]]:
    """What is compared, by name: each makes its steps, given a directory."""

    def ours(packing: str) -> Callable[[str], Steps]:
        def prepare(directory: str) -> Steps:
            packs, _ = pack_dialogues(examples, PackingConfig(packing, options.max_length))
            attention = select_attention("auto", packing, "bf16")
            trainer = pack_trainer(
                random_model(model, attention, torch.bfloat16), packs, packing, directory, options.checkpointing
            )
            return Steps(trainer, full_packs(packs.document_lengths, options.max_length))

        return prepare

    def theirs(attention: str) -> Callable[[str], Steps]:
        def prepare(directory: str) -> Steps:
            trainer = trl_trainer(
                random_model(model, attention, torch.bfloat16),
                examples,
                options.max_length,
                directory,
                options.checkpointing,
            )
            return Steps(trainer, full_packs(trainer.train_dataset["seq_lengths"], options.max_length))

        return prepare

    available = {
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_2": is_flash_attn_2_available(),
        "flex_attention": True,
        "sdpa": True,
    }
    theirs_by_name = {f"TRL, {attention}": theirs(attention) for attention, there in available.items() if there}
    return {"shared prefix": ours("shared_prefix"), "plain packs": ours("best_fit")} | theirs_by_name


def measure_side(report: Report, name: str, prepare: Callable[[], Steps], options: argparse.Namespace) -> float:
    """Measure one side's steps; its median of trained tokens a second."""
    torch.cuda.reset_peak_memory_stats()
    steps: Any = prepare()
    report.add(f"{name}: attention", steps.trainer.model.config._attn_implementation)
    flops = forward_flops(steps.trainer.model)
    for _ in range(options.warm_up):
        steps()
    taken = [seconds(steps) for _ in range(options.steps)]
    lengths, prefixes = layout(steps)
    work = []
    for pack in steps.taken[options.warm_up :]:
        work.append(3 * pack_cost(lengths[pack], prefixes[pack], *flops).total)
    rate = spread(count / each for count, each in zip(steps.trained[options.warm_up :], taken, strict=True))
    report.add(f"{name}: trained tokens/s", rate)
    report.add(f"{name}: seconds a step", spread(taken))
    report.add(f"{name}: MFU", spread(each / (s * options.peak * 1e12) for each, s in zip(work, taken, strict=True)))
    report.add(f"{name}: peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)
    return rate["median"]


def layout(steps: Any) -> tuple[list[list[int]], list[int]]:
    """By pack, the lengths of its documents and that of the prefix that they share, ours or TRL's."""
    if hasattr(steps.trainer, "packs"):
        return steps.packs.document_lengths, steps.packs.prefix_lengths
    lengths = list(steps.packs["seq_lengths"])
    return lengths, [0] * len(lengths)


if __name__ == "__main__":
    main()
