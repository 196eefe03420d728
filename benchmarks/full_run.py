"""Measure scoring and the HTML report of an evaluation of CSConv's size, beside another build.

python benchmarks/full_run.py CHECKOUT            # half an hour on two cores
python benchmarks/full_run.py CHECKOUT --quick    # a smoke test; its results mean nothing

1,855 dialogues of 13 supporter turns, two baselines, two models, both contexts. Each build scores the run in a process
of its own and writes its page; builds take turns. Each load of a page starts Chromium. Prints each result and writes
benchmarks/results/full_run.json.
"""

import argparse
import functools
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process of the other build imports its own
    from csc_train.data.dialogue import Dialogue

ROOT = Path(__file__).parent.parent
DIALOGUES, SUPPORTER_TURNS = 1855, 13
MODELS = ("untrained base", "trained")
CHARACTERS = {"customer": 20, "supporter": 35}
"""Mean characters of a turn: those of a dialogue of `rolecs_like_lengths.txt`, 752 tokens, over its 25 turns."""
MAX_BYTES, MAX_SECONDS = 2_000_000, 1.0
READY = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#list button")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.readyAt = performance.now(); }));
}).observe(document, { childList: true, subtree: true });
"""
"""Notes when the page's list of dialogues, which its script fills last, is painted: milliseconds since navigation."""


def main() -> None:
    """Compare, and write the report; or be one of the builds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="the other build")
    parser.add_argument("--rounds", type=int, default=3, help="how often each build scores the run")
    parser.add_argument("--loads", type=int, default=5, help="how often each page is loaded")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "full_run.json")
    parser.add_argument("--score", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        print(json.dumps(score(options.score)))
        return
    from measure import Report

    report = Report({"rounds": options.rounds, "loads": options.loads, "quick": options.quick}, {})
    with tempfile.TemporaryDirectory() as directory:
        builds = {"old": options.checkout.absolute(), "new": ROOT}
        runs = {name: Path(directory) / name for name in builds}
        write_run(runs["old"], 24 if options.quick else DIALOGUES)
        for name in ("new", "changed"):
            shutil.copytree(runs["old"], Path(directory) / name)
        compare_scoring(report, builds, runs, Path(directory) / "changed", options.rounds)
        compare_pages(report, runs, options.loads)
    report.write(options.output)


# --- the run ---


def write_run(directory: Path, count: int) -> None:
    """Write a run directory with dialogues and predictions, in fields that builds since 5fab51a read."""
    from csc_train.data.dialogue import Dialogue, Speaker, Turn
    from csc_train.data.readers import write_dialogues
    from csc_train.data.sample_grammar import generate_sample
    from csc_train.data.segmentation import segment_words
    from csc_train.data.strategies import STRATEGIES
    from csc_train.inference.baselines import StrategyBaseline
    from csc_train.inference.config import CONTEXTS
    from csc_train.inference.generator import generate_predictions
    from csc_train.inference.predictions import BASELINE_NAMES
    from csc_train.jsonl import write_jsonl

    sample = generate_sample(1000, seed=0)
    words = {
        speaker: [word for each in sample for turn in each.turns if turn.speaker is speaker
                  for word in segment_words(turn.text)]
        for speaker in Speaker
    }  # fmt: skip

    mean_words = {speaker: CHARACTERS[speaker.name.lower()] * len(found) / sum(map(len, found))
                  for speaker, found in words.items()}  # fmt: skip

    def text(rng: random.Random, speaker: Speaker) -> str:
        count = rng.randint(int(0.2 * mean_words[speaker]), int(1.8 * mean_words[speaker]))
        return "".join(rng.choices(words[speaker], k=count))

    rng = random.Random(0)
    dialogues = []
    for number in range(count):
        turns = []
        for _ in range(SUPPORTER_TURNS):
            turns.append(Turn(Speaker.SUPPORTER, text(rng, Speaker.SUPPORTER), rng.choice(STRATEGIES)))
            turns.append(Turn(Speaker.CUSTOMER, text(rng, Speaker.CUSTOMER)))
        dialogues.append(Dialogue(f"csconv-{number:05}", tuple(turns[:-1]), "random"))
    write_dialogues(directory / "dialogues.jsonl", dialogues)
    for name in (*BASELINE_NAMES, *MODELS):
        for context in CONTEXTS:
            if name in BASELINE_NAMES:
                baseline = StrategyBaseline(sample, BASELINE_NAMES.index(name))
                rows = map(vars, generate_predictions(dialogues, baseline, context))
            else:
                rows = model_predictions(name, context, dialogues, functools.partial(text, speaker=Speaker.SUPPORTER))
            kept = ("dialogue_id", "turn", "context", "prompt_hash", "raw_text", "strategy", "response",
                    "reference_strategy", "reference_response")  # fmt: skip
            path = directory / "predictions" / f"{name}-{context}.jsonl"
            write_jsonl(path, ({field: row[field] for field in kept} for row in rows))


def model_predictions(name: str, context: str, dialogues: list["Dialogue"], text: Any) -> Iterator[dict[str, Any]]:
    """Predictions with 60 % of the reference's strategies. The first turn's contexts are equal, so are its replies."""
    for dialogue in dialogues:
        for turn in dialogue.supporter_turns:
            gold = dialogue.turns[turn]
            assert gold.strategy
            rng = random.Random(f"{name} {dialogue.id} {turn} {context if turn else ''}")
            strategy = gold.strategy.number if rng.random() < 0.6 else rng.randint(1, 12)
            reply = text(rng)
            yield {
                "dialogue_id": dialogue.id, "turn": turn, "context": context, "prompt_hash": "", "raw_text": reply,
                "strategy": strategy, "response": reply, "reference_strategy": gold.strategy.number,
                "reference_response": gold.text,
            }  # fmt: skip


# --- scoring ---


def score(directory: Path) -> dict[str, Any]:
    """Score a run and write its report, by the build that this process imports.

    Returns:
        `commit`, and seconds by what took them: `scoring` and `page`, and `CPU scoring` of all threads.
    """
    try:
        html, tables = (importlib.import_module(f"csc_train.evaluation.report.{name}") for name in ("html", "tables"))
    except ModuleNotFoundError:  # as 5fab51a names them
        html, tables = (importlib.import_module(f"csc_train.evaluation.{name}") for name in ("html_report", "report"))
    scoring = importlib.import_module("csc_train.evaluation.scoring")
    config = importlib.import_module("csc_train.evaluation.config" if hasattr(html, "REPORT_FILE") else
                                     "csc_train.evaluation.metrics").MetricsConfig()  # fmt: skip
    started = time.perf_counter(), time.process_time()
    scored = scoring.score_run(directory, config)
    taken = time.perf_counter() - started[0], time.process_time() - started[1]
    tables.write_results(directory, scored.results, scored.drifts, {}, scored.contamination)
    settings = {"checkpoint": None, "predictions": "replies.jsonl", "llm": None, "data": None, "evaluation": {}}
    started = time.perf_counter()
    html.write_html(directory, scored, settings, {"started": "", "provenance": {"commit": "", "versions": {}}})
    return {"scoring": taken[0], "CPU scoring": taken[1], "page": time.perf_counter() - started}


def scored_by(checkout: Path, directory: Path) -> dict[str, Any]:
    """What `score` returns in a process of a build."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "benchmarks")))}
    command = [sys.executable, "-P", __file__, str(checkout), "--score", str(directory)]
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_scoring(report: Any, builds: dict[str, Path], runs: dict[str, Path], changed: Path, rounds: int) -> None:
    """Seconds of scoring, and that both builds come to the same numbers."""
    from measure import ratios, spread

    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
    for _ in range(rounds):
        for name, checkout in builds.items():
            taken[name].append(scored_by(checkout, runs[name]))
            print(f"  {name}: {taken[name][-1]}", file=sys.stderr, flush=True)
    commit = ["git", "-C", str(builds["old"]), "rev-parse", "HEAD"]
    report.section(
        "scoring",
        "The whole of `score_run`: reading, all metrics of the profiles `paper` and `zh` and of all sections, "
        "intervals, and the difference between the contexts. Two baselines of 12 replies, two models whose replies are "
        "random words of the sample grammar. Builds take turns, each time in a new process. Values: all numbers that "
        "both builds' results.json hold, intervals included. Control: the same after one character of one reply "
        "changed.",
        old=subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        turns=len((runs["new"] / "predictions" / "trained-reference.jsonl").read_text("utf-8").splitlines()),
        systems=4,
        contexts=2,
        rounds=rounds,
    )
    for kind in ("scoring", "CPU scoring", "page"):
        seconds = {name: [each[kind] for each in found] for name, found in taken.items()}
        for name in builds:
            report.add(f"{name}: {kind}, seconds", spread(seconds[name]))
        if kind != "page":
            report.add(f"old / new: {kind}", ratios(seconds["old"], seconds["new"]))
    ours = numbers(runs["new"])
    theirs = numbers(runs["old"])
    shared = ours.keys() & theirs.keys()
    report.add("values compared", len(shared))
    report.add("values that differ", sum(ours[key] != theirs[key] for key in shared), most=0)
    path = changed / "predictions" / "trained-reference.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    row = json.loads(lines[0])
    lines[0] = json.dumps(row | {"response": row["response"] + "嗯"}, ensure_ascii=False) + "\n"
    path.write_text("".join(lines), "utf-8")
    scored_by(builds["new"], changed)
    other = numbers(changed)
    report.add("control: values that differ", sum(ours[key] != other[key] for key in ours), least=1)


def numbers(directory: Path) -> dict[str, float | None]:
    """The numbers of `results.json` by their path in it."""
    found: dict[str, float | None] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{place}/{key}", each)
        elif value is None or isinstance(value, int | float):
            found[place] = value

    content = json.loads((directory / "results.json").read_text("utf-8"))
    walk("", {name: content[name] for name in ("results", "drift")})
    return found


# --- the page ---


def compare_pages(report: Any, runs: dict[str, Path], loads: int) -> None:
    """Bytes of the pages, and seconds until a browser has painted them whole."""
    from measure import ratios, spread
    from playwright.sync_api import sync_playwright

    taken: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    whole: list[float] = []
    with sync_playwright() as playwright:
        for _ in range(loads):
            for name, directory in runs.items():
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_page()
                page.set_default_timeout(900_000)
                page.add_init_script(READY)
                devtools = page.context.new_cdp_session(page)
                devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
                page.goto((directory / "report.html").as_uri(), wait_until="commit")
                page.wait_for_function("() => window.readyAt")
                taken[name].append(page.evaluate("window.readyAt") / 1000)
                figures = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
                cpu[name].append(figures["TaskDuration"])
                if name == "new" and page.locator("#load").is_visible():
                    started = time.perf_counter()
                    page.click("#load")
                    page.wait_for_selector("#load", state="hidden")
                    whole.append(time.perf_counter() - started)
                version = browser.version
                browser.close()
    report.section(
        "page",
        "`report.html` of that run, by the address file://. Seconds from navigation until the page is painted with its "
        "list of dialogues, which its script fills last; a new Chromium for each load, builds in turn. CPU seconds: of "
        "the page's main thread, by DevTools, which other processes lengthen little. All dialogues: from the click "
        "until the list shows them.",
        chromium=version,
        loads=loads,
    )
    for name, directory in runs.items():
        report.add(f"{name}: bytes", (directory / "report.html").stat().st_size,
                   most=MAX_BYTES if name == "new" else None)  # fmt: skip
        report.add(f"{name}: seconds", spread(taken[name]), most=MAX_SECONDS if name == "new" else None)
        report.add(f"{name}: CPU seconds", spread(cpu[name]))
    report.add("old / new: seconds", ratios(taken["old"], taken["new"]))
    if whole:
        report.add("new: bytes of report_dialogues.js", (runs["new"] / "report_dialogues.js").stat().st_size)
        report.add("new: all dialogues, seconds", spread(whole))


if __name__ == "__main__":
    main()
