"""Measure a real pretrained model on a CPU: LoRA training beside TRL's, and evaluation in generated context.

make demo-pretrained && python benchmarks/pretrained.py    # half an hour on two cores
python benchmarks/pretrained.py --quick                    # two layers and short packs: a smoke test in seconds
python benchmarks/pretrained.py --sections "evaluation in bf16"   # only this section; the results of the others stay

Prints each result and writes benchmarks/results/pretrained.json. The compared sides take turns in one process.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
import transformers
from generators import MAX_NEW_TOKENS, SequentialGenerator, WithoutLikelihoods, prepared
from measure import Report, Steps, full_packs, pack_trainer, ratios, side_by_side, spread, trl_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

from csc_train.data.sample_grammar import generate_sample
from csc_train.evaluation.config import EvaluationConfig
from csc_train.files import read_json
from csc_train.inference.generator import generate_predictions
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.models.config import AdapterConfig
from csc_train.models.gguf import DIRECTORY
from csc_train.models.loading import lora_config
from csc_train.models.tokenizer import load_tokenizer
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

CAPACITIES = (2048, 4096, 8192)
SHORT = 1024
"""Tokens of a pack in a quick run, in the place of the first of `CAPACITIES`."""
GOALS = {2048: 1.6, 8192: 4.0}
"""Trained tokens a second over TRL's."""
DTYPES = {"evaluation in fp32": torch.float32, "evaluation in bf16": torch.bfloat16}
"""The demo's evaluation is in bf16, the dtype of its model; in fp32, a reply does not depend on its batch."""
SECTIONS = (*(f"training at {capacity:,}" for capacity in CAPACITIES), *DTYPES)
ADAPTER = AdapterConfig("lora")


def main() -> None:
    """Measure every section and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers and short packs, in seconds")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="the pretrained model, a directory")
    parser.add_argument("--trained", type=Path, default=Path("runs/demo_pretrained/model"), help="what is evaluated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps, or evaluations, of each side")
    parser.add_argument("--cpu-time", action="store_true", help="time by CPU seconds, on a machine that does more")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pretrained.json")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="measure these again, keep the others' results")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = Report(settings, read_json(options.output)["sections"] if options.sections else {})
    tokenizer = load_tokenizer(str(options.model))
    template = DialogueTemplate(tokenizer, read_template(options.model), TemplateConfig(language="en"))
    for name, capacity in zip(SECTIONS, CAPACITIES, strict=False):
        if name in (options.sections or SECTIONS) and not (options.quick and capacity > CAPACITIES[0]):
            training(report, name, options, template, capacity)
    for name, dtype in DTYPES.items():
        if name in (options.sections or SECTIONS):
            evaluation(report, name, options, template, dtype)
    report.write(options.output)
    print(f"\n{options.output}")


def read_template(directory: Path) -> str:
    """The chat template of a model directory, as `DialogueTemplate` takes it."""
    return str(directory / "chat_template.jinja")


def load(
    directory: Path, options: argparse.Namespace, attention: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a directory, of two layers in a quick run."""
    layers = {"num_hidden_layers": 2} if options.quick else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention, **layers)


def training(report: Report, name: str, options: argparse.Namespace, template: DialogueTemplate, capacity: int) -> None:
    """Trained tokens a second of whole optimizer steps, one pack a step."""
    length = SHORT if options.quick else capacity
    checkpointing = capacity > CAPACITIES[0]
    examples = list(template.encode_all(generate_sample(20 if options.quick else 400, seed=0, language="en")))
    packs, _ = pack_dialogues(examples, PackingConfig("shared_prefix", length))
    with tempfile.TemporaryDirectory() as directory:
        ours = pack_trainer(
            load(options.model, options, VARLEN_ATTENTION),
            packs,
            "shared_prefix",
            directory,
            adapter=ADAPTER,
            gradient_checkpointing="full" if checkpointing else "off",
        )
        model = load(options.model, options, "sdpa")
        theirs = trl_trainer(
            model,
            examples,
            length,
            directory,
            peft_config=lora_config(ADAPTER, model),
            learning_rate=ours.args.learning_rate,
            activation_checkpointing=checkpointing,
        )
        sides = {
            "ours": Steps(ours, full_packs(packs.document_lengths, length)),
            "TRL": Steps(theirs, full_packs(theirs.train_dataset["seq_lengths"], length)),
        }
        taken = side_by_side(sides, 1 if options.quick else options.rounds, clock=clock(options))
    report.section(
        name,
        "LoRA on a pretrained SmolLM2-135M-Instruct: trained tokens a second of whole optimizer steps (collation, "
        "forward, backward, clipping, AdamW) of one pack, in fp32. English sample dialogues; the supporter's turns are "
        "trained. Ours: shared prefix, attention by document. TRL: SFTTrainer, packing=True, bfd, its own collator, "
        "sdpa with the mask that transformers derives from the positions. Activation checkpointing as said, on both "
        "sides. Packs under nine tenths full are left out on both sides.",
        max_length=length,
        prompt_ids=len(template.prefix_ids),
        threads=options.threads,
        rounds=options.rounds,
        seconds_of="CPU" if options.cpu_time else "wall",
        checkpointing=checkpointing,
        rank=ADAPTER.rank,
        layers=model.config.num_hidden_layers,
    )
    speed = {
        side: [count / each for count, each in zip(steps.trained[1:], taken[side], strict=True)]
        for side, steps in sides.items()
    }
    for side, each in speed.items():
        report.add(f"{side}: trained tokens/s", spread(each))
        report.add(f"{side}: seconds a step", spread(taken[side]))
        report.add(f"{side}: trained tokens a step", int(numpy.median(sides[side].trained)))
        report.add(f"{side}: first loss", sides[side].losses[0])
    report.add("ours / TRL", ratios(speed["ours"], speed["TRL"]), least=None if options.quick else GOALS.get(capacity))


def evaluation(
    report: Report, name: str, options: argparse.Namespace, template: DialogueTemplate, dtype: torch.dtype
) -> None:
    """Turns a second in generated context, beside one prompt at a time by `generate`."""
    count, compared, repeats = (4, 1, 1) if options.quick else (128, 4, options.rounds)
    dialogues = generate_sample(count, seed=1, language="en")
    model: Any = load(options.trained, options, "sdpa", dtype)
    settings = EvaluationConfig(batch_size=64, max_new_tokens=MAX_NEW_TOKENS)
    generators = {
        "alone": SequentialGenerator(model, template, settings),
        "together": WithoutLikelihoods(prepared(model), template, settings),
    }
    predictions: dict[str, list] = {}

    def take(side: str) -> None:
        some = dialogues[:compared] if side == "alone" else dialogues
        predictions[side] = generate_predictions(some, generators[side], "generated")

    actions = {side: partial(take, side) for side in generators}
    taken = side_by_side(actions, repeats, warm_up=0, clock=clock(options))
    ids = {side: {each.key: each.token_ids for each in some} for side, some in predictions.items()}
    report.section(
        name,
        "Generated context. Alone: `generate`, one prompt at a time, its cache not kept from "
        "turn to turn; timed on the first dialogues. Together: batches of dialogues with a cache that is kept, and in "
        "fp32 oneDNN for the linear layers, which `generate` does not take.",
        dialogues=count,
        alone=compared,
        batch=settings.batch_size,
        turns=len(ids["together"]),
        prompt_ids=len(template.prefix_ids),
        max_new_tokens=MAX_NEW_TOKENS,
        mean_generated=round(float(numpy.mean([len(each) for each in ids["together"].values()])), 1),
        threads=options.threads,
        rounds=options.rounds,
        seconds_of="CPU" if options.cpu_time else "wall",
        layers=model.config.num_hidden_layers,
    )
    per_turn = {side: [each / len(ids[side]) for each in times] for side, times in taken.items()}
    for side, times in per_turn.items():
        report.add(f"{side}: milliseconds a turn", spread(1000 * each for each in times))
    goal = None if options.quick else 12
    report.add("alone / together", ratios(per_turn["alone"], per_turn["together"]), least=goal)
    same = [ids["together"][turn] == own for turn, own in ids["alone"].items()]
    report.add("turns with equal tokens, percent", 100 * sum(same) / len(same))


def clock(options: argparse.Namespace) -> Any:
    """The clock of a run."""
    return time.process_time if options.cpu_time else time.perf_counter


if __name__ == "__main__":
    main()
