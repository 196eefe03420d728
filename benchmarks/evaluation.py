"""Measure the time of an evaluation on a CPU: generation in generated context, and scoring.

python benchmarks/evaluation.py            # a few minutes
python benchmarks/evaluation.py --quick    # a smoke test in seconds; its results mean nothing

Prints each result and writes benchmarks/results/evaluation.json.
"""

import argparse
import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy
from generators import MAX_NEW_TOKENS, SequentialGenerator, WithoutLikelihoods, prepared
from measure import Report, random_model, ratios, seconds, side_by_side, spread
from transformers import PreTrainedModel

from csc_train.config.compose import compose, to_container
from csc_train.data.dialogue import Speaker
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.segmentation import segment_words
from csc_train.evaluation import table
from csc_train.evaluation.config import EvaluationConfig, MetricsConfig
from csc_train.evaluation.metrics import lexical
from csc_train.evaluation.metrics.registry import compute_metrics
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import HFGenerator
from csc_train.inference.predictions import Prediction
from csc_train.runs.distributed import distributed_state
from csc_train.stats import bootstrap_interval, sign_flip_test
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.tokenizer_training import get_tokenizer

TURNS = 24115
"""Supporter turns of CSConv's 1,855 conversations."""
TURNS_PER_DIALOGUE = 13
"""Supporter turns of a synthetic dialogue."""
BATCH_SIZE = 128
DIMENSIONS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "initializer_range",
)  # fmt: skip
"""Model settings that the report records."""


def main() -> None:
    """Run all sections and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    options = parser.parse_args()
    turns = TURNS // 100 if options.quick else TURNS
    repeats = 1 if options.quick else 3
    dialogues, compared = (4, 2) if options.quick else (512, 8)
    report = Report({"quick": options.quick, "turns": turns, "dialogues": dialogues, "repeats": repeats}, {})
    template, architecture = demo()
    model = random_model(architecture, "sdpa")
    generation(report, "generated context", template, model, dialogues, compared, repeats)
    scoring(report, turns, repeats)
    report.write(options.output)
    print(f"\n{options.output}")


def demo() -> tuple[DialogueTemplate, dict[str, Any]]:
    """The demo's template, with a tokenizer trained as in the demo, and its model's dimensions."""
    config = compose("sft", ["experiment=demo"])
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = get_tokenizer(
            config.model,
            config.template,
            generate_sample(700, seed=0),
            Path(directory) / "tokenizer",
            distributed_state(),
        )
    architecture = {key: value for key, value in to_container(config)["model"]["architecture"].items() if value}
    del architecture["model_type"]
    # A wide initialization, so that replies depend on the prompt.
    return DialogueTemplate(tokenizer, config.model.chat_template, config.template), architecture | {
        "vocab_size": len(tokenizer), "initializer_range": 0.3,
    }  # fmt: skip


def generation(
    report: Report,
    name: str,
    template: DialogueTemplate,
    model: PreTrainedModel,
    count: int,
    compared: int,
    repeats: int,
    batch: int = BATCH_SIZE,
    goal: float | None = 10,
) -> None:
    """Compare batched generation with a cache to one prompt at a time without one, in generated context."""
    dialogues = generate_sample(count, seed=0)
    words = len(template.tokenizer)
    model.eval().generation_config.eos_token_id = random.Random(0).sample(range(256, words), words // 10)
    settings = EvaluationConfig(batch_size=batch, max_new_tokens=MAX_NEW_TOKENS)
    generators = {"alone": SequentialGenerator, "together": WithoutLikelihoods, "with likelihoods": HFGenerator}
    ours = prepared(model)
    generators = {
        name: kind(model if name == "alone" else ours, template, settings) for name, kind in generators.items()
    }
    few = dialogues[:compared]
    predictions = {}

    def side(name: str) -> None:
        predictions[name] = generate_predictions(few if name == "alone" else dialogues, generators[name], "generated")

    taken = side_by_side({name: functools.partial(side, name) for name in generators}, repeats, warm_up=0)
    ids = {name: {each.key: each.token_ids for each in some} for name, some in predictions.items()}
    lengths = [len(each) for each in ids["together"].values()]
    report.section(
        name,
        "Sample dialogues with the demo's tokenizer. The model has random weights and stops at any of a tenth of its "
        "tokens, so that replies vary in length. Alone: `generate`, one prompt at a time, without a cache between "
        "turns; timed on the first dialogues. Together: batches of dialogues with a cache that is kept from turn to "
        "turn.",
        dialogues=count,
        alone=compared,
        batch=batch,
        turns=len(ids["together"]),
        prompt=len(template.prefix_ids),
        model={key: getattr(model.config, key) for key in DIMENSIONS},
        dtype=str(model.dtype),
        mean_generated=round(float(numpy.mean(lengths)), 1),
        lengths=f"{min(lengths)} to {max(lengths)}",
    )
    per_turn = {name: [each / len(ids[name]) for each in times] for name, times in taken.items()}
    for side_name, times in per_turn.items():
        report.add(f"{side_name}: milliseconds a turn", spread(1000 * each for each in times))
    report.add("alone / together", ratios(per_turn["alone"], per_turn["together"]), least=goal)
    report.add("alone / with likelihoods", ratios(per_turn["alone"], per_turn["with likelihoods"]))
    same = [ids["together"][turn] == own for turn, own in ids["alone"].items()]
    report.add("tokens equal", all(same))
    if not all(same):
        report.add("turns with equal tokens, percent", 100 * sum(same) / len(same))


def scoring(report: Report, count: int, repeats: int) -> None:
    """Time metrics, intervals and tests on synthetic predictions."""
    one, other = synthetic_predictions(count, seed=1), synthetic_predictions(count, seed=2)
    lengths = [len(lexical.characters(text)) for each in one for text in (each.response, each.reference_response)]
    report.section(
        "scoring",
        "Each reply and reference joins one to three random sentences of the sample grammar. All lexical metrics: "
        "nltk BLEU and rouge_score's ROUGE-L of profile `paper`; sacrebleu's BLEU and ROUGE-L on characters and words "
        "of profile `zh`; ACC. Each repeat segments all texts. Interval: 1,000 bootstrap samples of dialogues for one "
        "metric, drawing included. Test: 10,000 permutations for one metric.",
        turns=count,
        dialogues=len({each.dialogue_id for each in one}),
        mean_characters=round(float(numpy.mean(lengths)), 1),
    )
    segment_words("您好")  # loads the dictionary

    def all_metrics() -> None:
        lexical._sacrebleu_zh.cache_clear()
        compute_metrics(table.PredictionTable(one), MetricsConfig(), ("paper", "zh"))

    taken = side_by_side({"all": all_metrics}, repeats, warm_up=0)
    report.add("all lexical metrics of both profiles: seconds", spread(taken["all"]), most=40)
    turns = table.PredictionTable(one)
    lexical._sacrebleu_zh.cache_clear()
    for name, action in {
        "segmentation": lambda: turns.words,
        "nltk sentence BLEU": lambda: lexical.sentence_bleu(turns.words),
        "sacrebleu counts": lambda: lexical.corpus_bleu_zh_counts(turns.pairs),
        "ROUGE-L, words": lambda: lexical.rouge_l(turns.words),
        "ROUGE-L, characters": lambda: lexical.rouge_l(turns.pairs),
        "ROUGE-L, digits and Latin": lambda: lexical.rouge_l_latin(turns.pairs),
    }.items():
        report.add(f"{name}: seconds", seconds(action))
    paper = [
        compute_metrics(each, MetricsConfig(), ["paper"])["paper"]["B-4"].statistic
        for each in (turns, table.PredictionTable(other))
    ]
    report.add("interval: first metric, seconds", seconds(lambda: bootstrap_interval(paper[0], turns.dialogue, 1000)))
    taken = side_by_side({"next": lambda: bootstrap_interval(paper[0], turns.dialogue, 1000)}, 5)
    report.add("interval: every other metric, seconds", spread(taken["next"]), most=0.1)
    taken = side_by_side(
        {"test": lambda: sign_flip_test(paper[0], paper[1], turns.dialogue, 10_000)}, repeats, warm_up=0
    )
    report.add("sign-flip test: seconds", spread(taken["test"]))


def synthetic_predictions(count: int, seed: int) -> list[Prediction]:
    """Predictions with random replies and references, nearly all distinct."""
    rng = random.Random(seed)
    sample = generate_sample(1000, seed=0)
    pool = [turn.text for each in sample for turn in each.turns if turn.speaker is Speaker.SUPPORTER]
    texts = random.Random(0)

    def text(source: random.Random) -> str:
        return "".join(source.choices(pool, k=source.randint(1, 3)))

    return [
        Prediction(
            dialogue_id=f"{number // TURNS_PER_DIALOGUE:05}",
            turn=number % TURNS_PER_DIALOGUE * 2,
            context="reference",
            prompt_hash="",
            raw_text="",
            strategy=rng.randint(1, 12),
            response=text(rng),
            reference_strategy=texts.randint(1, 12),
            reference_response=text(texts),
        )
        for number in range(count)
    ]


if __name__ == "__main__":
    main()
