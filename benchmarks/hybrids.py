"""Measure hybrid models (Qwen3.5) on a CPU: training beside TRL's, evaluation; and training of models with experts.

python benchmarks/hybrids.py            # about nine minutes on two cores
python benchmarks/hybrids.py --quick    # every section on tiny data, in seconds: a smoke test
python benchmarks/hybrids.py --sections training    # only this section; the results of the others stay

Prints each result and writes benchmarks/results/hybrids.json with settings, versions, commit and machine. The compared
sides take turns in one process; a ratio compares the two sides of each turn.
"""

import argparse
import itertools
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
import transformers
from evaluation import demo, generation
from measure import (
    PREFIX,
    Report,
    Steps,
    body_lengths,
    full_packs,
    pack_trainer,
    random_examples,
    random_model,
    ratios,
    side_by_side,
    spread,
    trl_trainer,
)
from packing import hidden
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from csc_train.files import read_json
from csc_train.inference.kv_cache import DialogueCache
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.experts import routers
from csc_train.models.layers import decoder_layers
from csc_train.packing.collator import PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.dialogue_template import TokenizedDialogue

MODEL = {
    "model_type": "qwen3_5_text",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
"""Three delta nets and one layer of full attention; keys and values of the delta nets are twice the hidden states, as
in Qwen3.5-0.8B."""
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
"""A token's experts are as wide as the hybrid's MLP."""
SECTIONS = (
    "training", "exactness", "prompt", "cost of a token", "generated context", "experts: training", "experts: products",
)  # fmt: skip
DECODED = 10
"""Tokens that each dialogue of a batch decodes."""
BATCH = 8
"""Dialogues of TRL's padded batch: transformers' default."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    max_length: int = 8192
    """Tokens of a pack."""
    shortened: int = 1
    """By how much the dialogues are shortened."""
    trained_dialogues: int = 1000
    """Dialogues in the packs."""
    rounds: int = 5
    """Measured optimizer steps of each side, after one that is not counted."""
    contexts: tuple[int, int] = (500, 4000)
    """Tokens of the context behind which tokens are generated."""
    rows: int = 8
    """Dialogues that are generated at a time in the sections on the prompt and on a token."""
    generated: int = 16
    """Tokens of their replies."""
    dialogues: tuple[int, int] = (128, 4)
    """Sample dialogues that are evaluated together, and one at a time."""
    threads: int = 2
    """Of torch."""
    cpu_time: bool = False
    """Whether training is timed by CPU seconds instead of those of a clock."""
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    experts: dict[str, Any] = field(default_factory=lambda: EXPERTS)
    short_row: int = 256
    """Tokens of the row that every implementation of experts takes: batched_mm copies their experts for each token."""

    @property
    def prefix(self) -> int:
        """Tokens of the shared prefix."""
        return PREFIX // self.shortened


QUICK = Settings(
    max_length=1024,
    shortened=8,
    trained_dialogues=60,
    rounds=2,
    contexts=(60, 240),
    rows=3,
    generated=4,
    dialogues=(3, 1),
    threads=1,
    model=MODEL
    | {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "vocab_size": 2100}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    experts=EXPERTS | {"hidden_size": 32, "head_dim": 8, "moe_intermediate_size": 8, "vocab_size": 2100},
    short_row=16,
)


def main() -> None:
    """Measure every section and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every section on next to nothing, in seconds")
    parser.add_argument("--cpu-time", action="store_true", help="time by CPU seconds, on a machine that does more")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "hybrids.json")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="measure these again, keep the others' results")
    options = parser.parse_args()
    settings = replace(QUICK if options.quick else Settings(), cpu_time=options.cpu_time)
    with_experts = replace(settings, model=settings.experts)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads)
    earlier = read_json(options.output)["sections"] if options.sections and options.output.exists() else {}
    report = Report(asdict(settings) | {"quick": options.quick}, earlier)
    with tempfile.TemporaryDirectory() as directory:
        sections = {
            "training": lambda: training(report, settings, directory),
            "exactness": lambda: exactness(report, settings),
            "prompt": lambda: prompt(report, settings),
            "cost of a token": lambda: token_cost(report, settings),
            "generated context": lambda: generated_context(report, settings),
            "experts: training": lambda: training(
                report, with_experts, directory, "experts: training", EXPERTS_BATCHES
            ),
            "experts: products": lambda: products(report, with_experts),
        }
        for name in options.sections or sections:
            sections[name]()
    report.write(options.output)
    print(f"\n{options.output}")


def hybrid(settings: Settings, attention: str = VARLEN_ATTENTION) -> PreTrainedModel:
    """The model with our forward pass of the delta nets, if it has any."""
    model = random_model(settings.model, attention)
    prepare_delta_nets(model)
    return model


def training_examples(settings: Settings) -> list[TokenizedDialogue]:
    """Random ids with the lengths of the file behind one prefix."""
    bodies = body_lengths(settings.trained_dialogues, settings.shortened)
    return random_examples(bodies.tolist(), settings.prefix, settings.model["vocab_size"])


HYBRID_BATCHES = "without the kernels, transformers refuses its packs (see exactness)"
EXPERTS_BATCHES = "with its default weight of the auxiliary loss"


def training(
    report: Report, settings: Settings, directory: str, section: str = "training", batches: str = HYBRID_BATCHES
) -> None:
    """Trained tokens a second of whole optimizer steps.

    Args:
        batches: what to say about TRL's.
    """
    examples, length = training_examples(settings), settings.max_length

    def ours(packing: str) -> Steps:
        packs, _ = pack_dialogues(examples, PackingConfig(packing, length))
        trainer = pack_trainer(hybrid(settings), packs, packing, directory)
        return Steps(trainer, full_packs(packs.document_lengths, length))

    def theirs() -> Steps:
        model = random_model(settings.model, "sdpa")
        trainer = trl_trainer(model, examples, length, directory, packing=False, per_device_train_batch_size=BATCH)
        order = itertools.cycle(numpy.random.default_rng(0).permutation(len(examples)).tolist())
        return Steps(trainer, order, BATCH)

    sides = {"shared prefix": ours("shared_prefix"), "plain packs": ours("best_fit"), "TRL, padded": theirs()}
    clock = time.process_time if settings.cpu_time else time.perf_counter
    taken = side_by_side(sides, settings.rounds, clock=clock)
    report.section(
        section,
        "Trained tokens a second of whole optimizer steps (collation, forward, backward, clipping, AdamW) in fp32 "
        "without activation checkpointing, by transformers' torch functions on every side. Random ids with the file's "
        "lengths behind one prefix; the second half of each exchange is trained. Ours: one pack a step, packs under "
        f"nine tenths full left out. TRL, padded: SFTTrainer, packing=False, its own collator, batches of {BATCH} "
        f"random dialogues: {batches}.",
        max_length=length,
        prefix=settings.prefix,
        threads=settings.threads,
        seconds_of="CPU" if settings.cpu_time else "wall",
        model=settings.model,
    )
    speed = {}
    for name, steps in sides.items():
        speed[name] = [count / each for count, each in zip(steps.trained[1:], taken[name], strict=True)]
        report.add(f"{name}: trained tokens/s", spread(speed[name]))
        report.add(f"{name}: seconds a step", spread(taken[name]))
        report.add(f"{name}: trained tokens a step", int(numpy.median(steps.trained)))
    for name, goal in (("plain packs", 1.3), ("TRL, padded", 2.0)):
        report.add(f"shared prefix / {name}", ratios(speed["shared prefix"], speed[name]), least=goal)


def products(report: Report, settings: Settings) -> None:
    """Time of one layer's experts by each of transformers' implementations."""
    model = random_model(settings.model, "sdpa")
    for router in routers(model):
        torch.nn.init.normal_(router.get_parameter("weight"), std=0.1)
    first: Any = decoder_layers(model)[0]
    report.section(
        "experts: products",
        "One layer's router and experts by transformers' implementations, in turn. Training: forward and backward pass "
        "of a row, input and weights. Decoding: forward passes of a batch of one token each.",
        max_length=settings.max_length,
        short_row=settings.short_row,
        rows=settings.rows,
        threads=settings.threads,
        model=settings.model,
    )
    for dtype in (torch.float32, torch.bfloat16):
        layer: Any = first.mlp.to(dtype)

        def run(implementation: str, hidden: torch.Tensor, trains: bool, layer: Any = layer) -> None:
            model.config._experts_implementation = implementation
            with torch.inference_mode(not trains):
                if trains:
                    output = layer(hidden)
                    torch.autograd.grad(output, [hidden, *layer.parameters()], torch.ones_like(output))
                else:
                    for _ in range(DECODED):
                        layer(hidden)

        for work, tokens in (
            ("training", settings.max_length),
            ("training", settings.short_row),
            ("decoding", settings.rows),
        ):
            trains, every = work == "training", tokens <= settings.short_row
            hidden = torch.randn(1, tokens, settings.model["hidden_size"], dtype=dtype, requires_grad=trains)
            names = ("grouped_mm", "eager", "batched_mm")[: 3 if every else 2]
            actions = {name: lambda name=name, row=hidden, trains=trains: run(name, row, trains) for name in names}
            taken = side_by_side(actions, settings.rounds)
            where = f"{str(dtype)[6:]}, {work}, {tokens} tokens"
            report.add(f"{where}: grouped_mm, ms", spread(1000 * each for each in taken["grouped_mm"]))
            for name in names[1:]:
                report.add(f"{where}: {name} / grouped_mm", ratios(taken[name], taken["grouped_mm"]))


def exactness(report: Report, settings: Settings) -> None:
    """Hidden states of packs against those of the same dialogues one by one."""
    examples = training_examples(settings)
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", settings.max_length))
    number = next(iter(full_packs(packs.document_lengths, settings.max_length)))
    members = [examples[member.dialogue] for member in packs.pack_items[number]]
    report.section(
        "exactness",
        "Largest absolute difference of a hidden state behind the last layer from that of the separate dialogue, over "
        "one pack. TRL packs: what its collator makes of the same dialogues, with sdpa and no kernels. Position ids "
        "alone: the same without its other marks of documents; the delta nets run through all of them.",
        dialogues=len(members),
        max_length=settings.max_length,
        prefix=settings.prefix,
        model=settings.model,
    )
    plain, ours = random_model(settings.model, "sdpa"), hybrid(settings)
    ids = [torch.tensor(example.input_ids, dtype=torch.int64) for example in members]
    alone = [hidden(plain, {"input_ids": each[None]}) for each in ids]
    expected = torch.cat([alone[0][: settings.prefix], *(states[settings.prefix :] for states in alone)])
    collator = PackCollator("varlen", pad_id=0, delta_levels=True)
    report.add("shared prefix", float((hidden(ours, collator([packs[number]])) - expected).abs().max()), most=1e-5)
    packed = {"input_ids": torch.cat(ids).tolist(), "seq_lengths": list(map(len, ids))}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed])
    try:
        hidden(plain, batch)
    except ValueError as refusal:
        report.add("TRL packs", f"refused: {refusal}")
    states = hidden(plain, {name: batch[name] for name in ("input_ids", "position_ids")})
    report.add("position ids alone", float((states - torch.cat(alone)).abs().max()))
    report.add("largest hidden state", float(expected.abs().max()))


@torch.inference_mode()
def prompt(report: Report, settings: Settings) -> None:
    """Tokens that go through a delta net until each of some dialogues has its first token."""
    model = hybrid(settings, "sdpa").eval()
    own = settings.contexts[0]
    ids = numpy.random.default_rng(0).integers(settings.model["vocab_size"], size=settings.prefix + settings.rows * own)
    prefix, *bodies = (part.tolist() for part in numpy.split(ids, range(settings.prefix, len(ids), own)))
    counted = []
    layer = next(layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn"))
    layer.register_forward_pre_hook(
        lambda _, __, inputs: counted.append(inputs["hidden_states"].shape[:2].numel()), with_kwargs=True
    )
    cache = DialogueCache(model, prefix, stop_ids=set(), max_new_tokens=1)
    cache.add(range(settings.rows), [prefix + body for body in bodies])
    cache.step()
    report.section(
        "prompt",
        "Tokens that go through the first delta net until dialogues of equally many own tokens behind one prefix have "
        "their first generated token.",
        dialogues=settings.rows,
        prefix=settings.prefix,
        own_tokens=own,
    )
    report.add("tokens computed", sum(counted))
    report.add("tokens of all prompts", settings.rows * (settings.prefix + own))
    report.add("times the prefix was computed", (sum(counted) - settings.rows * own) / settings.prefix, most=1)


@torch.inference_mode()
def token_cost(report: Report, settings: Settings) -> None:
    """What a generated token costs behind a short and a long context, by kind of layer."""
    model = hybrid(settings, "sdpa").eval()
    taken: dict[str, list[float]] = defaultdict(list)
    started: list[float] = []
    for kind in ("linear_attn", "self_attn"):
        for layer in model.model.layers:
            if module := getattr(layer, kind, None):
                module.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
                module.register_forward_hook(
                    lambda *_, kind=kind: taken[kind].append(time.process_time() - started.pop())
                )
    rng = numpy.random.default_rng(0)
    caches = {}
    for context in settings.contexts:
        ids = rng.integers(settings.model["vocab_size"], size=context).tolist()
        caches[context] = ids, DialogueCache(model, ids, stop_ids=set(), max_new_tokens=settings.generated)
    cost: dict[tuple[int, str], list[float]] = defaultdict(list)

    def generate(context: int) -> None:
        taken.clear()
        ids, cache = caches[context]
        active = set(cache.add(range(settings.rows), [[*ids, number] for number in range(settings.rows)]))
        begun = time.process_time()
        while active:
            active -= set(cache.step())
        for kind, seconds in (*taken.items(), ("model", [time.process_time() - begun])):
            cost[context, kind].append(1000 * sum(seconds) / settings.rows / settings.generated)

    torch.set_num_threads(1)
    turns = {context: lambda context=context: generate(context) for context in settings.contexts}
    side_by_side(turns, 3 * settings.rounds)
    torch.set_num_threads(settings.threads)
    report.section(
        "cost of a token",
        "CPU milliseconds of a generated token on one thread by kind of layer, all layers of a kind together, and of "
        "the whole model, its cache included: some dialogues at a time behind contexts that are computed before.",
        dialogues=settings.rows,
        generated=settings.generated,
        contexts=settings.contexts,
        threads=1,
        model=settings.model,
    )
    short, long = settings.contexts
    names = {"linear_attn": "delta nets", "self_attn": "full attention", "model": "model"}
    for kind, name in names.items():
        for context in settings.contexts:
            report.add(f"{name}: ms behind {context:,} tokens", spread(cost[context, kind][1:]))
        goal = 1.1 if kind == "linear_attn" else None
        found = ratios(cost[long, kind][1:], cost[short, kind][1:])
        report.add(f"{name}: {long:,} / {short:,} tokens", found, most=goal)


def generated_context(report: Report, settings: Settings) -> None:
    """Evaluation beside transformers' `generate`, one prompt at a time."""
    template, _ = demo()
    model = random_model(settings.model | {"vocab_size": len(template.tokenizer), "initializer_range": 0.3}, "sdpa")
    generation(report, "generated context", template, model, *settings.dialogues, repeats=1, goal=None)


if __name__ == "__main__":
    main()
