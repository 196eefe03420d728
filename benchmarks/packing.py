"""Compare packing with TRL's on a CPU: tokens, packs, load balance, tokenization and training speed.

python benchmarks/packing.py            # about six minutes on two cores
python benchmarks/packing.py --quick    # every section on tiny data, in seconds: a smoke test
python benchmarks/packing.py --sections balance     # only this section; the results of the others stay
python benchmarks/packing.py --sections scale --old CHECKOUT    # by name only: beside 5fab51a, four minutes

Prints each result and writes benchmarks/results/packing.json with settings, versions, commit and machine. The compared
sides take turns in one process; a ratio compares the two sides of each turn.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import torch
import transformers
from measure import (
    EXCHANGES,
    LEARNING_RATE,
    PREFIX,
    SHAPES,
    SMALL_TOKENIZER,
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
    turn_ends,
    turn_samples,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.sample_grammar import generate_sample
from csc_train.files import read_json
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.families import forward_flops
from csc_train.packing.bin_packing import best_fit_decreasing, subset_sum_packing
from csc_train.packing.collator import IGNORE_INDEX, PackCollator
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import PackedDataset, pack_dialogues
from csc_train.packing.global_batches import assign_to_ranks, global_batches
from csc_train.packing.pack_cost import PackCost, PackCosts, PackSlice, pack_cost, pack_costs
from csc_train.packing.ragged import Ragged
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue, chat_messages

CPU_MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
SECTIONS = (
    "tokens",
    "packer",
    "scale",
    "balance",
    "preparation",
    "training",
    "same dialogues",
    "compiled layers",
    "exactness",
)
RANKS = 8
GENERATION_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
)
"""Qwen2.5's chat template with the marks by which TRL finds trained tokens (`assistant_only_loss`)."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    capacities: tuple[int, ...] = (8192, 4096)
    dialogues: int | None = None
    """Dialogues whose lengths are packed and balanced; defaults to all."""
    tokenized_dialogues: int = 2000
    tokenization_repeats: int = 3
    packer_repeats: int = 5
    many: tuple[int, ...] = (1_120_000, 10_000_000)
    """Dialogues whose plan is made; of the fewest, beside an older build's."""
    many_ranks: int = 1024
    many_repeats: int = 2
    trained_dialogues: int = 1000
    """Dialogues in the packs of the training sections."""
    epochs: int = 2
    """Over which balance is measured."""
    rounds: int = 5
    """Measured optimizer steps of each side, after one that is not counted."""
    shortened: int = 1
    """By how much the dialogues of the training sections are shortened."""
    threads: int = 2
    """Of torch, in the training sections."""
    model: dict[str, Any] = field(default_factory=lambda: CPU_MODEL)
    """Dimensions of the Qwen2 that is trained."""

    @property
    def prefix(self) -> int:
        """Tokens of the shared prefix in the training sections."""
        return PREFIX // self.shortened

    @property
    def max_length(self) -> int:
        """Tokens of a pack in the training sections."""
        return self.capacities[0] // self.shortened


QUICK = Settings(
    dialogues=1200,
    tokenized_dialogues=20,
    tokenization_repeats=1,
    packer_repeats=1,
    many=(2000, 20_000),
    many_ranks=8,
    many_repeats=1,
    trained_dialogues=60,
    epochs=1,
    rounds=2,
    shortened=8,
    threads=1,
    model=CPU_MODEL | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 2100},
)


def main() -> None:
    """Measure every section and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every section on next to nothing, in seconds")
    parser.add_argument("--tokenizer", default=published_tokenizer(), help="directory of the Qwen2.5 tokenizer")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="scale: beside 5fab51a's or a later build")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="measure these again, keep the others' results")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    datasets.disable_progress_bars()
    datasets.disable_caching()  # else TRL's second preparation would read what the first has written
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or SMALL_TOKENIZER)

    report = Report(
        asdict(settings) | {"quick": options.quick, "published_tokenizer": options.tokenizer is not None},
        read_json(options.output)["sections"] if options.sections else {},
    )
    with tempfile.TemporaryDirectory() as directory:
        sections = {
            "tokens": lambda: tokens(report, settings, tokenizer if options.tokenizer else None),
            "packer": lambda: [packer(report, settings, capacity) for capacity in settings.capacities],
            "scale": lambda: scale(report, settings, options.old),
            "balance": lambda: [balance(report, settings, capacity) for capacity in settings.capacities],
            "preparation": lambda: preparation(report, settings, tokenizer, directory),
            "training": lambda: training(report, settings, directory),
            "same dialogues": lambda: same_steps(report, settings, directory),
            "compiled layers": lambda: compiled(report, settings, directory),
            "exactness": lambda: exactness(report, settings),
        }
        for name in options.sections or [name for name in sections if name != "scale"]:
            sections[name]()
    report.write(options.output)
    print(f"\n{options.output}")


def published_tokenizer() -> str | None:
    """The directory of the Qwen2.5 tokenizer below the one that CSC_TOKENIZERS names, if it is there."""
    path = Path(os.environ.get("CSC_TOKENIZERS", "")) / "qwen2_5"
    return str(path) if (path / "tokenizer.json").exists() else None


# Tokens and packs


def tokens(report: Report, settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Tokens that are processed for the same gradient."""
    bodies, capacity = body_lengths(settings.dialogues), settings.capacities[0]
    report.section(
        "tokens",
        "All dialogues of the lengths file. Plain: one sequence per dialogue, prefix included. Shared: "
        "bodies, and one prefix a pack. Per turn: a sample for each supporter turn with all that comes before it, "
        f"{EXCHANGES} turns at equal distances in each body (the file has no turns). For another prefix the bodies "
        "stay and the prefix is exchanged.",
        dialogues=len(bodies),
        max_length=capacity,
    )
    prefixes = {"568 ids": PREFIX, "300 ids": 300, "900 ids": 900}
    if tokenizer is None:
        report.add("the real prompt", "skipped: no Qwen2.5 tokenizer in CSC_TOKENIZERS")
    else:
        own = len(DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig()).prefix_ids)
        prefixes[f"the real prompt of {own} ids"] = own
    for name, prefix in prefixes.items():
        plain = int((bodies + prefix).sum())
        shared = int(bodies.sum()) + prefix * len(subset_sum_packing(bodies, capacity - prefix))
        if prefix == PREFIX:
            per_turn = int((turn_ends(bodies) + prefix).sum())
            report.add("per turn", per_turn)
            report.add("plain", plain)
            report.add("shared", shared)
            report.add("per turn / plain", per_turn / plain)
        report.add(f"shared / plain, {name}", shared / plain, most=0.62 if prefix == PREFIX else None)


def packer(report: Report, settings: Settings, capacity: int) -> None:
    """Utilization and number of packs, and the time of packing."""
    bodies = body_lengths(settings.dialogues)
    report.section(
        f"packer at {capacity:,}",
        "All dialogues. Lower bound: tokens over room, rounded up. TRL's packer is `pack_dataset` as its trainer calls "
        "it, over 1,000 dialogues at a time; its seconds include copying ids, ours do not. best_fit_decreasing is over "
        "all dialogues.",
        max_length=capacity,
        prefix=PREFIX,
    )
    goals = {8192: (0.995, 0.99), 4096: (0.985, 0.965)}[capacity]
    for name, lengths, shared, goal in zip(
        ("shared", "plain"), (bodies, bodies + PREFIX), (PREFIX, 0), goals, strict=True
    ):
        room = capacity - shared
        packs = len(subset_sum_packing(lengths, room))
        report.add(f"{name}: packs", packs)
        report.add(f"{name}: lower bound", -(-int(lengths.sum()) // room))
        report.add(f"{name}: packs by best_fit_decreasing", len(best_fit_decreasing(lengths, room)))
        report.add(f"{name}: utilization", (int(lengths.sum()) + packs * shared) / (packs * capacity), least=goal)
        taken = side_by_side(
            {"ours": lambda lengths=lengths, room=room: subset_sum_packing(lengths, room)}, settings.packer_repeats
        )
        report.add(f"{name}: seconds", spread(taken["ours"]), most=1.0)
    ids = dataset_of_lengths(bodies + PREFIX)
    taken = side_by_side({"TRL": lambda: pack_dataset(ids, capacity, "bfd")}, settings.packer_repeats, warm_up=0)
    packs = len(pack_dataset(ids, capacity, "bfd"))
    report.add("plain: packs by TRL", packs)
    report.add("plain: utilization by TRL", int((bodies + PREFIX).sum()) / (packs * capacity))
    report.add("plain: seconds by TRL", spread(taken["TRL"]))


def dataset_of_lengths(lengths: numpy.ndarray) -> datasets.Dataset:
    """A dataset of `input_ids` of these lengths."""
    offsets = numpy.concatenate([[0], lengths.cumsum()]).astype(numpy.int32)
    ids = numpy.zeros(offsets[-1], numpy.int32)
    return datasets.Dataset(pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, ids)}))


# Scale

PLAN = """
import json, sys, time
import numpy
bodies, ranks, capacity, prefix, *flops = numpy.load(sys.argv[1]), *map(int, sys.argv[2:])
try:
    from csc_train.packing.bin_packing import subset_sum_packing as pack
    from csc_train.packing.global_batches import assign_to_ranks as assign, global_batches as order
    from csc_train.packing.pack_cost import pack_costs
    from csc_train.packing.ragged import Ragged
    row = {"single_row": True}
    def costs_of(packs):
        values = numpy.insert(bodies[packs.values], packs.offsets[:-1], prefix)
        lengths = Ragged(values, packs.offsets + numpy.arange(len(packs) + 1))
        return pack_costs(lengths, [prefix] * len(packs), *flops)
except ImportError:  # 5fab51a
    from csc_train.packing.schedule import distribute as assign, epoch_steps as order, pack_cost
    from csc_train.packing.tight_fit import tight_fit as pack
    row = {"joined": True}
    def costs_of(packs):
        return [pack_cost([prefix, *bodies[pack].tolist()], prefix, *flops) for pack in packs]
seconds, start = {}, time.process_time()
def done(name):
    global start
    seconds[name], start = time.process_time() - start, time.process_time()
packs = pack(bodies, capacity - prefix)
done("packs")
costs = costs_of(packs)
done("costs")
steps = order(costs, ranks, 0, 0)
done("order of an epoch")
for step in steps:
    assign(step, costs, ranks, 1, **row)
done("slices of all ranks, all steps")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # not of the process before it
print(json.dumps([seconds, len(packs), int(peak.split()[1]) * 1024]))
"""
"""Makes the plan of an epoch; runs by this build and by 5fab51a."""


def scale(report: Report, settings: Settings, old: Path | None) -> None:
    """The plan of an epoch of many dialogues: packs, their costs, their order, and the slices of each rank."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPES["7b"]))
    capacity, checkout = settings.capacities[0], Path(__file__).parent.parent

    def plan(bodies: numpy.ndarray, place: Path) -> tuple[float, dict[str, float], int, float]:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            numpy.save(file, bodies)
            file.flush()
            numbers = map(str, (settings.many_ranks, capacity, PREFIX, *forward_flops(model)))
            done = subprocess.run(
                [sys.executable, "-c", PLAN, file.name, *numbers], env=os.environ | {"PYTHONPATH": str(place)},
                stdout=subprocess.PIPE, check=True, cwd=place,
            )  # fmt: skip
        seconds, packs, memory = json.loads(done.stdout)
        return sum(seconds.values()), seconds, packs, memory / 1e9

    for count in settings.many:
        bodies = numpy.random.default_rng(0).choice(body_lengths(), count)
        report.section(
            f"scale: {count:,} dialogues",
            "CPU seconds of one process from the lengths of dialogues to the packs of each step of an epoch and the "
            "slices of every rank in each, as many packs in a step as ranks; its peak memory. Lengths are drawn from "
            "the file. Old: commit 5fab51a. Both sides take turns.",
            max_length=capacity,
            ranks=settings.many_ranks,
        )
        sides = {"new": checkout} | ({"old": old} if old and count == min(settings.many) else {})
        repeats = settings.many_repeats if len(sides) > 1 else 1
        found = {name: [] for name in sides}
        for _ in range(repeats):
            for name, place in sides.items():
                found[name].append(plan(bodies, place.absolute()))
        largest = count == max(settings.many)
        for name, rounds in found.items():
            goal = 60.0 if largest and name == "new" else None
            report.add(f"{name}: seconds", spread([each[0] for each in rounds]), most=goal)
            for part in rounds[0][1]:
                report.add(f"{name}: {part}, seconds", spread([each[1][part] for each in rounds]))
            report.add(f"{name}: packs", rounds[0][2])
            report.add(f"{name}: GB", max(each[3] for each in rounds), most=4.0 if goal else None)
        if "old" in found:
            report.add("new / old", ratios(*([each[0] for each in found[name]] for name in ("new", "old"))))


# Balance


def balance(report: Report, settings: Settings, capacity: int) -> None:
    """How much slower the slowest rank is than the mean, and how fair a sample each step."""
    bodies = body_lengths(settings.dialogues)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPES["7b"]))
    flops = forward_flops(model)
    shared = Ragged.of([[PREFIX, *bodies[pack]] for pack in subset_sum_packing(bodies, capacity - PREFIX)])
    plain = pack_dataset(dataset_of_lengths(bodies + PREFIX), capacity)["seq_lengths"]
    sides = {
        "ours": (pack_costs(shared, [PREFIX] * len(shared), *flops), our_steps),
        "TRL": ([pack_cost(pack, 0, *flops) for pack in plain], random_steps),
    }
    for per_step in (RANKS, 8 * RANKS):
        report.section(
            f"balance at {capacity:,}, {per_step} packs a step",
            "Forward FLOPs of Qwen2.5-7B. Slowest / mean: of the ranks, mean over all steps. Efficiency: FLOPs of the "
            "packs over ranks x slowest rank, over all steps; repeats (the prefix of a split pack, packs that fill "
            "TRL's last step) do not count. TRL: its plain packs, shuffled and assigned in order. Spread: "
            "standard deviation over the full steps of the mean length of a step's dialogues, over what it would be "
            "for as many dialogues drawn at random.",
            max_length=capacity,
            ranks=RANKS,
            packs_per_step=per_step,
            epochs=settings.epochs,
        )
        for name, (packs, steps_of) in sides.items():
            epochs = [steps_of(packs, per_step, epoch) for epoch in range(settings.epochs)]
            loads = [[sum(part.flops(packs) for part in parts) for parts in step] for steps in epochs for step in steps]
            even = [max(load) * RANKS / sum(load) for load in loads]
            useful = settings.epochs * sum(pack.total for pack in packs)
            ours = name == "ours"
            report.add(f"{name}: slowest / mean", float(numpy.mean(even)), most=1.005 if ours else None)
            report.add(f"{name}: slowest / mean, worst step", max(even))
            efficiency = useful / sum(max(load) * RANKS for load in loads)
            report.add(f"{name}: effective efficiency", efficiency, least=0.995 if ours else None)
            full = [step for steps in epochs for step in steps[: len(packs) // per_step]]
            report.add(f"{name}: spread of dialogue lengths", unfairness(full, packs))


def our_steps(packs: PackCosts, per_step: int, epoch: int) -> list[list[list[PackSlice]]]:
    """By step, by rank, the pack slices."""
    steps = global_batches(packs, per_step, 0, epoch)
    return [[list(itertools.chain(*passes)) for passes in assign_to_ranks(step, packs, RANKS, 1, single_row=True)]
            for step in steps]  # fmt: skip


def random_steps(packs: list[PackCost], per_step: int, epoch: int) -> list[list[list[PackSlice]]]:
    """As `our_steps`, but shuffled and assigned in order; the first packs fill the last step, as in accelerate."""
    order = numpy.random.default_rng([0, epoch]).permutation(len(packs)).tolist()
    order += order[: -len(order) % RANKS]
    whole = [PackSlice(pack, 0, len(packs[pack].tokens)) for pack in order]
    steps = [whole[start : start + per_step] for start in range(0, len(whole), per_step)]
    return [[step[rank::RANKS] for rank in range(RANKS)] for step in steps]


def unfairness(steps: list[list[list[PackSlice]]], packs: Sequence[PackCost]) -> float:
    """Spread of the steps' mean dialogue length, over that of random dialogues; 1 is as fair as random."""
    samples = [
        [packs[part.pack].prefix_tokens + body for part in itertools.chain(*step)
         for body in packs[part.pack].tokens[part.start : part.stop]]
        for step in steps
    ]  # fmt: skip
    expected = numpy.std(numpy.concatenate(samples)) * numpy.sqrt(numpy.mean([1 / len(each) for each in samples]))
    return float(numpy.std([numpy.mean(each) for each in samples]) / expected)


# Preparation


def preparation(report: Report, settings: Settings, tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Dialogues to ids and labels, a second, on one core."""
    dialogues = long_dialogues(settings.tokenized_dialogues)
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    rows = datasets.Dataset.from_list(
        [{"messages": chat_messages(dialogue.turns, TemplateConfig())} for dialogue in dialogues]
    )
    tokenizer.chat_template = GENERATION_TEMPLATE
    trainer = SFTTrainer(
        random_model(QUICK.model | {"vocab_size": len(tokenizer)}, "sdpa"),
        SFTConfig(
            output_dir=directory,
            assistant_only_loss=True,
            max_length=None,
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=rows.select([0]),
        processing_class=tokenizer,
    )
    made: dict[str, Sequence] = {}

    def ours() -> None:
        made["ours"] = list(template.encode_all(dialogues))

    def theirs() -> None:
        made["TRL"] = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train")

    taken = side_by_side({"ours": ours, "TRL": theirs}, settings.tokenization_repeats)
    lengths = [len(example.input_ids) for example in made["ours"]]
    report.section(
        "preparation",
        "Sample dialogues, each turn's text joined with three or four others of its speaker: about as long as one "
        "of RoleCS under the published tokenizer, and hardly a text comes twice. Ours: `encode_all`. TRL: "
        "`_prepare_dataset` with assistant_only_loss, on messages and the same chat template with generation marks, "
        "without the passes that truncate and pack. One core each, tokenizer threads off.",
        dialogues=len(dialogues),
        mean_tokens=round(float(numpy.mean(lengths)), 1),
        prefix=len(template.prefix_ids),
    )
    pairs = list(zip(made["ours"], made["TRL"], strict=True))
    report.add("ids equal", all(each.input_ids.tolist() == row["input_ids"] for each, row in pairs))
    labels = (numpy.where(each.trained, each.input_ids, IGNORE_INDEX).tolist() for each, _ in pairs)
    report.add("labels equal", all(own == row["labels"] for own, (_, row) in zip(labels, pairs, strict=True)))
    for name, each in taken.items():
        report.add(f"{name}: dialogues/s", spread(len(dialogues) / second for second in each))
    report.add("ours / TRL", ratios(taken["TRL"], taken["ours"]), least=3.0)


def long_dialogues(count: int) -> list[Dialogue]:
    """Sample dialogues with longer turns: each joined with three or four other texts of its speaker."""
    rng = random.Random(0)
    sample = generate_sample(count, seed=0)
    pool = {
        speaker: [turn.text for dialogue in sample for turn in dialogue.turns if turn.speaker is speaker]
        for speaker in Speaker
    }

    def longer(turn: Turn) -> Turn:
        texts = [turn.text, *rng.choices(pool[turn.speaker], k=rng.choice((3, 3, 4)))]
        return Turn(turn.speaker, "".join(texts), turn.strategy)

    return [Dialogue(each.id, tuple(map(longer, each.turns)), each.source) for each in sample]


# Training


def training_examples(settings: Settings) -> list[TokenizedDialogue]:
    """Random ids with the lengths of the file."""
    bodies = body_lengths(settings.trained_dialogues, settings.shortened)
    return random_examples(bodies.tolist(), settings.prefix, settings.model["vocab_size"])


def training(report: Report, settings: Settings, directory: str) -> None:
    """Trained tokens a second of whole optimizer steps, one pack a step."""
    examples, length = training_examples(settings), settings.max_length

    def ours(examples: list[TokenizedDialogue], packing: str) -> Steps:
        packs, _ = pack_dialogues(examples, PackingConfig(packing, length))
        trainer = pack_trainer(random_model(settings.model, VARLEN_ATTENTION), packs, packing, directory)
        return Steps(trainer, full_packs(packs.document_lengths, length))

    def theirs() -> Steps:
        trainer = trl_trainer(random_model(settings.model, "sdpa"), examples, length, directory)
        return Steps(trainer, full_packs(trainer.train_dataset["seq_lengths"], length))

    sides = {
        "shared prefix": ours(examples, "shared_prefix"),
        "plain packs": ours(examples, "best_fit"),
        "TRL packs": theirs(),
        "per turn": ours(turn_samples(examples[: len(examples) // EXCHANGES + 1]), "best_fit"),
    }
    taken = side_by_side(sides, settings.rounds)
    report.section(
        "training",
        "Trained tokens a second of whole optimizer steps (collation, forward, backward, clipping, AdamW) of one pack, "
        "in fp32 without activation checkpointing. Random ids with the file's lengths behind one prefix; the second "
        "half of each exchange is trained, and a token counts once. Shared prefix, plain packs and "
        "per turn (packs of samples, a sample a supporter turn): our trainer and attention by document. TRL packs: "
        "SFTTrainer, packing=True, bfd, its own collator, sdpa with the mask that transformers derives from the "
        "positions, which keeps documents apart (see exactness). Packs under nine tenths full, of which so small a set "
        "has too many, are left out on every side.",
        max_length=length,
        prefix=settings.prefix,
        threads=settings.threads,
        model=settings.model,
    )
    speed = {
        name: [count / each for count, each in zip(steps.trained[1:], taken[name], strict=True)]
        for name, steps in sides.items()
    }
    for name, each in speed.items():
        report.add(f"{name}: trained tokens/s", spread(each))
        report.add(f"{name}: seconds a step", spread(taken[name]))
        report.add(f"{name}: trained tokens a step", int(numpy.median(sides[name].trained)))
    for name, goal in (("TRL packs", 7.0), ("plain packs", 1.5), ("per turn", None)):
        report.add(f"shared prefix / {name}", ratios(speed["shared prefix"], speed[name]), least=goal)


def same_steps(report: Report, settings: Settings, directory: str) -> None:
    """The same dialogues in each step with and without a shared prefix: equal losses, less time."""
    examples = training_examples(settings)
    shared, _ = pack_dialogues(examples, PackingConfig("shared_prefix", settings.max_length))
    plain = PackedDataset(shared.dialogues, shared.pack_items, [0] * len(shared), shared.loss_weights)
    order = list(itertools.islice(full_packs(shared.document_lengths, settings.max_length), settings.rounds + 1))
    sides = {
        packing: Steps(pack_trainer(random_model(settings.model, VARLEN_ATTENTION), packs, packing, directory), order)
        for packing, packs in {"shared_prefix": shared, "best_fit": plain}.items()
    }
    taken = side_by_side(sides, settings.rounds)
    report.section(
        "same dialogues a step",
        "Each step holds the dialogues of one shared-prefix pack; under best_fit each of them has its own prefix. "
        "Losses of consecutive optimizer steps from the same weights.",
        steps=len(order),
        learning_rate=LEARNING_RATE,
        max_length=settings.max_length,
        prefix=settings.prefix,
        threads=settings.threads,
        model=settings.model,
    )
    losses = {packing: steps.losses for packing, steps in sides.items()}
    for packing, each in losses.items():
        report.add(f"{packing}: losses", " ".join(f"{loss:.6f}" for loss in each))
    apart = max(abs(one - other) / other for one, other in zip(*losses.values(), strict=True))
    report.add("losses apart, relative", apart, most=1e-5)
    report.add("same trained tokens", sides["shared_prefix"].trained == sides["best_fit"].trained)
    report.add("time, best_fit / shared_prefix", ratios(taken["best_fit"], taken["shared_prefix"]))


# Exactness


def compiled(report: Report, settings: Settings, directory: str) -> None:
    """The same steps with compiled layers and without: equal losses, less time."""
    examples, length = training_examples(settings), settings.max_length
    sides = {}
    for name, packing in (("shared prefix", "shared_prefix"), ("plain packs", "best_fit")):
        packs, _ = pack_dialogues(examples, PackingConfig(packing, length))
        order = list(itertools.islice(full_packs(packs.document_lengths, length), settings.rounds + 1))
        for mode in ("off", "layers"):
            model = random_model(settings.model, VARLEN_ATTENTION)
            sides[name, mode] = Steps(pack_trainer(model, packs, packing, directory, compile=mode), order)
    torch.set_num_threads(1)
    taken = side_by_side(sides, settings.rounds, clock=time.process_time)
    torch.set_num_threads(settings.threads)
    report.section(
        "compiled layers",
        "CPU time of whole optimizer steps as in the section on training, with trainer.compile=off and layers, on one "
        "thread: what else the machine does hardly counts. Both sides take the same packs from the same weights; with "
        "layers, rows are padded to the longest pack. The first step, which compiles, is not counted.",
        learning_rate=LEARNING_RATE,
        max_length=length,
        prefix=settings.prefix,
        threads=1,
        model=settings.model,
    )
    for name in ("shared prefix", "plain packs"):
        eager, layers = sides[name, "off"], sides[name, "layers"]
        report.add(f"{name}: seconds a step, eager", spread(taken[name, "off"]))
        report.add(f"{name}: seconds a step, compiled", spread(taken[name, "layers"]))
        report.add(f"{name}: speed, compiled / eager", ratios(taken[name, "off"], taken[name, "layers"]), least=1.05)
        apart = max(abs(one - other) / other for one, other in zip(layers.losses, eager.losses, strict=True))
        report.add(f"{name}: losses apart, relative", apart, most=1e-5)


def exactness(report: Report, settings: Settings) -> None:
    """Hidden states of packs against those of the same dialogues one by one."""
    examples = training_examples(settings)
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", settings.max_length))
    number = next(iter(full_packs(packs.document_lengths, settings.max_length)))
    members = [examples[member.dialogue] for member in packs.pack_items[number]]
    report.section(
        "exactness",
        "Largest absolute difference of a hidden state behind the last layer from that of the separate dialogue, over "
        "one pack. TRL packs: what its collator makes of the same dialogues, with sdpa.",
        dialogues=len(members),
        max_length=settings.max_length,
        prefix=settings.prefix,
        model=settings.model,
    )
    plain = random_model(settings.model, "sdpa")
    ids = [torch.tensor(example.input_ids, dtype=torch.int64) for example in members]
    alone = [hidden(plain, {"input_ids": each[None]}) for each in ids]
    expected = torch.cat([alone[0][: settings.prefix], *(states[settings.prefix :] for states in alone)])
    states = hidden(random_model(settings.model, VARLEN_ATTENTION), PackCollator("varlen", pad_id=0)([packs[number]]))
    report.add("shared prefix", float((states - expected).abs().max()), most=1e-5)
    packed = {"input_ids": torch.cat(ids).tolist(), "seq_lengths": list(map(len, ids))}
    states = hidden(plain, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed]))
    report.add("TRL packs", float((states - torch.cat(alone)).abs().max()), most=1e-5)
    report.add("largest hidden state", float(expected.abs().max()))


@torch.no_grad()
def hidden(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """[length, hidden]: the last layer's states of a batch of one row."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
    return model.eval().model(**inputs, use_cache=False).last_hidden_state[0]


if __name__ == "__main__":
    main()
