"""Measure the time of an evaluation on a GPU: generation in generated context, and BERTScore.

python benchmarks/evaluation_cuda.py       # one GPU with 80 GB, less than five minutes

First the demo's model in float32, whose tokens must equal those of one prompt at a time. Then a model with Qwen2.5-7B's
dimensions and random weights in bf16. Writes evaluation_cuda.json to the directory $OUT, or to benchmarks/results.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from evaluation import TURNS, demo, generation, synthetic_predictions
from measure import SHAPES, Report, random_model, seconds

from csc_train.evaluation.metrics import metric_models

SECTIONS = ("demo", "bertscore", "7b")


def main() -> None:
    """Run the sections and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--dialogues", type=int, default=512, help="dialogues of the demo's model")
    parser.add_argument("--large-dialogues", type=int, default=384, help="dialogues of the 7B")
    parser.add_argument("--batch", type=int, default=384, help="dialogues of the 7B at a time")
    parser.add_argument("--repeats", type=int, default=3)
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    parser.add_argument("--output", type=Path, default=folder / "evaluation_cuda.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("evaluation_cuda.py: needs a CUDA GPU, and torch finds none here: run evaluation.py on a CPU")
    transformers.logging.set_verbosity_error()
    report = Report({name: value for name, value in vars(options).items() if name != "output"}, {})

    template, architecture = demo()
    if "demo" in options.sections:
        model = random_model(architecture, "sdpa")
        generation(report, "generated context, demo", template, model, options.dialogues, 8, options.repeats)
        report.write(options.output)
    if "bertscore" in options.sections:
        bertscore(report)
        report.write(options.output)
    if "7b" in options.sections:
        model = random_model(SHAPES["7b"] | {"vocab_size": len(template.tokenizer)}, "sdpa", torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        name, count = "generated context, 7b", options.large_dialogues
        generation(report, name, template, model, count, 2, options.repeats, options.batch)
        report.add("peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)
        report.write(options.output)
    print(f"\n{options.output}")


def bertscore(report: Report) -> None:
    """Time BERTScore on as many pairs as CSConv has, with a model of bert-base's dimensions."""
    pairs = [(each.response, each.reference_response) for each in synthetic_predictions(TURNS, seed=1)]
    report.section(
        "BERTScore",
        "A BERT with bert-base-chinese's dimensions, random weights and a vocabulary of all characters in the texts.",
        turns=TURNS,
    )
    with tempfile.TemporaryDirectory() as directory:
        characters = sorted({character for pair in pairs for text in pair for character in text})
        vocabulary = Path(directory) / "vocab.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), encoding="utf-8")
        transformers.BertTokenizer(str(vocabulary), model_max_length=512).save_pretrained(directory)
        transformers.set_seed(0)
        transformers.BertModel(transformers.BertConfig(vocab_size=5 + len(characters))).save_pretrained(directory)
        taken = seconds(lambda: metric_models.bertscore(pairs, directory, 8, 256))
    report.add("all pairs: seconds", taken)


if __name__ == "__main__":
    main()
