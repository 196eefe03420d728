"""Helpers of the benchmarks: dialogues with RoleCS-like lengths, optimizer steps of any trainer, timing, report.

The lengths file holds token counts of 11,232 dialogues by the Qwen2.5 tokenizer, with 568 of the system prompt in each.
It has no turns. Each dialogue is taken to have 13 exchanges of equal length, half of each by the supporter.
"""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer

from csc_train.files import write_json, write_text
from csc_train.models.config import AdapterConfig
from csc_train.packing.collator import IGNORE_INDEX
from csc_train.packing.dataset import PackedDataset
from csc_train.runs.provenance import provenance
from csc_train.template.dialogue_template import TokenizedDialogue, TokenType
from csc_train.training.config import TrainerConfig
from csc_train.training.trainer import PackTrainer, build_trainer, training_arguments

ROOT = Path(__file__).parent.parent
LENGTHS = Path(__file__).parent / "rolecs_like_lengths.txt"
SMALL_TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "qwen2"
PREFIX = 568
"""Tokens of the system prompt, with what the chat template puts around it, in each of the lengths."""
LEARNING_RATE = 1e-3
"""High, so that each step changes the next one's loss."""
EXCHANGES = 13
"""Supporter turns of a dialogue."""
SHAPES = {
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
}
"""The published dimensions of Qwen2.5."""
HYBRID_SHAPE = {
    "model_type": "qwen3_5_text",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 3584,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
"""Those of Qwen3.5-0.8B's text model."""
EXPERT_SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
"""Those of Qwen3-30B-A3B with a quarter of its layers."""


# Dialogues


def body_lengths(count: int | None = None, divisor: int = 1) -> numpy.ndarray:
    """int64 [dialogues]: lengths behind the prefix, of all dialogues or a seeded choice of `count`.

    Args:
        divisor: by how much to shorten them, for a quick run.
    """
    lengths = numpy.loadtxt(LENGTHS, dtype=numpy.int64) - PREFIX
    if count is not None:
        lengths = numpy.random.default_rng(0).choice(lengths, count, replace=False)
    return lengths // divisor


def turn_ends(bodies: numpy.ndarray) -> numpy.ndarray:
    """int64 [dialogues, EXCHANGES]: the tokens of a body up to the end of each supporter turn."""
    return bodies[:, None] * numpy.arange(1, EXCHANGES + 1) // EXCHANGES


def random_examples(bodies: Iterable[int], prefix: int, vocabulary: int) -> list[TokenizedDialogue]:
    """Encoded dialogues of these lengths, of random ids, behind one prefix; the second half of each exchange is
    trained."""
    rng = numpy.random.default_rng(0)
    shared = rng.integers(vocabulary, size=prefix)
    examples = []
    for body in bodies:
        turn_offsets = prefix + body * numpy.arange(2 * EXCHANGES + 1) // (2 * EXCHANGES)
        token_types = numpy.zeros(prefix + body, numpy.uint8)
        for start, end in zip(turn_offsets[1::2], turn_offsets[2::2], strict=True):
            token_types[start:end] = TokenType.REPLY
        ids = numpy.concatenate([shared, rng.integers(vocabulary, size=body)]).astype(numpy.int32)
        strategies = numpy.tile(numpy.array([0, 1], numpy.uint8), EXCHANGES)
        examples.append(TokenizedDialogue(ids, token_types, turn_offsets.astype(numpy.int32), strategies))
    return examples


def turn_samples(examples: Iterable[TokenizedDialogue]) -> list[TokenizedDialogue]:
    """One sample per supporter turn: the turns before it as context, and the turn itself trained."""
    samples = []
    for example in examples:
        for turn in range(1, len(example.turn_offsets), 2):
            start, end = example.turn_offsets[turn], example.turn_offsets[turn + 1]
            token_types = numpy.where(numpy.arange(end) < start, TokenType.CONTEXT, example.token_types[:end]).astype(
                numpy.uint8
            )
            samples.append(
                TokenizedDialogue(
                    example.input_ids[:end],
                    token_types,
                    example.turn_offsets[: turn + 2],
                    example.strategies[: turn + 1],
                )
            )
    return samples


# Trainers


def random_model(architecture: dict[str, Any], attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of these dimensions (a Qwen2 unless they name another type), with seeded random weights, on this
    machine's device."""
    transformers.set_seed(0)
    config = AutoConfig.for_model(**{"model_type": "qwen2"} | architecture)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def pack_trainer(
    model: PreTrainedModel,
    packs: PackedDataset,
    packing: str,
    directory: str,
    adapter: AdapterConfig | None = None,
    **options: Any,
) -> PackTrainer:
    """Our trainer, one pack per step, without checkpointing; `options` go to `TrainerConfig`."""
    config = TrainerConfig(
        **{"learning_rate": LEARNING_RATE, "packs_per_step": 1, "gradient_checkpointing": "off"} | options
    )
    return build_trainer(
        model,
        AutoTokenizer.from_pretrained(SMALL_TOKENIZER),
        packs,
        packing=packing,
        arguments=training_arguments(config, Path(directory), processes=1),
        adapter=adapter or AdapterConfig(),
    )


def trl_trainer(
    model: PreTrainedModel,
    examples: Iterable[TokenizedDialogue],
    max_length: int,
    directory: str,
    peft_config: Any = None,
    **options: Any,
) -> SFTTrainer:
    """TRL's own trainer with its own collator and, unless `options` of `SFTConfig` change that, its own packing, one
    pack a step."""
    rows = [(each.input_ids, numpy.where(each.trained, each.input_ids, IGNORE_INDEX)) for each in examples]
    dataset = datasets.Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [each for _, each in rows]})
    defaults = {
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 1,
        "activation_checkpointing": False,
    }
    arguments = SFTConfig(
        output_dir=directory,
        max_length=max_length,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        **defaults | options,
    )
    tokenizer = AutoTokenizer.from_pretrained(SMALL_TOKENIZER)
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
    if arguments.activation_checkpointing:  # a whole training switches it on; `Steps` takes single steps
        adapted: Any = trainer.model
        adapted.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
    return trainer


def full_packs(lengths: Sequence[Sequence[int]], max_length: int) -> Iterator[int]:
    """Numbers of the packs that are at least nine tenths full, in a seeded order, over and over.

    Args:
        lengths: by pack, those of its documents.
    """
    full = [number for number, pack in enumerate(lengths) if sum(pack) >= 0.9 * max_length]
    return itertools.cycle(numpy.random.default_rng(0).permutation(full).tolist())


class Steps:
    """Whole optimizer steps of a trainer, ours or TRL's: collation, forward, backward, clip, update."""

    def __init__(self, trainer: Trainer, order: Iterable[int], size: int = 1):
        """Prepare the trainer; no step is taken yet.

        Args:
            order: which items of the trainer's dataset, packs or dialogues, in turn.
            size: how many of them are a step's batch.
        """
        self.trainer, self.order, self.size = trainer, iter(order), size
        self.packs = getattr(trainer, "packs", trainer.train_dataset)
        trainer.current_gradient_accumulation_steps = 1  # pyright: ignore[reportAttributeAccessIssue]
        self.taken: list[int] = []
        """The items of all steps."""
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        self.trained: list[int] = []
        """Of each step, the tokens that were trained."""
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Take one step."""
        trainer = self.trainer
        numbers = list(itertools.islice(self.order, self.size))
        self.taken += numbers
        batch = trainer.data_collator([self.packs[number] for number in numbers])
        self.trained.append(int((batch["labels"] != IGNORE_INDEX).sum()))
        device = trainer.args.device
        [batch], total = trainer.get_batch_samples(iter([batch]), 1, device)
        loss = trainer.training_step(self.model, batch, total)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


# Timing


def seconds(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long an action takes; on a GPU, until it is done there."""
    started = clock()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def side_by_side(
    actions: dict[Any, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds of each action in each round. In a round all take their turn, so that what else the machine does falls
    on all of them; rounds that warm up are not counted."""
    taken: dict[Any, list[float]] = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            each = seconds(action, clock)
            if number >= warm_up:
                taken[name].append(each)
    return taken


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, least and most of repeats."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "repeats": len(values)}


def ratios(above: Iterable[float], below: Iterable[float]) -> dict[str, Any]:
    """The spread of the ratio of two sides, round by round."""
    return spread(one / other for one, other in zip(above, below, strict=True))


# Report


class Report:
    """Results by section: printed at once, and written as JSON with their settings, versions and machine."""

    def __init__(self, settings: dict[str, Any], sections: dict[str, Any], gpu: str | None = None):
        """Begin a report.

        Args:
            settings: the arguments of the script.
            sections: those of an earlier report; sections that are not measured again are kept.
            gpu: its name, where this process must not ask; defaults to what torch says.
        """
        self.settings, self.sections, self.gpu = settings, sections, gpu
        self.results: dict[str, Any] = {}

    def section(self, name: str, how: str, **settings: Any) -> None:
        """Begin a section.

        Args:
            how: the method and its assumptions.
            settings: the settings that decide the results.
        """
        self.results = {}
        self.sections[name] = {
            "how": how,
            "settings": settings,
            "provenance": provenance(),
            "machine": machine(self.gpu),
            "results": self.results,
        }
        shown = ", ".join(f"{key}={value}" for key, value in settings.items() if not isinstance(value, dict))
        print(f"\n{name}: {shown}", flush=True)

    def add(self, name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
        """Record a result: a number, a flag, a note, or a `spread`; goals apply to the median."""
        result = value if isinstance(value, dict) else {"value": value}
        middle = result.get("median", result.get("value"))
        for bound, word, met in (
            (least, "at least", least is not None and middle >= least),
            (most, "at most", most is not None and middle <= most),
        ):
            if bound is not None:
                result = result | {"goal": f"{word} {bound}", "met": bool(met)}
        self.results[name] = result
        print(f"  {name:<58} {'  '.join(filter(None, columns(result)))}", flush=True)

    def write(self, path: Path) -> None:
        """Write all sections to `path`, and as tables to the `.md` file beside it."""
        write_json(path, {"settings": self.settings, "sections": self.sections})
        lines = []
        for name, section in self.sections.items():
            origin = section["provenance"]
            commit = f"{(origin['commit'] or 'unknown')[:12]}{' with changes' if origin['dirty'] else ''}"
            machine = ", ".join(filter(None, (f"{section['machine']['cores']} cores", section["machine"]["gpu"])))
            lines += [f"## {name}", "", section["how"], f"Measured at {commit}, {machine}."]
            lines += ["", "| result | value | low to high | goal |", "|---|---|---|---|"]
            lines += [f"| {label} | {' | '.join(columns(result))} |" for label, result in section["results"].items()]
            lines += [""]
        write_text(path.with_suffix(".md"), "\n".join(lines))


def columns(result: dict[str, Any]) -> tuple[str, str, str]:
    """A result as text: its value or median, its spread, and its goal."""
    between = f"{show(result['low'])} to {show(result['high'])} ({result['repeats']})" if "median" in result else ""
    goal = f"{result['goal']}: {'met' if result['met'] else 'MISSED'}" if "goal" in result else ""
    return show(result.get("median", result.get("value"))), between, goal


def show(value: Any) -> str:
    """A result as text: large numbers whole, small ones to four digits."""
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.4g}"


def machine(gpu: str | None = None) -> dict[str, Any]:
    """The machine of the measurement.

    Args:
        gpu: its name; defaults to what torch says.
    """
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
