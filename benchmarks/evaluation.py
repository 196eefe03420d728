"""How long scoring takes on one CPU core: lexical metrics of both profiles, intervals, tests.

python benchmarks/evaluation.py            # about a minute
python benchmarks/evaluation.py --quick    # on next to nothing, in seconds: the figures mean nothing

Prints each figure as it comes and writes benchmarks/results/evaluation.json.
"""

import argparse
import random
from pathlib import Path

import numpy
from measure import Report, seconds, side_by_side, spread

from csc_train.dialogue import Speaker
from csc_train.evaluation import lexical
from csc_train.evaluation.metrics import MetricsConfig, figures
from csc_train.evaluation.predictions import Prediction
from csc_train.evaluation.turns import Turns
from csc_train.evaluation.uncertainty import interval, sign_flip_test
from csc_train.synthesis.sample import generate_sample

TURNS = 24115
"""Supporter turns of CSConv's 1,855 conversations."""
EXCHANGES = 13


def main() -> None:
    """Measure every section and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="on next to nothing, in seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    options = parser.parse_args()
    turns = TURNS // 100 if options.quick else TURNS
    repeats = 1 if options.quick else 3
    report = Report({"quick": options.quick, "turns": turns, "repeats": repeats}, {})
    scoring(report, turns, repeats)
    report.write(options.output)
    print(f"\n{options.output}")


def scoring(report: Report, count: int, repeats: int) -> None:
    """Seconds from predictions to figures, to an interval and to a p-value."""
    one, other = made_up(count, seed=1), made_up(count, seed=2)
    lengths = [len(lexical.characters(text)) for each in one for text in (each.response, each.reference_response)]
    report.section(
        "scoring",
        "Each reply and each reference is one to three sentences of the sample grammar, joined at random. All lexical "
        "metrics: nltk BLEU and rouge_score's ROUGE-L of the profile `paper`, sacrebleu's BLEU and ROUGE-L on "
        "characters and words of the profile `zh`, ACC; each text segmented anew in each repeat. Interval: 1,000 "
        "resamples of dialogues of one figure, drawing them included. Test: 10,000 exchanges of one figure.",
        turns=count,
        dialogues=len({each.dialogue_id for each in one}),
        mean_characters=round(float(numpy.mean(lengths)), 1),
    )
    lexical.words("您好")  # loads the dictionary
    taken = side_by_side({"all": lambda: figures(Turns(one), MetricsConfig())}, repeats, warm_up=0)
    report.add("all lexical metrics of both profiles: seconds", spread(taken["all"]), most=40)
    turns = Turns(one)
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
        figures(each, MetricsConfig(profiles=["paper"]))["paper"]["B-4"].statistic for each in (turns, Turns(other))
    ]
    report.add("interval: first figure, seconds", seconds(lambda: interval(paper[0], turns.dialogue, 1000)))
    taken = side_by_side({"next": lambda: interval(paper[0], turns.dialogue, 1000)}, 5)
    report.add("interval: every other figure, seconds", spread(taken["next"]), most=0.1)
    taken = side_by_side({"test": lambda: sign_flip_test(*paper, turns.dialogue, 10_000)}, repeats, warm_up=0)
    report.add("sign-flip test: seconds", spread(taken["test"]))


def made_up(count: int, seed: int) -> list[Prediction]:
    """Predictions whose replies and references differ, hardly a text twice."""
    rng = random.Random(seed)
    sample = generate_sample(1000, seed=0)
    pool = [turn.text for each in sample for turn in each.turns if turn.speaker is Speaker.SUPPORTER]
    texts = random.Random(0)

    def text(source: random.Random) -> str:
        return "".join(source.choices(pool, k=source.randint(1, 3)))

    return [
        Prediction(
            dialogue_id=f"{number // EXCHANGES:05}",
            turn=number % EXCHANGES * 2,
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
