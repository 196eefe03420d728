"""Predict on paper how long the parts of a training step take on a GPU, with a shared prefix and with plain packs.

python benchmarks/roofline.py           # seconds on any machine

A part takes as long as its arithmetic at a share of the data sheet's peak, or as its bytes at the memory's bandwidth,
whichever is longer; parts follow one another. Prints the ratio of trained tokens a second of both kinds of packs,
beside the measured one if results/gpu.json has it, and writes results/roofline.json and .md.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from measure import EXCHANGES, PREFIX, SHAPES, body_lengths
from transformers import AutoConfig

from csc_train.files import read_json, write_json, write_text
from csc_train.models.families import ModelDims, lora_parameter_count, model_dims, training_flops
from csc_train.packing.bin_packing import subset_sum_packing
from csc_train.packing.pack_cost import pack_cost
from csc_train.runs.provenance import provenance

RESULTS = Path(__file__).parent / "results"
MAX_LENGTH = 8192
GPUS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""Dense bf16 FLOP/s and bytes/s, by the data sheets."""
EFFICIENCY = {"products": 0.7, "attention": 0.35}
"""Share of the peak that kernels reach. Matrix products: what large ones reach on an H100 or H200. Attention: what
FlashAttention-2 reaches on Hopper. Source: Shah et al., "FlashAttention-3" (2024)."""
FLASH_PASSES = 3.5
"""FLOPs of flash-attention's forward and backward pass over those of its forward pass: it recomputes the scores."""
ELEMENTWISE_BYTES = {"eager": (84, 24, 10), "compiled": (16, 4, 6)}
"""Bytes that a forward pass of one layer moves for a token: for each entry of the hidden states (two norms, two
residual sums), of queries and keys (rotary embedding), and of the MLP (SwiGLU)."""
ELEMENTWISE_PASSES = 3
"""Forward passes in bytes: one, and two for the backward pass; nothing is recomputed."""
ADAMW_BYTES = 42
"""For each trained weight: AdamW reads four fp32 numbers and writes three, and one in bf16; clipping reads one and
scales one."""
LORA_RANK = 16
PREFIXES = (PREFIX, 309)
"""The prompt in the lengths file, and the project's own."""


class Pack(NamedTuple):
    """The mean pack.

    Attributes:
        tokens: in the row.
        scored: positions whose next token is trained.
        pairs: pairs of tokens, as `pack_cost` counts them.
        keys: gathered keys, of all documents.
    """

    tokens: float
    scored: float
    pairs: float
    keys: float


def mean_pack(prefix: int, shared: bool) -> Pack:
    """The mean pack of all dialogues of the lengths file, with a prefix of this length instead of theirs."""
    bodies = body_lengths()
    trained = bodies // 2 // EXCHANGES * EXCHANGES  # the second half of each exchange
    if shared:
        packs = subset_sum_packing(bodies, MAX_LENGTH - prefix)
        documents = [[prefix, *bodies[pack]] for pack in packs]
        keys = sum(prefix + sum(prefix + body for body in each[1:]) for each in documents)
    else:
        packs = subset_sum_packing(bodies + prefix, MAX_LENGTH)
        documents = [list(bodies[pack] + prefix) for pack in packs]
        keys = sum(map(sum, documents))
    pairs = sum(pack_cost(each, prefix if shared else 0, 0, 1).total for each in documents)
    totals = sum(map(sum, documents)), trained.sum(), pairs, keys
    return Pack(*(float(total) / len(packs) for total in totals))


def parts(dims: ModelDims, pack: Pack, adapters: int, elementwise: str) -> dict[str, tuple[float, float, float]]:
    """FLOPs, bytes and the share of the peak of each part of a step of one pack, in bf16.

    Args:
        adapters: weights of LoRA adapters, which are trained instead of the model; 0 trains the whole model.
        elementwise: a key of `ELEMENTWISE_BYTES`.
    """
    tokens, layers, passes = pack.tokens, dims.layers, 2 if adapters else 3
    _, per_head_token, per_pair = training_flops(dims, adapters)

    def products(names: str) -> tuple[float, float, float]:
        shapes = [shape for name, shape in dims.linears["full_attention"].items() if name.startswith(names)]
        weights = layers * sum(inputs * outputs for inputs, outputs in shapes)
        activations = layers * tokens * sum(inputs + outputs for inputs, outputs in shapes)
        # Gradients in bf16 are added to a sum in fp32.
        sums = 0 if adapters else (2 + 4 + 4) * weights
        return 2 * passes * weights * tokens, 2 * passes * (weights + activations) + sums, EFFICIENCY["products"]

    hidden, rotary, mlp = ELEMENTWISE_BYTES[elementwise]
    entries = hidden * dims.hidden + rotary * (dims.queries + dims.keys) + mlp * dims.intermediate
    trained = adapters or dims.parameters
    head_bytes = 2 * passes * dims.embedding + 12 * pack.scored * dims.vocabulary
    gathered = layers * pack.keys * 2 * 2
    return {
        "projections": products("self_attn"),
        "MLP": products("mlp"),
        "adapters": (6 * adapters * tokens, 0, EFFICIENCY["products"]),
        "attention": (
            FLASH_PASSES / 3 * per_pair * pack.pairs,
            layers * 2 * (6 * tokens * dims.queries + 6 * pack.keys * dims.keys),
            EFFICIENCY["attention"],
        ),
        # Read and written by the forward pass, again by the backward pass, and by its sum; the kernel makes key and
        # value gradients for every query head.
        "gather of keys": (0, gathered * (3 * 2 * dims.keys + 2 * dims.queries), 1),
        "norms, SwiGLU, rotary": (0, ELEMENTWISE_PASSES * layers * tokens * entries, 1),
        "head": (
            per_head_token * pack.scored,
            head_bytes + (0 if adapters else 8 * dims.embedding),
            EFFICIENCY["products"],
        ),
        "optimizer": (0, ADAMW_BYTES * trained, 1),
    }


def predict(gpu: str, shape: str, pack: Pack, elementwise: str) -> dict[str, Any]:
    """The milliseconds of each part, and from them trained tokens a second and MFU."""
    peak, bandwidth = GPUS[gpu]
    dims = model_dims(AutoConfig.for_model("qwen2", **SHAPES[shape]))
    adapters = lora_parameter_count(dims, LORA_RANK) if shape == "7b" else 0
    times = {
        name: max(flops / (peak * share), moved / bandwidth)
        for name, (flops, moved, share) in parts(dims, pack, adapters, elementwise).items()
    }
    total = sum(times.values())
    per_token, per_head_token, per_pair = training_flops(dims, adapters)
    model_flops = per_token * pack.tokens + per_head_token * pack.scored + per_pair * pack.pairs
    return {
        "ms": {name: 1000 * each for name, each in times.items()},
        "trained_tokens_per_second": pack.scored / total,
        "mfu": model_flops / (total * peak),
    }


def measured_ratio(shape: str, prefix: int) -> float | None:
    """The median of shared prefix / plain packs in results/gpu.json; None if it is not there."""
    path = RESULTS / "gpu.json"
    sections = read_json(path)["sections"] if path.exists() else {}
    results = sections.get(f"steps: {shape}, {prefix} ids", {}).get("results", {})
    return results.get("shared prefix / plain packs", {}).get("median")


def main() -> None:
    """Predict every case, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.json")
    options = parser.parse_args()
    packs = {prefix: (mean_pack(prefix, True), mean_pack(prefix, False)) for prefix in PREFIXES}
    rows = []
    for gpu in GPUS:
        for shape in SHAPES:
            for prefix in PREFIXES:
                for elementwise in ELEMENTWISE_BYTES:
                    shared, plain = (predict(gpu, shape, pack, elementwise) for pack in packs[prefix])
                    rows.append({
                        "gpu": gpu, "shape": shape, "prefix": prefix, "elementwise": elementwise,
                        "shared": shared, "plain": plain,
                        "ratio": shared["trained_tokens_per_second"] / plain["trained_tokens_per_second"],
                        "measured_ratio": measured_ratio(shape, prefix) if gpu == "H200" else None,
                    })  # fmt: skip
    settings = {
        "max_length": MAX_LENGTH, "gpus": GPUS, "efficiency": EFFICIENCY, "lora_rank": LORA_RANK,
        "packs": {prefix: {"shared": pair[0]._asdict(), "plain": pair[1]._asdict()} for prefix, pair in packs.items()},
    }  # fmt: skip
    text = tables(rows)
    print(text)
    write_json(options.output, {"settings": settings, "provenance": provenance(), "rows": rows})
    write_text(options.output.with_suffix(".md"), text)


def tables(rows: list[dict[str, Any]]) -> str:
    """The predictions as Markdown: one table of ratios, one of milliseconds by part."""
    lines = [
        "# Roofline of a training step",
        "",
        f"Predicted by `benchmarks/roofline.py`, not measured: packs of {MAX_LENGTH:,} tokens of the lengths file; the",
        "1.5B trained whole, the 7B by LoRA; bf16 weights, with an fp32 copy where trained; nothing recomputed;",
        f"matrix products at {EFFICIENCY['products']} of the data sheet's peak, attention at",
        f"{EFFICIENCY['attention']}, all else at the memory's full bandwidth.",
        "",
        "| GPU | model | prefix | elementwise | trained tokens/s, shared | plain | shared / plain | measured | MFU, "
        "shared | plain |",
        f"|{'---|' * 10}",
    ]
    for row in rows:
        shared, plain = row["shared"], row["plain"]
        measured = "-" if row["measured_ratio"] is None else f"{row['measured_ratio']:.2f}"
        lines.append(
            f"| {row['gpu']} | {row['shape']} | {row['prefix']} | {row['elementwise']} | "
            f"{shared['trained_tokens_per_second']:,.0f} | {plain['trained_tokens_per_second']:,.0f} | "
            f"{row['ratio']:.2f} | {measured} | {shared['mfu']:.2f} | {plain['mfu']:.2f} |"
        )
    names = list(rows[0]["shared"]["ms"])
    lines += ["", "Milliseconds of a step on an H200, compiled layers:", ""]
    lines += [f"| model | prefix | packs | {' | '.join(names)} |", f"|{'---|' * (3 + len(names))}"]
    for row in rows:
        if (row["gpu"], row["elementwise"]) == ("H200", "compiled"):
            for side in ("shared", "plain"):
                cells = " | ".join(f"{row[side]['ms'][name]:.1f}" for name in names)
                lines.append(f"| {row['shape']} | {row['prefix']} | {side} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
