"""Measure on a CPU how fast dialogues are read, encoded and searched for near-duplicates, and in how much memory.

python benchmarks/data.py                   # some ten minutes on two idle cores
python benchmarks/data.py --old CHECKOUT    # near-duplicates beside those of an older build, which needs datasketch
python benchmarks/data.py --quick           # a smoke test in seconds; its results mean nothing

Prints each result and writes benchmarks/results/data.json.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measure import SMALL_TOKENIZER, Report, ratios, side_by_side, spread
from packing import long_dialogues, published_tokenizer
from transformers import AutoTokenizer

from csc_train.data.dialogue import Dialogue
from csc_train.data.near_duplicates import NearDuplicateIndex
from csc_train.data.readers import iter_dialogues, read_dialogues, write_dialogues
from csc_train.files import read_json
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

TRAINING, EVALUATION = 11_232, 1_855
"""Dialogues of RoleCS and of CSConv."""
SECTIONS = ("duplicates", "encoding", "threads", "memory")
BATCHES = (200, 1000)
"""Texts of a call of the tokenizer alone."""
THRESHOLD = 0.8
"""The default of data.overlap_threshold."""


def main() -> None:
    """Run all sections and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="an older build, such as a worktree of 5fab51a")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each side")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data.json")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure only these")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    tokenizer = published_tokenizer() or SMALL_TOKENIZER
    template = DialogueTemplate(AutoTokenizer.from_pretrained(tokenizer), "qwen2_5", TemplateConfig())
    count, held_out = (40, 10) if options.quick else (TRAINING, EVALUATION)
    earlier = read_json(options.output)["sections"] if options.output.exists() else {}  # what is not measured is kept
    report = Report({"quick": options.quick, "rounds": options.rounds}, earlier)
    dialogues = long_dialogues(count + held_out)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "dialogues.jsonl"
        write_dialogues(file, dialogues[:count])
        measured = {
            "duplicates": lambda: near_duplicates(
                report, dialogues[:count], dialogues[count:], options.old, options.rounds
            ),
            "encoding": lambda: encoding(report, file, template, options.rounds),
            "threads": lambda: threads(report, file, template, tokenizer, options.rounds),
            "memory": lambda: memory(report, file, tokenizer, 2 if options.quick else 10),
        }
        for name in SECTIONS:
            if name in options.sections:
                measured[name]()
    report.write(options.output)
    print(f"\n{options.output}")


def near_duplicates(
    report: Report, training: list[Dialogue], evaluation: list[Dialogue], old: Path | None, rounds: int
) -> None:
    """The overlap check's search; one in eight evaluation dialogues nearly repeats one of training."""
    texts = [dialogue.text for dialogue in training]
    looked_for = [
        texts[number][20:] if number % 8 == 0 else dialogue.text for number, dialogue in enumerate(evaluation)
    ]
    found: dict[str, list] = {}

    def search(name: str, index: Any, prepare: Callable[[Any], Callable]) -> None:
        own = index(THRESHOLD)
        for text in texts:
            own.add(prepare(own)(text))
        found[name] = [[place for place, _ in own.matches(prepare(own)(text))] for text in looked_for]

    sides = {"new": functools.partial(search, "new", NearDuplicateIndex, lambda index: index.minhash)}
    if old:
        place = importlib.util.spec_from_file_location("old_near_duplicates", old / "csc_train" / "near_duplicates.py")
        assert place and place.loader
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        sides["old"] = functools.partial(search, "old", module.NearDuplicates, lambda index: index.sign)
    taken = side_by_side(sides, rounds, warm_up=0)
    report.section(
        "near duplicates",
        "Seconds to index the training texts and to search for those of the evaluation set, one core. Old: the module "
        "of commit 5fab51a. Texts of the sample grammar share sentences, so many pairs are compared exactly.",
        training=len(texts),
        evaluation=len(looked_for),
        threshold=THRESHOLD,
        load=round(os.getloadavg()[0], 1),
    )
    for name, each in taken.items():
        report.add(f"{name}: seconds", spread(each))
    report.add("pairs", sum(map(len, found["new"])))
    if old:
        report.add("new / old", ratios(taken["new"], taken["old"]), most=0.5)
        pairs = {
            name: {(n, place) for n, places in enumerate(each) for place in places} for name, each in found.items()
        }
        report.add(
            "pairs of both, percent of either",
            100 * len(pairs["new"] & pairs["old"]) / len(pairs["new"] | pairs["old"]),
        )


def encoding(report: Report, file: Path, template: DialogueTemplate, rounds: int) -> None:
    """Reading, checking and encoding beside the tokenizer alone, on one core."""
    dialogues = read_dialogues(file)
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
    backend: Any = getattr(template.tokenizer, "backend_tokenizer")  # noqa: B009

    def alone(size: int) -> None:
        for start in range(0, len(texts), size):
            backend.encode_batch_fast(texts[start : start + size], add_special_tokens=False)

    sides: dict[str, Callable[[], Any]] = {
        **{f"tokenizer alone, batches of {size:,}": functools.partial(alone, size) for size in BATCHES},
        "reading and checking": lambda: list(iter_dialogues(file)),
        "reading, checking and encoding": lambda: list(template.encode_all(iter_dialogues(file))),
    }
    taken = side_by_side(sides, rounds)
    report.section(
        "reading and encoding",
        "Seconds from a JSONL file to token ids and types, one core. Tokenizer alone: `encode_batch_fast` of the same "
        "texts; 1,000 is the batch of `datasets`, 200 about that of `encode_all`. "
        "TRL's preparation beside `encode_all` alone: packing.py, section preparation.",
        dialogues=len(dialogues),
        load=round(os.getloadavg()[0], 1),
    )
    for name, each in taken.items():
        report.add(f"{name}: seconds", spread(each))
    whole = taken["reading, checking and encoding"]
    for size in BATCHES:
        alone_taken = taken[f"tokenizer alone, batches of {size:,}"]
        report.add(f"all / tokenizer alone, batches of {size:,}", ratios(whole, alone_taken), most=1.25)


def threads(report: Report, file: Path, template: DialogueTemplate, tokenizer: str | Path, rounds: int) -> None:
    """Encoding into a cache entry by one thread and by two, beside processes that share nothing."""
    texts = [turn.text for dialogue in read_dialogues(file) for turn in dialogue.turns]
    taken: dict[int, list[float]] = {1: [], 2: []}
    apart: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in taken:
            apart[workers].append(encode_apart(template, texts, workers))
            taken[workers].append(prepare(file, tokenizer, workers)[0])
    report.section(
        "threads",
        "Seconds that recipes/prepare.py takes to encode dialogues into an entry of the cache, as it logs them, by one "
        "thread and by two (tokenization.num_workers), in turn. Apart: the tokenizer alone, on the same texts, by one "
        "process and by two that share nothing; one / two is what the cores allow.",
        dialogues=file.read_bytes().count(b"\n"),
        load=round(os.getloadavg()[0], 1),
    )
    for workers in taken:
        report.add(f"threads {workers}: seconds", spread(taken[workers]))
        report.add(f"apart {workers}: seconds", spread(apart[workers]))
    report.add("one / two", ratios(taken[1], taken[2]), least=1.8)
    report.add("one / two, apart", ratios(apart[1], apart[2]))


def encode_apart(template: DialogueTemplate, texts: list[str], count: int) -> float:
    """The seconds of `count` forked processes that each encode their share of the texts."""
    context = multiprocessing.get_context("fork")
    backend: Any = getattr(template.tokenizer, "backend_tokenizer")  # noqa: B009
    ready = context.Barrier(count + 1)

    def encode(own: list[str]) -> None:
        ready.wait()
        for start in range(0, len(own), BATCHES[0]):
            backend.encode_batch_fast(own[start : start + BATCHES[0]], add_special_tokens=False)

    processes = [context.Process(target=encode, args=(texts[number::count],)) for number in range(count)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - started


def memory(report: Report, file: Path, tokenizer: str | Path, times: int) -> None:
    """Peak memory of recipes/prepare.py on many dialogues."""
    many = file.with_name("many.jsonl")
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    with open(many, "w", encoding="utf-8") as output:
        for number in range(times):
            for line in lines:
                output.write(line.replace('"id": "', f'"id": "{number}-', 1) + "\n")
    _, resident, own = prepare(many, tokenizer, 1)
    report.section(
        "memory",
        "Peak memory of recipes/prepare.py with one process: reads and checks a JSONL file, searches it for the "
        "evaluation set's dialogues, encodes it into an entry of the cache and packs it. "
        "Resident memory counts libraries and the mapped entry, which the system may drop.",
        dialogues=times * len(lines),
    )
    report.add("GB, resident", resident / 1e9)
    report.add("GB, without mapped files", own / 1e9, most=1.5)


def prepare(file: Path, tokenizer: str | Path, workers: int) -> tuple[float, int, int]:
    """Run recipes/prepare.py with an empty cache: the seconds of its encoding, its peak of resident memory, and that
    without mapped files, in bytes."""
    recipe = Path(__file__).parent.parent / "recipes" / "prepare.py"
    with tempfile.TemporaryDirectory() as cache, open(Path(cache) / "log", "w+") as log:
        command = [
            sys.executable, str(recipe), "model=demo_qwen2", f"model.tokenizer={tokenizer}", "data=files",
            f"data.train.path={file}", f"tokenization.cache_dir={cache}/entries", f"tokenization.num_workers={workers}",
        ]  # fmt: skip
        started, resident, own = psutil.Popen(command, cwd=cache, stdout=log), 0, 0
        while started.poll() is None:
            used = started.memory_info()
            resident, own = max(resident, used.rss), max(own, used.rss - used.shared)
            time.sleep(0.05)
        log.seek(0)
        found = re.findall(r"dialogues encoded in ([\d.]+) s", log.read())
        if started.returncode or not found:
            raise SystemExit(f"{recipe.name} ended with status {started.returncode}")
        return float(found[0]), resident, own


if __name__ == "__main__":
    main()
